"""Peak memory of reading and writing weights: one JSON line a measurement.

  python benchmarks/weights_memory.py --preset tglobal-large --folder /tmp/w
  python benchmarks/weights_memory.py --preset tglobal-xl --folder /tmp/w

Makes a Hugging Face folder of random numbers under --folder, as large as the
model, and works on it in processes of their own. `ratio` is the peak of all
that the process has in memory, over the model's size; `before_gb` of it are
Python and the libraries.
Parameters are on the CPU, so `load` and `save` hold the model itself; `convert`
goes from file to file. Linux only.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
ACTIONS = ('load', 'load_stacked', 'save', 'convert_to_hf', 'convert_to_orbax',
           'load_orbax')


def abstract_params(preset, stacked=False):
  import jax
  import jax.numpy as jnp

  from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
  config = LongT5Config.preset(preset)
  ids = jnp.ones((1, 1), jnp.int32)
  model = LongT5ForConditionalGeneration(config, scan_layers=stacked)
  return config, jax.eval_shape(
      lambda: model.init(jax.random.key(0), ids, ids))['params']


def make_file(preset, folder):
  """Random numbers, one tensor at a time."""
  import numpy as np

  from longt5_flax.interop.huggingface import save_pretrained
  from longt5_flax.interop.tensors import ParamTensors

  class Random(ParamTensors):

    def read(self, name, index=None):
      return np.random.default_rng(len(name)).random(
          self.shapes[name], np.float32)

  config, params = abstract_params(preset)
  # One file, the harder case.
  save_pretrained(folder, config, Random(params, config),
                  max_shard_bytes=10**12)


def act(action, preset, folder):
  """What is measured; returns the peak before it."""
  import jax
  import orbax.checkpoint  # noqa: F401

  from longt5_flax.convert import convert
  from longt5_flax.interop.huggingface import save_pretrained
  from longt5_flax.interop.open import open_tensors
  from longt5_flax.interop.tensors import load_params
  jax.devices()
  before = peak_bytes()
  source, target = f'{folder}/source', f'{folder}/target'
  if action.startswith('convert_to_'):
    kind = action.removeprefix('convert_to_')
    convert(f'hf:{source}', f'{kind}:{target}')
    if kind == 'orbax':
      os.rename(target, f'{folder}/orbax')
    return before
  config, wanted = abstract_params(preset, action == 'load_stacked')
  params = load_params(open_tensors(
      f'orbax:{folder}/orbax' if action == 'load_orbax' else f'hf:{source}'),
                       wanted)
  jax.block_until_ready(params)
  if action == 'save':
    save_pretrained(target, config, params)
  return before


def peak_bytes():
  for line in Path('/proc/self/status').read_text().splitlines():
    if line.startswith('VmHWM:'):
      return int(line.split()[1]) * 1024
  raise OSError('no VmHWM in /proc/self/status')


def measure(arguments):
  """In a process of its own."""
  folder = arguments.folder
  start = time.perf_counter()
  if arguments.action == 'make':
    make_file(arguments.preset, f'{folder}/source')
    return
  before = act(arguments.action, arguments.preset, folder)
  size = os.path.getsize(f'{folder}/source/model.safetensors')
  print(json.dumps({
      'action': arguments.action, 'preset': arguments.preset,
      'before_gb': round(before / 1e9, 2),
      'model_gb': round(size / 1e9, 2),
      'peak_gb': round(peak_bytes() / 1e9, 2),
      'ratio': round(peak_bytes() / size, 2),
      'seconds': round(time.perf_counter() - start, 1)}), flush=True)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--preset', default='tglobal-large')
  parser.add_argument('--folder', required=True,
                      help='where there is room for two copies of the model')
  parser.add_argument('--action', choices=('make', *ACTIONS))
  arguments = parser.parse_args()
  if arguments.action:
    measure(arguments)
    return
  for action in ('make', *ACTIONS):
    if action == 'make' and os.path.exists(f'{arguments.folder}/source'):
      continue
    subprocess.run(
        [sys.executable, __file__, '--action', action, '--preset',
         arguments.preset, '--folder', arguments.folder],
        check=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    shutil.rmtree(f'{arguments.folder}/target', ignore_errors=True)


if __name__ == '__main__':
  main()

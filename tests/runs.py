"""Real training processes at the smallest size, for tests of whole runs."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent

# The quickstart, smaller. A constant rate, so that a run may be told to go on
# for longer.
TINY = {
    'model.num_layers': 1, 'model.d_model': 32, 'model.d_ff': 64,
    'data.inputs_length': 64, 'data.targets_length': 24, 'data.batch_size': 4,
    'data.path': 'corpus/validation.jsonl.xz', 'data.validation_path': '',
    'log_every_steps': 1, 'eval.samples': 0, 'schedule.name': 'constant',
    'optimizer.name': 'adafactor', 'optimizer.min_dim_size_to_factor': 32,
}


def command(workdir, **settings):
  """The command line of a run; keys of settings have dots as `__`."""
  settings = TINY | {
      key.replace('__', '.'): value for key, value in settings.items()}
  return [sys.executable, 'train.py', '--config=configs/quickstart.py',
          f'--workdir={workdir}',
          *(f'--config.{key}={value}' for key, value in settings.items())]


def start(arguments, cache=None, **environment):
  """Starts a process in the repository; one XLA device, output captured."""
  env = {key: value for key, value in os.environ.items()
         if not key.startswith(('XLA_', 'JAX_'))}
  env |= {'JAX_PLATFORMS': 'cpu', **environment}
  if cache:
    env |= {'JAX_COMPILATION_CACHE_DIR': str(cache),
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  # Where a shell runs the tests in the background, Ctrl-C is ignored, and it
  # would be in the process too.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    return subprocess.Popen(
        arguments, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
  finally:
    signal.signal(signal.SIGINT, before)


def finish(process, code=0):
  """Waits for a process, checks its exit code, returns its output."""
  output, _ = process.communicate(timeout=240)
  assert process.returncode == code, output
  return output


def metrics(workdir, split='train'):
  """The lines of metrics.jsonl, without what depends on the clock."""
  lines = [json.loads(line) for line in
           (Path(workdir) / 'metrics.jsonl').read_text().splitlines()]
  clock = ('per_second', 'mfu', 'memory', 'input_wait')
  return [{key: value for key, value in line.items()
           if not any(word in key for word in clock)}
          for line in lines if line['split'] == split]


def checkpoint(workdir, step):
  """(arrays of the state by name, stream states) of a checkpoint."""
  path = Path(workdir).resolve() / 'checkpoints' / str(step)
  tree = ocp.PyTreeCheckpointer().restore(path / 'state')
  arrays = {}

  def visit(name, node):
    if isinstance(node, dict):
      for key, value in node.items():
        visit(f'{name}/{key}', value)
    elif isinstance(node, (list, tuple)):
      for i, value in enumerate(node):
        visit(f'{name}/{i}', value)
    elif node is not None:
      arrays[name] = np.asarray(node)

  visit('', tree)
  streams = json.loads((path / 'streams' / 'metadata').read_text())
  return arrays, streams

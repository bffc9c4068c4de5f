"""Decoding: encode an input and write so many tokens; time and memory.

  python -m benchmarks.generate --case 16384x4 16384x4x2 4096x8x4 --peer
  python -m benchmarks.generate --case 16384x4 --profile profiles

A case is LENGTHxROWS, or LENGTHxROWSxBEAMS; without beams it is greedy. Each
has a process of its own, random parameters in bfloat16, and prints a JSON line:
the median, tenth and ninetieth percentile of a whole call of `generate`, which
writes neither fewer nor more tokens; tokens a second of it (of the results, not
of all beams); milliseconds of the encoder alone, and of a step of decoding,
which is the rest over the number of steps; the most memory in use; and the
floor of a step: the bytes of the decoder's parameters, of the inputs' keys and
values and of the half-filled cache, at the rate at which the GPU copies memory.

--peer measures Hugging Face's PyTorch `generate` on the same shapes in the same
run; its line has `speedup`, how many times as fast ours is, and `memory_ratio`,
our peak over its. --profile shows where the time of decoding goes, as
benchmarks.train_step does.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import processes, step_profile
from benchmarks.processes import Line
from benchmarks.timing import MEMORY_RATE, Limits, compare, spread, time_calls
from benchmarks.train_step import whole_memory
from longt5_flax import FlaxLongT5ForConditionalGeneration, LongT5Config
from longt5_flax.api import programs
from longt5_flax.config import ConfigError
from longt5_flax.generation.generate import start_tokens
from longt5_flax.generation.options import GenerationOptions

CASES = ('16384x4', '16384x4x2', '4096x8x4')


class Case(NamedTuple):
  """What is decoded."""
  length: int
  rows: int
  beams: int


class Writer(NamedTuple):
  """A model with random parameters and inputs, on the device."""
  model: FlaxLongT5ForConditionalGeneration
  params: Any
  ids: jax.Array


def make_writer(preset: str, attention: str, case: Case) -> Writer:
  """Parameters are bfloat16, as the peer's."""
  model = FlaxLongT5ForConditionalGeneration(
      LongT5Config.preset(preset), dtype=jnp.bfloat16, attention=attention,
      _do_init=False)
  params = jax.jit(lambda key: model.to_bf16(model.init_weights(key)))(
      jax.random.key(0))
  ids = np.random.default_rng(0).integers(
      2, model.config.vocab_size, (case.rows, case.length), np.int32)
  return Writer(model, params, jax.device_put(ids))


def measure(preset: str, attention: str, sizes: list[int], new_tokens: int,
            limits: list[Any]) -> Iterator[Line]:
  """What is measured of one case; in a process of its own."""
  case = Case(*sizes)
  model, params, ids = make_writer(preset, attention, case)
  device = jax.devices()[0]
  yield {'device': device.device_kind}

  def encode():
    return model.encode(ids, params=params).last_hidden_state

  def write():
    return model.generate(
        ids, params=params, num_beams=case.beams, max_new_tokens=new_tokens,
        min_new_tokens=new_tokens).sequences

  start = time.perf_counter()
  jax.block_until_ready(write())
  yield {'first_call_seconds': round(time.perf_counter() - start, 2)}
  wait = jax.block_until_ready
  encoding = spread(time_calls(encode, wait, Limits(*limits)))['median_ms']
  times = spread(time_calls(
      write, wait, Limits(*limits)._replace(warmup=1), ahead=False))
  step_ms = (times['median_ms'] - encoding) / new_tokens
  size = step_bytes(model.config, params, case, new_tokens)
  line = times | {
      'tokens_per_second': round(
          1000 * case.rows * new_tokens / times['median_ms'], 1),
      'encode_ms': encoding, 'step_ms': round(step_ms, 4), 'step_bytes': size,
      'peak_bytes': (device.memory_stats() or {}).get('peak_bytes_in_use')}
  if device.device_kind in MEMORY_RATE:
    floor = 1000 * size / MEMORY_RATE[device.device_kind]
    line |= {'floor_step_ms': round(floor, 4),
             'share_of_floor': round(floor / step_ms, 4)}
  yield line


def step_bytes(config: LongT5Config, params: Any, case: Case, new_tokens: int
               ) -> int:
  """What a step of decoding must read, halfway through."""
  layers = config.num_decoder_layers or config.num_layers
  read = [params['decoder']]
  if config.tie_word_embeddings:
    read.append(params['token_embedder'])
  keys = case.rows * (case.length + case.beams * new_tokens // 2)
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(read)
             ) + keys * layers * 2 * config.num_heads * config.d_kv * 2


def profile(preset: str, attention: str, sizes: list[int], new_tokens: int,
            folder: str, name: str) -> Iterator[Line]:
  """Where the time of decoding goes, without encoding; in its own process."""
  case = Case(*sizes)
  model, params, ids = make_writer(preset, attention, case)
  yield {'device': jax.devices()[0].device_kind}
  options = GenerationOptions(
      max_length=new_tokens + 1, min_length=new_tokens + 1,
      num_beams=case.beams)
  arrays = (params, model.encode(ids, params=params).last_hidden_state,
            jnp.ones_like(ids), start_tokens(case.rows, options), None,
            jax.random.key(0))
  compiled = programs.write.lower(model.module, options, *arrays).compile()
  yield step_profile.record(
      partial(compiled, *arrays), 2, compiled, folder, name)


def parse_case(text: str) -> Case:
  """LENGTHxROWS or LENGTHxROWSxBEAMS.

  Raises:
    ConfigError: it is something else.
  """
  parts = text.split('x')
  if len(parts) not in (2, 3) or not all(
      part.isdigit() and int(part) for part in parts):
    raise ConfigError(f'--case={text} must be LENGTHxROWS or '
                      'LENGTHxROWSxBEAMS, as in 4096x8x4.')
  length, rows, beams = map(int, [*parts, '1'][:3])
  return Case(length, rows, beams)


def run_case(arguments: argparse.Namespace, case: Case) -> Iterator[Line]:
  """Our line, and the peer's."""
  line = {'benchmark': 'generate', 'implementation': 'longt5_flax',
          'preset': arguments.preset, **case._asdict(),
          'new_tokens': arguments.new_tokens, 'dtype': 'bfloat16'}
  asked = {'preset': arguments.preset, 'attention': arguments.attention,
           'sizes': case, 'new_tokens': arguments.new_tokens}
  limits = Limits(2, arguments.steps, arguments.seconds, arguments.max_seconds)
  if arguments.profile:
    name = f'generate-{arguments.preset}-' + '-'.join(map(str, case))
    folder = os.path.abspath(arguments.profile)
    result = processes.run_alone(
        'benchmarks.generate:profile', asked | {'folder': folder, 'name': name},
        arguments.case_timeout,
        environment=whole_memory() | step_profile.prepare(folder))
    if 'error' not in result:
      step_profile.show_tables(folder, name)
    yield line | {'measure': 'profile'} | result
    return
  ours = line | {'attention': arguments.attention} | processes.run_alone(
      'benchmarks.generate:measure', asked | {'limits': limits},
      arguments.case_timeout, environment=whole_memory())
  yield ours
  if arguments.peer:
    peer = processes.run_peer_alone(
        'benchmarks.peers:generate',
        {'config': LongT5Config.preset(arguments.preset).to_dict(),
         **case._asdict(), 'new_tokens': arguments.new_tokens,
         'limits': limits}, arguments)
    peer = line | {'implementation': 'transformers eager'} | peer
    if 'median_ms' in peer:
      peer['tokens_per_second'] = round(
          1000 * case.rows * arguments.new_tokens / peer['median_ms'], 1)
    yield compare(peer, ours)


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.generate', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--case', nargs='+', metavar='LENGTHxROWS[xBEAMS]', default=CASES)
  add('--preset', default='tglobal-base')
  add('--attention', default='fused', help='of the encoder')
  add('--new_tokens', type=int, default=256)
  add('--peer', action='store_true')
  processes.add_peer_options(parser)
  add('--profile', metavar='FOLDER', help='where decoding goes, no times')
  add('--steps', type=int, default=3, help='calls to measure, at least')
  add('--seconds', type=float, default=2.0, help='at least')
  add('--max_seconds', type=float, default=60.0,
      help='of measuring a case, however few calls that is')
  add('--case_timeout', type=float, default=300.0,
      help='seconds that a case may take, compilation included')
  add('--out', metavar='FILE', help='add the lines to it, too')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the lines; a user's mistake is one line and exit code 2."""
  arguments = make_parser().parse_args(argv)
  try:
    LongT5Config.preset(arguments.preset)
    cases = [parse_case(text) for text in arguments.case]
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  show = processes.show_on(arguments.out)
  show(processes.environment('generate', 'jax', 'flax'))
  for case in cases:
    for line in run_case(arguments, case):
      show(line)
  return 0


if __name__ == '__main__':
  sys.exit(main())

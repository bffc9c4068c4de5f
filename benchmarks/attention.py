"""One attention layer of the encoder, each implementation: time and memory.

  python -m benchmarks.attention --case 16384x2 --implementation fused

prints, first, how far output and gradients are from the reference's in float32,
relative to their norm; then a JSON line a case, measured in a process of its
own: median, tenth and ninetieth percentile of forward, and of forward and
backward with the gradients of queries, keys, values and both biases, in
milliseconds; the memory that the compiled program plans beyond inputs and
outputs; the most that was in use; and MFU. Base's twelve heads of 64, radius
127, blocks of 16, one segment a row.

--peer measures PyTorch's FlexAttention on the same shapes in the same run; its
line has `speedup`, how many times as fast the fastest of ours is.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import processes
from benchmarks.processes import Line
from benchmarks.timing import Limits, compare, named, time_calls
from benchmarks.train_step import parse_case, whole_memory
from longt5_flax.config import ConfigError
from longt5_flax.model.attention import GlobalTokens, local_attention
from longt5_flax.model.chunked_attention import chunked_attention
from longt5_flax.model.fused_attention import fused_attention
from longt5_flax.model.global_tokens import (
    assign_global_blocks,
    segment_positions,
)
from longt5_flax.model.longt5 import DTYPES
from longt5_flax.training.flops import mfu

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    'reference': lambda *inputs: local_attention(*inputs)[0],
    'chunked': chunked_attention,
    'fused': fused_attention,
}
HEADS, HEAD_SIZE, RADIUS, BLOCK_SIZE, REACH = 12, 64, 127, 16, 91


def random_arrays(length: int, rows: int) -> dict[str, Any]:
  """All that has a gradient, float32."""
  tokens = (rows, length, HEADS, HEAD_SIZE)
  globals_ = (rows, length // BLOCK_SIZE, HEADS, HEAD_SIZE)
  shapes = {'query': tokens, 'key': tokens, 'value': tokens,
            'side_key': globals_, 'side_value': globals_,
            'bias': (HEADS, 2 * RADIUS + 1),
            'side_bias': (HEADS, 2 * REACH + 1)}
  keys = jax.random.split(jax.random.key(time.time_ns() % 2**32), len(shapes))
  arrays = {name: jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
  arrays['query'] *= HEAD_SIZE ** -0.5  # What T5's initialiser does.
  return arrays


def programs(implementation: str, length: int, rows: int, dtype: Any
             ) -> tuple[Any, Any]:
  """Forward, and output with all gradients, given arrays and a cotangent."""
  segment_ids = jnp.ones((rows, length), jnp.int32)
  blocks = assign_global_blocks(
      segment_ids, segment_positions(segment_ids), BLOCK_SIZE)

  def attend(arrays):
    side = GlobalTokens(
        arrays['side_key'], arrays['side_value'], arrays['side_bias'],
        blocks.segment_ids, blocks.block_ids, BLOCK_SIZE)
    return IMPLEMENTATIONS[implementation](
        arrays['query'], arrays['key'], arrays['value'], arrays['bias'],
        segment_ids, side, dtype)

  def with_gradients(arrays, cotangent):
    output, pullback = jax.vjp(attend, arrays)
    return output, pullback(cotangent.astype(output.dtype))[0]

  return jax.jit(attend), jax.jit(with_gradients)


def narrow(arrays: dict[str, Any], dtype: Any) -> dict[str, Any]:
  """As activations are stored; biases stay float32."""
  return {name: x if 'bias' in name else x.astype(dtype)
          for name, x in arrays.items()}


def measure(implementation: str, length: int, rows: int, dtype: str,
            limits: list[Any]) -> Iterator[Line]:
  """A line of the table, without errors; in a process of its own."""
  arrays = narrow(random_arrays(length, rows), jnp.dtype(dtype))
  cotangent = jax.random.normal(
      jax.random.key(1), arrays['query'].shape, jnp.dtype(dtype))
  forward, both = programs(implementation, length, rows, jnp.dtype(dtype))
  plan = both.lower(arrays, cotangent).compile().memory_analysis()
  device = jax.devices()[0]
  yield {'device': device.device_kind,
         'temporary_bytes': plan.temp_size_in_bytes}
  calls = {'forward': lambda: forward(arrays),
           'forward_backward': lambda: both(arrays, cotangent)}
  for name, call in calls.items():
    seconds = time_calls(call, jax.block_until_ready, Limits(*limits))
    yield named(name, seconds)
  # Of forward and backward, which costs twice the forward pass.
  share = mfu(3 * forward_flops(length, rows) / statistics.median(seconds),
              device.device_kind, 1)
  yield {'mfu': None if share is None else round(share, 4),
         'peak_bytes': (device.memory_stats() or {}).get('peak_bytes_in_use')}


def forward_flops(length: int, rows: int) -> int:
  """As training/flops.py counts them: the keys that a query may see."""
  keys = min(2 * RADIUS + 1, length) + length // BLOCK_SIZE
  return 2 * 2 * HEADS * HEAD_SIZE * keys * length * rows


def errors(implementation: str, dtype: str, length: int = 2048, rows: int = 2
           ) -> Iterator[Line]:
  """Distance from the reference in float32, relative to its norm."""
  arrays = narrow(random_arrays(length, rows), jnp.dtype(dtype))
  exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
  cotangent = jax.random.normal(jax.random.key(1), arrays['query'].shape)
  with jax.default_matmul_precision('highest'):
    output, gradients = programs('reference', length, rows, jnp.float32)[1](
        exact, cotangent)
  found, found_gradients = programs(
      implementation, length, rows, jnp.dtype(dtype))[1](arrays, cotangent)
  pairs = {'output': (found, output)} | {
      name: (found_gradients[name], gradients[name]) for name in gradients}
  yield {'errors': {
      name: float(jnp.linalg.norm(a.astype(jnp.float32) - b)
                  / jnp.linalg.norm(b)) for name, (a, b) in pairs.items()}}


def run_case(arguments: argparse.Namespace, case: str) -> Iterator[Line]:
  """Our lines of a case, and the peer's."""
  length, rows = parse_case(case)
  limits = Limits(seconds=arguments.seconds)
  line = {'benchmark': 'attention', 'length': length, 'rows': rows}
  asked = {'length': length, 'rows': rows, 'limits': limits}
  ours: list[Line] = []
  for implementation in arguments.implementation:
    ours.append(line | {
        'implementation': implementation, 'dtype': arguments.dtype}
                | processes.run_alone('benchmarks.attention:measure', asked | {
                    'implementation': implementation, 'dtype': arguments.dtype},
                            arguments.case_timeout, environment=whole_memory()))
    yield ours[-1]
  if arguments.peer:
    key = 'forward_backward_ms'
    best = min((each for each in ours if 'error' not in each),
               key=lambda each: each[key], default=None)
    peer = processes.run_peer_alone('benchmarks.peers:attention', asked | {
        'heads': HEADS, 'head_size': HEAD_SIZE, 'radius': RADIUS,
        'block_size': BLOCK_SIZE, 'reach': REACH}, arguments)
    yield compare(
        line | {'implementation': 'torch FlexAttention'} | peer, best, key)


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.attention', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--case', nargs='+', metavar='LENGTHxROWS',
      default=['4096x8', '16384x1', '16384x2'])
  add('--implementation', nargs='+', choices=IMPLEMENTATIONS,
      default=list(IMPLEMENTATIONS))
  add('--dtype', default='bfloat16', choices=DTYPES)
  add('--seconds', type=float, default=1.0, help='of each measurement')
  add('--peer', action='store_true')
  processes.add_peer_options(parser)
  add('--case_timeout', type=float, default=300.0,
      help='seconds that a measurement may take, compilation included')
  add('--out', metavar='FILE', help='add the lines to it, too')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the lines; a user's mistake is one line and exit code 2."""
  arguments = make_parser().parse_args(argv)
  try:
    for case in arguments.case:
      parse_case(case)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  show = processes.show_on(arguments.out)
  show(processes.environment('attention', 'jax'))
  for implementation in arguments.implementation:
    show({'benchmark': 'attention', 'measure': 'errors',
          'implementation': implementation, 'dtype': arguments.dtype,
          **processes.run_alone('benchmarks.attention:errors', {
              'implementation': implementation, 'dtype': arguments.dtype},
                      arguments.case_timeout)})
  for case in arguments.case:
    for line in run_case(arguments, case):
      show(line)
  return 0


if __name__ == '__main__':
  sys.exit(main())

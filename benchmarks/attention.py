"""One attention layer of the encoder, each implementation: time and memory.

  python -m benchmarks.attention --case 16384x2 --implementation fused

prints a JSON line a case: the medians of forward, and of forward and backward
with the gradients of queries, keys, values and both biases, in milliseconds;
the memory that the compiled program plans beyond inputs and outputs; and how
far output and gradients are from the reference's in float32, relative to their
norm. Base's twelve heads of 64, radius 127, blocks of 16, one segment a row.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from longt5_flax.model.attention import GlobalTokens, local_attention
from longt5_flax.model.chunked_attention import chunked_attention
from longt5_flax.model.fused_attention import fused_attention
from longt5_flax.model.global_tokens import (
    assign_global_blocks,
    segment_positions,
)

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
             ) -> tuple[Callable[..., Any], Callable[..., Any]]:
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


def median_ms(call: Callable[[], Any], seconds: float) -> float:
  """Of calls, each waited for, after one that is not counted."""
  jax.block_until_ready(call())
  times: list[float] = []
  while len(times) < 5 or sum(times) < seconds and len(times) < 200:
    start = time.perf_counter()
    jax.block_until_ready(call())
    times.append(time.perf_counter() - start)
  return 1000 * statistics.median(times)


def narrow(arrays: dict[str, Any], dtype: Any) -> dict[str, Any]:
  """As activations are stored; biases stay float32."""
  return {name: x if 'bias' in name else x.astype(dtype)
          for name, x in arrays.items()}


def measure(implementation: str, length: int, rows: int, dtype: Any,
            seconds: float) -> dict[str, Any]:
  """A line of the table, without errors."""
  arrays = narrow(random_arrays(length, rows), dtype)
  cotangent = jax.random.normal(jax.random.key(1), arrays['query'].shape, dtype)
  forward, both = programs(implementation, length, rows, dtype)
  plan = both.lower(arrays, cotangent).compile().memory_analysis()
  return {
      'implementation': implementation, 'length': length, 'rows': rows,
      'dtype': jnp.dtype(dtype).name,
      'forward_ms': round(median_ms(lambda: forward(arrays), seconds), 3),
      'forward_backward_ms': round(
          median_ms(lambda: both(arrays, cotangent), seconds), 3),
      'temporary_bytes': plan.temp_size_in_bytes}


def errors(implementation: str, dtype: Any, length: int = 2048, rows: int = 2
           ) -> dict[str, float]:
  """Distance from the reference in float32, relative to its norm."""
  arrays = narrow(random_arrays(length, rows), dtype)
  exact = {name: x.astype(jnp.float32) for name, x in arrays.items()}
  cotangent = jax.random.normal(jax.random.key(1), arrays['query'].shape)
  with jax.default_matmul_precision('highest'):
    output, gradients = programs('reference', length, rows, jnp.float32)[1](
        exact, cotangent)
  found, found_gradients = programs(implementation, length, rows, dtype)[1](
      arrays, cotangent)
  pairs = {'output': (found, output)} | {
      name: (found_gradients[name], gradients[name]) for name in gradients}
  return {name: float(jnp.linalg.norm(a.astype(jnp.float32) - b)
                      / jnp.linalg.norm(b)) for name, (a, b) in pairs.items()}


def main() -> None:
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--case', nargs='+', metavar='LENGTHxROWS',
                      default=['4096x8', '16384x1', '16384x2'])
  parser.add_argument('--implementation', nargs='+', choices=IMPLEMENTATIONS,
                      default=list(IMPLEMENTATIONS))
  parser.add_argument('--dtype', default='bfloat16')
  parser.add_argument('--seconds', type=float, default=1.0,
                      help='of each measurement')
  arguments = parser.parse_args()
  dtype = jnp.dtype(arguments.dtype)
  print(json.dumps({'device': jax.devices()[0].device_kind,
                    'jax': version('jax')}), flush=True)
  for implementation in arguments.implementation:
    print(json.dumps({'implementation': implementation, 'dtype': dtype.name,
                      'errors': errors(implementation, dtype)}), flush=True)
  for case in arguments.case:
    length, rows = map(int, case.split('x'))
    for implementation in arguments.implementation:
      print(json.dumps(measure(implementation, length, rows, dtype,
                               arguments.seconds)), flush=True)


if __name__ == '__main__':
  main()

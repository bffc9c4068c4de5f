"""T5's relative position biases: buckets, and the matrices built from them.

A bias depends on the offset between key and query alone, so everything here
works on one vector over offsets and never looks a table up per score.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def relative_position_bucket(
    offsets: Int[np.ndarray, '...'],
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Int[np.ndarray, '...']:
  """The bucket of each offset (key position - query position).

  Half of the buckets (of each direction's, if bidirectional) hold one distance
  each, the others distances that grow geometrically up to `max_distance`; all
  beyond shares the last one. Raffel et al. 2020 (arXiv 1910.10683), 2.1.
  """
  offsets = np.asarray(offsets)
  if bidirectional:
    num_buckets //= 2
    buckets = np.where(offsets > 0, num_buckets, 0)
    distance = np.abs(offsets)
  else:
    buckets = np.zeros_like(offsets)
    distance = np.maximum(-offsets, 0)
  exact = num_buckets // 2
  scale = (num_buckets - exact) / np.log(max_distance / exact)
  # The small number keeps exact powers from falling just below an integer.
  far = exact + np.floor(
      np.log(np.maximum(distance, 1) / exact + 1e-9) * scale).astype(int)
  far = np.minimum(far, num_buckets - 1)
  buckets = buckets + np.where(distance < exact, distance, far)
  return np.asarray(buckets, np.int32)


def bucket_reach(num_buckets: int, max_distance: int) -> int:
  """The distance from which on all offsets of a direction share a bucket, when
  both directions have buckets of their own; 91 of T5's 32 and 128."""
  buckets = relative_position_bucket(
      np.arange(max_distance + 1), bidirectional=True, num_buckets=num_buckets,
      max_distance=max_distance)
  return int(np.argmax(buckets == buckets[-1]))


def offset_bias(
    table: Float[Array, 'H buckets'],
    first: int,
    last: int,
    *,
    bidirectional: bool,
    max_distance: int,
) -> Float[Array, 'H offsets']:
  """The bias of every offset from `first` to `last`, both included."""
  buckets = relative_position_bucket(
      np.arange(first, last + 1), bidirectional=bidirectional,
      num_buckets=table.shape[1], max_distance=max_distance)
  return table[:, buckets]


def toeplitz(
    values: Float[Array, 'H offsets'], rows: int, columns: int
) -> Float[Array, 'H rows columns']:
  """The matrix whose entry (i, j) is `values[j - i + rows - 1]`.

  `toeplitz([a, b, c, d], 2, 3)` is [[b, c, d], [a, b, c]]. Made of a reshape:
  rows of a sequence with period n + 1, cut every n entries, shift by one.
  """
  length = rows + columns - 1
  assert values.shape[1] == length, (values.shape, rows, columns)
  periodic = jnp.pad(values, ((0, 0), (0, 1)))
  repeated = jnp.broadcast_to(
      periodic[:, None], (values.shape[0], rows, length + 1))
  skewed = repeated.reshape(values.shape[0], -1)[:, :rows * length]
  return skewed.reshape(values.shape[0], rows, length)[:, :, rows - 1:]

"""Local attention in chunks of blocks, recomputed in the backward pass.

Plain XLA for every platform. Scores exist for one chunk at a time, so memory is
linear in the length also with global tokens, whose scores grow as L^2 / 16.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from longt5_flax.model.attention import (
    GlobalTokens,
    attend_blocks,
    join_neighbours,
    to_blocks,
    window_bias,
)
from longt5_flax.model.kernels.calls import ATTENDED
from longt5_flax.model.side_bias import side_bias

# Scores of a chunk: 256 MB in float32, several times that with temporaries.
_MAX_SCORES = 2**26


def chunked_attention(
    query: Float[Array, 'B L H K'],
    key: Float[Array, 'B L H K'],
    value: Float[Array, 'B L H K'],
    bias: Float[Array, 'H offsets'],
    segment_ids: Int[Array, 'B L'],
    side: GlobalTokens | None,
    dtype: DTypeLike,
    max_scores: int = _MAX_SCORES,
) -> Float[Array, 'B L H K']:
  """What `local_attention` attends to; arguments as there.

  Args:
    query, key, value, bias, segment_ids, side, dtype: see there.
    max_scores: of a chunk, which has one block at least.
  """
  batch, length, heads, _ = query.shape
  block = bias.shape[1] // 2 + 1
  num_blocks = -(-length // block)
  num_globals = 0 if side is None else side.key.shape[1]
  scores = batch * heads * block * (3 * block + num_globals)
  size = max(1, min(num_blocks, max_scores // scores))
  chunks = -(-num_blocks // size)
  window = window_bias(bias)

  def split(x, fill=0):
    """[chunks, B, size, C, ...]"""
    x = to_blocks(x, block * size, fill)
    return jnp.moveaxis(x.reshape(batch, chunks, size, block, *x.shape[3:]),
                        1, 0)

  def split_windows(x):
    """[chunks, B, size + 2, C, ...]: with the blocks on either side."""
    x = split(x)
    edge = jnp.zeros_like(x[:1, :, :1])
    before = jnp.concatenate([edge, x[:-1, :, -1:]])
    after = jnp.concatenate([x[1:, :, :1], edge])
    return jnp.concatenate([before, x, after], axis=2)

  @jax.checkpoint
  def attend(parts):
    query, key, value, segment_ids, block_ids = parts
    bias = None
    if side is not None:
      bias = side_bias(side.bias, block_ids, num_globals, side.block_size)
    return attend_blocks(
        query, join_neighbours(key), join_neighbours(value),
        join_neighbours(segment_ids), window, side, bias, dtype)[0]

  block_ids = (jnp.zeros_like(segment_ids) if side is None else side.block_ids)
  output = checkpoint_name(jax.lax.map(attend, (
      split(query), split_windows(key), split_windows(value),
      split_windows(segment_ids), split(block_ids, -1))), ATTENDED)
  output = jnp.moveaxis(output, 0, 1).reshape(batch, -1, *query.shape[2:])
  return output[:, :length]

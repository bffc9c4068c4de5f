"""Transient global tokens: which token belongs to which block, and their sums.

A global token is the sum of `block_size` consecutive tokens of one segment.
Tail tokens that fill no whole block ("orphans") join the last whole block of
their segment; a segment shorter than a block has none. Blocks are numbered
through the row, from 0. LongT5 paper, 3.1.2; facts of the original: orphans
take the adopted block's number, segments need not be aligned to blocks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class GlobalBlocks(NamedTuple):
  """How the tokens of each row form global tokens.

  Attributes:
    block_ids: the global token of each token, -1 for none.
    segment_ids: the segment of each global token, 0 where it is not used.
    starts: the position in the row of each block's first token; L if unused.
  """
  block_ids: Int[Array, 'B L']
  segment_ids: Int[Array, 'B G']
  starts: Int[Array, 'B G']


def segment_positions(segment_ids: Int[Array, 'B L']) -> Int[Array, 'B L']:
  """Positions that restart at 0 with each segment: [3, 3, 5, 5, 5, 0] gives
  [0, 1, 0, 1, 2, 0]."""
  index = jnp.arange(segment_ids.shape[1])
  previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  starts = jnp.where(segment_ids != previous, index, 0)
  return index - jax.lax.cummax(starts, axis=1)


def assign_global_blocks(
    segment_ids: Int[Array, 'B L'],
    positions: Int[Array, 'B L'],
    block_size: int,
) -> GlobalBlocks:
  """Numbers the blocks of every row; G = L // block_size.

  With block_size 2, segments [1, 1, 1, 2, 3, 3, 0] have the block ids
  [0, 0, 0, -1, 1, 1, -1]: an orphan, a segment with no block, padding.
  """
  length = segment_ids.shape[1]
  num_globals = length // block_size
  real = segment_ids > 0
  ends = real & (positions % block_size == block_size - 1)
  ended = jnp.cumsum(ends, axis=1)
  # A token's own block is whole if the row holds its last token.
  index = jnp.arange(length)
  last = index + block_size - 1 - positions % block_size
  clipped = jnp.minimum(last, length - 1)
  whole = (last < length) & (
      jnp.take_along_axis(segment_ids, clipped, axis=1) == segment_ids)
  own = ended - ends  # Blocks that ended before this token.
  block_ids = jnp.where(
      whole, own, jnp.where(positions >= block_size, own - 1, -1))
  block_ids = jnp.where(real, block_ids, -1)

  numbers = jnp.arange(1, num_globals + 1)
  last_token = jax.vmap(partial(jnp.searchsorted, v=numbers))(ended)
  used = numbers <= ended[:, -1:]
  starts = jnp.where(used, last_token - (block_size - 1), length)
  segments = jnp.take_along_axis(
      segment_ids, jnp.minimum(starts, length - 1), axis=1)
  return GlobalBlocks(block_ids, jnp.where(used, segments, 0), starts)


# The sum over a block and the look-up by block are each other's transpose.
# Written as such, both directions are gathers: no scatter-add, whose order of
# summation is not fixed on a GPU.


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def sum_blocks(
    x: Float[Array, 'B L D'], blocks: GlobalBlocks, block_size: int
) -> Float[Array, 'B G D']:
  """The float32 sum of every block's tokens, its orphans included; zeros for
  global tokens that are not used."""
  # A whole block and its orphans. Cut out as one piece, as an index for each of
  # its tokens takes a GPU longer to look up than the token; where the row ends
  # before the piece does, that begins earlier, and finds the same ones its own.
  window = min(2 * block_size - 1, x.shape[1])

  def one(x_LD, ids_L, number, first):
    is_own = jax.lax.dynamic_slice_in_dim(ids_L, first, window) == number
    tokens = jax.lax.dynamic_slice_in_dim(x_LD, first, window)
    return jnp.sum(jnp.where(is_own[:, None], tokens, 0), axis=0,
                   dtype=jnp.float32)

  row = jax.vmap(one, in_axes=(None, None, 0, 0))
  numbers = jnp.arange(blocks.starts.shape[1])
  return jax.vmap(row, in_axes=(0, 0, None, 0))(
      x, blocks.block_ids, numbers, blocks.starts)


def _sum_blocks_fwd(x, blocks, block_size):
  return sum_blocks(x, blocks, block_size), (blocks, jnp.zeros(0, x.dtype))


def _sum_blocks_bwd(block_size, residuals, cotangent):
  del block_size
  blocks, like = residuals
  return _look_up(cotangent.astype(like.dtype), blocks.block_ids), None


sum_blocks.defvjp(_sum_blocks_fwd, _sum_blocks_bwd)


def _look_up(rows_BGD, block_ids):
  taken = jnp.take_along_axis(
      rows_BGD, jnp.maximum(block_ids, 0)[..., None], axis=1)
  return jnp.where((block_ids >= 0)[..., None], taken, 0)

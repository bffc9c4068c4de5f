"""Attention as pure functions over arrays: full, and blockwise local with or
without transient global tokens.

The reference implementation: plain XLA, every platform. T5 does not divide
scores by sqrt(K); its query initialiser does. Masks are applied with `where`,
so that every float dtype can hold the masked score.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.model.precision import contract
from longt5_flax.model.relative_position import toeplitz
from longt5_flax.model.side_bias import side_bias


class GlobalTokens(NamedTuple):
  """The global tokens, and how the tokens relate to them.

  Attributes:
    key, value: of the global tokens.
    bias: towards a global token at offset o, in blocks, at [h, o + reach];
      beyond either end it is the last one.
    segment_ids: the segment of each global token, 0 where it is not used.
    block_ids: the global token that each token is part of, -1 for none.
    block_size: tokens of a block.
  """
  key: Float[Array, 'B G H K']
  value: Float[Array, 'B G H K']
  bias: Float[Array, 'H offsets']
  segment_ids: Int[Array, 'B G']
  block_ids: Int[Array, 'B L']
  block_size: int


def full_attention(
    query: Float[Array, 'B T H K'],
    key: Float[Array, 'B S H K'],
    value: Float[Array, 'B S H K'],
    bias: Float[Array, '#B #H #T #S'] | None,
    mask: Bool[Array, '#B 1 #T S'],
    dtype: DTypeLike,
) -> tuple[Float[Array, 'B T H K'], Float[Array, 'B H T S']]:
  """Softmax attention of every query to every key that the mask admits.

  Returns:
    The attended values, and the float32 weights. A query that may see nothing
    gets the mean of all values.
  """
  scores = contract('BTHK,BSHK->BHTS', query, key, dtype, jnp.float32)
  if bias is not None:
    scores = scores + bias
  weights = _masked_softmax(scores, mask)
  return contract('BHTS,BSHK->BTHK', weights, value, dtype), weights


def local_attention(
    query: Float[Array, 'B L H K'],
    key: Float[Array, 'B L H K'],
    value: Float[Array, 'B L H K'],
    bias: Float[Array, 'H offsets'],
    segment_ids: Int[Array, 'B L'],
    side: GlobalTokens | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, 'B L H K'], Float[Array, 'B N H C keys']]:
  """Attention to the tokens within the radius, and to all global tokens.

  The row is cut into N blocks of C = radius + 1 tokens; a block's queries see
  the W = 3C keys of their own block and of both neighbours, with the band cut
  out, and after them the G global keys, in ONE softmax. Memory is
  O(L (W + G)) in either direction.

  Args:
    query, key, value: of the tokens.
    bias: towards the token at offset o at [h, o + radius].
    segment_ids: 0 is padding; tokens see their own segment only.
    side: the global tokens, or None for local attention.
    dtype: of the matrix products.

  Returns:
    The attended values, and the float32 weights, keys = W + G.
  """
  block = bias.shape[1] // 2 + 1
  key, value, segments = (
      _windows(to_blocks(x, block)) for x in (key, value, segment_ids))
  side_bias_BNHCG = None
  if side is not None:
    side_bias_BNHCG = side_bias(
        side.bias, to_blocks(side.block_ids, block, -1), side.key.shape[1],
        side.block_size)
  output, weights = attend_blocks(
      to_blocks(query, block), key, value, segments, window_bias(bias), side,
      side_bias_BNHCG, dtype)
  output = output.reshape(output.shape[0], -1, *output.shape[3:])
  return output[:, :query.shape[1]], weights


def attend_blocks(
    query: Float[Array, 'B N C H K'],
    key: Float[Array, 'B N W H K'],
    value: Float[Array, 'B N W H K'],
    segment_ids: Int[Array, 'B N W'],
    bias: Float[Array, 'H C W'],
    side: GlobalTokens | None,
    side_bias: Float[Array, 'B N H C G'] | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, 'B N C H K'], Float[Array, 'B N H C keys']]:
  """`local_attention` of blocks that have their windows of keys and their
  biases beside them; of `side` it takes keys, values and segments."""
  block = query.shape[2]
  segments_BNC = segment_ids[:, :, block:2 * block]
  scores = contract(
      'BNCHK,BNWHK->BNHCW', query, key, dtype, jnp.float32) + bias
  mask_BNCW = _same_segment(segments_BNC, segment_ids) & band_mask(block)
  if side is not None:
    assert side_bias is not None
    side_scores = contract(
        'BNCHK,BGHK->BNHCG', query, side.key, dtype, jnp.float32) + side_bias
    scores = jnp.concatenate([scores, side_scores], axis=-1)
    side_mask = _same_segment(segments_BNC, side.segment_ids[:, None])
    mask_BNCW = jnp.concatenate([mask_BNCW, side_mask], axis=-1)
  weights = _masked_softmax(scores, mask_BNCW[:, :, None])
  window = key.shape[2]
  output = contract('BNHCW,BNWHK->BNCHK', weights[..., :window], value, dtype,
                    jnp.float32)
  if side is not None:
    output += contract('BNHCG,BGHK->BNCHK', weights[..., window:], side.value,
                       dtype, jnp.float32)
  return output.astype(query.dtype), weights


def window_bias(bias: Float[Array, 'H offsets']) -> Float[Array, 'H C W']:
  """For query c of a block and key w of its window, the bias of offset
  w - C - c; anything beyond the radius, which the band hides."""
  block = bias.shape[1] // 2 + 1
  return toeplitz(jnp.pad(bias, ((0, 0), (block, block))), block, 3 * block)


def band_mask(block: int) -> Bool[np.ndarray, 'C W']:
  """Which keys of the window lie within the radius, block - 1.

  band_mask(2) is [[0, 1, 1, 1, 0, 0],
                   [0, 0, 1, 1, 1, 0]].
  """
  offsets = np.arange(3 * block) - block - np.arange(block)[:, None]
  return np.abs(offsets) < block


def to_blocks(
    x: Array, block: int, fill: int = 0
) -> Array:
  """[B, L, ...] to [B, N, C, ...], its last block filled up."""
  padding = -x.shape[1] % block
  x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2),
              constant_values=fill)
  return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _same_segment(query_segments, key_segments):
  key_segments = key_segments[..., None, :]
  return (query_segments[..., None] == key_segments) & (key_segments > 0)


def _masked_softmax(scores, mask):
  return jax.nn.softmax(
      jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)


def _windows(x_BNC):
  """Each block between its neighbours: [B, N, C, ...] to [B, N, 3C, ...]."""
  padded = jnp.pad(x_BNC, [(0, 0), (1, 1)] + [(0, 0)] * (x_BNC.ndim - 2))
  return join_neighbours(padded)


def join_neighbours(x_BNC: Array) -> Array:
  """[B, N + 2, C, ...] to [B, N, 3C, ...]: the blocks from n to n + 2."""
  return jnp.concatenate([x_BNC[:, :-2], x_BNC[:, 1:-1], x_BNC[:, 2:]], axis=2)

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


class Globals(NamedTuple):
  """Keys, values and biases of the global tokens.

  Attributes:
    key, value: of the global tokens.
    bias: of every token towards every global token.
    segment_ids: the segment of each global token, 0 where it is not used.
  """
  key: Float[Array, 'B G H K']
  value: Float[Array, 'B G H K']
  bias: Float[Array, 'B L H G']
  segment_ids: Int[Array, 'B G']


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
    bias: Float[Array, 'H C W'],
    segment_ids: Int[Array, 'B L'],
    side: Globals | None,
    dtype: DTypeLike,
) -> tuple[Float[Array, 'B L H K'], Float[Array, 'B N H C keys']]:
  """Attention to the tokens at most C - 1 away, and to all global tokens.

  The row is cut into N blocks of C = local_radius + 1 tokens; a block's
  queries see the W = 3C keys of their own block and of both neighbours, with
  the band cut out, and after them the G global keys, in ONE softmax. Memory is
  O(L (W + G)) in either direction.

  Args:
    query, key, value: of the tokens.
    bias: for query c of a block and key w of its window, at offset w - C - c.
    segment_ids: 0 is padding; tokens see their own segment only.
    side: the global tokens, or None for local attention.
    dtype: of the matrix products.

  Returns:
    The attended values, and the float32 weights, keys = W + G.
  """
  length, block = query.shape[1], bias.shape[1]
  query_BNCHK = _to_blocks(query, block)
  segments_BNC = _to_blocks(segment_ids, block)
  key_BNWHK = _windows(_to_blocks(key, block))
  scores = contract(
      'BNCHK,BNWHK->BNHCW', query_BNCHK, key_BNWHK, dtype, jnp.float32) + bias
  mask_BNCW = _same_segment(
      segments_BNC, _windows(segments_BNC)) & band_mask(block)
  if side is not None:
    side_scores = contract(
        'BNCHK,BGHK->BNHCG', query_BNCHK, side.key, dtype, jnp.float32)
    side_scores += jnp.swapaxes(_to_blocks(side.bias, block), 2, 3)
    scores = jnp.concatenate([scores, side_scores], axis=-1)
    side_mask = _same_segment(segments_BNC, side.segment_ids[:, None])
    mask_BNCW = jnp.concatenate([mask_BNCW, side_mask], axis=-1)
  weights = _masked_softmax(scores, mask_BNCW[:, :, None])
  window = 3 * block
  output = contract(
      'BNHCW,BNWHK->BNCHK', weights[..., :window],
      _windows(_to_blocks(value, block)), dtype, jnp.float32)
  if side is not None:
    output += contract('BNHCG,BGHK->BNCHK', weights[..., window:], side.value,
                       dtype, jnp.float32)
  output = output.reshape(output.shape[0], -1, *output.shape[3:])[:, :length]
  return output.astype(query.dtype), weights


def band_mask(block: int) -> Bool[np.ndarray, 'C W']:
  """Which keys of the window lie within the radius, block - 1.

  band_mask(2) is [[0, 1, 1, 1, 0, 0],
                   [0, 0, 1, 1, 1, 0]].
  """
  offsets = np.arange(3 * block) - block - np.arange(block)[:, None]
  return np.abs(offsets) < block


def _same_segment(query_segments, key_segments):
  key_segments = key_segments[..., None, :]
  return (query_segments[..., None] == key_segments) & (key_segments > 0)


def _masked_softmax(scores, mask):
  return jax.nn.softmax(
      jnp.where(mask, scores, jnp.finfo(scores.dtype).min), axis=-1)


def _to_blocks(x, block):
  """[B, L, ...] to [B, N, C, ...], padded with zeros."""
  padding = -x.shape[1] % block
  x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
  return x.reshape(x.shape[0], -1, block, *x.shape[2:])


def _windows(x_BNC):
  """Each block between its neighbours: [B, N, C, ...] to [B, N, 3C, ...]."""
  padded = jnp.pad(x_BNC, [(0, 0), (1, 1)] + [(0, 0)] * (x_BNC.ndim - 2))
  return jnp.concatenate(
      [padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], axis=2)

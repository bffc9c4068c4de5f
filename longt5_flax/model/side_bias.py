"""The bias of tokens towards global tokens.

It depends on the offset between a global token's block and the token's own, so
tokens of one block share it: it is made block by block and given to tokens by a
product with a one-hot matrix. Nothing is looked up, and no gradient scattered,
per score; gradients are sums in a fixed order.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def side_bias(
    bias: Float[Array, 'H offsets'],
    block_ids: Int[Array, 'B N C'],
    num_globals: int,
    block_size: int,
) -> Float[Array, 'B N H C num_globals']:
  """The bias of every token towards every global token; 0 for tokens that are
  part of none.

  Args:
    bias: at offset o, in blocks, at [h, o + reach]; beyond that the last one.
    block_ids: of the tokens; -1 for none.
    num_globals: how many global tokens there are.
    block_size: tokens of a block, so that C tokens have few different ones.
  """
  rows = block_ids.shape[-1] // block_size + 2
  has_block = block_ids >= 0
  largest = jnp.iinfo(block_ids.dtype).max
  first = jnp.min(jnp.where(has_block, block_ids, largest), axis=-1)
  first = jnp.where(jnp.any(has_block, axis=-1), first, 0)
  one_hot = jax.nn.one_hot(
      jnp.where(has_block, block_ids - first[..., None], -1), rows)
  by_block = _by_block(rows, num_globals, bias, first)
  # Exact: one factor of each sum is 1.
  return jnp.einsum('BNCR,BNRHG->BNHCG', one_hot, by_block,
                    precision=jax.lax.Precision.HIGHEST)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_block(rows, num_globals, bias, first):
  """[B, N, rows, H, G]: of the blocks from `first` [B, N] on."""
  reach = bias.shape[1] // 2
  blocks = first[..., None] + jnp.arange(rows)
  offsets = jnp.arange(num_globals) - blocks[..., None]
  index = jnp.clip(offsets, -reach, reach) + reach
  return jnp.moveaxis(bias[:, index], 0, -2)


def _by_block_forward(rows, num_globals, bias, first):
  return _by_block(rows, num_globals, bias, first), (first, bias)


def _by_block_backward(rows, num_globals, residuals, gradient):
  first, bias = residuals
  reach = bias.shape[1] // 2
  blocks = first[..., None] + jnp.arange(rows)
  # Offsets within reach: a window of the global tokens around each block.
  half = min(reach, num_globals) - 1
  index = blocks[..., None] + jnp.arange(-half, half + 1)
  inside = (index >= 0) & (index < num_globals)
  taken = jnp.take_along_axis(
      gradient, jnp.clip(index, 0, num_globals - 1)[..., None, :], axis=-1)
  near = jnp.sum(jnp.where(inside[..., None, :], taken, 0), axis=(0, 1, 2))
  near = jnp.pad(near, ((0, 0), (reach - 1 - half,) * 2))
  offsets = (jnp.arange(num_globals) - blocks[..., None])[..., None, :]
  far = [jnp.sum(jnp.where(side, gradient, 0), axis=(0, 1, 2, 4))[:, None]
         for side in (offsets <= -reach, offsets >= reach)]
  return jnp.concatenate([far[0], near, far[1]], axis=1), None


_by_block.defvjp(_by_block_forward, _by_block_backward)

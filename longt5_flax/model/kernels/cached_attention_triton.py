"""The GPU kernel of `cached_attention`: attention of one target of each row to
the targets of its group in a cache, through Pallas' Triton backend.

A program has the rows of a group and one head. It reads as much of the cache as
is filled, once for all of them, and puts their own keys and values there.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longt5_flax.model.kernels import triton_tiles as tiles
from longt5_flax.model.kernels.triton_tiles import Keys, Mask, Tiling


class Cache(NamedTuple):
  """What is attended to.

  Attributes:
    key, value: [B, H, n, S, K].
    bias: by position, [H, S].
    held_by: whose key a row sees at each position, [B, n, S]; -1: none's.
    start: the position of the new targets, [B, 1].
  """
  key: Any
  value: Any
  bias: Any
  held_by: Any
  start: Any


def _forward(tiling, new_ref, cache, out_ref, key_ref, value_ref):
  size, (rows, room, _) = tiling.tile, cache.key.shape
  # A product takes more rows than there may be: then the last one repeats, and
  # is written several times.
  own = jnp.minimum(jnp.arange(tiles.product_size(rows)), rows - 1)
  query, start = new_ref[0, own, :], cache.start[0]
  now = pl.ds(start, 1)
  for row in range(rows):
    key_ref[row, now, :] = new_ref[1, pl.ds(row, 1), :]
    value_ref[row, now, :] = new_ref[2, pl.ds(row, 1), :]

  def attend(keys, bias, sees, softmax):
    return tiles.attend(
        tiling, query, keys, jnp.broadcast_to(bias[None, :], sees.shape),
        Mask(None, lambda scores: jnp.where(sees, scores, tiles.MASKED)),
        softmax)

  def add(i, softmax):
    tile, row = jax.lax.div(i, rows), jax.lax.rem(i, rows)
    # The last tile begins early, and hides what was in the one before.
    first = jnp.minimum(tile * size, room - size)
    part, positions = pl.ds(first, size), first + jnp.arange(size)
    is_old = (positions >= tile * size) & (positions < start)
    return attend(
        Keys(cache.key[row, part, :], cache.value[row, part, :]),
        cache.bias[part], (cache.held_by[own, part] == row) & is_old[None, :],
        softmax)

  softmax = attend(
      Keys(new_ref[1, own, :], new_ref[2, own, :]), cache.bias[now],
      cache.held_by[own, now] == jnp.arange(len(own))[None, :],
      tiles.no_keys(query))
  count = jax.lax.div(start + size - 1, size) * rows
  softmax = jax.lax.fori_loop(0, count, add, softmax)
  out_ref[own, :] = (softmax.output / softmax.total[:, None]).astype(
      out_ref.dtype)


def forward(tiling: Tiling, new: jax.Array, cache: Cache
            ) -> tuple[jax.Array, ...]:
  """What rows attend to, [B, n, H, K], and keys and values of the cache with
  theirs, in the place of the old ones.

  Args:
    tiling: with a tile of at most S.
    new: queries, keys and values, [B, 3, n, H, K].
    cache: what else they attend to.
  """
  batch, _, rows, heads, size = new.shape
  output = jax.ShapeDtypeStruct((batch, rows, heads, size), new.dtype)
  kept = pl.BlockSpec((None, None, *cache.key.shape[2:]),
                      lambda b, h, i: (b, h, 0, 0, 0))
  specs = Cache(
      kept, kept,
      pl.BlockSpec((None, cache.bias.shape[1]), lambda b, h, i: (h, 0)),
      pl.BlockSpec((None, *cache.held_by.shape[1:]), lambda b, h, i: (b, 0, 0)),
      pl.BlockSpec((None, 1), lambda b, h, i: (b, 0)))
  return tiles.call(
      tiling, partial(_forward, tiling), (batch, heads, 1),
      [pl.BlockSpec((None, 3, rows, None, size),
                    lambda b, h, i: (b, 0, 0, h, 0)), specs],
      [tiles.tiles(output, rows), kept, kept],
      [output, *(jax.ShapeDtypeStruct(x.shape, x.dtype)
                 for x in (cache.key, cache.value))],
      'longt5_cached_attention', in_place={1: 1, 2: 2})(new, cache)

"""The GPU kernels of `cached_attention`, through Pallas' Triton backend:
attention of one target of each row to the targets of its group in a cache, and
a list of what several rows see there.

A program of the first has the rows of a group and one head. It reads what they
see of the cache, once for all of them, and puts their own keys and values
there. The list is made once for all heads and layers, by a program a group.
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
    seen: what is read, [B, 3, places], as `list_seen` gives it; None, for one
      row, is all that is filled.
  """
  key: Any
  value: Any
  bias: Any
  held_by: Any
  start: Any
  seen: Any


def _forward(tiling, new_ref, cache, out_ref, key_ref, value_ref):
  size, (rows, room, _) = tiling.tile, cache.key.shape
  own, has_list = tiles.repeated_rows(rows), cache.seen is not None
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

  def filled(i):
    # The last tile begins early, and hides what was in the one before.
    first = jnp.minimum(i * size, room - size)
    part, positions = pl.ds(first, size), first + jnp.arange(size)
    is_old = (positions >= i * size) & (positions < start)
    return (Keys(cache.key[0, part, :], cache.value[0, part, :]),
            cache.bias[part],
            (cache.held_by[own, part] == 0) & is_old[None, :])

  def listed(i, places):
    row, position = jax.lax.div(places, room), jax.lax.rem(places, room)
    bits = cache.seen[1, pl.ds(i * size, size)]
    return (Keys(cache.key[row, position, :], cache.value[row, position, :]),
            cache.bias[position], (bits[None, :] >> own[:, None]) & 1 == 1)

  def places_of(i):
    return cache.seen[0, pl.ds(i * size, size)] if has_list else None

  def add(i, carry):
    places, softmax = carry
    keys, bias, sees = listed(i, places) if has_list else filled(i)
    softmax = attend(keys, bias, sees, softmax)
    # Known a turn ahead, so that keys are asked for as early as filled ones.
    return places_of(jnp.minimum(i + 1, turns - 1)), softmax

  places, count = places_of(0), cache.seen[2, 0] if has_list else start
  softmax = attend(
      Keys(new_ref[1, own, :], new_ref[2, own, :]), cache.bias[now],
      cache.held_by[own, now] == jnp.arange(len(own))[None, :],
      tiles.no_keys(query))
  turns = jax.lax.div(count + size - 1, size)
  _, softmax = jax.lax.fori_loop(0, turns, add, (places, softmax))
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
      pl.BlockSpec((None, 1), lambda b, h, i: (b, 0)),
      None if cache.seen is None else pl.BlockSpec(
          (None, *cache.seen.shape[1:]), lambda b, h, i: (b, 0, 0)))
  return tiles.call(
      tiling, partial(_forward, tiling), (batch, heads, 1),
      [pl.BlockSpec((None, 3, rows, None, size),
                    lambda b, h, i: (b, 0, 0, h, 0)), specs],
      [tiles.tiles(output, rows), kept, kept],
      [output, *(jax.ShapeDtypeStruct(x.shape, x.dtype)
                 for x in (cache.key, cache.value))],
      'longt5_cached_attention', in_place={1: 1, 2: 2})(new, cache)


def _list_seen(size, held_by_ref, start_ref, out_ref):
  (n, room), start = held_by_ref.shape, start_ref[0]
  rows = jnp.arange(tiles.product_size(n))[:, None]

  def add(i, count):
    positions = i * size + jnp.arange(size)
    bits = jnp.zeros((len(rows), size), jnp.int32)
    for row in range(n):
      held_by = held_by_ref[row, jnp.minimum(positions, room - 1)]
      sees = (held_by == rows) & (positions < start)
      bits |= jnp.where(sees, jnp.int32(1) << row, 0)
    is_seen = bits != 0
    ones = is_seen.astype(jnp.int32)
    of_rows = jnp.sum(ones, axis=1)
    index = (count + jnp.cumsum(of_rows) - of_rows)[:, None] + (
        jnp.cumsum(ones, axis=1) - ones)
    # The rest goes to the end, where nothing is read.
    index = jnp.where(is_seen, index, out_ref.shape[1] - 1)
    out_ref[0, index] = rows * room + positions
    out_ref[1, index] = bits
    return count + jnp.sum(of_rows)

  count = jax.lax.fori_loop(0, jax.lax.div(start + size - 1, size), add, 0)
  filling = count + jnp.arange(size)
  out_ref[0, filling] = out_ref[1, filling] = jnp.zeros(size, jnp.int32)
  out_ref[2, 0] = count


def list_seen(tiling: Tiling, held_by: jax.Array, start: jax.Array
              ) -> jax.Array:
  """[B, 3, places]: what `seen_places` says; behind the places a tile of zeros.

  Args:
    tiling: of `forward`.
    held_by, start: as in `Cache`.
  """
  batch, n, room = held_by.shape
  length = (-(-n * room // tiling.tile) + 2) * tiling.tile
  return tiles.call(
      tiling, partial(_list_seen, tiling.tile), (batch, 1, 1),
      [pl.BlockSpec((None, n, room), lambda b, *_: (b, 0, 0)),
       tiles.whole(start)],
      pl.BlockSpec((None, 3, length), lambda b, *_: (b, 0, 0)),
      jax.ShapeDtypeStruct((batch, 3, length), jnp.int32),
      'longt5_seen_places')(held_by, start)

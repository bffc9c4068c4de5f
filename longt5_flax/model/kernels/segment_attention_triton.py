"""The GPU kernels of `segment_attention`: attention of every query to all keys
of its segment, no bias, through Pallas' Triton backend.

Few queries may face many keys: then tiles of queries are smaller than those of
keys, programs share the keys of one tile of queries, and what they found is put
together afterwards.

No two programs add to one address, so results do not depend on their order.
"""

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longt5_flax.model.kernels import triton_tiles as tiles
from longt5_flax.model.kernels.triton_tiles import Columns, Rows, Tiling

# Rows whose parts a program puts together.
_JOINED = 16


class Arrays(NamedTuple):
  """Queries and keys; T and S are whole tiles of their own.

  Attributes:
    query: [B, T, H, K].
    query_segments: [B, T], 0 is padding.
    key, value: [B, S, H, K]; where it is said, heads first, [B, H, S, K], so
      that all a program reads of them is in one piece.
    segment_ids: of the keys, [B, S].
  """
  query: Any
  query_segments: Any
  key: Any
  value: Any
  segment_ids: Any


def _load_spans(ref):
  return tuple(ref[i] for i in range(4))


def _share(spans):
  """The part of a span that belongs to this program."""
  part, parts = pl.program_id(3), pl.num_programs(3)
  first, end = spans[0], spans[1]
  size = (end - first + parts - 1) // parts
  first = first + part * size
  return first, jnp.minimum(first + size, end)


def _key_tile(tiling, arrays, spans, segments, j):
  """A tile of keys, and its mask."""
  part = tiles.at(j, tiling.tile)
  return tiles.load_keys(arrays, part), tiles.segment_mask(
      spans[2:], j, segments, arrays.segment_ids, part)


def _forward(tiling, arrays, span_ref, out_ref, lse_ref):
  rows = tiles.product_rows(arrays.query.shape[0])
  query, segments = arrays.query[rows], arrays.query_segments[rows]
  spans = _load_spans(span_ref)

  def add(j, softmax):
    keys, mask = _key_tile(tiling, arrays, spans, segments, j)
    return tiles.attend(tiling, query, keys, None, mask, softmax)

  first, end = _share(spans)
  softmax = jax.lax.fori_loop(first, end, add, tiles.no_keys(query))
  sees = (segments > 0) & (softmax.top > tiles.MASKED)
  tiles.write(softmax, sees, out_ref, lse_ref, rows)


def _join(output_refs, lse_refs, out_ref, lse_ref):
  """One softmax of all parts, which lie first."""
  # All is on its way before any is waited for.
  lses, outputs = ([ref[part] for part in range(len(ref))]
                   for ref in (lse_refs, output_refs))
  # A part where a query sees nothing has no weight.
  lses = [jnp.where(lse < -tiles.MASKED, lse, tiles.MASKED) for lse in lses]
  top = reduce(jnp.maximum, lses)
  weights = [jnp.exp2(lse - top) for lse in lses]
  output = reduce(jnp.add, [
      weight[:, None] * output
      for weight, output in zip(weights, outputs, strict=True)])
  tiles.write(tiles.Softmax(top, reduce(jnp.add, weights), output),
              top > tiles.MASKED, out_ref, lse_ref)


def _backward_query(tiling, arrays, span_ref, rows, d_query_ref):
  query, segments = arrays.query[...], arrays.query_segments[...]
  rows = Rows(*(ref[...] for ref in rows))
  spans = _load_spans(span_ref)

  def add(j, d_query):
    keys, mask = _key_tile(tiling, arrays, spans, segments, j)
    d_scores = tiles.score_gradient(tiling, query, keys, None, mask, rows)
    return d_query + tiles.dot(
        tiling, d_scores.astype(keys.key.dtype), keys.key)

  first, end = _share(spans)
  d_query_ref[...] = jax.lax.fori_loop(
      first, end, add, jnp.zeros(query.shape, jnp.float32))


def _backward_key(tiling, query_tile, arrays, span_ref, columns, d_key_ref,
                  d_value_ref):
  keys = tiles.Keys(arrays.key[...], arrays.value[...])
  segments, columns = arrays.segment_ids[...], columns.hold()
  first, end, *clean = _load_spans(span_ref)

  def add(i, gradients):
    part = tiles.at(i, query_tile)
    mask = tiles.segment_mask(clean, i, segments, arrays.query_segments, part)
    return tiles.add_key_gradient(
        tiling, arrays.query[part, :], keys, None, mask, columns.load(part),
        gradients)

  zeros = jnp.zeros(keys.key.shape, jnp.float32)
  d_key, d_value = jax.lax.fori_loop(first, end, add, (zeros, zeros))
  d_key_ref[...] = d_key.astype(d_key_ref.dtype)
  d_value_ref[...] = d_value.astype(d_value_ref.dtype)


def _specs(arrays, queries, keys):
  """How arrays are cut: `tiles.whole` on the side that programs loop over, the
  program's tile on the other."""
  return Arrays(
      queries(arrays.query), queries(arrays.query_segments), keys(arrays.key),
      keys(arrays.value), keys(arrays.segment_ids))


def forward(
    tiling: Tiling, query_tile: int, arrays: Arrays, spans: jax.Array,
    parts: int, heads_first: bool = False) -> tuple[jax.Array, jax.Array]:
  """What queries attend to, [B, T, H, K], and the logarithm in base 2 of the
  softmax's sum, [B, H, T], in float32; `parts` programs share the keys of a
  tile of queries. `spans`: [B, query tiles, 4], from which to before which tile
  of keys a tile of queries sees any, and those of which every query sees every
  key. `heads_first`: keys and values are."""
  batch, length, heads, size = arrays.query.shape
  output = jax.ShapeDtypeStruct(arrays.query.shape, arrays.query.dtype)
  lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
  found = tiles.call(
      tiling, partial(_forward, tiling),
      (batch, heads, length // query_tile, parts),
      [_specs(arrays, partial(tiles.tiles, size=query_tile),
              partial(tiles.whole, heads_first=heads_first)),
       tiles.of_tile(spans)],
      [pl.BlockSpec((None, None, query_tile, None, size),
                    lambda b, h, i, p: (p, b, i, h, 0)),
       pl.BlockSpec((None, None, None, query_tile),
                    lambda b, h, i, p: (p, b, h, i))],
      [jax.ShapeDtypeStruct(
          (parts, *x.shape), x.dtype if parts == 1 else jnp.float32)
       for x in (output, lse)],
      'longt5_segment_attention_forward')(arrays, spans)
  if parts == 1:
    return found[0][0], found[1][0]
  # XLA would make two or three kernels of this. Few rows, so that registers
  # hold all parts of them, or one by one.
  rows = 1 if length % _JOINED else _JOINED
  return tiles.call(
      tiling, _join, (batch, heads, length // rows),
      [pl.BlockSpec((parts, None, rows, None, size),
                    lambda b, h, i: (0, b, i, h, 0)),
       pl.BlockSpec((parts, None, None, rows), lambda b, h, i: (0, b, h, i))],
      [tiles.tiles(output, rows), tiles.row_tiles(lse, rows)],
      [output, lse], 'longt5_segment_attention_join')(*found)


def backward_query(
    tiling: Tiling, query_tile: int, arrays: Arrays, spans: jax.Array,
    rows: Rows, parts: int) -> jax.Array:
  """The gradient of queries, [parts, B, T, H, K] in float32; it is the sum over
  parts. `spans` is that of `forward`."""
  batch, length, heads, size = arrays.query.shape
  row = tiles.row_tiles(rows.lse, query_tile)
  return tiles.call(
      tiling, partial(_backward_query, tiling),
      (batch, heads, length // query_tile, parts),
      [_specs(arrays, partial(tiles.tiles, size=query_tile), tiles.whole),
       tiles.of_tile(spans),
       Rows(tiles.tiles(rows.gradient, query_tile), row, row)],
      pl.BlockSpec((None, None, query_tile, None, size),
                   lambda b, h, i, p: (p, b, i, h, 0)),
      jax.ShapeDtypeStruct((parts, *arrays.query.shape), jnp.float32),
      'longt5_segment_attention_backward_query')(arrays, spans, rows)


def backward_key(
    tiling: Tiling, query_tile: int, arrays: Arrays, spans: jax.Array,
    columns: Columns) -> tuple[jax.Array, jax.Array]:
  """The gradients of keys and values, [B, S, H, K]. `spans`: [B, S / tile, 4],
  as for `forward` the other way round."""
  batch, length, heads, _ = arrays.key.shape
  key = tiles.tiles(arrays.key, tiling.tile)
  shape = jax.ShapeDtypeStruct(arrays.key.shape, arrays.key.dtype)
  return tiles.call(
      tiling, partial(_backward_key, tiling, query_tile),
      (batch, heads, length // tiling.tile),
      [_specs(arrays, tiles.whole, partial(tiles.tiles, size=tiling.tile)),
       tiles.of_tile(spans), tiles.column_specs(columns)],
      [key, key], [shape, shape],
      'longt5_segment_attention_backward_key')(arrays, spans, columns)

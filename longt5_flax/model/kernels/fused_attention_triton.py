"""The GPU kernels of fused attention, through Pallas' Triton backend.

Long because forward and backward share one geometry: tiles of tokens, tiles of
global tokens around them, and biases by offset. `fused_attention` says what
they compute.

A query tile meets three kinds of key tiles:

  local   the tiles whose tokens may lie within reach. The bias of each
          relative tile is a dense Toeplitz tile with the band cut out.
  near    global tokens within reach, in a window that begins at the same
          offset from the first block of every query tile; so one tile of
          biases, [rows, near], serves all, spread to tokens by a product with
          a one-hot matrix of the row (block) that each token is in.
  far     global tokens beyond reach on either side: one number a side.

No two programs add to one address, so results do not depend on their order.

`Tokens`, `Globals`, `GlobalTiles` and `Rows` hold arrays outside of kernels,
their references inside, and in between how arrays are cut for a grid.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from longt5_flax.model.kernels import triton_tiles as tiles
from longt5_flax.model.kernels.triton_tiles import (
    LOG2_E,
    Columns,
    Rows,
    Tiling,
)

# Of kernels whose programs have queries: more would leave room for fewer
# programs on a multiprocessor, and are slower.
_QUERY_STAGES = 2


class Geometry(NamedTuple):
  """What is known when a kernel is compiled.

  Attributes:
    tiling: of tokens, and of global tokens.
    behind, ahead: how far before and after itself a query sees local keys.
    rows: of the near bias: blocks that tokens of a tile may be in.
    near: global tokens of the near window; 0 without global tokens.
  """
  tiling: Tiling
  behind: int
  ahead: int
  rows: int
  near: int

  @property
  def tile(self) -> int:
    return self.tiling.tile

  @property
  def tiles_behind(self) -> int:
    """Local key tiles before a query tile's own."""
    return -(-self.behind // self.tile)

  @property
  def tiles_ahead(self) -> int:
    """Local key tiles after a query tile's own."""
    return -(-self.ahead // self.tile)

  @property
  def local_tiles(self) -> int:
    return self.tiles_behind + 1 + self.tiles_ahead


class Tokens(NamedTuple):
  """Tokens and their biases, as the kernels take them; L whole tiles.

  Attributes:
    query, key, value: [B, L, H, K].
    segment_ids: [B, L], 0 is padding.
    bias: [H, local_tiles, tile, tile], the band cut out; queries and keys, the
      other way round and in base 2 for the gradients of keys.
    clean: [B, L / tile, 2], from which to before which of the tiles within
      reach of a tile of queries they all see every key; or of query tiles for
      a tile of keys; or for `backward_local_bias` of query tiles for a tile of
      the bias, [B, local_tiles, 2].
  """
  query: Any
  key: Any
  value: Any
  segment_ids: Any
  bias: Any
  clean: Any


class Globals(NamedTuple):
  """Global tokens and their biases, as the kernels take them.

  Attributes:
    key, value: [B, P, H, K], padded on both sides so that no window leaves it.
    segment_ids: [B, P], 0 is none.
    rows: [B, L], which row of the near bias a token has; without a block none,
      `Geometry.rows`, and no bias towards far tiles.
    spans: [B, L / tile, 5]: where the near window of a query tile begins in P;
      how many far tiles lie before and behind it; and from which to before
      which global token every query sees every key.
    near_bias: [H, 2 * rows, near], the higher parts of rows and the lower:
      operands of products.
    far_bias: [H, 2] in base 2, before and behind.
  """
  key: Any
  value: Any
  segment_ids: Any
  rows: Any
  spans: Any
  near_bias: Any
  far_bias: Any


class GlobalTiles(NamedTuple):
  """The global tokens once more, as `backward_side` goes through them.

  Attributes:
    key, value: [B, S, H, K], whole tiles.
    segment_ids: [B, S].
    bounds: [B, S / tile, 6]: of the query tiles that a tile is seen by, from
      the first to the last: where those begin to which it is far behind, near,
      far before, and where they end; and from which to before which of them
      every query sees every key.
    firsts: [B, L / tile], the block that has row 0 of a query tile.
    bias: [H, 2 * offsets, tile]: of row o, the bias at offsets from o - shift
      on, where `shift` is an argument, the higher and the lower part.
    one_hot: [B, L, 2 * rows], which of a query tile's rows of it a token has.
    far_bias: see `Globals`.
  """
  key: Any
  value: Any
  segment_ids: Any
  bounds: Any
  firsts: Any
  bias: Any
  one_hot: Any
  far_bias: Any


class Outputs(NamedTuple):
  """What `backward_query` makes `Rows` of.

  Attributes:
    gradient, lse: see `Rows`.
    output: of the forward pass, [B, L, H, K].
  """
  gradient: Any
  lse: Any
  output: Any


class _Side(NamedTuple):
  """One query tile's view of the global tokens, inside a kernel."""
  refs: Globals
  rows: Any
  segments: Any
  far_bias: tuple[Any, Any]
  window: Any
  before: Any
  behind: Any
  clean: tuple[Any, Any]

  def near(self, geometry, i):
    """The i-th tile of the near window, its mask, and its bias."""
    parts = self.refs.near_bias[:, tiles.at(i, geometry.tile)]
    part = jax.lax.broadcasted_iota(
        jnp.int32, (geometry.tile, 2 * geometry.rows), 1)
    one_hot = part % geometry.rows == self.rows[:, None]
    return (*self._load(geometry, self.window + i * geometry.tile),
            tiles.Spread(one_hot.astype(parts.dtype), parts))

  def far(self, geometry, i):
    """The i-th far tile, its mask, its bias of queries, and whether it lies
    before."""
    is_before = i < self.before
    start = self.window + jnp.where(
        is_before, -(i + 1) * geometry.tile,
        geometry.near + (i - self.before) * geometry.tile)
    return (*self._load(geometry, start),
            jnp.where(is_before, *self.far_bias), is_before)

  def _load(self, geometry, start):
    part = pl.ds(start, geometry.tile)
    is_clean = (self.clean[0] <= start) & (
        start + geometry.tile <= self.clean[1])
    return tiles.load_keys(self.refs, part), tiles.Mask(
        is_clean, lambda scores: tiles.hidden(
            scores, self.segments, self.refs.segment_ids[part]))


def _with_block(geometry, rows, values):
  """Values of tokens that have a block, 0 for others."""
  return jnp.where(rows < geometry.rows, values, 0)


def _side(geometry, refs, tile, segments):
  rows = refs.rows[tiles.at(tile, geometry.tile)]
  window, before, behind, *clean = (refs.spans[i] for i in range(5))
  far_bias = tuple(
      _with_block(geometry, rows, refs.far_bias[i]) for i in range(2))
  return _Side(
      refs, rows, segments, far_bias, window, before, behind, tuple(clean))


def _range_around(geometry, tile, before, after, length):
  """The tiles from `before` before a tile to `after` after it."""
  return (jnp.maximum(tile - before, 0),
          jnp.minimum(tile + after + 1, length // geometry.tile))


def _fold_local(geometry, tokens, tile, segments, body, carry):
  """Goes through the tiles of keys near a tile of queries: (keys, mask, bias,
  carry) -> carry."""
  clean = tiles.span(tokens.clean)

  def step(j, carry):
    part = tiles.at(j, geometry.tile)
    mask = tiles.segment_mask(clean, j, segments, tokens.segment_ids, part)
    return body(tiles.load_keys(tokens, part), mask,
                tokens.bias[j - tile + geometry.tiles_behind], carry)

  first, end = _range_around(
      geometry, tile, geometry.tiles_behind, geometry.tiles_ahead,
      tokens.key.shape[0])
  return jax.lax.fori_loop(first, end, step, carry)


def _forward(geometry, tokens, side_refs, out_ref, lse_ref):
  tile = pl.program_id(2)
  query = tokens.query[...]
  segments = tokens.segment_ids[tiles.at(tile, geometry.tile)]

  def attend(keys, mask, bias, softmax, shift=0.0):
    return tiles.attend(
        geometry.tiling, query, keys, bias, mask, softmax, shift)

  softmax = _fold_local(
      geometry, tokens, tile, segments, attend, tiles.no_keys(query))
  if side_refs is not None:
    side = _side(geometry, side_refs, tile, segments)

    def near(i, softmax):
      keys, mask, bias = side.near(geometry, i)
      return attend(keys, mask, bias, softmax)

    def far(i, softmax):
      keys, mask, shift, _ = side.far(geometry, i)
      return attend(keys, mask, None, softmax, shift)

    softmax = jax.lax.fori_loop(
        0, geometry.near // geometry.tile, near, softmax)
    softmax = jax.lax.fori_loop(0, side.before + side.behind, far, softmax)
  # A real token sees itself.
  tiles.write(softmax, segments > 0, out_ref, lse_ref)


def _backward_query(geometry, tokens, side_refs, outputs, d_query_ref,
                    delta_ref, statistics_ref, *side_bias_refs):
  tile = pl.program_id(2)
  query = tokens.query[...]
  segments = tokens.segment_ids[tiles.at(tile, geometry.tile)]
  gradient = outputs.gradient[...]
  of_rows = Rows(gradient, outputs.lse[...], jnp.sum(
      gradient.astype(jnp.float32) * outputs.output[...], axis=1))
  delta_ref[...] = of_rows.delta
  statistics_ref[...] = tiles.statistics(
      of_rows.lse, of_rows.delta, gradient.dtype)

  def add(keys, mask, bias, d_query, shift=0.0):
    d_scores = tiles.score_gradient(
        geometry.tiling, query, keys, bias, mask, of_rows, shift)
    return d_scores, d_query + tiles.apart(geometry.tiling, tiles.dot(
        geometry.tiling, d_scores.astype(keys.key.dtype), keys.key))

  def local(keys, mask, bias, d_query):
    return add(keys, mask, bias, d_query)[1]

  d_query = _fold_local(
      geometry, tokens, tile, segments, local,
      jnp.zeros(query.shape, jnp.float32))
  if side_refs is not None:
    side = _side(geometry, side_refs, tile, segments)
    d_near_ref, d_far_ref = side_bias_refs

    def near(i, d_query):
      keys, mask, bias = side.near(geometry, i)
      d_scores, d_query = add(keys, mask, bias, d_query)
      # Of every part, hence the same for both of a row.
      d_near_ref[:, tiles.at(i, geometry.tile)] = tiles.dot(
          geometry.tiling, bias.one_hot.T, d_scores.astype(query.dtype))
      return d_query

    def far(i, carry):
      d_query, d_before, d_behind = carry
      keys, mask, shift, is_before = side.far(geometry, i)
      d_scores, d_query = add(keys, mask, None, d_query, shift)
      d_bias = jnp.sum(d_scores, axis=1)
      return (d_query, d_before + jnp.where(is_before, d_bias, 0),
              d_behind + jnp.where(is_before, 0, d_bias))

    d_query = jax.lax.fori_loop(
        0, geometry.near // geometry.tile, near, d_query)
    zeros = jnp.zeros((geometry.tile,), jnp.float32)
    d_query, *d_far = jax.lax.fori_loop(
        0, side.before + side.behind, far, (d_query, zeros, zeros))
    for i, d_bias in enumerate(d_far):
      d_far_ref[i] = jnp.sum(_with_block(geometry, side.rows, d_bias))
  d_query_ref[...] = d_query.astype(d_query_ref.dtype)


def _backward_key(geometry, tokens, columns, d_key_ref, d_value_ref):
  tile = pl.program_id(2)
  own = tiles.at(tile, geometry.tile)
  keys, segments = tiles.load_keys(tokens, own), tokens.segment_ids[own]
  clean, columns = tiles.span(tokens.clean), columns.hold()

  def of_query_tile(i, gradients):
    part = tiles.at(i, geometry.tile)
    mask = tiles.segment_mask(clean, i, segments, tokens.segment_ids, part)
    return tiles.add_key_gradient(
        geometry.tiling, tokens.query[part, :], keys, None, mask,
        columns.load(part), gradients,
        tokens.bias[tile - i + geometry.tiles_behind])

  zeros = jnp.zeros(keys.key.shape, jnp.float32)
  first, end = _range_around(
      geometry, tile, geometry.tiles_ahead, geometry.tiles_behind,
      tokens.key.shape[0])
  d_key, d_value = jax.lax.fori_loop(
      first, end, of_query_tile, (zeros, zeros))
  d_key_ref[...] = d_key.astype(d_key_ref.dtype)
  d_value_ref[...] = d_value.astype(d_value_ref.dtype)


def _backward_side(geometry, shift, tokens, side, columns, d_key_ref,
                   d_value_ref):
  """Part p of the query tiles that a tile of global tokens is seen by."""
  tile, part, parts = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
  keys = tiles.Keys(side.key[...], side.value[...])
  segments, columns = side.segment_ids[...], columns.hold()
  start, near, far, end, *clean = (side.bounds[i] for i in range(6))
  far_bias = side.far_bias[1], side.far_bias[0]
  size = (end - start + parts - 1) // parts
  start = start + part * size
  end = jnp.maximum(start, jnp.minimum(start + size, end))
  near, far = tiles.clip_span((near, far), start, end)

  def add(i, spread, gradients, bias=0.0):
    part = tiles.at(i, geometry.tile)

    def hide(scores):
      if spread is None:
        has_block = jnp.max(side.one_hot[part, :].astype(jnp.float32), axis=1)
        scores -= ((1 - has_block) * bias / LOG2_E)[None, :]
      return tiles.hidden(scores, segments, tokens.segment_ids[part])

    mask = tiles.Mask(tiles.within(clean, i), hide)
    return tiles.add_key_gradient(
        geometry.tiling, tokens.query[part, :], keys, spread, mask,
        columns.load(part), gradients, bias)

  def add_near(i, gradients):
    offset = tile * geometry.tile - side.firsts[i] + shift
    start = 2 * (offset - geometry.rows + 1)
    return add(i, tiles.Spread(
        side.one_hot[tiles.at(i, geometry.tile), :],
        side.bias[pl.ds(start, 2 * geometry.rows), :]), gradients)

  def add_far(i, gradients):
    return add(i, None, gradients, jnp.where(i < near, *far_bias))

  zeros = jnp.zeros(keys.key.shape, jnp.float32)
  gradients = jax.lax.fori_loop(near, far, add_near, (zeros, zeros))
  d_key_ref[...], d_value_ref[...] = tiles.fold_around(
      start, end, (near, far), add_far, gradients)


def _backward_local_bias(geometry, tokens, rows, d_bias_ref):
  """The gradient of one relative tile's bias, over a part of the batch's query
  tiles."""
  relative = pl.program_id(1) - geometry.tiles_behind
  bias = tokens.bias[...]
  count = tokens.query.shape[0] // geometry.tile
  clean = tiles.span(tokens.clean)

  def of_query_tile(i, d_bias):
    part = tiles.at(i, geometry.tile)
    of_keys = tiles.at(i + relative, geometry.tile)
    mask = tiles.Mask(
        tiles.within(clean, i), lambda scores: tiles.hidden(
            scores, tokens.segment_ids[part], tokens.segment_ids[of_keys]))
    return d_bias + tiles.score_gradient(
        geometry.tiling, tokens.query[part, :],
        tiles.load_keys(tokens, of_keys), bias, mask, rows.load(part))

  parts = pl.num_programs(3)
  size = (count + parts - 1) // parts
  start = pl.program_id(3) * size
  d_bias_ref[...] = jax.lax.fori_loop(
      jnp.maximum(start, -relative),
      jnp.minimum(jnp.minimum(start + size, count), count - relative),
      of_query_tile, jnp.zeros(bias.shape, jnp.float32))


def _by_head(x):
  """A bias: all of it that belongs to the head."""
  return pl.BlockSpec((None, *x.shape[1:]),
                      lambda b, h, *_: (h,) + (0,) * (x.ndim - 1))


def _token_specs(tokens, query):
  return Tokens(query, tiles.whole(tokens.key), tiles.whole(tokens.value),
                tiles.whole(tokens.segment_ids), _by_head(tokens.bias),
                tiles.of_tile(tokens.clean))


def _global_specs(side):
  if side is None:
    return None
  return Globals(
      tiles.whole(side.key), tiles.whole(side.value),
      tiles.whole(side.segment_ids), tiles.whole(side.rows),
      tiles.of_tile(side.spans), _by_head(side.near_bias),
      _by_head(side.far_bias))


def forward(geometry: Geometry, tokens: Tokens, side: Globals | None
            ) -> tuple[jax.Array, jax.Array]:
  """What tokens attend to, [B, L, H, K], and the logarithm in base 2 of each
  softmax's sum, [B, H, L]."""
  batch, length, heads, _ = tokens.query.shape
  query = tiles.tiles(tokens.query, geometry.tile)
  lse = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)
  return tiles.call(
      geometry.tiling._replace(stages=_QUERY_STAGES),
      partial(_forward, geometry),
      (batch, heads, length // geometry.tile),
      [_token_specs(tokens, query), _global_specs(side)],
      [query, tiles.row_tiles(lse, geometry.tile)],
      [jax.ShapeDtypeStruct(tokens.query.shape, tokens.query.dtype), lse],
      'longt5_attention_forward')(tokens, side)


def backward_query(
    geometry: Geometry, tokens: Tokens, side: Globals | None, outputs: Outputs
) -> tuple[jax.Array, ...]:
  """The gradient of queries, [B, L, H, K], `Rows.delta` and
  `Columns.statistics`; with global tokens also the gradients of the near
  biases, [B, H, L / tile, 2 * rows, near], where the second half repeats the
  first, and of the far ones, [B, H, L / tile, 2], of each query tile by itself.
  """
  batch, length, heads, _ = tokens.query.shape
  count = length // geometry.tile
  query = tiles.tiles(tokens.query, geometry.tile)
  row = tiles.row_tiles(outputs.lse, geometry.tile)
  statistics = pl.BlockSpec((None, None, geometry.tile, tiles.STATISTICS),
                            lambda b, h, i: (b, h, i, 0))
  specs = [query, row, statistics]
  shapes = [jax.ShapeDtypeStruct(tokens.query.shape, tokens.query.dtype),
            jax.ShapeDtypeStruct(outputs.lse.shape, jnp.float32),
            jax.ShapeDtypeStruct((*outputs.lse.shape, tiles.STATISTICS),
                                 tokens.query.dtype)]
  if side is not None:
    near = (2 * geometry.rows, geometry.near)
    specs += [pl.BlockSpec((None, None, None, *near),
                           lambda b, h, i: (b, h, i, 0, 0)),
              pl.BlockSpec((None, None, None, 2), lambda b, h, i: (b, h, i, 0))]
    shapes += [jax.ShapeDtypeStruct((batch, heads, count, *shape), jnp.float32)
               for shape in (near, (2,))]
  return tiles.call(
      geometry.tiling._replace(stages=_QUERY_STAGES),
      partial(_backward_query, geometry),
      (batch, heads, count),
      [_token_specs(tokens, query), _global_specs(side),
       Outputs(query, row, query)],
      specs, shapes, 'longt5_attention_backward_query')(tokens, side, outputs)


def backward_key(geometry: Geometry, tokens: Tokens, columns: Columns
                 ) -> tuple[jax.Array, jax.Array]:
  """The gradients of keys and values, [B, L, H, K]."""
  batch, length, heads, _ = tokens.query.shape
  key = tiles.tiles(tokens.key, geometry.tile)
  shape = jax.ShapeDtypeStruct(tokens.key.shape, tokens.key.dtype)
  return tiles.call(
      geometry.tiling, partial(_backward_key, geometry),
      (batch, heads, length // geometry.tile),
      [_token_specs(tokens, tiles.whole(tokens.query)),
       tiles.column_specs(columns)],
      [key, key], [shape, shape],
      'longt5_attention_backward_key')(tokens, columns)


def backward_side(
    geometry: Geometry, tokens: Tokens, side: GlobalTiles, shift: int,
    columns: Columns, parts: int
) -> tuple[jax.Array, jax.Array]:
  """The gradients of global keys and values, [parts, B, S, H, K] in float32;
  they are the sums over parts.

  Args:
    geometry, tokens, columns: as of the other kernels.
    side: the global tokens.
    shift: see `GlobalTiles`.
    parts: programs that share a tile's queries.
  """
  batch, globals_, heads, size = side.key.shape
  key = tiles.tiles(side.key, geometry.tile)
  specs = GlobalTiles(
      key, key, tiles.tiles(side.segment_ids, geometry.tile),
      tiles.of_tile(side.bounds), tiles.whole(side.firsts),
      _by_head(side.bias),
      pl.BlockSpec((None, *side.one_hot.shape[1:]), lambda b, *_: (b, 0, 0)),
      _by_head(side.far_bias))
  out = pl.BlockSpec((None, None, geometry.tile, None, size),
                     lambda b, h, i, p: (p, b, i, h, 0))
  shape = jax.ShapeDtypeStruct(
      (parts, batch, globals_, heads, size), jnp.float32)
  return tiles.call(
      geometry.tiling, partial(_backward_side, geometry, shift),
      (batch, heads, globals_ // geometry.tile, parts),
      [_token_specs(tokens, tiles.whole(tokens.query)), specs,
       tiles.column_specs(columns)],
      [out, out], [shape, shape], 'longt5_attention_backward_side')(
          tokens, side, columns)


def backward_local_bias(geometry: Geometry, tokens: Tokens, rows: Rows,
                        parts: int) -> jax.Array:
  """The gradient of the local bias, [B, parts, H, local_tiles, tile, tile];
  it is the sum over rows and parts."""
  batch, _, heads, _ = tokens.query.shape

  def of_row(x):
    if x.ndim == 2:
      return pl.BlockSpec((None, x.shape[1]), lambda h, d, b, p: (b, 0))
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]),
                        lambda h, d, b, p: (b, 0, h, 0))

  by_head = pl.BlockSpec((None, None, tokens.query.shape[1]),
                         lambda h, d, b, p: (b, h, 0))
  tile = (geometry.tile, geometry.tile)
  bias = pl.BlockSpec((None, None, *tile), lambda h, d, b, p: (h, d, 0, 0))
  return tiles.call(
      geometry.tiling, partial(_backward_local_bias, geometry),
      (heads, geometry.local_tiles, batch, parts),
      [Tokens(of_row(tokens.query), of_row(tokens.key), of_row(tokens.value),
              of_row(tokens.segment_ids), bias,
              pl.BlockSpec((None, None, 2), lambda h, d, b, p: (b, d, 0))),
       Rows(of_row(rows.gradient), by_head, by_head)],
      pl.BlockSpec((None, None, None, None, *tile),
                   lambda h, d, b, p: (b, p, h, d, 0, 0)),
      jax.ShapeDtypeStruct(
          (batch, parts, heads, geometry.local_tiles, *tile), jnp.float32),
      'longt5_attention_backward_local_bias')(tokens, rows)

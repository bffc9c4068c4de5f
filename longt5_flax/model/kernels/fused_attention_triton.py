"""The GPU kernels of fused attention, through Pallas' Triton backend.

Long because forward and backward share one geometry: tiles of tokens, tiles of
global tokens around them, and biases by offset. `fused_attention` says what
they compute.

A query tile meets three kinds of key tiles:

  local   the tiles whose tokens may lie within the radius. The bias of each
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
from longt5_flax.model.kernels.triton_tiles import Rows, Tiling

# Of kernels whose programs have queries: more would leave room for fewer
# programs on a multiprocessor, and are slower.
_QUERY_STAGES = 2


class Geometry(NamedTuple):
  """What is known when a kernel is compiled.

  Attributes:
    tiling: of tokens, and of global tokens.
    reach_tiles: local key tiles on either side of a query tile's own.
    rows: of the near bias: blocks that tokens of a tile may be in.
    near: global tokens of the near window; 0 without global tokens.
  """
  tiling: Tiling
  reach_tiles: int
  rows: int
  near: int

  @property
  def tile(self) -> int:
    return self.tiling.tile

  @property
  def local_tiles(self) -> int:
    return 2 * self.reach_tiles + 1


class Tokens(NamedTuple):
  """Tokens and their biases, as the kernels take them; L whole tiles.

  Attributes:
    query, key, value: [B, L, H, K].
    segment_ids: [B, L], 0 is padding.
    bias: [H, local_tiles, tile, tile] in base 2, the band cut out; queries and
      keys, the other way round for the gradients of keys.
  """
  query: Any
  key: Any
  value: Any
  segment_ids: Any
  bias: Any


class Globals(NamedTuple):
  """Global tokens and their biases, as the kernels take them.

  Attributes:
    key, value: [B, P, H, K], padded on both sides so that no window leaves it.
    segment_ids: [B, P], 0 is none.
    rows: [B, L], which row of the near bias a token has; without a block none,
      `Geometry.rows`, and no bias towards far tiles.
    spans: [B, L / tile, 5]: where the near window of a query tile begins in P;
      how many far tiles lie before and behind it; and of how many of them, the
      nearest, every query sees every key.
    near_bias: [H, 2 * rows, near] in base e, the higher parts of rows and the
      lower: operands of products.
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
    rows: see `Globals`.
    bias: [H, 2 * offsets, tile] in base e: of row o, the bias at offsets from
      o - shift on, where `shift` is an argument, the higher and the lower part.
    far_bias: see `Globals`.
  """
  key: Any
  value: Any
  segment_ids: Any
  bounds: Any
  firsts: Any
  rows: Any
  bias: Any
  far_bias: Any


class _Side(NamedTuple):
  """One query tile's view of the global tokens, inside a kernel."""
  refs: Globals
  rows: Any
  window: Any
  before: Any
  behind: Any
  clean_before: Any
  clean_behind: Any

  def near(self, geometry, i):
    """The i-th tile of the near window, and its bias."""
    part = tiles.at(i, geometry.tile)
    parts = self.refs.near_bias[:, part]
    one_hot = _one_hot(
        self.rows, geometry.rows, lambda i: i % geometry.rows, parts)
    return (self._load(geometry, self.window + i * geometry.tile),
            tiles.Spread(one_hot, parts))

  def far(self, geometry, is_before, i, is_masked):
    """The i-th far tile on one side, and its bias: one number if no mask is
    needed, as every query has a block then."""
    start = jnp.where(
        is_before, self.window - (i + 1) * geometry.tile,
        self.window + geometry.near + i * geometry.tile)
    bias = self.refs.far_bias[jnp.where(is_before, 0, 1)]
    if is_masked:
      bias = _with_block(geometry, self.rows, bias)[:, None]
    return self._load(geometry, start), bias

  def fold_far(self, some, every, carry):
    """Goes through the far tiles, (is it before, which one, carry) -> carry:
    with `every` through those of which every query sees every key, with `some`
    through others."""
    def clean(i, carry):
      is_before = i < self.clean_before
      return every(
          is_before, i - jnp.where(is_before, 0, self.clean_before), carry)

    before = self.before - self.clean_before

    def masked(i, carry):
      is_before = i < before
      first = jnp.where(
          is_before, self.clean_before, self.clean_behind - before)
      return some(is_before, first + i, carry)

    carry = jax.lax.fori_loop(
        0, self.clean_before + self.clean_behind, clean, carry)
    return jax.lax.fori_loop(
        0, before + self.behind - self.clean_behind, masked, carry)

  def _load(self, geometry, start):
    part = pl.ds(start, geometry.tile)
    return tiles.Keys(self.refs.key[part, :], self.refs.value[part, :],
                      self.refs.segment_ids[part])


def _with_block(geometry, rows, values):
  """Values of tokens that have a block, 0 for others."""
  return jnp.where(rows < geometry.rows, values, 0)


def _one_hot(rows, count, row_of_part, parts):
  """[tokens, parts]: which parts are of the row that a token has."""
  shape = rows.shape[0], 2 * count
  part = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  return (row_of_part(part) == rows[:, None]).astype(parts.dtype)


def _side(geometry, refs, tile):
  rows = refs.rows[tiles.at(tile, geometry.tile)]
  return _Side(refs, rows, *(refs.spans[i] for i in range(5)))


def _local_range(geometry, tile, length):
  """The local key tiles of a query tile, and as well the other way round."""
  reach = geometry.reach_tiles
  return (jnp.maximum(tile - reach, 0),
          jnp.minimum(tile + reach + 1, length // geometry.tile))


def _forward(geometry, tokens, side_refs, out_ref, lse_ref):
  tile = pl.program_id(2)
  query = tokens.query[...]
  segments = tokens.segment_ids[tiles.at(tile, geometry.tile)]

  attend = partial(tiles.attend, geometry.tiling, query, segments)

  def local(j, softmax):
    return attend(tiles.load_keys(geometry.tiling, tokens, j),
                  tokens.bias[j - tile + geometry.reach_tiles], softmax)

  first, end = _local_range(geometry, tile, tokens.key.shape[0])
  softmax = jax.lax.fori_loop(
      first, end, local, tiles.no_keys(geometry.tiling, query.shape[1]))
  if side_refs is not None:
    side = _side(geometry, side_refs, tile)

    def near(i, softmax):
      keys, bias = side.near(geometry, i)
      return attend(keys, bias, softmax)

    def some(is_before, i, softmax):
      keys, bias = side.far(geometry, is_before, i, True)
      return attend(keys, bias, softmax)

    def every(is_before, i, softmax):
      keys, bias = side.far(geometry, is_before, i, False)
      return tiles.attend_to_all(geometry.tiling, query, keys, bias, softmax)

    softmax = jax.lax.fori_loop(
        0, geometry.near // geometry.tile, near, softmax)
    softmax = side.fold_far(some, every, softmax)
  # A real token sees itself.
  tiles.write(softmax, segments > 0, out_ref, lse_ref)


def _backward_query(geometry, tokens, side_refs, rows, d_query_ref,
                    d_near_ref=None, d_far_ref=None):
  tile = pl.program_id(2)
  query = tokens.query[...]
  segments = tokens.segment_ids[tiles.at(tile, geometry.tile)]
  of_rows = rows.load(geometry.tiling, tile)

  def add(segments, keys, bias, d_query):
    _, d_scores = tiles.weights_and_gradient(
        geometry.tiling, query, segments, keys, bias, of_rows)
    return d_scores, d_query + tiles.apart(geometry.tiling, tiles.dot(
        geometry.tiling, d_scores.astype(keys.key.dtype), keys.key))

  def local(j, d_query):
    return add(segments, tiles.load_keys(geometry.tiling, tokens, j),
               tokens.bias[j - tile + geometry.reach_tiles], d_query)[1]

  first, end = _local_range(geometry, tile, tokens.key.shape[0])
  d_query = jax.lax.fori_loop(
      first, end, local, jnp.zeros(query.shape, jnp.float32))
  if side_refs is not None:
    side = _side(geometry, side_refs, tile)
    rows = jax.lax.broadcasted_iota(
        jnp.int32, (geometry.rows, geometry.tile), 0)
    one_hot = (rows == side.rows[None, :]).astype(query.dtype)

    def near(i, d_query):
      keys, bias = side.near(geometry, i)
      d_scores, d_query = add(segments, keys, bias, d_query)
      d_near_ref[:, tiles.at(i, geometry.tile)] = tiles.dot(
          geometry.tiling, one_hot, d_scores.astype(query.dtype))
      return d_query

    def far(segments, is_before, i, carry):
      d_query, d_before, d_behind = carry
      keys, bias = side.far(geometry, is_before, i, segments is not None)
      d_scores, d_query = add(segments, keys, bias, d_query)
      d_bias = _with_block(geometry, side.rows, jnp.sum(d_scores, axis=1))
      return (d_query, d_before + jnp.where(is_before, d_bias, 0),
              d_behind + jnp.where(is_before, 0, d_bias))

    d_query = jax.lax.fori_loop(
        0, geometry.near // geometry.tile, near, d_query)
    zeros = jnp.zeros((geometry.tile,), jnp.float32)
    d_query, *d_far = side.fold_far(
        partial(far, segments), partial(far, None), (d_query, zeros, zeros))
    for i, d_bias in enumerate(d_far):
      d_far_ref[i] = jnp.sum(d_bias)
  d_query_ref[...] = d_query.astype(d_query_ref.dtype)


def _add_key_gradient(geometry, tokens, rows, i, keys, bias, gradients,
                      is_masked=True):
  """Adds what the i-th query tile says of a tile of keys and values."""
  part = tiles.at(i, geometry.tile)
  segments = tokens.segment_ids[part] if is_masked else None
  return tiles.add_key_gradient(
      geometry.tiling, tokens.query[part, :], segments, keys, bias,
      rows.load(geometry.tiling, i), gradients)


def _backward_key(geometry, tokens, rows, d_key_ref, d_value_ref):
  tile = pl.program_id(2)
  keys = tiles.load_keys(geometry.tiling, tokens, tile)

  def of_query_tile(i, gradients):
    return _add_key_gradient(
        geometry, tokens, rows, i, keys,
        tokens.bias[tile - i + geometry.reach_tiles], gradients)

  zeros = jnp.zeros(keys.key.shape, jnp.float32)
  first, end = _local_range(geometry, tile, tokens.key.shape[0])
  d_key, d_value = jax.lax.fori_loop(
      first, end, of_query_tile, (zeros, zeros))
  d_key_ref[...] = d_key.astype(d_key_ref.dtype)
  d_value_ref[...] = d_value.astype(d_value_ref.dtype)


def _backward_side(geometry, shift, tokens, side, rows, d_key_ref,
                   d_value_ref):
  """Part p of the query tiles that a tile of global tokens is seen by."""
  tile, part, parts = pl.program_id(2), pl.program_id(3), pl.num_programs(3)
  keys = tiles.Keys(side.key[...], side.value[...], side.segment_ids[...])
  start, near, far, end, clean_first, clean_end = (
      side.bounds[i] for i in range(6))
  size = (end - start + parts - 1) // parts
  start = start + part * size
  end = jnp.maximum(start, jnp.minimum(start + size, end))

  def within(i):
    # Rows of the bias go up with the offset, hence down with the block.
    offset = tile * geometry.tile - side.firsts[i] + shift
    token_rows = side.rows[tiles.at(i, geometry.tile)]
    last = geometry.rows - 1
    parts = side.bias[pl.ds(2 * (offset - last), 2 * geometry.rows), :]
    return tiles.Spread(_one_hot(
        token_rows, geometry.rows, lambda i: last - i // 2, parts), parts)

  def add_near(i, gradients):
    return _add_key_gradient(
        geometry, tokens, rows, i, keys, within(i), gradients)

  def add_far(bias, is_masked, i, gradients):
    if is_masked:
      token_rows = side.rows[tiles.at(i, geometry.tile)]
      bias = _with_block(geometry, token_rows, bias)[None, :]
    return _add_key_gradient(
        geometry, tokens, rows, i, keys, bias, gradients, is_masked)

  near, far = tiles.clip_span((near, far), start, end)
  zeros = jnp.zeros(keys.key.shape, jnp.float32)
  gradients = jax.lax.fori_loop(near, far, add_near, (zeros, zeros))
  for bias, first, last in ((side.far_bias[1], start, near),
                            (side.far_bias[0], far, end)):
    hole = tiles.clip_span((clean_first, clean_end), first, last)
    gradients = tiles.fold_around(
        first, last, hole, partial(add_far, bias, True), gradients)
    gradients = jax.lax.fori_loop(
        *hole, partial(add_far, bias, False), gradients)
  d_key_ref[...], d_value_ref[...] = gradients


def _backward_local_bias(geometry, tokens, rows, d_bias_ref):
  """The gradient of one relative tile's bias, over a part of the batch's query
  tiles."""
  relative = pl.program_id(1) - geometry.reach_tiles
  bias = tokens.bias[...]
  count = tokens.query.shape[0] // geometry.tile

  def of_query_tile(i, d_bias):
    part = tiles.at(i, geometry.tile)
    _, d_scores = tiles.weights_and_gradient(
        geometry.tiling, tokens.query[part, :], tokens.segment_ids[part],
        tiles.load_keys(geometry.tiling, tokens, i + relative), bias,
        rows.load(geometry.tiling, i))
    return d_bias + d_scores

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
                tiles.whole(tokens.segment_ids), _by_head(tokens.bias))


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
  return tiles.call(
      geometry.tiling._replace(stages=_QUERY_STAGES),
      partial(_forward, geometry),
      (batch, heads, length // geometry.tile),
      [_token_specs(tokens, query), _global_specs(side)],
      [query, pl.BlockSpec((None, None, geometry.tile),
                           lambda b, h, i: (b, h, i))],
      [jax.ShapeDtypeStruct(tokens.query.shape, tokens.query.dtype),
       jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
      'longt5_attention_forward')(tokens, side)


def backward_query(
    geometry: Geometry, tokens: Tokens, side: Globals | None, rows: Rows
) -> tuple[jax.Array, ...]:
  """The gradient of queries, [B, L, H, K]; with global tokens also those of
  the near biases, [B, H, L / tile, rows, near], and of the far ones,
  [B, H, L / tile, 2], of each query tile by itself."""
  batch, length, heads, _ = tokens.query.shape
  count = length // geometry.tile
  query = tiles.tiles(tokens.query, geometry.tile)
  specs = [query]
  shapes = [jax.ShapeDtypeStruct(tokens.query.shape, tokens.query.dtype)]
  if side is not None:
    near = (geometry.rows, geometry.near)
    specs += [pl.BlockSpec((None, None, None, *near),
                           lambda b, h, i: (b, h, i, 0, 0)),
              pl.BlockSpec((None, None, None, 2), lambda b, h, i: (b, h, i, 0))]
    shapes += [jax.ShapeDtypeStruct((batch, heads, count, *shape), jnp.float32)
               for shape in (near, (2,))]
  return tiles.call(
      geometry.tiling._replace(stages=_QUERY_STAGES),
      partial(_backward_query, geometry),
      (batch, heads, count),
      [_token_specs(tokens, query), _global_specs(side), tiles.row_specs(rows)],
      specs, shapes, 'longt5_attention_backward_query')(tokens, side, rows)


def backward_key(geometry: Geometry, tokens: Tokens, rows: Rows
                 ) -> tuple[jax.Array, jax.Array]:
  """The gradients of keys and values, [B, L, H, K]."""
  batch, length, heads, _ = tokens.query.shape
  key = tiles.tiles(tokens.key, geometry.tile)
  shape = jax.ShapeDtypeStruct(tokens.key.shape, tokens.key.dtype)
  return tiles.call(
      geometry.tiling, partial(_backward_key, geometry),
      (batch, heads, length // geometry.tile),
      [_token_specs(tokens, tiles.whole(tokens.query)), tiles.row_specs(rows)],
      [key, key], [shape, shape],
      'longt5_attention_backward_key')(tokens, rows)


def backward_side(
    geometry: Geometry, tokens: Tokens, side: GlobalTiles, shift: int,
    rows: Rows, parts: int
) -> tuple[jax.Array, jax.Array]:
  """The gradients of global keys and values, [parts, B, S, H, K] in float32;
  they are the sums over parts.

  Args:
    geometry, tokens, rows: as of the other kernels.
    side: the global tokens.
    shift: see `GlobalTiles`.
    parts: programs that share a tile's queries.
  """
  batch, globals_, heads, size = side.key.shape
  key = tiles.tiles(side.key, geometry.tile)
  specs = GlobalTiles(
      key, key, tiles.tiles(side.segment_ids, geometry.tile),
      tiles.of_tile(side.bounds), tiles.whole(side.firsts),
      tiles.whole(side.rows), _by_head(side.bias), _by_head(side.far_bias))
  out = pl.BlockSpec((None, None, geometry.tile, None, size),
                     lambda b, h, i, p: (p, b, i, h, 0))
  shape = jax.ShapeDtypeStruct(
      (parts, batch, globals_, heads, size), jnp.float32)
  return tiles.call(
      geometry.tiling, partial(_backward_side, geometry, shift),
      (batch, heads, globals_ // geometry.tile, parts),
      [_token_specs(tokens, tiles.whole(tokens.query)), specs,
       tiles.row_specs(rows)],
      [out, out], [shape, shape], 'longt5_attention_backward_side')(
          tokens, side, rows)


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
              of_row(tokens.segment_ids), bias),
       Rows(of_row(rows.gradient), by_head, by_head)],
      pl.BlockSpec((None, None, None, None, *tile),
                   lambda h, d, b, p: (b, p, h, d, 0, 0)),
      jax.ShapeDtypeStruct(
          (batch, parts, heads, geometry.local_tiles, *tile), jnp.float32),
      'longt5_attention_backward_local_bias')(tokens, rows)

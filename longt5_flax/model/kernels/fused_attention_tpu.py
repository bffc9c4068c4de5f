"""The TPU kernels of fused attention, through Pallas' Mosaic backend.

Long because forward and backward share one geometry. `fused_attention_tpu` says
what they compute and makes their arrays; for `segment_attention_tpu` they leave
out what is local, and the biases.

Tokens lie along lanes and features of a head along sublanes: a head is cut out
without moving anything, and XLA leaves what the projections make that way too.
Scores have keys along sublanes and queries along lanes: maxima and sums over
keys are then rows, as are the logarithms that the backward pass reads.

A query tile meets two kinds of keys:

  local   its own tile and a block of tokens on either side, block by block.
          The bias, the same for every block, is a dense Toeplitz tile with the
          band cut out.
  side    tiles of global tokens, one a step of the grid's last dimension. Where
          all offsets are beyond reach the bias is one number. Else it is a
          product: rows of a table over offsets times a one-hot matrix of the
          block that each query is in. Blocks count from the query tile's first
          one, rounded down, so that the table is cut where its memory is
          aligned.

Grids run in order, and what several steps add to stays on the chip between
them: results do not depend on timing. Only groups of heads, the first dimension
of a grid, may be split between cores.

`Tokens`, `Globals` and `Rows` hold arrays outside of kernels, their references
inside, and in between how arrays are cut for a grid.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Of what the band or the segments hide. Finite: a difference of two is 0.
MASKED = -1e30
# The table is cut at multiples of this: sublanes of a bfloat16 register.
ALIGNMENT = 16
# Beyond the ends of a row; no token's segment.
_NOWHERE = -1
# What a kernel may use of on-chip memory: v5p has 64 MiB, v5e 128. The default
# is 16, too little for large radii.
_VMEM_BYTES = 48 * 2**20

# What products sum over: of a matrix's rows and another's columns, of both's
# rows, and of both's columns.
_ROWS_COLUMNS = ((1,), (0,))
_ROWS_ROWS = ((1,), (1,))
_COLUMNS_COLUMNS = ((0,), (0,))


class Geometry(NamedTuple):
  """What is known when a kernel is compiled.

  Attributes:
    block: tokens of a block; the radius or more.
    tile: tokens of a tile; whole blocks.
    side_tile: global tokens of a tile; 0 without global tokens.
    rows: of the one-hot matrices.
    reach: the offset from which on the side bias is one number.
    heads: that a program takes, a group.
    size: of a head.
    name: what the kernels' names begin with.
    interpret: run on any device, slowly.
  """
  block: int
  tile: int
  side_tile: int
  rows: int
  reach: int
  heads: int
  size: int
  name: str
  interpret: bool

  @property
  def first_offset(self) -> int:
    """Of the table of side biases: before the first that is cut from it."""
    return -round_up(self.reach + self.side_tile, ALIGNMENT)

  @property
  def table_rows(self) -> int:
    last = round_up(self.reach + self.rows, ALIGNMENT)
    return last - self.first_offset + self.side_tile


class Tokens(NamedTuple):
  """Tokens and their biases, as the kernels take them; L whole tiles.

  Attributes:
    query, key, value: [B, H K, L].
    segment_ids: [B, 1, L], 0 is padding.
    bias: of the queries of a block towards the keys of its window,
      [H, 3 block, block], or of the queries of a window towards the keys of a
      block, [H, block, 3 block]; the band cut out. None, as key and value then
      are, if there are global tokens alone.
  """
  query: Any
  key: Any
  value: Any
  segment_ids: Any
  bias: Any


class Globals(NamedTuple):
  """Global tokens and their biases, as the kernels take them.

  Attributes:
    key, value: [B, H K, S]; S whole tiles.
    segment_ids: [B, 1, S], 0 is none.
    rows: [B, 1, L], which row of its tile's one-hot matrix a token has; -1
      without a block, and so without a bias.
    table: [H, table_rows, parts rows]: at [h, o, r] the bias at the offset
      first_offset + o - r, in parts that add up.
    far_bias: [2 H], of each head before and behind. None, as rows and table
      then are, if there is no bias.
  """
  key: Any
  value: Any
  segment_ids: Any
  rows: Any
  table: Any
  far_bias: Any


class Spans(NamedTuple):
  """Which tiles meet, flat: scalars are read before a step begins.

  Attributes:
    queries: for each row and query tile three numbers: the block that has row 0
      of its one-hot matrix, first and end of the global tiles that it sees.
    globals: for each row and global tile two numbers, first and end of the
      query tiles that see it.
  """
  queries: Any
  globals: Any


class Rows(NamedTuple):
  """What the backward pass knows of queries.

  Attributes:
    gradient: of what they attended to, [B, H K, L].
    lse: the logarithm of each softmax's sum, [B, groups, heads, L].
    delta: the product of gradient and output, [B, groups, heads, L].
  """
  gradient: Any
  lse: Any
  delta: Any


def round_up(number: int, multiple: int) -> int:
  """The least multiple that is not below a number."""
  return -(-number // multiple) * multiple


def _dot(geometry, a, b, contracted):
  if geometry.interpret:  # Not every CPU has products of bfloat16; exact.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  # Not left to JAX's default: bfloat16 has no other.
  precision = (jax.lax.Precision.HIGHEST if a.dtype == jnp.float32
               else jax.lax.Precision.DEFAULT)
  return jax.lax.dot_general(
      a, b, (contracted, ((), ())), precision=precision,
      preferred_element_type=jnp.float32)


def _by_head(geometry):
  """Each head of a group, its row of [heads, n] and its features of [heads
  size, n]."""
  for head in range(geometry.heads):
    start = head * geometry.size
    yield head, slice(head, head + 1), slice(start, start + geometry.size)


def _blocks(geometry):
  """Each block of a tile, and where its window lies in the tile's."""
  block = geometry.block
  for start in range(0, geometry.tile, block):
    yield slice(start, start + block), slice(start, start + 3 * block)


def _column(row):
  """[1, n] to [n, 1]."""
  return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _scores(geometry, key, query, bias, key_segments, query_segments):
  """[keys, queries], of segments [keys, 1] and [1, queries]."""
  scores = _dot(geometry, key, query, _COLUMNS_COLUMNS) + bias
  return jnp.where(key_segments == query_segments, scores, MASKED)


def _weights_and_gradient(geometry, scores, value, gradient, lse, delta):
  """Weights, and the gradient of scores; both [keys, queries]."""
  weights = jnp.exp(scores - lse)
  d_weights = _dot(geometry, value, gradient, _COLUMNS_COLUMNS)
  return weights, weights * (d_weights - delta)


def _window(refs):
  """A tile between its neighbouring blocks."""
  return jnp.concatenate([ref[...] for ref in refs], axis=1)


def _window_segments(refs, tile, tiles):
  """[1, block + tile + block]"""
  before, own, after = (ref[...] for ref in refs)
  return jnp.concatenate([
      jnp.where(tile > 0, before, _NOWHERE), own,
      jnp.where(tile < tiles - 1, after, _NOWHERE)], axis=1)


class _Place(NamedTuple):
  """Where in the table of side biases a step's lie: from `start` on, spread by
  `one_hot` [parts rows, queries]; or beyond it, None, on one side, of the
  queries that have a block [1, queries]."""
  start: Any
  one_hot: Any
  behind: Any
  has_block: Any


def _with_side_bias(
    geometry: Geometry, side: Globals, first_head: Any, offset: Any,
    update: Callable[[Callable[[int], Any], _Place | None], None]) -> None:
  """Calls `update` with the bias of each head and its place, if it has one.

  Args:
    geometry, side: as of the kernels.
    first_head: of the group.
    offset: of the global tile's first token from the block that has row 0.
    update: called inside a condition.
  """
  size, table = geometry.side_tile, side.table
  if table is None:
    update(lambda head: 0.0, None)
    return
  near = (offset + size - 1 > -geometry.reach) & (
      offset - geometry.rows + 1 < geometry.reach)

  @pl.when(near)
  def _within_reach():
    start = pl.multiple_of(offset - geometry.first_offset, ALIGNMENT)
    row = side.rows[...]
    index = jax.lax.broadcasted_iota(
        jnp.int32, (table.shape[2], row.shape[1]), 0)
    one_hot = jnp.where(
        row == index % geometry.rows, 1.0, 0.0).astype(table.dtype)
    update(lambda head: _dot(
        geometry, table[head, pl.ds(start, size), :], one_hot, _ROWS_COLUMNS),
           _Place(start, one_hot, None, None))

  @pl.when(jnp.logical_not(near))
  def _beyond_reach():
    behind = offset > 0
    end = jnp.where(behind, 1, 0)
    has_block = side.rows[...] >= 0
    update(lambda head: jnp.where(
        has_block, side.far_bias[2 * (first_head + head) + end], 0.0),
           _Place(None, None, behind, has_block))


def _with_globals(geometry, spans, side, update):
  """`_with_side_bias` of a query tile's step, if it sees so many tiles."""
  group, row, tile, step = (pl.program_id(axis) for axis in range(4))
  place = 3 * (row * pl.num_programs(2) + tile)
  first_block, first, end = (spans.queries[place + i] for i in range(3))

  @pl.when(first + step < end)
  def _seen():
    _with_side_bias(
        geometry, side, group * geometry.heads,
        (first + step) * geometry.side_tile - first_block, update)


def _add_to_side_bias(geometry, d_table, d_far, head, place, d_scores):
  """Sums the gradient of scores where their biases came from."""
  if place is None:
    return
  if place.one_hot is not None:
    d_table[head, pl.ds(place.start, geometry.side_tile), :] += _dot(
        geometry, d_scores.astype(place.one_hot.dtype),
        place.one_hot[:geometry.rows], _ROWS_ROWS)
  else:
    sums = jnp.where(
        place.has_block, jnp.sum(d_scores, axis=0, keepdims=True), 0)
    before, behind = (slice(2 * head + i, 2 * head + i + 1) for i in range(2))
    d_far[before, :] += jnp.where(place.behind, 0, sums)
    d_far[behind, :] += jnp.where(place.behind, sums, 0)


def _forward(geometry, spans, tokens, side, out, lse, softmax):
  top, total, output = softmax
  tile, step = pl.program_id(2), pl.program_id(3)
  tiles, steps = pl.num_programs(2), pl.num_programs(3)
  segments = tokens.segment_ids[1][...]
  dtype = tokens.query.dtype

  @pl.when(step == 0)
  def _local():
    if tokens.bias is None:
      top[...] = jnp.full(top.shape, MASKED, top.dtype)
      for ref in (total, output):
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
      return
    key, value = _window(tokens.key), _window(tokens.value)
    key_segments = _column(_window_segments(tokens.segment_ids, tile, tiles))
    for head, line, part in _by_head(geometry):
      for own, window in _blocks(geometry):
        scores = _scores(
            geometry, key[part, window], tokens.query[part, own],
            tokens.bias[head], key_segments[window], segments[:, own])
        top[line, own] = jnp.max(scores, axis=0, keepdims=True)
        weights = jnp.exp(scores - top[line, own])
        total[line, own] = jnp.sum(weights, axis=0, keepdims=True)
        output[part, own] = _dot(
            geometry, value[part, window], weights.astype(dtype), _ROWS_COLUMNS)

  def attend(bias, place):
    del place
    key_segments = _column(side.segment_ids[...])
    for head, line, part in _by_head(geometry):
      scores = _scores(
          geometry, side.key[part, :], tokens.query[part, :], bias(head),
          key_segments, segments)
      old_top = top[line, :]
      new_top = jnp.maximum(old_top, jnp.max(scores, axis=0, keepdims=True))
      shrink = jnp.exp(old_top - new_top)
      weights = jnp.exp(scores - new_top)
      top[line, :] = new_top
      total[line, :] = total[line, :] * shrink + jnp.sum(
          weights, axis=0, keepdims=True)
      output[part, :] = output[part, :] * shrink + _dot(
          geometry, side.value[part, :], weights.astype(dtype), _ROWS_COLUMNS)

  if side is not None:
    _with_globals(geometry, spans, side, attend)

  @pl.when(step == steps - 1)
  def _finish():
    for _, line, part in _by_head(geometry):
      # Padding sees padding, and who sees nobody has masked scores at most.
      seen = (segments > 0) & (top[line, :] > MASKED / 2)
      out[part, :] = jnp.where(
          seen, output[part, :] / total[line, :], 0).astype(out.dtype)
      # In the backward pass that must have no weight.
      lse[line, :] = jnp.where(
          seen, top[line, :] + jnp.log(total[line, :]), -MASKED)


def _backward_query(geometry, spans, tokens, side, rows, d_query_ref,
                    d_biases, scratch):
  d_bias, d_table, d_far = d_biases
  d_query, = scratch
  row, tile, step = (pl.program_id(axis) for axis in (1, 2, 3))
  tiles, steps = pl.num_programs(2), pl.num_programs(3)
  segments = tokens.segment_ids[1][...]
  dtype = tokens.query.dtype

  @pl.when((row == 0) & (tile == 0) & (step == 0))
  def _start():
    for ref in d_biases:
      if ref is not None:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)

  @pl.when(step == 0)
  def _local():
    if tokens.bias is None:
      d_query[...] = jnp.zeros(d_query.shape, d_query.dtype)
      return
    key, value = _window(tokens.key), _window(tokens.value)
    key_segments = _column(_window_segments(tokens.segment_ids, tile, tiles))
    for head, line, part in _by_head(geometry):
      for own, window in _blocks(geometry):
        scores = _scores(
            geometry, key[part, window], tokens.query[part, own],
            tokens.bias[head], key_segments[window], segments[:, own])
        _, d_scores = _weights_and_gradient(
            geometry, scores, value[part, window], rows.gradient[part, own],
            rows.lse[line, own], rows.delta[line, own])
        d_bias[head] += d_scores
        d_query[part, own] = _dot(
            geometry, key[part, window], d_scores.astype(dtype), _ROWS_COLUMNS)

  def differentiate(bias, place):
    key_segments = _column(side.segment_ids[...])
    for head, line, part in _by_head(geometry):
      scores = _scores(
          geometry, side.key[part, :], tokens.query[part, :], bias(head),
          key_segments, segments)
      _, d_scores = _weights_and_gradient(
          geometry, scores, side.value[part, :], rows.gradient[part, :],
          rows.lse[line, :], rows.delta[line, :])
      _add_to_side_bias(geometry, d_table, d_far, head, place, d_scores)
      d_query[part, :] += _dot(
          geometry, side.key[part, :], d_scores.astype(dtype), _ROWS_COLUMNS)

  if side is not None:
    _with_globals(geometry, spans, side, differentiate)

  @pl.when(step == steps - 1)
  def _finish():
    d_query_ref[...] = d_query[...].astype(d_query_ref.dtype)


def _backward_key(geometry, spans, tokens, rows, d_key_ref, d_value_ref,
                  scratch):
  del spans, scratch
  tile, tiles = pl.program_id(2), pl.num_programs(2)
  dtype = tokens.key.dtype
  key_segments = _column(tokens.segment_ids[1][...])
  segments = _window_segments(tokens.segment_ids, tile, tiles)
  query, gradient, lse, delta = (
      _window(refs) for refs in (tokens.query, *rows))
  for head, line, part in _by_head(geometry):
    for own, window in _blocks(geometry):
      scores = _scores(
          geometry, tokens.key[part, own], query[part, window],
          tokens.bias[head], key_segments[own], segments[:, window])
      weights, d_scores = _weights_and_gradient(
          geometry, scores, tokens.value[part, own], gradient[part, window],
          lse[line, window], delta[line, window])
      for ref, left, right in ((d_key_ref, query, d_scores),
                               (d_value_ref, gradient, weights)):
        ref[part, own] = _dot(
            geometry, left[part, window], right.astype(dtype), _ROWS_ROWS
        ).astype(dtype)


def _backward_side(geometry, spans, tokens, side, rows, d_key_ref,
                   d_value_ref, scratch):
  d_key, d_value = scratch
  group, row, side_tile, step = (pl.program_id(axis) for axis in range(4))
  side_tiles, steps = pl.num_programs(2), pl.num_programs(3)
  first, end = (
      spans.globals[2 * (row * side_tiles + side_tile) + i] for i in range(2))
  tile = first + step

  @pl.when(step == 0)
  def _start():
    for ref in scratch:
      ref[...] = jnp.zeros(ref.shape, ref.dtype)

  @pl.when(tile < end)
  def _queries():
    key_segments = _column(side.segment_ids[...])

    def update(bias, place):
      del place
      for head, line, part in _by_head(geometry):
        query, gradient = tokens.query[part, :], rows.gradient[part, :]
        scores = _scores(
            geometry, side.key[part, :], query, bias(head), key_segments,
            tokens.segment_ids[...])
        weights, d_scores = _weights_and_gradient(
            geometry, scores, side.value[part, :], gradient, rows.lse[line, :],
            rows.delta[line, :])
        d_key[part, :] += _dot(
            geometry, query, d_scores.astype(query.dtype), _ROWS_ROWS)
        d_value[part, :] += _dot(
            geometry, gradient, weights.astype(query.dtype), _ROWS_ROWS)

    first_block = spans.queries[3 * (row * steps + tile)]
    _with_side_bias(
        geometry, side, group * geometry.heads,
        side_tile * geometry.side_tile - first_block, update)

  @pl.when(step == steps - 1)
  def _finish():
    d_key_ref[...] = d_key[...].astype(d_key_ref.dtype)
    d_value_ref[...] = d_value[...].astype(d_value_ref.dtype)


# How arrays are cut for the grids, which begin with group and row. Index maps
# get the scalars behind the indices of a step.


def _cut(geometry, size, index, x):
  """Of what tokens have, `size` at a time, the one that `index` says."""
  if x.ndim == 4:
    return pl.BlockSpec((None, None, geometry.heads, size),
                        lambda g, b, *rest: (b, g, 0, index(b, *rest)))
  if x.shape[1] == 1:
    return pl.BlockSpec((None, 1, size),
                        lambda g, b, *rest: (b, 0, index(b, *rest)))
  return pl.BlockSpec((None, geometry.heads * geometry.size, size),
                      lambda g, b, *rest: (b, g, index(b, *rest)))


def _own(b, i, *rest):
  del b, rest
  return i


def _around(geometry, length, x):
  """A tile, between the blocks before and behind it."""
  blocks = geometry.tile // geometry.block
  last = length // geometry.block - 1

  def before(b, i, *rest):
    del b, rest
    return jnp.maximum(i * blocks - 1, 0)

  def behind(b, i, *rest):
    del b, rest
    return jnp.minimum((i + 1) * blocks, last)

  return (_cut(geometry, geometry.block, before, x),
          _cut(geometry, geometry.tile, _own, x),
          _cut(geometry, geometry.block, behind, x))


def _of_group(geometry, shape):
  """Of a bias all that belongs to the group."""
  return pl.BlockSpec((geometry.heads, *shape[1:]),
                      lambda g, *_: (g, *(0 for _ in shape[1:])))


def _side_specs(geometry, side, side_index, query_index):
  cut = partial(_cut, geometry, geometry.side_tile, side_index)
  specs = cut(side.key), cut(side.value), cut(side.segment_ids)
  if side.table is None:
    return Globals(*specs, None, None, None)
  return Globals(
      *specs, _cut(geometry, geometry.tile, query_index, side.rows),
      _of_group(geometry, side.table.shape),
      pl.BlockSpec(memory_space=pltpu.SMEM))


def _call(geometry, kernel, grid, arrays, in_specs, outputs, scratch,
          products):
  """Runs a kernel.

  Args:
    geometry: the kernel's.
    kernel: gets geometry, spans, what `in_specs` and `outputs` cut, scratch.
    grid: its first dimension groups, which may run side by side.
    arrays: the spans, and what `in_specs` cut.
    in_specs: how.
    outputs: shapes and specs, two trees.
    scratch: shapes of float32.
    products: of matrices, in multiplications.
  """
  shapes, specs = outputs
  semantics: Any = ('parallel', *['arbitrary'] * (len(grid) - 1))
  return pl.pallas_call(
      partial(kernel, geometry),
      grid_spec=pltpu.PrefetchScalarGridSpec(
          num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=specs,
          scratch_shapes=[
              tuple(pltpu.VMEM(shape, jnp.float32) for shape in scratch)]),
      out_shape=shapes,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=semantics, vmem_limit_bytes=_VMEM_BYTES),
      # For XLA's schedule; it cannot look inside.
      cost_estimate=pl.CostEstimate(
          flops=2 * products, transcendentals=0, bytes_accessed=sum(
              x.size * x.dtype.itemsize
              for x in jax.tree.leaves((arrays, shapes)))),
      interpret=geometry.interpret,
      name=geometry.name + kernel.__name__)(*arrays)


def _like(x):
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


class _Sizes(NamedTuple):
  """Of the grids: groups of heads, rows, tiles, and tiles of global tokens."""
  groups: int
  rows: int
  tiles: int
  side_tiles: int


def _sizes(geometry, tokens, side):
  rows, features, length = tokens.query.shape
  side_tiles = side.key.shape[2] // geometry.side_tile if side else 0
  return _Sizes(features // (geometry.heads * geometry.size), rows,
                length // geometry.tile, side_tiles)


def _products(geometry, sizes, tokens, counts):
  """Multiplications of so many products with local and with global keys."""
  local, side = counts
  keys = sizes.side_tiles * geometry.side_tile * side
  if tokens.bias is not None:
    keys += 3 * geometry.block * local
  queries = sizes.rows * sizes.tiles * geometry.tile
  return queries * keys * geometry.size * geometry.heads * sizes.groups


def _query_specs(geometry, sizes, tokens, side):
  """How a query tile's keys are cut: windows, and a tile of globals a step."""
  around = partial(_around, geometry, sizes.tiles * geometry.tile)

  def side_index(b, i, j, spans):
    place = 3 * (b * sizes.tiles + i)
    last = jnp.maximum(spans.queries[place + 2] - 1, 0)
    return jnp.minimum(spans.queries[place + 1] + j, last)

  query = _cut(geometry, geometry.tile, _own, tokens.query)
  segment_ids = around(tokens.segment_ids)
  if tokens.bias is None:
    specs = Tokens(query, None, None, segment_ids, None)
  else:
    specs = Tokens(query, around(tokens.key), around(tokens.value), segment_ids,
                   _of_group(geometry, tokens.bias.shape))
  return specs, side and _side_specs(geometry, side, side_index, _own)


def forward(geometry: Geometry, spans: Spans | None, tokens: Tokens,
            side: Globals | None) -> tuple[jax.Array, jax.Array]:
  """What tokens attend to, [B, H K, L], and the logarithm of each softmax's
  sum, [B, groups, heads, L].

  Args:
    geometry: of the arrays.
    spans: which tiles meet; None without global tokens.
    tokens: their bias that of queries towards a window of keys.
    side: the global tokens.
  """
  sizes = _sizes(geometry, tokens, side)
  lse = jax.ShapeDtypeStruct(
      (sizes.rows, sizes.groups, geometry.heads, tokens.query.shape[2]),
      jnp.float32)
  specs = _query_specs(geometry, sizes, tokens, side)
  return _call(
      geometry, _forward, (*sizes[:3], max(1, sizes.side_tiles)),
      (spans, _with_windows_of_keys(tokens), side), specs,
      ((_like(tokens.query), lse),
       (specs[0].query, _cut(geometry, geometry.tile, _own, lse))),
      [(geometry.heads, geometry.tile)] * 2 + [
          (geometry.heads * geometry.size, geometry.tile)],
      _products(geometry, sizes, tokens, (2, 2)))


def backward_query(
    geometry: Geometry, spans: Spans | None, tokens: Tokens,
    side: Globals | None, rows: Rows,
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
  """The gradient of queries, [B, H K, L], and those of biases: of the tokens',
  of one part of the table, [H, table_rows, rows], and of the far ones, [groups,
  2 heads, tile], sums over the last dimension. What there is no bias of is
  None. Arguments are as of `forward`."""
  sizes = _sizes(geometry, tokens, side)
  heads = sizes.groups * geometry.heads
  specs = _query_specs(geometry, sizes, tokens, side)

  def float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

  d_bias = d_table = d_far = table_spec = far_spec = None
  if tokens.bias is not None:
    d_bias = float32(*tokens.bias.shape)
  if side and side.table is not None:
    d_table = float32(heads, geometry.table_rows, geometry.rows)
    table_spec = _of_group(geometry, d_table.shape)
    d_far = float32(sizes.groups, 2 * geometry.heads, geometry.tile)
    far_spec = pl.BlockSpec((None, *d_far.shape[1:]), lambda g, *_: (g, 0, 0))
  return _call(
      geometry, _backward_query, (*sizes[:3], max(1, sizes.side_tiles)),
      (spans, _with_windows_of_keys(tokens), side, rows),
      (*specs, jax.tree.map(partial(_cut, geometry, geometry.tile, _own),
                            rows)),
      ((_like(tokens.query), (d_bias, d_table, d_far)),
       (specs[0].query, (specs[0].bias, table_spec, far_spec))),
      [(geometry.heads * geometry.size, geometry.tile)],
      _products(geometry, sizes, tokens, (3, 3)))


def backward_key(geometry: Geometry, tokens: Tokens, rows: Rows
                 ) -> tuple[jax.Array, jax.Array]:
  """The gradients of keys and values, [B, H K, L]; the bias is that of a window
  of queries towards keys."""
  sizes = _sizes(geometry, tokens, None)
  around = partial(_around, geometry, tokens.key.shape[2])
  own = _cut(geometry, geometry.tile, _own, tokens.key)
  specs = (
      Tokens(around(tokens.query), own, own, around(tokens.segment_ids),
             _of_group(geometry, tokens.bias.shape)),
      jax.tree.map(around, rows))
  query, _, _, segment_ids, _ = _thrice(tokens)
  return _call(
      geometry, _backward_key, sizes[:3],
      (None, tokens._replace(query=query, segment_ids=segment_ids),
       _thrice(rows)), specs,
      ((_like(tokens.key),) * 2, (own, own)), (),
      _products(geometry, sizes, tokens, (4, 0)))


def backward_side(
    geometry: Geometry, spans: Spans, tokens: Tokens, side: Globals,
    rows: Rows) -> tuple[jax.Array, jax.Array]:
  """The gradients of global keys and values, [B, H K, S]."""
  sizes = _sizes(geometry, tokens, side)

  def tile(b, i, j, spans):
    place = 2 * (b * sizes.side_tiles + i)
    last = jnp.maximum(spans.globals[place + 1] - 1, 0)
    return jnp.minimum(spans.globals[place] + j, last)

  cut = partial(_cut, geometry, geometry.tile, tile)
  side_specs = _side_specs(geometry, side, _own, tile)
  tokens = Tokens(tokens.query, None, None, tokens.segment_ids, None)
  return _call(
      geometry, _backward_side,
      (*sizes[:2], sizes.side_tiles, sizes.tiles),
      (spans, tokens, side, rows),
      (jax.tree.map(cut, tokens), side_specs, jax.tree.map(cut, rows)),
      ((_like(side.key),) * 2, (side_specs.key,) * 2),
      [(geometry.heads * geometry.size, geometry.side_tile)] * 2,
      _products(geometry, sizes, tokens, (0, 4)))


def _thrice(arrays):
  """Once for each part of `_around`."""
  return jax.tree.map(lambda x: (x,) * 3, arrays)


def _with_windows_of_keys(tokens):
  _, key, value, segment_ids, _ = _thrice(tokens)
  return tokens._replace(key=key, value=value, segment_ids=segment_ids)

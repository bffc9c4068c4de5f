"""Local and transient-global attention in kernels that keep no scores: here
those of GPUs, in `fused_attention_tpu` those of TPUs.

Forward and backward hold one tile of scores at a time, on the chip; biases are
made inside from their vectors over offsets, and their gradients summed tile by
tile (`kernels/fused_attention_triton.py`). Results do not depend on the order
in which programs run.

Products take their operands in the compute dtype and sum in float32. For
float16 operands are TF32 numbers, of the same precision and the exponents of
float32, so that nothing overflows.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from longt5_flax.model import fused_attention_tpu
from longt5_flax.model.attention import GlobalTokens
from longt5_flax.model.kernels import fused_attention_triton as kernels
from longt5_flax.model.kernels.calls import (
    ATTENDED,
    LAYOUT,
    ON_A_GPU,
    KernelOptions,
    all_see,
    blocks_of_tiles,
    covering_run,
    gapless_run,
    on_each_device,
    ranges_meet,
    segment_range,
    to_operands,
)
from longt5_flax.model.kernels.fused_attention_triton import Geometry
from longt5_flax.model.kernels.triton_tiles import LOG2_E, MASKED, Rows
from longt5_flax.model.relative_position import toeplitz

# Programs that share the work of one tile in the backward pass, where there
# are few tiles and each has much to do: of the local bias, of global tokens.
_BIAS_PARTS = 8
_SIDE_PARTS = 8


def fused_attention(
    query: Float[Array, 'B L H K'],
    key: Float[Array, 'B L H K'],
    value: Float[Array, 'B L H K'],
    bias: Float[Array, 'H offsets'],
    segment_ids: Int[Array, 'B L'],
    side: GlobalTokens | None,
    dtype: DTypeLike,
    options: KernelOptions = ON_A_GPU,
) -> Float[Array, 'B L H K']:
  """What `local_attention` attends to; zeros at padding.

  Memory is linear in L. Under a mesh each device attends with its rows and
  heads; a length that is split is gathered.

  Args:
    query, key, value, bias, segment_ids, side, dtype: see `local_attention`.
    options: how the kernels are run.

  Raises:
    ConfigError: the device has no such kernels, or they cannot do this.
  """
  tokens: tuple[Array, ...] = query, key, value
  tables: tuple[Array, ...] = bias,
  ids: tuple[Array, ...] = segment_ids,
  block_size = None
  if side is not None:
    tokens += side.key, side.value
    tables += side.bias,
    ids += side.segment_ids, side.block_ids
    block_size = side.block_size
  attend = partial(
      fused_attention_tpu.attend if options.for_a_tpu() else _attend,
      block_size=block_size, dtype=dtype, options=options)
  return on_each_device(attend, tokens, tables, ids, options)


def _attend(tokens, tables, ids, block_size, dtype, options):
  """`fused_attention` on one device."""
  length, size = tokens[0].shape[1::2]
  tiling = options.tiling(dtype)
  multiple = max(tiling.queries, tiling.keys)
  prepare = partial(to_operands, dtype=dtype)
  rows = near = reach = 0
  layout, side = None, ()
  segment_ids = jnp.pad(ids[0], ((0, 0), (0, -length % multiple)))
  if block_size:
    reach = tables[1].shape[1] // 2
    # That a program's queries may be in.
    blocks = tiling.queries // block_size + 2
    rows = max(16, 1 << (blocks - 1).bit_length())
    near = 2 * reach - 2 + blocks
    near += -near % tiling.tile
  geometry = Geometry(
      tiling, -(-(tables[0].shape[1] // 2) // tiling.tile), rows, near)
  if block_size:
    layout = checkpoint_name(
        _layout(geometry, reach, segment_ids, *ids[1:]), LAYOUT)
    side = *(prepare(x) for x in tokens[3:]), tables[1]
  output = _fused(
      geometry, *(prepare(x, multiple=multiple) for x in tokens[:3]), tables[0],
      segment_ids, layout, side)
  return output[:, :length, :, :size].astype(tokens[0].dtype)


class _Layout(NamedTuple):
  """How tiles of tokens and of global tokens lie to each other.

  Attributes:
    segment_ids: of the global tokens, whole tiles.
    rows, spans: see `kernels.Globals`.
    bounds, firsts, tile_rows: see `kernels.GlobalTiles`.
  """
  segment_ids: Int[Array, 'B S']
  rows: Int[Array, 'B L']
  spans: Int[Array, 'B programs 5']
  bounds: Int[Array, 'B side_programs 6']
  firsts: Int[Array, 'B tiles']
  tile_rows: Int[Array, 'B L']


class _Queries(NamedTuple):
  """Of tiles of queries: which row of a bias, of those that begin with the
  block `firsts`, each token has; their first and last blocks; and their
  segments, where tokens without a block are in one that nobody sees, as they
  have no bias, which no unmasked tile can express."""
  rows: Int[Array, 'B tiles tile']
  firsts: Int[Array, 'B tiles']
  lasts: Int[Array, 'B tiles']
  segments: Int[Array, 'B tiles tile']
  alike: Int[Array, 'B tiles tile']


def _queries(geometry, segment_ids, block_ids, tile):
  segments = segment_ids.reshape(segment_ids.shape[0], -1, tile)
  own, firsts, lasts = blocks_of_tiles(block_ids, segment_ids.shape[1], tile)
  has_block = own >= 0
  return _Queries(
      jnp.where(has_block, own - firsts[..., None], geometry.rows),
      firsts, lasts, segments, jnp.where(
          has_block | (segments == 0), segments,
          jnp.iinfo(jnp.int32).max - 1))


def _layout(geometry, reach, segment_ids, side_segments, block_ids):
  of_programs, of_tiles = (
      _queries(geometry, segment_ids, block_ids, size)
      for size in (geometry.tiling.queries, geometry.tile))
  fill = -side_segments.shape[1] % geometry.tiling.keys
  padded = jnp.pad(side_segments, ((0, 0), (0, fill)))
  return _Layout(
      padded, _flat(of_programs.rows),
      _spans(geometry, reach, of_programs, side_segments),
      _bounds(geometry, reach, of_tiles, padded),
      of_tiles.firsts, _flat(of_tiles.rows))


def _flat(rows):
  return rows.reshape(rows.shape[0], -1)


def _spans(geometry, reach, queries, side_segments):
  tile = geometry.tile
  side_ids = side_segments[..., None]  # Tiles of one global token.
  first_seen, end_seen = covering_run(
      ranges_meet(segment_range(queries.segments), segment_range(side_ids)))
  first_clean, end_clean = gapless_run(all_see(queries.alike, side_ids))
  window = queries.firsts - (reach - 1)
  window_end = window + geometry.near
  return jnp.stack([
      window + _pads(geometry, reach)[0],
      -(-jnp.maximum(window - first_seen, 0) // tile),
      -(-jnp.maximum(end_seen - window_end, 0) // tile),
      jnp.where(window <= end_clean,
                jnp.maximum(window - first_clean, 0) // tile, 0),
      jnp.where(window_end >= first_clean,
                jnp.maximum(end_clean - window_end, 0) // tile, 0),
  ], axis=-1)


def _bounds(geometry, reach, queries, side_segments):
  own = geometry.tiling.keys
  keys = side_segments.reshape(side_segments.shape[0], -1, own)
  sees = ranges_meet(segment_range(keys), segment_range(queries.segments))
  clean = all_see(queries.alike, keys).swapaxes(1, 2)
  starts = jnp.arange(0, side_segments.shape[1], own)[:, None]
  near = jnp.sum(queries.lasts[:, None] + reach <= starts, axis=2)
  far = jnp.sum(queries.firsts[:, None] < starts + own - 1 + reach, axis=2)
  first, end = covering_run(sees)
  return jnp.stack([first, near, far, end, *gapless_run(clean)], axis=-1)


def _pads(geometry, reach):
  """Global tokens to add before and behind, so that every tile that is read
  lies within."""
  return (max(geometry.tile, reach - 1),
          max(geometry.tile, geometry.near - reach))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(geometry, query, key, value, bias, segment_ids, layout, side):
  return _fused_forward(
      geometry, query, key, value, bias, segment_ids, layout, side)[0]


def _fused_forward(geometry, query, key, value, bias, segment_ids, layout,
                   side):
  tokens = kernels.Tokens(
      query, key, value, segment_ids,
      _banded(geometry, bias, geometry.tiling.queries).astype(
          jnp.float16 if geometry.tiling.narrow_bias else jnp.float32))
  output, lse = kernels.forward(
      geometry, tokens, _globals(geometry, layout, side))
  output, lse = checkpoint_name((output, lse), ATTENDED)
  return output, (tokens, bias, layout, side, output, lse)


def _fused_backward(geometry, residuals, gradient):
  tokens, bias, layout, side, output, lse = residuals
  delta = jnp.sum(gradient.astype(jnp.float32) * output, axis=-1).swapaxes(1, 2)
  rows = Rows(gradient, lse, delta)
  arrays = _globals(geometry, layout, side)
  d_query, *d_rows = kernels.backward_query(geometry, tokens, arrays, rows)
  d_key, d_value = kernels.backward_key(
      geometry, tokens._replace(bias=_banded(
          geometry, bias[:, ::-1], geometry.tiling.keys)), rows)
  tile = geometry.tile
  d_tiles = kernels.backward_local_bias(
      geometry, tokens._replace(bias=_banded(geometry, bias, tile)), rows,
      _BIAS_PARTS)
  d_bias, = jax.linear_transpose(
      partial(_local_tiles, geometry, own=tile), bias)(
      jnp.sum(d_tiles, axis=(0, 1)))
  d_side = ()
  if side:
    d_side = _side_backward(
        geometry, tokens, arrays, layout, side, rows, d_rows)
  return d_query, d_key, d_value, d_bias, None, None, d_side


_fused.defvjp(_fused_forward, _fused_backward)


def _side_backward(geometry, tokens, arrays, layout, side, rows, d_rows):
  key, value, bias = side
  num_globals, reach = key.shape[1], bias.shape[1] // 2
  fill = layout.segment_ids.shape[1] - num_globals
  key, value = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0)))
                for x in (key, value))
  # Offsets of a program's first global token to the rows of a near query tile.
  own = geometry.tiling.keys
  shift = reach + own + geometry.rows
  offsets = jnp.arange(-shift, reach + geometry.rows)
  index = jnp.clip(offsets[:, None] + jnp.arange(own), -reach, reach)
  tiles = kernels.GlobalTiles(
      key, value, layout.segment_ids, layout.bounds, layout.firsts,
      layout.tile_rows, _by_row(geometry, bias[:, index + reach], key.dtype, 2),
      arrays.far_bias)
  d_key, d_value = (
      jnp.sum(x, axis=0)[:, :num_globals].astype(key.dtype)
      for x in kernels.backward_side(
          geometry, tokens, tiles, shift, rows, _SIDE_PARTS))
  d_near, d_far = (jnp.sum(x, axis=(0, 2)) for x in d_rows)
  d_bias, = jax.linear_transpose(partial(_near_rows, geometry), bias)(d_near)
  d_bias = d_bias.at[:, 0].add(d_far[:, 0]).at[:, -1].add(d_far[:, 1])
  return d_key, d_value, d_bias


def _local_tiles(geometry, bias, own):
  """[H, local_tiles, own, tile]: of each tile near a program's own tokens, by
  how far it lies behind them; 0 beyond the radius."""
  tile, reach = geometry.tile, geometry.reach_tiles
  count = geometry.local_tiles(own)
  radius = bias.shape[1] // 2
  # From the last own token to the first, from the first to the last.
  least, most = reach * tile + own - 1, (count - reach) * tile - 1
  values = jnp.pad(bias, ((0, 0), (least - radius, most - radius)))
  tiles = toeplitz(values, own, count * tile)
  return tiles.reshape(-1, own, count, tile).swapaxes(1, 2)


def _near_rows(geometry, bias):
  """[H, rows, near]: in row r the biases of the near window, which begins
  reach - 1 before the block of row 0, towards block r."""
  reach = bias.shape[1] // 2
  values = jnp.pad(
      bias, ((0, 0), (geometry.rows - 2, geometry.near - 2 * reach)),
      mode='edge')
  return toeplitz(values, geometry.rows, geometry.near)


def _globals(geometry, layout, side):
  if not side:
    return None
  key, value, bias = side
  reach = bias.shape[1] // 2
  pads = _pads(geometry, reach)
  key, value = (jnp.pad(x, ((0, 0), pads, (0, 0), (0, 0)))
                for x in (key, value))
  num_globals = side[0].shape[1]
  segment_ids = jnp.pad(layout.segment_ids[:, :num_globals], ((0, 0), pads))
  return kernels.Globals(
      key, value, segment_ids, layout.rows, layout.spans,
      _by_row(geometry, _near_rows(geometry, bias), key.dtype, 1),
      bias[:, ::2 * reach] * LOG2_E)


def _by_row(geometry, bias, dtype, axis):
  """[H, rows, keys] as kernels take it: with a last row for tokens without a
  block, which have no bias; or for products in two parts, which `axis` counts
  before or behind rows, that together are as good as float32."""
  if not geometry.tiling.near_products:
    return jnp.pad(bias * LOG2_E, ((0, 0), (0, 1), (0, 0)))
  # Not a cast, which a compiler may leave out.
  higher = jax.lax.reduce_precision(bias, *_bits(dtype))
  parts = jnp.stack([higher, bias - higher], axis).astype(dtype)
  return parts.reshape(bias.shape[0], -1, bias.shape[2])


def _bits(dtype):
  """Of exponent and fraction."""
  info = jnp.finfo(dtype)
  return info.nexp, info.nmant


def _banded(geometry, bias, own):
  """`_local_tiles` in base 2, with what lies beyond the radius hidden."""
  relative = np.arange(geometry.local_tiles(own)) - geometry.reach_tiles
  offsets = (relative[:, None, None] * geometry.tile + np.arange(geometry.tile)
             - np.arange(own)[:, None])
  return jnp.where(np.abs(offsets) <= bias.shape[1] // 2,
                   _local_tiles(geometry, bias, own) * LOG2_E, MASKED)

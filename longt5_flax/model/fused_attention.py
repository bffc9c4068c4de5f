"""Local, transient-global and causal attention in kernels that keep no scores:
here those of GPUs, in `fused_attention_tpu` those of TPUs.

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
from longt5_flax.model.kernels.triton_tiles import (
    LOG2_E,
    MASKED,
    Columns,
    Rows,
    which_statistics,
)
from longt5_flax.model.relative_position import toeplitz

# Programs that share the work of one tile in the backward pass, where there
# are few tiles and each has much to do: of the local bias, at most and with
# that many tiles of queries each at least; of global tokens.
_BIAS_PARTS = 8
_SIDE_PARTS = 4


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


def fused_causal_attention(
    query: Float[Array, 'B T H K'],
    key: Float[Array, 'B T H K'],
    value: Float[Array, 'B T H K'],
    bias: Float[Array, 'H T'],
    segment_ids: Int[Array, 'B T'],
    dtype: DTypeLike,
    options: KernelOptions = ON_A_GPU,
) -> Float[Array, 'B T H K']:
  """What targets attend to: of their segment, themselves and what is before.

  Zeros at padding. Memory is linear in T; GPUs only.

  Args:
    query, key, value: T5's: scores are not divided by sqrt(K).
    bias: by offset, of keys from T - 1 before the query to its own.
    segment_ids: 0 is padding.
    dtype: of the matrix products.
    options: how the kernels are run.

  Raises:
    ConfigError: the device has no such kernels.
  """
  attend = partial(_attend, block_size=None, dtype=dtype, options=options,
                   causal=True)
  return on_each_device(
      attend, (query, key, value), (bias,), (segment_ids,), options)


def _attend(tokens, tables, ids, block_size, dtype, options, causal=False):
  """On one device."""
  length, size = tokens[0].shape[1::2]
  tile = options.tile
  prepare = partial(to_operands, dtype=dtype)
  rows = near = reach = 0
  layout, side = None, ()
  segment_ids = jnp.pad(ids[0], ((0, 0), (0, -length % tile)))
  if block_size:
    reach = tables[1].shape[1] // 2
    blocks = tile // block_size + 2  # That tokens of a tile may be in.
    # Twice as many are the least that a product takes.
    rows = max(8, 1 << (blocks - 1).bit_length())
    near = 2 * reach - 2 + blocks
    near += -near % tile
  offsets = tables[0].shape[1]
  behind, ahead = (offsets - 1, 0) if causal else (offsets // 2, offsets // 2)
  geometry = Geometry(options.tiling(dtype), behind, ahead, rows, near)
  if block_size:
    layout = checkpoint_name(
        _layout(geometry, reach, segment_ids, *ids[1:]), LAYOUT)
    side = *(prepare(x) for x in tokens[3:]), tables[1]
  output = _fused(
      geometry, *(prepare(x, multiple=tile) for x in tokens[:3]), tables[0],
      checkpoint_name(_segments(geometry, segment_ids), LAYOUT), layout, side)
  return output[:, :length, :, :size].astype(tokens[0].dtype)


class _Segments(NamedTuple):
  """Segments of tokens; and where they hide nothing, `kernels.Tokens.clean` of
  queries, of keys and of tiles of the bias."""
  ids: Int[Array, 'B L']
  of_queries: Int[Array, 'B tiles 2']
  of_keys: Int[Array, 'B tiles 2']
  of_bias: Int[Array, 'B local_tiles 2']


def _segments(geometry, segment_ids):
  batch, tile = segment_ids.shape[0], geometry.tile
  behind, ahead = geometry.tiles_behind, geometry.tiles_ahead
  own = segment_ids.reshape(batch, -1, tile)
  count = own.shape[1]

  def around(before, after):
    padded = jnp.pad(own, ((0, 0), (before, after), (0, 0)))
    return jnp.stack([padded[:, i:i + count]
                      for i in range(geometry.local_tiles)], axis=2)

  def flags(queries, keys):
    queries, keys = (x.reshape(batch * count, -1, tile)
                     for x in (queries, keys))
    return all_see(queries, keys).reshape(batch, count, -1)

  def runs(flags, first):
    return jnp.stack(gapless_run(flags), axis=-1) + first

  of_queries = flags(own, around(behind, ahead))
  of_keys = flags(around(ahead, behind), own)
  index = jnp.arange(count)[:, None]
  return _Segments(segment_ids, runs(of_queries, index - behind),
                   runs(of_keys, index - ahead),
                   runs(of_queries.swapaxes(1, 2), 0))


class _Layout(NamedTuple):
  """How tiles of tokens and of global tokens lie to each other.

  Attributes:
    segment_ids: of the global tokens, whole tiles.
    rows, spans: see `kernels.Globals`.
    bounds, firsts: see `kernels.GlobalTiles`.
  """
  segment_ids: Int[Array, 'B S']
  rows: Int[Array, 'B L']
  spans: Int[Array, 'B tiles 5']
  bounds: Int[Array, 'B side_tiles 6']
  firsts: Int[Array, 'B tiles']


def _layout(geometry, reach, segment_ids, side_segments, block_ids):
  tile = geometry.tile
  batch, num_globals = side_segments.shape
  own, firsts, lasts = blocks_of_tiles(block_ids, segment_ids.shape[1], tile)
  has_block = own >= 0
  rows = jnp.where(has_block, own - firsts[..., None], geometry.rows)

  tokens = segment_ids.reshape(batch, -1, tile)
  of_tokens = segment_range(tokens)
  side_ids = side_segments[..., None]  # Tiles of one global token.
  first_seen, end_seen = covering_run(
      ranges_meet(of_tokens, segment_range(side_ids)))
  window = firsts - (reach - 1)
  before = _pads(geometry, reach)[0]
  spans = jnp.stack([
      window + before,
      -(-jnp.maximum(window - first_seen, 0) // tile),
      -(-jnp.maximum(end_seen - window - geometry.near, 0) // tile),
      *(x + before for x in gapless_run(all_see(tokens, side_ids)))], axis=-1)

  side_segments = jnp.pad(side_segments, ((0, 0), (0, -num_globals % tile)))
  side_tiles = side_segments.reshape(batch, -1, tile)
  sees = ranges_meet(segment_range(side_tiles), of_tokens)
  # Tokens without a block have no bias, unlike others of a clean far tile.
  alike = jnp.where(has_block | (tokens == 0), tokens,
                    jnp.iinfo(jnp.int32).max - 1)
  clean = all_see(alike, side_tiles).swapaxes(1, 2)
  starts = jnp.arange(0, side_segments.shape[1], tile)[:, None]
  near = jnp.sum(lasts[:, None] + reach <= starts, axis=2)
  far = jnp.sum(firsts[:, None] < starts + tile - 1 + reach, axis=2)
  first, end = covering_run(sees)
  bounds = jnp.stack([first, near, far, end, *gapless_run(clean)], axis=-1)
  return _Layout(side_segments, rows.reshape(batch, -1), spans, bounds, firsts)


def _pads(geometry, reach):
  """Global tokens to add before and behind, so that every tile that is read
  lies within."""
  return (max(geometry.tile, reach - 1),
          max(geometry.tile, geometry.near - reach))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(geometry, query, key, value, bias, segments, layout, side):
  return _fused_forward(
      geometry, query, key, value, bias, segments, layout, side)[0]


def _fused_forward(geometry, query, key, value, bias, segments, layout, side):
  tokens = kernels.Tokens(
      query, key, value, segments.ids,
      _banded(geometry, _local_tiles(geometry, bias)), segments.of_queries)
  output, lse = kernels.forward(
      geometry, tokens, _globals(geometry, layout, side))
  output, lse = checkpoint_name((output, lse), ATTENDED)
  return output, (tokens, bias, segments, layout, side, output, lse)


def _fused_backward(geometry, residuals, gradient):
  tokens, bias, segments, layout, side, output, lse = residuals
  arrays = _globals(geometry, layout, side)
  d_query, delta, statistics, *d_rows = kernels.backward_query(
      geometry, tokens, arrays, kernels.Outputs(gradient, lse, output))
  columns = Columns(gradient, statistics, which_statistics(
      geometry.tile, gradient.dtype))
  d_key, d_value = kernels.backward_key(
      geometry, tokens._replace(
          bias=tokens.bias.swapaxes(2, 3) * LOG2_E, clean=segments.of_keys),
      columns)
  count = output.shape[1] // geometry.tile
  d_tiles = kernels.backward_local_bias(
      geometry, tokens._replace(clean=segments.of_bias),
      Rows(gradient, lse, delta),
      max(1, min(_BIAS_PARTS, count // _BIAS_PARTS)))
  d_bias, = jax.linear_transpose(partial(_local_tiles, geometry), bias)(
      jnp.sum(d_tiles, axis=(0, 1)))
  d_side = ()
  if side:
    d_side = _side_backward(
        geometry, tokens, arrays, layout, side, columns, d_rows)
  return d_query, d_key, d_value, d_bias, None, None, d_side


_fused.defvjp(_fused_forward, _fused_backward)


def _side_backward(geometry, tokens, arrays, layout, side, columns, d_rows):
  key, value, bias = side
  num_globals, reach = key.shape[1], bias.shape[1] // 2
  fill = layout.segment_ids.shape[1] - num_globals
  key, value = (jnp.pad(x, ((0, 0), (0, fill), (0, 0), (0, 0)))
                for x in (key, value))
  # Offsets of a tile's first global token to the rows of a near query tile.
  shift = reach + geometry.tile + geometry.rows
  offsets = jnp.arange(-shift, reach + geometry.rows)
  index = jnp.clip(offsets[:, None] + jnp.arange(geometry.tile), -reach, reach)
  # Rows of the bias go up with the offset, hence down with the block.
  row = geometry.rows - 1 - jnp.arange(2 * geometry.rows) // 2
  tiles = kernels.GlobalTiles(
      key, value, layout.segment_ids, layout.bounds, layout.firsts,
      _in_parts(bias[:, index + reach], key.dtype, 2),
      (layout.rows[..., None] == row).astype(key.dtype), arrays.far_bias)
  d_key, d_value = (
      jnp.sum(x, axis=0)[:, :num_globals].astype(key.dtype)
      for x in kernels.backward_side(
          geometry, tokens, tiles, shift, columns, _SIDE_PARTS))
  d_near, d_far = (jnp.sum(x, axis=(0, 2)) for x in (
      d_rows[0][:, :, :, :geometry.rows], d_rows[1]))
  d_bias, = jax.linear_transpose(partial(_near_rows, geometry), bias)(d_near)
  d_bias = d_bias.at[:, 0].add(d_far[:, 0]).at[:, -1].add(d_far[:, 1])
  return d_key, d_value, d_bias


def _local_tiles(geometry, bias):
  """[H, local_tiles, tile, tile]: of each key tile relative to the query's, 0
  beyond reach."""
  tile = geometry.tile
  # The largest offsets of the tiles, less those that the bias has.
  pads = ((geometry.tiles_behind + 1) * tile - 1 - geometry.behind,
          (geometry.tiles_ahead + 1) * tile - 1 - geometry.ahead)
  tiles = toeplitz(
      jnp.pad(bias, ((0, 0), pads)), tile, geometry.local_tiles * tile)
  return tiles.reshape(-1, tile, geometry.local_tiles, tile).swapaxes(1, 2)


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
      _in_parts(_near_rows(geometry, bias), key.dtype, 1),
      bias[:, ::2 * reach] * LOG2_E)


def _in_parts(bias, dtype, axis):
  """[H, rows, keys] as operands of products: in two parts, which `axis` counts
  before or behind rows, that together are as good as float32."""
  # Not a cast, which a compiler may leave out.
  higher = jax.lax.reduce_precision(bias, *_bits(dtype))
  parts = jnp.stack([higher, bias - higher], axis).astype(dtype)
  return parts.reshape(bias.shape[0], -1, bias.shape[2])


def _bits(dtype):
  """Of exponent and fraction."""
  info = jnp.finfo(dtype)
  return info.nexp, info.nmant


def _banded(geometry, tiles):
  """With what lies beyond reach hidden."""
  tile = np.arange(geometry.tile)
  relative = np.arange(geometry.local_tiles) - geometry.tiles_behind
  offsets = (relative[:, None, None] * geometry.tile + tile
             - tile[:, None])
  is_near = (-geometry.behind <= offsets) & (offsets <= geometry.ahead)
  return jnp.where(is_near, tiles, MASKED)

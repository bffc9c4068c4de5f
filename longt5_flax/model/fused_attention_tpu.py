"""Fused attention on TPUs: the arrays that its kernels take, and its gradient.

`fused_attention` says what is computed and chooses between this and the kernels
for GPUs; `kernels/fused_attention_tpu.py` says how. TPUs have no float16:
operands of that dtype are float32 here, products exact.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from longt5_flax.config import ConfigError
from longt5_flax.model.kernels import fused_attention_tpu as kernels
from longt5_flax.model.kernels.calls import (
    ATTENDED,
    LAYOUT,
    KernelOptions,
    blocks_of_tiles,
    covering_run,
    ranges_meet,
    segment_range,
)
from longt5_flax.model.kernels.fused_attention_tpu import (
    ALIGNMENT,
    MASKED,
    Geometry,
    Globals,
    Rows,
    Spans,
    Tokens,
    round_up,
)
from longt5_flax.model.relative_position import toeplitz

LANES = 128
# A block holds the radius, and the scores of a block fit on the chip.
MAX_RADIUS = 512
# So many LANES are a tile of tokens or global tokens, at most.
MAX_TILES = 4
# Features of a group of heads, at most; or one head.
_GROUP_SIZE = 128


def attend(
    tokens: tuple[Array, ...], tables: tuple[Array, ...],
    ids: tuple[Array, ...], block_size: int | None, dtype: DTypeLike,
    options: KernelOptions,
) -> Float[Array, 'B L H K']:
  """`fused_attention` on one device.

  Args:
    tokens: query, key, value; with global tokens their key and value.
    tables: the bias; with global tokens theirs.
    ids: segments; with global tokens their segments, and the tokens' blocks.
    block_size: of global tokens; None without.
    dtype: of the matrix products.
    options: how the kernels are run.

  Raises:
    ConfigError: the radius is larger than the kernels can do.
  """
  query, *_ = tokens
  length = query.shape[1]
  radius = tables[0].shape[1] // 2
  if radius > MAX_RADIUS:
    raise ConfigError(
        f"local_radius={radius} must be at most {MAX_RADIUS} for "
        "attention='fused' on a TPU; attention='chunked' takes any.")
  geometry = _geometry(tokens, tables, block_size, options)
  prepare = partial(to_operands, geometry, dtype)
  bias, *side_bias = (x.astype(jnp.float32) for x in tables)
  segment_ids = jnp.pad(ids[0], ((0, 0), (0, -length % geometry.tile)))
  layout, side = None, None
  if block_size:
    layout = _layout(geometry, segment_ids, *ids[1:])
    side = *(prepare(geometry.side_tile, x) for x in tokens[3:]), *side_bias
  output = _fused(
      geometry, *(prepare(geometry.tile, x) for x in tokens[:3]), bias,
      segment_ids, layout, side)
  return from_operands(output, query)


def to_operands(geometry: Geometry, dtype: DTypeLike, multiple: int,
                x: Float[Array, 'B L H K']) -> Float[Array, 'B features l']:
  """As the kernels take tokens, a multiple of them."""
  operand = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
  x = jnp.pad(x.astype(operand), (
      (0, 0), (0, -x.shape[1] % multiple), (0, 0),
      (0, geometry.size - x.shape[3])))
  return jnp.moveaxis(x, 1, 3).reshape(x.shape[0], -1, x.shape[1])


def from_operands(x: Float[Array, 'B features l'],
                  like: Float[Array, 'B L H K']) -> Float[Array, 'B L H K']:
  """What `to_operands` made of an array like that."""
  batch, length, heads, size = like.shape
  x = jnp.moveaxis(x.reshape(batch, heads, -1, x.shape[2]), 3, 1)
  return x[:, :length, :, :size].astype(like.dtype)


def heads_of_a_group(heads: int, size: int) -> int:
  """A divisor, of as many as have _GROUP_SIZE features; at least one."""
  return max(n for n in range(1, heads + 1)
             if heads % n == 0 and n <= max(1, _GROUP_SIZE // size))


def _geometry(tokens, tables, block_size, options):
  length, heads, size = tokens[0].shape[1:]
  unit = options.tile if options.interpret else LANES
  block = round_up(max(1, tables[0].shape[1] // 2), unit)
  tile = block * min(
      max(1, MAX_TILES * unit // block), round_up(length, block) // block)
  size = round_up(size, ALIGNMENT)
  side_tile = rows = reach = 0
  if block_size:
    side_tile = min(MAX_TILES * unit, round_up(tokens[3].shape[1], unit))
    # Blocks that tokens of a tile may be in, with those that the first is
    # rounded down by.
    rows = round_up(tile // block_size + 2 + ALIGNMENT - 1, ALIGNMENT)
    reach = tables[1].shape[1] // 2
  return Geometry(block, tile, side_tile, rows, reach,
                  heads_of_a_group(heads, size), size, 'longt5_attention',
                  options.interpret)


class _Layout(NamedTuple):
  """How tiles of tokens and of global tokens lie to each other; see `Globals`
  and `Spans`."""
  segment_ids: Int[Array, 'B S']
  rows: Int[Array, 'B L']
  spans: Spans


def _layout(geometry, segment_ids, side_segments, block_ids):
  batch, length = segment_ids.shape
  side_segments = jnp.pad(
      side_segments,
      ((0, 0), (0, -side_segments.shape[1] % geometry.side_tile)))
  own, firsts, _ = blocks_of_tiles(block_ids, length, geometry.tile)
  firsts -= firsts % ALIGNMENT
  rows = jnp.where(own >= 0, own - firsts[..., None], -1)

  spans = spans_of(geometry, segment_ids, side_segments, firsts)
  return checkpoint_name(
      _Layout(side_segments, rows.reshape(batch, -1), spans), LAYOUT)


def spans_of(geometry: Geometry, segment_ids: Int[Array, 'B L'],
             side_segments: Int[Array, 'B S'], firsts: Int[Array, 'B tiles']
             ) -> Spans:
  """Which tiles meet, by their segments and with the first block of each."""
  sees = ranges_meet(*(
      segment_range(x.reshape(x.shape[0], -1, size)) for x, size in (
          (segment_ids, geometry.tile), (side_segments, geometry.side_tile))))
  return Spans(*(jnp.stack(numbers, axis=-1).reshape(-1) for numbers in (
      (firsts, *covering_run(sees)), covering_run(sees.swapaxes(1, 2)))))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(geometry, query, key, value, bias, segment_ids, layout, side):
  return _fused_forward(
      geometry, query, key, value, bias, segment_ids, layout, side)[0]


def _fused_forward(geometry, query, key, value, bias, segment_ids, layout,
                   side):
  tokens = Tokens(
      query, key, value, segment_ids[:, None],
      _banded(geometry, bias, _of_queries))
  output, lse = checkpoint_name(kernels.forward(
      geometry, layout and layout.spans, tokens,
      _globals(geometry, layout, side)), ATTENDED)
  return output, (tokens, bias, layout, side, output, lse)


def _fused_backward(geometry, residuals, gradient):
  tokens, bias, layout, side, output, lse = residuals
  rows = rows_of(gradient, output, lse)
  arrays = _globals(geometry, layout, side)
  spans = layout and layout.spans
  d_query, (d_tiles, *d_side_biases) = kernels.backward_query(
      geometry, spans, tokens, arrays, rows)
  d_key, d_value = kernels.backward_key(geometry, tokens._replace(
      bias=_banded(geometry, bias, _of_keys)), rows)
  d_bias, = jax.linear_transpose(partial(_of_queries, geometry), bias)(d_tiles)
  d_side = None
  if side:
    d_side = _side_backward(
        geometry, spans, tokens, arrays, rows, side, d_side_biases)
  return d_query, d_key, d_value, d_bias, None, None, d_side


def rows_of(gradient: Float[Array, 'B features L'],
            output: Float[Array, 'B features L'],
            lse: Float[Array, 'B groups heads L']) -> Rows:
  """What the backward pass knows of queries."""
  batch, groups, heads, length = lse.shape
  delta = jnp.sum((gradient.astype(jnp.float32) * output).reshape(
      batch, groups, heads, -1, length), axis=3)
  return Rows(gradient, lse, delta)


_fused.defvjp(_fused_forward, _fused_backward)


def _side_backward(geometry, spans, tokens, arrays, rows, side, d_biases):
  d_table, d_far = d_biases
  d_key, d_value = kernels.backward_side(
      geometry, spans, tokens, arrays, rows)
  d_bias, = jax.linear_transpose(partial(_table, geometry), side[2])(d_table)
  before, behind = jnp.sum(d_far, axis=-1).reshape(-1, 2).T
  return d_key, d_value, d_bias.at[:, 0].add(before).at[:, -1].add(behind)


def _globals(geometry, layout, side):
  if not side:
    return None
  key, value, bias = side
  return Globals(
      key, value, layout.segment_ids[:, None], layout.rows[:, None],
      _split(key.dtype, _table(geometry, bias)),
      jnp.stack([bias[:, 0], bias[:, -1]], axis=1).reshape(-1))


def _of_queries(geometry, bias):
  """[H, 3 block, block]: of the queries of a block towards its window; 0 beyond
  the radius."""
  return _tiles(geometry, bias).swapaxes(1, 2)


def _of_keys(geometry, bias):
  """[H, block, 3 block]: of the queries of a window towards a block."""
  return _tiles(geometry, bias[:, ::-1])


def _tiles(geometry, bias):
  """At [h, i, j] the bias at the offset j - block - i."""
  fill = 2 * geometry.block - 1 - bias.shape[1] // 2
  return toeplitz(jnp.pad(bias, ((0, 0), (fill, fill))), geometry.block,
                  3 * geometry.block)


def _banded(geometry, bias, tiles):
  """`tiles` of the bias, what lies beyond the radius hidden."""
  inside = tiles(geometry, jnp.ones_like(bias[:1])) > 0
  return jnp.where(inside, tiles(geometry, bias), MASKED)


def _table(geometry, bias):
  """[H, table_rows, rows]; see `Globals`."""
  reach = bias.shape[1] // 2
  before = geometry.rows - 1 - geometry.first_offset - reach
  behind = geometry.first_offset + geometry.table_rows - 1 - reach
  values = jnp.pad(bias, ((0, 0), (before, behind)), mode='edge')
  return toeplitz(values, geometry.rows, geometry.table_rows).swapaxes(1, 2)


def _split(dtype, table):
  """The table in parts beside each other, numbers of that dtype that add up."""
  if dtype == jnp.float32:
    return table
  # As bfloat16; a pair of casts XLA would take out.
  high = jax.lax.reduce_precision(table, exponent_bits=8, mantissa_bits=7)
  return jnp.concatenate([high, table - high], axis=-1).astype(dtype)

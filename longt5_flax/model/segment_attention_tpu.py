"""Attention of targets to all inputs of their segment on TPUs: in the kernels
of fused attention, the inputs in the place of global tokens and no biases."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from longt5_flax.model.fused_attention_tpu import (
    LANES,
    MAX_TILES,
    from_operands,
    heads_of_a_group,
    rows_of,
    spans_of,
    to_operands,
)
from longt5_flax.model.kernels import fused_attention_tpu as kernels
from longt5_flax.model.kernels.calls import (
    ATTENDED,
    LAYOUT,
    KernelOptions,
)
from longt5_flax.model.kernels.fused_attention_tpu import (
    ALIGNMENT,
    Geometry,
    Globals,
    Tokens,
    round_up,
)


def attend(
    tokens: tuple[Array, ...], tables: tuple[()], ids: tuple[Array, ...],
    dtype: DTypeLike, options: KernelOptions,
) -> Float[Array, 'B T H K']:
  """`segment_attention` on one device.

  Args:
    tokens: query, key and value.
    tables: none.
    ids: segments of the queries and of the keys.
    dtype: of the matrix products.
    options: how the kernels are run.
  """
  del tables
  query, key, _ = tokens
  unit = options.tile if options.interpret else LANES
  tile, side_tile = (min(MAX_TILES * unit, round_up(x.shape[1], unit))
                     for x in (query, key))
  size = round_up(query.shape[3], ALIGNMENT)
  geometry = Geometry(
      unit, tile, side_tile, 0, 0, heads_of_a_group(query.shape[2], size), size,
      'longt5_segment_attention', options.interpret)
  segment_ids = (jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))
                 for x, multiple in zip(ids, (tile, side_tile), strict=True))
  output = _segment_attention(
      geometry, *(
          to_operands(geometry, dtype, multiple, x) for x, multiple in zip(
              tokens, (tile, side_tile, side_tile), strict=True)), *segment_ids)
  return from_operands(output, query)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segment_attention(geometry, query, key, value, query_segments,
                       segment_ids):
  return _forward(
      geometry, query, key, value, query_segments, segment_ids)[0]


def _forward(geometry, query, key, value, query_segments, segment_ids):
  batch, length = query_segments.shape
  no_blocks = jnp.zeros((batch, length // geometry.tile), jnp.int32)
  arrays = (
      checkpoint_name(spans_of(
          geometry, query_segments, segment_ids, no_blocks), LAYOUT),
      Tokens(query, None, None, query_segments[:, None], None),
      Globals(key, value, segment_ids[:, None], None, None, None))
  output, lse = checkpoint_name(
      kernels.forward(geometry, *arrays), ATTENDED)
  return output, (arrays, output, lse)


def _backward(geometry, residuals, gradient):
  (spans, tokens, side), output, lse = residuals
  rows = rows_of(gradient, output, lse)
  d_query, _ = kernels.backward_query(geometry, spans, tokens, side, rows)
  d_key, d_value = kernels.backward_side(geometry, spans, tokens, side, rows)
  return d_query, d_key, d_value, None, None


_segment_attention.defvjp(_forward, _backward)

"""Attention of targets to all inputs of their segment, in kernels that keep no
scores: here those of GPUs (`kernels/segment_attention_triton.py`), in
`segment_attention_tpu` those of TPUs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from longt5_flax.model import segment_attention_tpu
from longt5_flax.model.kernels import segment_attention_triton as kernels
from longt5_flax.model.kernels.calls import (
    ATTENDED,
    LAYOUT,
    ON_A_GPU,
    KernelOptions,
    all_see,
    covering_run,
    gapless_run,
    on_each_device,
    ranges_meet,
    segment_range,
    to_operands,
)
from longt5_flax.model.kernels.triton_tiles import (
    Columns,
    Rows,
    product_size,
    statistics,
    which_statistics,
)

# Programs that fill a GPU, some on each of its 132 multiprocessors; and how
# many may share the keys of a tile of queries to get there.
_PROGRAMS = 512
_MAX_PARTS = 8


def segment_attention(
    query: Float[Array, 'B T H K'],
    key: Float[Array, 'B S H K'],
    value: Float[Array, 'B S H K'],
    query_segments: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B S'],
    dtype: DTypeLike,
    options: KernelOptions = ON_A_GPU,
) -> Float[Array, 'B T H K']:
  """What queries attend to; zeros for those that see nothing.

  Memory is linear in T and S, and tiles that share no segment take no time.
  Under a mesh each device attends with its rows and heads; a length that is
  split is gathered.

  Args:
    query, key, value: T5's: scores are not divided by sqrt(K).
    query_segments: 0 is padding; a query sees the keys of its own segment.
    segment_ids: of the keys.
    dtype: of the matrix products.
    options: how the kernels are run.

  Raises:
    ConfigError: the device has no such kernels.
  """
  attend = partial(
      segment_attention_tpu.attend if options.for_a_tpu() else _attend,
      dtype=dtype, options=options)
  return on_each_device(attend, (query, key, value), (),
                        (query_segments, segment_ids), options)


def attend_to_stored(
    query: Float[Array, 'B T H K'],
    key: Float[Array, 'B H S K'],
    value: Float[Array, 'B H S K'],
    query_segments: Int[Array, 'B T'],
    segment_ids: Int[Array, 'B S'],
    dtype: DTypeLike,
    options: KernelOptions = ON_A_GPU,
) -> Float[Array, 'B T H K']:
  """`segment_attention`, which see, to keys and values that lie as a step of
  decoding reads them. It has no gradient."""
  attend = partial(_attend_to_stored, dtype=dtype, options=options)
  return on_each_device(attend, (query,), (), (query_segments, segment_ids),
                        options, (key, value))


def _attend(tokens, tables, ids, dtype, options):
  del tables
  query, *keys = tokens
  query_tile = min(options.tile, product_size(query.shape[1]))
  ids = _whole_tiles(query_tile, ids, options)
  output = _segment_attention(
      options.tiling(dtype), query_tile, to_operands(query, dtype, query_tile),
      *(to_operands(x, dtype, options.tile) for x in keys), *ids)
  return _from_operands(output, query)


def _attend_to_stored(tokens, tables, ids, stored, dtype, options):
  query, = tokens
  if options.for_a_tpu():
    return segment_attention_tpu.attend(
        (query, *(x.swapaxes(1, 2) for x in stored)), tables, ids, dtype,
        options)
  # A step of decoding has a query or a few: the kernel takes them as they are.
  query_tile = min(options.tile, query.shape[1])
  query_segments, segment_ids = _whole_tiles(query_tile, ids, options)
  key, value = (to_operands(x, dtype, options.tile, axis=2) for x in stored)
  arrays = kernels.Arrays(to_operands(query, dtype, query_tile),
                          query_segments, key, value, segment_ids)
  tiling = options.tiling(dtype)
  spans, _ = _spans(tiling, query_tile, query_segments, segment_ids)
  output, _ = kernels.forward(
      tiling, query_tile, arrays, spans, _parts(query_tile, arrays.query),
      heads_first=True)
  return _from_operands(output, query)


def _whole_tiles(query_tile, ids, options):
  """Segments of queries and keys in whole tiles."""
  return tuple(
      jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple)))
      for x, multiple in zip(ids, (query_tile, options.tile), strict=True))


def _from_operands(x, like):
  """What came of `to_operands` of an array like that."""
  return x[:, :like.shape[1], :, :like.shape[3]].astype(like.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _segment_attention(tiling, query_tile, query, key, value, query_segments,
                       segment_ids):
  return _forward(tiling, query_tile, query, key, value, query_segments,
                  segment_ids)[0]


def _forward(tiling, query_tile, query, key, value, query_segments,
             segment_ids):
  arrays = kernels.Arrays(query, query_segments, key, value, segment_ids)
  spans = checkpoint_name(
      _spans(tiling, query_tile, query_segments, segment_ids), LAYOUT)
  output, lse = checkpoint_name(kernels.forward(
      tiling, query_tile, arrays, spans[0], _parts(query_tile, query)),
      ATTENDED)
  return output, (arrays, spans, output, lse)


def _backward(tiling, query_tile, residuals, gradient):
  arrays, (key_spans, query_spans), output, lse = residuals
  delta = jnp.sum(gradient.astype(jnp.float32) * output, axis=-1).swapaxes(1, 2)
  rows = Rows(gradient, lse, delta)
  d_query = jnp.sum(kernels.backward_query(
      tiling, query_tile, arrays, key_spans, rows,
      _parts(query_tile, arrays.query)), axis=0)
  pack = jax.vmap(jax.vmap(partial(statistics, dtype=gradient.dtype)))
  d_key, d_value = kernels.backward_key(
      tiling, query_tile, arrays, query_spans, Columns(
          gradient, pack(lse, delta), which_statistics(
              tiling.tile, gradient.dtype)))
  return d_query.astype(arrays.query.dtype), d_key, d_value, None, None


_segment_attention.defvjp(_forward, _backward)


def _parts(query_tile, query):
  """Programs that share the keys of a tile of queries."""
  batch, length, heads, _ = query.shape
  programs = batch * heads * (length // query_tile)
  return min(_MAX_PARTS, -(-_PROGRAMS // programs))


def _spans(tiling, query_tile, query_segments, segment_ids):
  """[B, query tiles, 4]: the key tiles from first to end that a query tile
  shares a segment with, and those of which all see each other; and the same
  for key tiles, [B, key tiles, 4]."""
  queries, keys = (
      x.reshape(x.shape[0], -1, tile) for x, tile in (
          (query_segments, query_tile), (segment_ids, tiling.tile)))
  shared = ranges_meet(segment_range(queries), segment_range(keys))
  every = all_see(queries, keys)
  return tuple(
      jnp.stack([*covering_run(shared), *gapless_run(every)], axis=-1)
      for shared, every in ((shared, every), (
          shared.swapaxes(1, 2), every.swapaxes(1, 2))))

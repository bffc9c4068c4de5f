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
    MASKED,
    Columns,
    Rows,
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


def _attend(tokens, tables, ids, dtype, options):
  del tables
  length, size = tokens[0].shape[1::2]
  query_segments, segment_ids = (
      jnp.pad(x, ((0, 0), (0, -x.shape[1] % options.tile))) for x in ids)
  output = _segment_attention(
      options.tiling(dtype),
      *(to_operands(x, dtype, options.tile) for x in tokens),
      query_segments, segment_ids)
  return output[:, :length, :, :size].astype(tokens[0].dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _segment_attention(tiling, query, key, value, query_segments, segment_ids):
  return _forward(
      tiling, query, key, value, query_segments, segment_ids)[0]


def _forward(tiling, query, key, value, query_segments, segment_ids):
  arrays = kernels.Arrays(query, query_segments, key, value, segment_ids)
  spans = checkpoint_name(
      _spans(tiling, query_segments, segment_ids), LAYOUT)
  outputs, lses = kernels.forward(
      tiling, arrays, spans[0], _parts(tiling, query))
  lse, shares = _join(lses)
  output = jnp.einsum('pBTHK,pBHT->BTHK', outputs, shares).astype(query.dtype)
  output, lse = checkpoint_name((output, lse), ATTENDED)
  return output, (arrays, spans, output, lse)


def _join(lses):
  """[B, H, T] of the softmax over all parts, and the share of each part in it,
  [parts, B, H, T]. Where a query sees nothing a kernel wrote -MASKED."""
  seen = lses < -MASKED
  top = jnp.max(jnp.where(seen, lses, MASKED), axis=0)
  total = jnp.sum(jnp.where(seen, jnp.exp2(lses - top), 0), axis=0)
  lse = jnp.where(total > 0, top + jnp.log2(total), -MASKED)
  return lse, jnp.where(seen, jnp.exp2(lses - lse), 0)


def _backward(tiling, residuals, gradient):
  arrays, (key_spans, query_spans), output, lse = residuals
  delta = jnp.sum(gradient.astype(jnp.float32) * output, axis=-1).swapaxes(1, 2)
  rows = Rows(gradient, lse, delta)
  d_query = jnp.sum(kernels.backward_query(
      tiling, arrays, key_spans, rows, _parts(tiling, arrays.query)), axis=0)
  pack = jax.vmap(jax.vmap(partial(statistics, dtype=gradient.dtype)))
  d_key, d_value = kernels.backward_key(
      tiling, arrays, query_spans, Columns(
          gradient, pack(lse, delta), which_statistics(
              tiling.tile, gradient.dtype)))
  return d_query.astype(arrays.query.dtype), d_key, d_value, None, None


_segment_attention.defvjp(_forward, _backward)


def _parts(tiling, query):
  """Programs that share the keys of a tile of queries."""
  batch, length, heads, _ = query.shape
  programs = batch * heads * (length // tiling.tile)
  return min(_MAX_PARTS, -(-_PROGRAMS // programs))


def _spans(tiling, query_segments, segment_ids):
  """[B, query tiles, 4]: the key tiles from first to end that a query tile
  shares a segment with, and those of which all see each other; and the same
  for key tiles, [B, key tiles, 4]."""
  queries, keys = (x.reshape(x.shape[0], -1, tiling.tile)
                   for x in (query_segments, segment_ids))
  shared = ranges_meet(segment_range(queries), segment_range(keys))
  every = all_see(queries, keys)
  return tuple(
      jnp.stack([*covering_run(shared), *gapless_run(every)], axis=-1)
      for shared, every in ((shared, every), (
          shared.swapaxes(1, 2), every.swapaxes(1, 2))))

"""What the GPU kernels of attention share: one tile of queries and one of keys,
how arrays are cut into tiles, and how a kernel is called.

Scores are in base 2: exp2 is the instruction that GPUs have.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LOG2_E = 1.4426950408889634
# Of what a band or segments hide. Finite: a difference of two is 0.
MASKED = -1e30
_WARPS = 4


class Tiling(NamedTuple):
  """What is known of all tiles when a kernel is compiled.

  Attributes:
    tile: tokens of a tile, queries or keys.
    precision: of products of float32 operands.
    stages: tiles that loops hold at a time: one in use, others on their way.
    interpret: run on any device, slowly.
  """
  tile: int
  precision: jax.lax.Precision
  stages: int
  interpret: bool


class Keys(NamedTuple):
  """A tile of keys: [tile, K] twice, and [tile]."""
  key: Any
  value: Any
  segment_ids: Any


class Rows(NamedTuple):
  """What the backward pass knows of queries.

  Attributes:
    gradient: of what they attended to, [B, L, H, K].
    lse: the logarithm in base 2 of each softmax's sum, [B, H, L].
    delta: the product of gradient and output, [B, H, L].
  """
  gradient: Any
  lse: Any
  delta: Any

  def load(self, tiling: Tiling, tile: Any) -> 'Rows':
    part = at(tile, tiling.tile)
    return Rows(self.gradient[part, :], self.lse[part], self.delta[part])


class Spread(NamedTuple):
  """A bias in base e, of rows that many queries share: the product of a one-hot
  matrix, [queries, parts], and the parts of rows, [parts, keys]; for keys by
  queries the other way round. It adds to the scores in the matrix unit."""
  one_hot: Any
  parts: Any


class Softmax(NamedTuple):
  """A softmax over the keys so far: the largest score, the sum of weights
  relative to it, [tile] both, and the sum of weighted values, [tile, K]."""
  top: Any
  total: Any
  output: Any


def dot(tiling: Tiling, a: Any, b: Any) -> Any:
  """The product of two tiles, in float32."""
  if tiling.interpret:  # Not every CPU has products of bfloat16; exact.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jax.lax.dot(a, b, precision=tiling.precision,
                     preferred_element_type=jnp.float32)


def apart(tiling: Tiling, product: Any) -> Any:
  """A product that the compiler does not add to its sum in the matrix unit.

  It would, and where several loops hand one sum on, it has to move the sum
  between registers and then waits for every single instruction of the unit
  (ptxas says so, C7515). Programs have no negative number.
  """
  if tiling.interpret:
    return product
  return jnp.where(pl.program_id(2) >= 0, product, 0)


def at(index: Any, size: int) -> Any:
  """The index-th run of `size` elements."""
  return pl.ds(pl.multiple_of(index * size, size), size)


def load_keys(tiling: Tiling, refs: Any, tile: Any) -> Keys:
  """A tile of `refs.key`, `refs.value` and `refs.segment_ids`."""
  part = at(tile, tiling.tile)
  return Keys(refs.key[part, :], refs.value[part, :], refs.segment_ids[part])


def scores(tiling: Tiling, query: Any, segments: Any, keys: Keys, bias: Any
           ) -> Any:
  """[queries, keys] in base 2, where `bias` is too."""
  products = _biased(
      tiling, dot(tiling, query, keys.key.T), bias, lambda bias: dot(
          tiling, bias.one_hot, bias.parts))
  same = segments[:, None] == keys.segment_ids[None, :]
  return jnp.where(same, products, MASKED)


def _biased(tiling, products, bias, spread):
  """In base 2."""
  if isinstance(bias, Spread):
    return (products + spread(bias)) * LOG2_E
  return products * LOG2_E + bias


def no_keys(tiling: Tiling, size: int) -> Softmax:
  """Where `attend` begins."""
  return Softmax(jnp.full((tiling.tile,), MASKED, jnp.float32),
                 jnp.zeros((tiling.tile,), jnp.float32),
                 jnp.zeros((tiling.tile, size), jnp.float32))


def attend(tiling: Tiling, query: Any, segments: Any, keys: Keys, bias: Any,
           softmax: Softmax) -> Softmax:
  """Adds a tile of keys."""
  new_scores = scores(tiling, query, segments, keys, bias)
  top = jnp.maximum(softmax.top, jnp.max(new_scores, axis=1))
  return _add_weights(
      tiling, jnp.exp2(new_scores - top[:, None]), top, keys, softmax)


def attend_to_all(tiling: Tiling, query: Any, keys: Keys, bias: Any,
                  softmax: Softmax) -> Softmax:
  """`attend` where every query sees every key and `bias` is one number; half
  the instructions."""
  products = dot(tiling, query, keys.key.T)
  top = jnp.maximum(
      softmax.top, jnp.max(products, axis=1) * LOG2_E + bias)
  weights = jnp.exp2(products * LOG2_E + (bias - top)[:, None])
  return _add_weights(tiling, weights, top, keys, softmax)


def _add_weights(tiling, weights, top, keys, softmax):
  shrink = jnp.exp2(softmax.top - top)
  return Softmax(
      top, softmax.total * shrink + jnp.sum(weights, axis=1),
      softmax.output * shrink[:, None] + apart(tiling, dot(
          tiling, weights.astype(keys.value.dtype), keys.value)))


def write(softmax: Softmax, real: Any, out_ref: Any, lse_ref: Any) -> None:
  """Writes what real queries attended to, zeros for others, and the logarithm
  in base 2 of the softmax's sum."""
  out_ref[...] = jnp.where(
      real[:, None], softmax.output / softmax.total[:, None], 0
  ).astype(out_ref.dtype)
  # What others see must have no weight in the backward pass.
  lse_ref[...] = jnp.where(real, softmax.top + jnp.log2(softmax.total), -MASKED)


def weights_and_gradient(tiling: Tiling, query: Any, segments: Any, keys: Keys,
                         bias: Any, rows: Rows) -> tuple[Any, Any]:
  """Weights, and the gradient of scores in base e. Without segments all keys
  are seen, and `bias` is one number."""
  if segments is None:
    weights = jnp.exp2(dot(tiling, query, keys.key.T) * LOG2_E
                       + (bias - rows.lse)[:, None])
  else:
    weights = jnp.exp2(
        scores(tiling, query, segments, keys, bias) - rows.lse[:, None])
  d_weights = dot(tiling, rows.gradient, keys.value.T)
  return weights, weights * (d_weights - rows.delta[:, None])


def add_key_gradient(tiling: Tiling, query: Any, segments: Any, keys: Keys,
                     bias: Any, rows: Rows, gradients: tuple[Any, Any]
                     ) -> tuple[Any, Any]:
  """Adds what a tile of queries says of a tile of keys and values.

  Works on [keys, queries], so that what comes out of one product goes into the
  next without changing places between threads; `bias` is transposed, or one
  number. Without segments all keys are seen.
  """
  products = dot(tiling, keys.key, query.T)
  if segments is None:
    weights = jnp.exp2(products * LOG2_E + (bias - rows.lse)[None, :])
  else:
    same = keys.segment_ids[:, None] == segments[None, :]
    weights = jnp.exp2(
        jnp.where(same, _biased(
            tiling, products, bias, lambda bias: dot(
                tiling, bias.parts.T, bias.one_hot.T)), MASKED)
        - rows.lse[None, :])
  d_weights = dot(tiling, keys.value, rows.gradient.T)
  d_scores = weights * (d_weights - rows.delta[None, :])
  d_key, d_value = gradients
  return (d_key + dot(tiling, d_scores.astype(query.dtype), query),
          d_value + dot(tiling, weights.astype(rows.gradient.dtype),
                        rows.gradient))


def fold_around(first: Any, end: Any, hole: tuple[Any, Any],
                body: Callable[[Any, Any], Any], carry: Any) -> Any:
  """`fori_loop(first, end, body, carry)` without what lies in the hole, whose
  borders are within."""
  before = hole[0] - first

  def step(i, carry):
    return body(jnp.where(i < before, first + i, hole[1] + i - before), carry)

  return jax.lax.fori_loop(0, before + end - hole[1], step, carry)


def clip_span(span: tuple[Any, Any], first: Any, end: Any) -> tuple[Any, Any]:
  """The part of a span that lies between `first` and `end`; if there is none,
  an empty one there."""
  start = jnp.clip(span[0], first, end)
  return start, jnp.clip(span[1], start, end)


# How arrays are cut for the grids: `whole` for all of a row, `tiles` for the
# program's tile of it. Grids begin with row, head and tile.


def whole(x: Any) -> pl.BlockSpec:
  """[B, n, H, K] without batch and head, or [B, n] without batch."""
  if x.ndim == 2:
    return pl.BlockSpec((None, x.shape[1]), lambda b, *_: (b, 0))
  return pl.BlockSpec((None, x.shape[1], None, x.shape[3]),
                      lambda b, h, *_: (b, 0, h, 0))


def tiles(x: Any, size: int) -> pl.BlockSpec:
  if x.ndim == 2:
    return pl.BlockSpec((None, size), lambda b, h, i, *_: (b, i))
  return pl.BlockSpec((None, size, None, x.shape[3]),
                      lambda b, h, i, *_: (b, i, h, 0))


def rows_by_head(x: Any) -> pl.BlockSpec:
  """[B, H, L] without batch and head."""
  return pl.BlockSpec((None, None, x.shape[2]), lambda b, h, *_: (b, h, 0))


def of_tile(x: Any) -> pl.BlockSpec:
  """[B, tiles, n]: the n numbers of the program's tile."""
  return pl.BlockSpec((None, None, x.shape[2]), lambda b, h, i, *_: (b, i, 0))


def row_specs(rows: Rows) -> Rows:
  return Rows(whole(rows.gradient), rows_by_head(rows.lse),
              rows_by_head(rows.delta))


def call(tiling: Tiling, kernel: Callable[..., None], grid: tuple[int, ...],
         in_specs: Sequence[Any], out_specs: Any, out_shapes: Any, name: str
         ) -> Any:
  """The kernel as a function of arrays."""
  return pl.pallas_call(
      kernel, grid=grid, in_specs=in_specs, out_specs=out_specs,
      out_shape=out_shapes, interpret=tiling.interpret, name=name,
      compiler_params=plgpu.CompilerParams(
          num_warps=_WARPS, num_stages=tiling.stages))

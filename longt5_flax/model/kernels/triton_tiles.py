"""What the GPU kernels of attention share: one tile of queries and one of keys,
how arrays are cut into tiles, and how a kernel is called.

Softmaxes are in base 2: exp2 is the instruction that GPUs have.
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
# The columns of `statistics`: products are no less deep. Parts of a number in
# them, and the bits that a bfloat16 has of a float32.
STATISTICS, _PARTS, _BFLOAT16 = 16, 3, -(1 << 16)
_WARPS = 4
# The least that a product takes along each of its axes.
LEAST = 16


class Tiling(NamedTuple):
  """What is known of all tiles when a kernel is compiled.

  Attributes:
    tile: tokens of a tile, queries or keys; of keys where few queries have
      tiles of their own.
    precision: of products of float32 operands.
    stages: tiles that loops hold at a time: one in use, others on their way.
    interpret: run on any device, slowly.
  """
  tile: int
  precision: jax.lax.Precision
  stages: int
  interpret: bool


class Keys(NamedTuple):
  """A tile of keys: [tile, K] twice."""
  key: Any
  value: Any


class Mask(NamedTuple):
  """Which keys of a tile the queries see.

  Attributes:
    is_clean: whether each sees every one; None if that is not known.
    hide: scores -> scores with `hidden` ones, used if not. So a tile where
      nothing is hidden has a fifth fewer instructions, and reads no segments.
  """
  is_clean: Any
  hide: Callable[[Any], Any]

  def apply(self, scores: Any) -> Any:
    if self.is_clean is None:
      return self.hide(scores)
    return jax.lax.cond(self.is_clean, lambda x: x, self.hide, scores)


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

  def load(self, part: Any) -> 'Rows':
    return Rows(self.gradient[part, :], self.lse[part], self.delta[part])


class Columns(NamedTuple):
  """`Rows` for `add_key_gradient`, where queries are columns.

  Attributes:
    gradient: [B, L, H, K].
    statistics: see there, [B, H, L, 16].
    which: see `which_statistics`, [2, tile, 16].
  """
  gradient: Any
  statistics: Any
  which: Any

  def hold(self) -> 'Columns':
    """What does not depend on the tile is read once."""
    return self._replace(which=(self.which[0], self.which[1]))

  def load(self, part: Any) -> 'Columns':
    return Columns(
        self.gradient[part, :], self.statistics[part, :], self.which)


class Spread(NamedTuple):
  """A bias of rows that many queries share: the product of a one-hot matrix,
  [queries, parts], and the parts of rows, [parts, keys]."""
  one_hot: Any
  parts: Any


class Softmax(NamedTuple):
  """A softmax over the keys so far: the largest score, the sum of weights
  relative to it, [tile] both, and the sum of weighted values, [tile, K]."""
  top: Any
  total: Any
  output: Any


def product_size(size: int) -> int:
  """What holds so many of a product's rows, columns or terms: a power of two,
  16 or more."""
  return max(LEAST, 1 << (size - 1).bit_length())


def repeated_rows(size: int) -> Any:
  """As many rows as a product takes, of so many: where it takes more than there
  are the last one repeats, and is written several times."""
  return jnp.minimum(jnp.arange(product_size(size)), size - 1)


def product_rows(size: int) -> Any:
  """`repeated_rows` as an index, which is none where no row repeats."""
  return ... if size == product_size(size) else repeated_rows(size)


def dot(tiling: Tiling, a: Any, b: Any) -> Any:
  """The product of two tiles, in float32."""
  if tiling.interpret:  # Not every CPU has products of bfloat16; exact.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jax.lax.dot(a, b, precision=tiling.precision,
                     preferred_element_type=jnp.float32)


def statistics(lse: Any, delta: Any, dtype: Any) -> Any:
  """[n, 16]: lse in base e and delta, [n], less than 0 and each in three parts
  that every dtype of operands can hold, and that are together as good as
  float32. So the matrix unit subtracts them from products."""
  column = jax.lax.broadcasted_iota(
      jnp.int32, (lse.shape[0], STATISTICS), 1)
  packed = jnp.zeros(column.shape, jnp.float32)
  for i, rest in enumerate((-lse / LOG2_E, -delta)):
    for j in range(_PARTS):
      part = jax.lax.bitcast_convert_type(
          jax.lax.bitcast_convert_type(rest, jnp.int32) & _BFLOAT16,
          jnp.float32)
      packed = jnp.where(column == _PARTS * i + j, part[:, None], packed)
      rest -= part
  return packed.astype(dtype)


def which_statistics(tile: int, dtype: Any) -> jax.Array:
  """[2, tile, 16]: 1 where `statistics` has lse, and where it has delta. An
  array of the kernels, as operands that are made in registers keep products
  from overlapping (ptxas says so, C7513)."""
  which = jnp.arange(STATISTICS) // _PARTS == jnp.arange(2)[:, None]
  return jnp.broadcast_to(
      which[:, None], (2, tile, STATISTICS)).astype(dtype)


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


def load_keys(refs: Any, part: Any) -> Keys:
  """A run of `refs.key` and `refs.value`."""
  return Keys(refs.key[part, :], refs.value[part, :])


def scores(tiling: Tiling, query: Any, keys: Keys, bias: Any, mask: Mask
           ) -> Any:
  """[queries, keys], in base e as the bias is: none, a tile, or a `Spread`,
  which the matrix unit adds."""
  products = dot(tiling, query, keys.key.T)
  if isinstance(bias, Spread):
    products += dot(tiling, bias.one_hot, bias.parts)
  elif bias is not None:
    products = apart(tiling, products) + bias
  return mask.apply(products)


def hidden(scores: Any, segments: Any, others: Any) -> Any:
  """Scores of rows and columns that are not of one segment."""
  return jnp.where(segments[:, None] == others[None, :], scores, MASKED)


def segment_mask(clean: Sequence[Any], index: Any, segments: Any, others: Any,
                 part: Any) -> Mask:
  """Of a tile, which hides what is not of one segment.

  Args:
    clean: from which to before which tile nothing is hidden.
    index: of the tile.
    segments: of the program's tokens.
    others: a reference to those of all others.
    part: the tile's.
  """
  return Mask(within(clean, index), lambda scores: hidden(
      scores, segments, others[part]))


def no_keys(query: Any) -> Softmax:
  """Where `attend` begins."""
  return Softmax(jnp.full(query.shape[:1], MASKED, jnp.float32),
                 jnp.zeros(query.shape[:1], jnp.float32),
                 jnp.zeros(query.shape, jnp.float32))


def attend(tiling: Tiling, query: Any, keys: Keys, bias: Any, mask: Mask,
           softmax: Softmax, shift: Any = 0.0) -> Softmax:
  """Adds a tile of keys; `shift` is a bias of queries in base 2, [queries]."""
  new_scores = scores(tiling, query, keys, bias, mask)
  top = jnp.maximum(
      softmax.top, jnp.max(new_scores, axis=1) * LOG2_E + shift)
  weights = jnp.exp2(new_scores * LOG2_E - (top - shift)[:, None])
  shrink = jnp.exp2(softmax.top - top)
  return Softmax(
      top, softmax.total * shrink + jnp.sum(weights, axis=1),
      softmax.output * shrink[:, None] + apart(tiling, dot(
          tiling, weights.astype(keys.value.dtype), keys.value)))


def write(softmax: Softmax, real: Any, out_ref: Any, lse_ref: Any,
          rows: Any = ...) -> None:
  """Writes what real queries attended to, zeros for others, and the logarithm
  in base 2 of the softmax's sum."""
  out_ref[rows] = jnp.where(
      real[:, None], softmax.output / softmax.total[:, None], 0
  ).astype(out_ref.dtype)
  # What others see must have no weight in the backward pass.
  lse_ref[rows] = jnp.where(
      real, softmax.top + jnp.log2(softmax.total), -MASKED)


def score_gradient(tiling: Tiling, query: Any, keys: Keys, bias: Any,
                   mask: Mask, rows: Rows, shift: Any = 0.0) -> Any:
  """[queries, keys]; arguments as of `attend`."""
  weights = jnp.exp2(scores(tiling, query, keys, bias, mask) * LOG2_E
                     - (rows.lse - shift)[:, None])
  d_weights = dot(tiling, rows.gradient, keys.value.T)
  return weights * (d_weights - rows.delta[:, None])


def add_key_gradient(tiling: Tiling, query: Any, keys: Keys,
                     spread: Spread | None, mask: Mask, columns: Columns,
                     gradients: tuple[Any, Any], bias: Any = 0.0
                     ) -> tuple[Any, Any]:
  """Adds what a tile of queries says of a tile of keys and values.

  Works on [keys, queries], so that what comes out of one product goes into the
  next without changing places between threads. Biases are `spread`, and `bias`
  in base 2: a number or a tile.
  """
  lse, delta = (dot(tiling, which, columns.statistics.T)
                for which in columns.which)
  products = dot(tiling, keys.key, query.T) + lse
  if spread is not None:
    products += dot(tiling, spread.parts.T, spread.one_hot.T)
  weights = jnp.exp2(mask.apply(products) * LOG2_E + bias)
  d_scores = weights * (
      dot(tiling, keys.value, columns.gradient.T) + delta)
  d_key, d_value = gradients
  return (d_key + dot(tiling, d_scores.astype(query.dtype), query),
          d_value + dot(tiling, weights.astype(columns.gradient.dtype),
                        columns.gradient))


def span(ref: Any) -> tuple[Any, Any]:
  """First and end, of a reference to them."""
  return ref[0], ref[1]


def within(span: Sequence[Any], index: Any) -> Any:
  """Whether it lies there."""
  return (span[0] <= index) & (index < span[1])


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


def whole(x: Any, heads_first: bool = False) -> pl.BlockSpec:
  """[B, n, H, K], heads first [B, H, n, K], without batch and head; or [B, n]
  without batch."""
  if x.ndim == 2:
    return pl.BlockSpec((None, x.shape[1]), lambda b, *_: (b, 0))
  if heads_first:
    return pl.BlockSpec((None, None, *x.shape[2:]),
                        lambda b, h, *_: (b, h, 0, 0))
  return pl.BlockSpec((None, x.shape[1], None, x.shape[3]),
                      lambda b, h, *_: (b, 0, h, 0))


def tiles(x: Any, size: int) -> pl.BlockSpec:
  if x.ndim == 2:
    return pl.BlockSpec((None, size), lambda b, h, i, *_: (b, i))
  return pl.BlockSpec((None, size, None, x.shape[3]),
                      lambda b, h, i, *_: (b, i, h, 0))


def row_tiles(x: Any, size: int) -> pl.BlockSpec:
  """[B, H, L]: the program's tile of it."""
  return pl.BlockSpec((None, None, size), lambda b, h, i, *_: (b, h, i))


def of_tile(x: Any) -> pl.BlockSpec:
  """[B, tiles, n]: the n numbers of the program's tile."""
  return pl.BlockSpec((None, None, x.shape[2]), lambda b, h, i, *_: (b, i, 0))


def column_specs(columns: Columns) -> Columns:
  """All of a row and head."""
  return Columns(
      whole(columns.gradient), whole(columns.statistics, heads_first=True),
      pl.BlockSpec(columns.which.shape, lambda *_: (0, 0, 0)))


def call(tiling: Tiling, kernel: Callable[..., None], grid: tuple[int, ...],
         in_specs: Sequence[Any], out_specs: Any, out_shapes: Any, name: str,
         in_place: dict[int, int] | None = None) -> Any:
  """The kernel as a function of arrays; `in_place` says which of them, flat,
  becomes which output."""
  return pl.pallas_call(
      kernel, grid=grid, in_specs=in_specs, out_specs=out_specs,
      out_shape=out_shapes, interpret=tiling.interpret, name=name,
      input_output_aliases=in_place or {},
      compiler_params=plgpu.CompilerParams(
          num_warps=_WARPS, num_stages=tiling.stages))

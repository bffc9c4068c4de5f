"""Matrix products in the compute dtype with float32 accumulation.

In bfloat16 and float16 the operands of a product are narrow and its sum is
float32; the same holds for the two products of its gradient. What the residual
stream receives stays float32, because released LongT5 weights drive it past
float16's largest number, 65,504.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Largest magnitude, as a power of two, of a float16 operand: far from both
# ends of float16's range (2^-24 to 2^16).
_FLOAT16_TOP = 10


def activation_dtype(dtype: DTypeLike) -> jnp.dtype:
  """The dtype in which activations are stored between matrix products.

  For float16 that is float32: a value above 65,504 would become infinite
  before the next product could scale it down.
  """
  return jnp.dtype(jnp.float32 if dtype == jnp.float16 else dtype)


def contract(
    spec: str,
    a: Float[Array, '...'],
    b: Float[Array, '...'],
    dtype: DTypeLike,
    out_dtype: DTypeLike | None = None,
) -> Float[Array, '...']:
  """`jnp.einsum(spec, a, b)` in `dtype`, accumulated in float32.

  Args:
    spec: an einsum of two operands; every letter occurs in two of the three
      terms or more, so that the gradient is an einsum of the same kind.
    a: left operand, any float dtype.
    b: right operand, any float dtype.
    dtype: what the operands are rounded to. float16 operands are first scaled
      by a power of two, exactly undone in the float32 result, so that neither
      activations nor gradients overflow or vanish as a whole.
    out_dtype: of the result; by default `activation_dtype(dtype)`.

  Returns:
    The product. The gradients have the dtypes of `a` and `b`.
  """
  dtype = jnp.dtype(dtype)
  out_dtype = jnp.dtype(out_dtype or activation_dtype(dtype))
  if dtype == jnp.float32:
    return jnp.einsum(spec, a, b, preferred_element_type=out_dtype)
  return _contract(spec, dtype, out_dtype, a, b)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _contract(spec, dtype, out_dtype, a, b):
  return _product(spec, dtype, out_dtype, a, b)


def _contract_fwd(spec, dtype, out_dtype, a, b):
  return _product(spec, dtype, out_dtype, a, b), (a, b)


def _contract_bwd(spec, dtype, out_dtype, operands, cotangent):
  # Left to autodiff, the transposed products would mix a float32 cotangent
  # with narrow operands and run in float32.
  a, b = operands
  inputs, out = spec.split('->')
  left, right = inputs.split(',')
  return (_product(f'{out},{right}->{left}', dtype, a.dtype, cotangent, b),
          _product(f'{left},{out}->{right}', dtype, b.dtype, a, cotangent))


_contract.defvjp(_contract_fwd, _contract_bwd)


def _product(spec, dtype, out_dtype, a, b):
  if dtype != jnp.float16:
    return jnp.einsum(spec, a.astype(dtype), b.astype(dtype),
                      preferred_element_type=out_dtype)
  a, a_exponent = _scale_to_float16(a)
  b, b_exponent = _scale_to_float16(b)
  product = jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
  return _shift(product, a_exponent + b_exponent).astype(out_dtype)


def _scale_to_float16(x):
  """x as `scaled * 2 ** exponent`, `scaled` float16 and at most 2^10."""
  x = x.astype(jnp.float32)
  _, exponent = jnp.frexp(jnp.max(jnp.abs(x), initial=0.0))
  exponent = exponent - _FLOAT16_TOP
  return _shift(x, -exponent).astype(jnp.float16), exponent


def _shift(x, exponent):
  """`x * 2 ** exponent`: two products instead of ldexp's dozen operations, and
  two because one factor reaches only 2^-126 to 2^127."""
  half = jnp.clip(exponent // 2, -126, 126)
  rest = jnp.clip(exponent - half, -126, 127)
  return x * _power_of_two(half) * _power_of_two(rest)


def _power_of_two(exponent):
  """Exact, as exp2 need not be: the exponent's bits of a float32."""
  return jax.lax.bitcast_convert_type(
      (exponent.astype(jnp.int32) + 127) << 23, jnp.float32)

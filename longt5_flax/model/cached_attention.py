"""Attention of the next targets to those before them, in a kernel of GPUs
(`kernels/cached_attention_triton.py`): what a step of decoding takes."""

from functools import partial

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from longt5_flax.model.kernels import cached_attention_triton as kernels
from longt5_flax.model.kernels.calls import (
    ON_A_GPU,
    KernelOptions,
    on_each_device,
    to_operands,
)
from longt5_flax.model.kernels.triton_tiles import LEAST, product_size


def kernel_takes(room: int, size: int) -> bool:
  """Whether there is a kernel for a cache of S = room and K = size."""
  return room >= LEAST and size == product_size(size)


def cached_attention(
    new: tuple[Float[Array, 'B n H K'], ...],
    cache: tuple[Float[Array, 'B H n S K'], ...],
    bias: Float[Array, 'H S'],
    held_by: Int[Array, 'B n S'],
    start: Int[Array, 'B 1'],
    dtype: DTypeLike,
    options: KernelOptions = ON_A_GPU,
) -> tuple[Float[Array, '...'], ...]:
  """What one target of each row attends to, [B, n, H, K], n rows to a group;
  and the cache with its key and value.

  Under a mesh each device attends with its groups and heads.

  Args:
    new: query, key and value of the targets; T5's: scores are not divided by
      sqrt(K).
    cache: keys and values of those before, in the dtype of operands; see
      `kernel_takes`.
    bias: by position.
    held_by: which row of the group holds what a row sees at a position; -1
      where it sees nothing. A row sees something.
    start: the position of the targets.
    dtype: of the matrix products.
    options: how the kernel is run.

  Raises:
    ConfigError: the device has no such kernel.
  """
  attend = partial(_attend, dtype=dtype, options=options)
  return on_each_device(attend, new, (bias,), (held_by, start), options, cache,
                        updates=True)


def _attend(tokens, tables, ids, caches, dtype, options):
  """On one device."""
  # The largest power of two that is no more than a tile and the room.
  tile = min(options.tile, 1 << (ids[0].shape[2].bit_length() - 1))
  output, *caches = kernels.forward(
      options.tiling(dtype)._replace(tile=tile),
      jnp.stack([to_operands(x, dtype) for x in tokens], axis=1),
      kernels.Cache(*caches, *tables, *ids))
  return output.astype(tokens[0].dtype), *caches

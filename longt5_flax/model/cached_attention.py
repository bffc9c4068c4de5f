"""Attention of the next targets to those before them, in kernels of GPUs
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

_BITS = 32  # Of a number: rows that `seen_places` can name.


def kernel_takes(n: int, room: int, size: int) -> bool:
  """Whether there is a kernel for a cache of n rows, S = room and K = size."""
  return n <= _BITS and room >= LEAST and size == product_size(size)


def seen_places(
    held_by: Int[Array, 'B n S'],
    start: Int[Array, 'B 1'],
    options: KernelOptions = ON_A_GPU,
) -> Int[Array, 'B 3 _'] | None:
  """What of the cache some row of a group sees, the same in all layers: the
  kernel reads nothing else.

  Beams soon go on from one of them, so that of most positions that is one key;
  but any row's, as a beam changes rows from step to step.

  Args:
    held_by, start, options: see `cached_attention`.

  Returns:
    Places, row * S + position; in bits which rows see each; and at the head of
    the third row their number. None where n is 1: a row sees what is filled.

  Raises:
    ConfigError: the device has no such kernel.
  """
  if held_by.shape[1] == 1:
    return None
  # As tokens of one head, which is all of them.
  seen = on_each_device(
      partial(_list_seen, options=options), (held_by[:, :, None],), (),
      (start,), options)
  return seen[:, :, 0]


def _list_seen(tokens, _, ids, options):
  """On one device."""
  held_by = tokens[0][:, :, 0]
  tiling = options.tiling(jnp.float32)._replace(
      tile=_tile(held_by.shape[2], options))
  return kernels.list_seen(tiling, held_by, ids[0])[:, :, None]


def cached_attention(
    new: tuple[Float[Array, 'B n H K'], ...],
    cache: tuple[Float[Array, 'B H n S K'], ...],
    bias: Float[Array, 'H S'],
    held_by: Int[Array, 'B n S'],
    seen: Int[Array, 'B 3 _'] | None,
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
    seen: see `seen_places`.
    start: the position of the targets.
    dtype: of the matrix products.
    options: how the kernel is run.

  Raises:
    ConfigError: the device has no such kernel.
  """
  attend = partial(_attend, dtype=dtype, options=options)
  return on_each_device(attend, new, (bias,), (held_by, start, seen), options,
                        cache, updates=True)


def _attend(tokens, tables, ids, caches, dtype, options):
  """On one device."""
  tile = _tile(ids[0].shape[2], options)
  output, *caches = kernels.forward(
      options.tiling(dtype)._replace(tile=tile),
      jnp.stack([to_operands(x, dtype) for x in tokens], axis=1),
      kernels.Cache(*caches, *tables, *ids))
  return output.astype(tokens[0].dtype), *caches


def _tile(room, options):
  """The largest power of two that is no more than a tile and the room."""
  return min(options.tile, 1 << (room.bit_length() - 1))

"""Around the kernels of attention: options, devices, operands, segments."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.config import ConfigError
from longt5_flax.model.kernels.triton_tiles import Tiling, product_size

# Compute capabilities of GPUs with more than 160 KB of it: A100, H100, B200.
_LARGE_SHARED_MEMORY = ('8.0', '9.0', '10.0')

# Names for policies of rematerialisation: what attention computes besides
# products with parameters, and what it finds out about segments, which is
# small and the same in all layers.
ATTENDED = 'attended'
LAYOUT = 'layout'


class KernelOptions(NamedTuple):
  """How kernels are run; results are the same within rounding.

  Attributes:
    tile: tokens of a tile; a power of two, 16 or more. On a TPU always 128.
    interpret: on any device, slowly, for tests.
    platform: whose kernels, 'gpu' or 'tpu'; empty for the device's.
  """
  tile: int = 64
  interpret: bool = False
  platform: str = ''

  def tiling(self, dtype: DTypeLike) -> Tiling:
    """For products in `dtype`; see `to_operands`."""
    precision = (jax.lax.Precision.DEFAULT if dtype == jnp.float16 else
                 jax.lax.Precision.HIGHEST)
    device = jax.local_devices()[0]
    capability = getattr(device, 'compute_capability', '')
    return Tiling(self.tile, precision,
                  3 if capability in _LARGE_SHARED_MEMORY else 2,
                  self.interpret)

  def for_a_tpu(self) -> bool:
    """Whether the kernels to run are those of TPUs."""
    return (self.platform or target_platform()) == 'tpu'


ON_A_GPU = KernelOptions()
_LEAST_CAPABILITY = 8  # Ampere's.


def target_platform() -> str:
  """What the program at hand is for: the platform of the mesh's devices, which
  need not be here, or without a mesh of JAX's default devices."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def why_no_kernels(platform: str) -> str:
  """What 'fused' needs and the platform has not got; empty if it has all."""
  if platform not in ('gpu', 'tpu'):
    return f'needs an NVIDIA GPU or a TPU, not {platform!r}'
  # What a program is compiled for elsewhere is not known; AMD's are no numbers.
  capability = getattr(jax.local_devices()[0], 'compute_capability', None)
  if platform == 'gpu' and capability is not None:
    major = capability.split('.')[0]
    if not major.isdigit() or int(major) < _LEAST_CAPABILITY:
      return (f'needs an NVIDIA GPU of compute capability {_LEAST_CAPABILITY} '
              f'or more, not {capability}')
  return ''


def to_operands(x: Float[Array, 'B _ _ K'], dtype: DTypeLike, multiple: int = 1,
                axis: int = 1) -> Float[Array, 'B _ _ k']:
  """As kernels take tokens: K a power of two, the length, which is that axis, a
  multiple.

  For float16 operands are TF32 numbers, of the same precision and the exponents
  of float32, so that nothing overflows.
  """
  size = x.shape[-1]
  operand = jnp.bfloat16 if dtype == jnp.bfloat16 else jnp.float32
  added = [0, 0, 0, product_size(size) - size]
  added[axis] = -x.shape[axis] % multiple
  return jnp.pad(x.astype(operand), [(0, n) for n in added])


def on_each_device(
    attend: Callable[..., Any], tokens: tuple[Array, ...],
    tables: tuple[Array, ...], ids: tuple[Array | None, ...],
    options: KernelOptions,
    caches: tuple[Array, ...] = (), updates: bool = False,
) -> Any:
  """`attend(tokens, tables, ids)`; under a mesh each device attends with its
  rows and heads, and a length that is split is gathered.

  Args:
    attend: gives an array like `tokens[0]`; with caches it takes them as well.
    tokens: [B, length, H, K].
    tables: [H, ...].
    ids: [B, length]; None stays what it is.
    options: see KernelOptions.
    caches: [B, H, ...].
    updates: whether `attend` gives others like them behind the array.

  Raises:
    ConfigError: the device has no such kernels.
  """
  refusal = why_no_kernels(target_platform())
  if refusal and not options.interpret:
    raise ConfigError(f"attention='fused' {refusal}.")
  arguments = (tokens, tables, ids, *([caches] if caches else []))
  mesh = jax.sharding.get_abstract_mesh()
  if not mesh.empty:
    rows = _mesh_axes(mesh, 'batch', tokens[0].shape[0])
    heads = _mesh_axes(mesh, 'joined_kv', tokens[0].shape[2])
    spec, kept = PartitionSpec(rows, None, heads), PartitionSpec(rows, heads)
    attend = jax.shard_map(
        attend, mesh=mesh, check_vma=False,
        in_specs=(spec, PartitionSpec(heads), PartitionSpec(rows), kept)[
            :len(arguments)],
        out_specs=(spec, *(kept for _ in caches)) if updates else spec)
  return attend(*arguments)


def _mesh_axes(mesh, name, size):
  """The mesh axes that split a logical axis; None where they cannot."""
  spec = nn.logical_to_mesh_axes((name,)) or PartitionSpec(None)
  axes = (spec[0],) if isinstance(spec[0], str) else spec[0] or ()
  parts = math.prod(mesh.shape[axis] for axis in axes)
  return axes if axes and size % parts == 0 else None


def segment_range(
    segment_ids: Int[Array, 'B tiles tile']
) -> tuple[Int[Array, 'B tiles'], Int[Array, 'B tiles']]:
  """Least and greatest segment in each tile; what lies between is nothing if
  there is padding alone."""
  largest = jnp.iinfo(segment_ids.dtype).max
  real = jnp.where(segment_ids > 0, segment_ids, largest)
  return jnp.min(real, axis=2), jnp.max(segment_ids, axis=2)


def covering_run(
    flags: Bool[Array, '*rows n']
) -> tuple[Int[Array, '*rows'], Int[Array, '*rows']]:
  """First and end, along the last axis, of what contains all that is true."""
  return _run_and_count(flags)[:2]


def gapless_run(
    flags: Bool[Array, '*rows n']
) -> tuple[Int[Array, '*rows'], Int[Array, '*rows']]:
  """`covering_run` if all it contains is true, else an empty one."""
  first, end, count = _run_and_count(flags)
  return first, jnp.where(count == end - first, end, first)


def _run_and_count(flags):
  """First and end of what contains all that is true, and how much that is.

  One reduction, which XLA does not hand to Triton: of two for each of a million
  tokens' tiles that took minutes to compile.
  """
  n = flags.shape[-1]
  index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), flags.shape)
  first, end, count = jax.lax.reduce(
      (jnp.where(flags, index, n), jnp.where(flags, index + 1, 0),
       flags.astype(jnp.int32)),
      (np.int32(n), np.int32(0), np.int32(0)),
      lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1]),
                    a[2] + b[2]),
      (flags.ndim - 1,))
  return jnp.minimum(first, end), end, count


def ranges_meet(
    ranges: tuple[Int[Array, 'B n'], Int[Array, 'B n']],
    others: tuple[Int[Array, 'B m'], Int[Array, 'B m']],
) -> Bool[Array, 'B n m']:
  """Of two lists of tiles by their `segment_range`, which may share one."""
  (least, most), (other_least, other_most) = ranges, others
  return (least[..., None] <= other_most[:, None]) & (
      other_least[:, None] <= most[..., None])


def all_see(
    query_segments: Int[Array, 'B n _'], key_segments: Int[Array, 'B m _']
) -> Bool[Array, 'B n m']:
  """Of tiles of queries and of keys, in which pairs every query sees every key;
  queries that are padding, of which nothing is wanted, may."""
  least, most = segment_range(query_segments)
  of_queries = jnp.where(least == most, most, -1)
  of_keys = jnp.where(jnp.min(key_segments, axis=2)
                      == jnp.max(key_segments, axis=2), key_segments[..., 0], 0)
  return (of_queries[..., None] == of_keys[:, None]) & (
      of_keys[:, None] > 0)


class TileBlocks(NamedTuple):
  """Which blocks the tokens of tiles are in.

  Attributes:
    own: the block of each token, -1 for none.
    firsts, lasts: of each tile; where it has none, the last one before it, so
      that both never decrease.
  """
  own: Int[Array, 'B tiles tile']
  firsts: Int[Array, 'B tiles']
  lasts: Int[Array, 'B tiles']


def blocks_of_tiles(block_ids: Int[Array, 'B L'], length: int, tile: int
                    ) -> TileBlocks:
  """Of tokens filled up to a length of whole tiles."""
  own = jnp.pad(
      block_ids, ((0, 0), (0, length - block_ids.shape[1])),
      constant_values=-1).reshape(block_ids.shape[0], -1, tile)
  lasts = jax.lax.cummax(jnp.max(own, axis=2, initial=0), axis=1)
  firsts = jnp.min(jnp.where(own >= 0, own, lasts[..., None]), axis=2)
  return TileBlocks(own, firsts, lasts)

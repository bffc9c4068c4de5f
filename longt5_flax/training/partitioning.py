"""Where parameters, optimizer state and batches live on the mesh.

One table, RULES, says which mesh axis splits which logical axis; another names
the logical axes of every parameter. Everything else follows from the two.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from longt5_flax.config import ConfigError

MESH_AXES = ('data', 'fsdp', 'tensor', 'sequence')

# Logical axis to mesh axes. Activations are split by `batch` and `length`;
# parameters by the others.
RULES: dict[str, str | tuple[str, ...] | None] = {
    'batch': ('data', 'fsdp'),
    'length': 'sequence',
    'activation': None,
    'embed': 'fsdp',
    'vocab': 'tensor',
    'mlp': 'tensor',
    'joined_kv': 'tensor',
    'layers': None,
}

# The last two names of a parameter's path, or the last one, to the logical
# axes of its unstacked dimensions.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    'embedding': ('vocab', 'embed'),
    'query/kernel': ('embed', 'joined_kv'),
    'key/kernel': ('embed', 'joined_kv'),
    'value/kernel': ('embed', 'joined_kv'),
    'out/kernel': ('joined_kv', 'embed'),
    'wi/kernel': ('embed', 'mlp'),
    'wi_0/kernel': ('embed', 'mlp'),
    'wi_1/kernel': ('embed', 'mlp'),
    'wo/kernel': ('mlp', 'embed'),
    'logits_dense/kernel': ('embed', 'vocab'),
    'scale': (None,),
    'rel_embedding': (None, None),
}


def make_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
  """The mesh of `config.mesh`: devices along data, fsdp, tensor, sequence.

  Args:
    sizes: of each axis; one may be -1, whatever is left.
    devices: all of them.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  shape = [sizes[axis] for axis in MESH_AXES]
  for axis, size in zip(MESH_AXES, shape, strict=True):
    if size < 1 and size != -1:
      raise ConfigError(f'mesh.{axis}={size} must be at least 1, or -1.')
  if shape.count(-1) > 1:
    raise ConfigError(f'mesh={sizes} may have only one axis of -1.')
  known = math.prod(size for size in shape if size != -1)
  if -1 in shape:
    shape[shape.index(-1)] = len(devices) // known
  if math.prod(shape) != len(devices):
    raise ConfigError(f'mesh={sizes} needs a multiple of {known} devices; '
                      f'there are {len(devices)}.' if -1 in sizes.values() else
                      f'mesh={sizes} needs {known} devices; there are '
                      f'{len(devices)}.')
  # Auto axes: Linen's sharding constraints do not know explicit ones.
  return jax.make_mesh(shape, MESH_AXES, devices=devices,
                       axis_types=(AxisType.Auto,) * len(MESH_AXES))


def rows_divisor(mesh: Mesh) -> int:
  """How many parts the rows of a batch are split into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Of batch arrays [B, length]: by rows only; lengths differ, and the model
  splits them itself."""
  return NamedSharding(mesh, PartitionSpec(RULES['batch']))


def state_shardings(state: Any, params: Any, mesh: Mesh) -> Any:
  """The sharding of every leaf of a train state.

  Optimizer state is split as the parameter in whose place it stands; the
  factored moments of Adafactor as the dimensions that they keep.

  Args:
    state: with shapes.
    params: the parameters inside it, with shapes.
    mesh: of the devices.
  """
  known = {_names(path): leaf.shape for path, leaf
           in jax.tree_util.tree_leaves_with_path(params)}

  def sharding(path, leaf):
    names = _names(path)
    for i in range(len(names)):
      if names[i:] in known:
        axes = _axes(path[i:], len(known[names[i:]]))
        axes = _kept(axes, known[names[i:]], leaf.shape, 'v_row' in names)
        return NamedSharding(mesh, _spec(axes, leaf.shape, mesh))
    return NamedSharding(mesh, PartitionSpec())

  return jax.tree_util.tree_map_with_path(sharding, state)


def _names(path):
  return tuple(str(getattr(key, 'key', getattr(key, 'name', key)))
               for key in path)


def _axes(path, ndim):
  names = _names(path)
  axes = PARAMETER_AXES.get('/'.join(names[-2:]), PARAMETER_AXES.get(names[-1]))
  if axes is None:
    raise KeyError(f'{"/".join(names)}: no logical axes in PARAMETER_AXES.')
  return ('layers',) * (ndim - len(axes)) + axes


def _kept(axes, shape, state_shape, is_row):
  """The logical axes of what an optimizer keeps of a parameter."""
  if state_shape == shape:
    return axes
  # Of two equal dimensions Adafactor's rows drop the later.
  order = range(len(shape) - 1, -1, -1) if is_row else range(len(shape))
  for i in order:
    if state_shape == shape[:i] + shape[i + 1:] and axes[i] != 'layers':
      return axes[:i] + axes[i + 1:]
  return (None,) * len(state_shape)  # A placeholder or a counter.


def _spec(axes, shape, mesh):
  """Splits every dimension that its mesh axes divide; others stay whole."""
  spec = []
  for axis, size in zip(axes, shape, strict=True):
    mesh_axis = RULES[axis] if axis else None
    parts = mesh.shape[mesh_axis] if mesh_axis else 1
    spec.append(mesh_axis if size % parts == 0 else None)
  return PartitionSpec(*spec)


@contextlib.contextmanager
def active(mesh: Mesh) -> Iterator[None]:
  """Within it, the model's activations are split by RULES over the mesh."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(list(RULES.items())):
    yield


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
  """The rows of a batch that live on this process's devices, ascending."""
  sharding = batch_sharding(mesh)
  indices = sharding.addressable_devices_indices_map((batch_size, 1))
  rows: set[int] = set()
  for index in filter(None, indices.values()):
    rows.update(range(*index[0].indices(batch_size)))
  return sorted(rows)


def row_shard(mesh: Mesh, batch_size: int) -> tuple[int, int]:
  """Which of how many parts of a batch `local_rows` is.

  Processes that hold the same rows have the same part.
  """
  rows: dict[int, set[int]] = {}
  indices: Any = batch_sharding(mesh).devices_indices_map((batch_size, 1))
  for device, index in indices.items():
    rows.setdefault(device.process_index, set()).update(
        range(*index[0].indices(batch_size)))
  parts = sorted({tuple(sorted(part)) for part in rows.values()})
  return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def global_batch(
    mesh: Mesh, rows: Sequence[int], batch: dict[str, np.ndarray],
    batch_size: int
) -> dict[str, jax.Array]:
  """Global arrays from this process's rows of a batch.

  Args:
    mesh: of all devices.
    rows: `local_rows`.
    batch: arrays [len(rows), length].
    batch_size: of the global arrays.
  """
  place = {row: i for i, row in enumerate(rows)}
  sharding = batch_sharding(mesh)

  def make(array):
    def part(index):
      wanted = range(*index[0].indices(batch_size))
      return array[[place[row] for row in wanted]]
    return jax.make_array_from_callback(
        (batch_size, *array.shape[1:]), sharding, part)

  return {name: make(array) for name, array in batch.items()}

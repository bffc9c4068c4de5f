"""Parameters in files under one set of names, and parameter trees from them.

Every format is read through `Tensors`: the names are the unrolled ones of the
released T5X checkpoints (`encoder/layers_0/attention/query/kernel`), kernels
are [in, out] and bias tables [heads, buckets], whatever the file has.
"""

import abc
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longt5_flax.config import ConfigError, LongT5Config

Index = tuple[slice, ...]


class WeightsError(ConfigError):
  """Weights that cannot be used; one line that names file, tensor and rule."""


class Tensors(abc.ABC):
  """A checkpoint's parameters, read one at a time.

  Attributes:
    origin: what messages call the checkpoint, its path.
    config: the architecture; None where the checkpoint holds none.
    shapes: of every tensor, as `read` gives it, by name.
    dtypes: of every tensor as stored, by name.
    report: lines that say what was found, renamed, tied and ignored.
    architecture: 'LongT5ForConditionalGeneration', 'LongT5Model' or
      'LongT5EncoderModel', where the checkpoint says it.
  """
  architecture: str | None = None
  origin: str
  config: LongT5Config | None
  shapes: Mapping[str, tuple[int, ...]]
  dtypes: Mapping[str, np.dtype]
  report: Sequence[str]

  @abc.abstractmethod
  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """One tensor, or the part of it at `index`, a slice for each dimension."""

  def stored_name(self, name: str) -> str:
    """What the checkpoint calls, or would call, a tensor; for messages."""
    return name


class _Leaf(NamedTuple):
  """Where a leaf of a parameter tree is in files: in one tensor, or, if it is
  stacked, in one for each layer."""
  names: tuple[str, ...]
  shape: tuple[int, ...]  # of each tensor
  stacked: bool


def tensor_names(path: Sequence[Any], shape: Sequence[int]) -> _Leaf:
  """The tensors that make up the leaf at `path` of a parameter tree.

  Args:
    path: keys, as `jax.tree_util` gives them.
    shape: of the leaf; its first dimension is layers if `path` has a key
      `layers`.
  """
  keys = [str(getattr(key, 'key', key)) for key in path]
  shape = tuple(shape)
  if 'layers' not in keys:
    return _Leaf(('/'.join(keys),), shape, False)
  place = keys.index('layers')
  return _Leaf(
      tuple('/'.join([*keys[:place], f'layers_{i}', *keys[place + 1:]])
            for i in range(shape[0])), shape[1:], True)


class ParamTensors(Tensors):
  """A parameter tree, layers stacked or not, read like a checkpoint.

  Args:
    params: nested dicts of arrays.
    config: the architecture.
    origin: what messages call it.
  """

  def __init__(self, params: Any, config: LongT5Config | None,
               origin: str = 'params'):
    self.origin, self.config, self.report = origin, config, []
    self._arrays: dict[str, tuple[Any, int | None]] = {}
    shapes, dtypes = {}, {}
    for path, array in jax.tree_util.tree_leaves_with_path(params):
      leaf = tensor_names(path, array.shape)
      for i, name in enumerate(leaf.names):
        self._arrays[name] = array, i if leaf.stacked else None
        shapes[name], dtypes[name] = leaf.shape, np.dtype(array.dtype)
    self.shapes, self.dtypes = shapes, dtypes

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `Tensors.read`."""
    array, layer = self._arrays[name]
    key = (index or ()) if layer is None else (layer, *(index or ()))
    return np.asarray(array[key] if key else array)


def check_tensors(tensors: Tensors, wanted: Any,
                  allow_missing: Sequence[str] = (),
                  allow_extra: Sequence[str] = ()) -> None:
  """Refuses a checkpoint that does not hold exactly what is wanted.

  Args:
    tensors: the checkpoint.
    wanted: tree of shapes (`jax.ShapeDtypeStruct` or arrays), layers stacked
      or not.
    allow_missing: names, or patterns with `*`, of tensors that it may lack.
    allow_extra: the same for tensors that may be left unread.

  Raises:
    WeightsError: a tensor is missing, not wanted, has another shape, or holds
      no floating-point numbers.
  """
  shapes = dict(_wanted_shapes(wanted))
  missing = [name for name in shapes if name not in tensors.shapes
             and not _matches(name, allow_missing)]
  extra = [name for name in tensors.shapes if name not in shapes
           and not _matches(name, allow_extra)]
  if missing:
    raise WeightsError(
        f'{tensors.origin}: tensor {_both_names(tensors, missing[0])} of shape '
        f'{shapes[missing[0]]} is missing{_and_more(missing)}'
        f'{_perhaps_renamed(tensors, extra, shapes[missing[0]])}.')
  if extra:
    raise WeightsError(
        f'{tensors.origin}: tensor {_both_names(tensors, extra[0])} of shape '
        f'{tensors.shapes[extra[0]]} has no place in this model'
        f'{_and_more(extra)}.')
  for name in filter(tensors.shapes.__contains__, shapes):
    stored, dtype = tuple(tensors.shapes[name]), tensors.dtypes[name]
    if stored != shapes[name]:
      raise WeightsError(
          f'{tensors.origin}: tensor {_both_names(tensors, name)} has shape '
          f'{stored} there and {shapes[name]} in this model.')
    if not jnp.issubdtype(dtype, jnp.floating):
      raise WeightsError(
          f'{tensors.origin}: tensor {_both_names(tensors, name)} is of type '
          f'{dtype}, not of floating-point numbers.')


def load_params(tensors: Tensors, wanted: Any,
                allow_missing: Sequence[str] = (),
                allow_extra: Sequence[str] = ()) -> Any:
  """The parameter tree `wanted`, filled from a checkpoint.

  One leaf is in the host's memory at a time, and of it only the parts that
  live on this process's devices.

  Args:
    tensors: the checkpoint.
    wanted: tree of `jax.ShapeDtypeStruct` (shape, dtype and, if not None,
      sharding of the result) or of arrays; layers stacked or not.
    allow_missing: names, or patterns with `*`, of tensors that the checkpoint
      may lack; such leaves are returned as they are in `wanted`. Of stacked
      layers all must be missing, or none.
    allow_extra: the same for tensors that may be left unread.

  Raises:
    WeightsError: see `check_tensors`.
  """
  check_tensors(tensors, wanted, allow_missing, allow_extra)
  leaves, tree = jax.tree_util.tree_flatten_with_path(wanted)
  params = [leaf for _, leaf in leaves]
  # The largest first, while there is most room for what reading takes beside.
  sizes = [math.prod(leaf.shape) for leaf in params]
  for i in sorted(range(len(leaves)), key=lambda i: -sizes[i]):
    # Until it is ready, what was read is in memory too.
    params[i] = _load(tensors, *leaves[i])
    if isinstance(params[i], jax.Array):
      params[i].block_until_ready()
  return jax.tree_util.tree_unflatten(tree, params)


def _load(tensors, path, leaf):
  """A leaf of the tree wanted, filled if it is in the checkpoint."""
  where = tensor_names(path, leaf.shape)
  absent = [name for name in where.names if name not in tensors.shapes]
  if len(absent) == len(where.names):
    return leaf
  if absent:
    raise WeightsError(f'{tensors.origin}: tensor '
                       f'{_both_names(tensors, absent[0])} is missing, but '
                       'not those of all layers.')
  parts: dict[Any, np.ndarray] = {}

  def part(index):
    spans = tuple(span.indices(size)[:2] for span, size in zip(
        index, leaf.shape, strict=True))
    if spans not in parts:  # Devices that hold the same share one copy.
      parts[spans] = _read_part(tensors, where, spans, leaf.dtype)
    return parts[spans]

  sharding = getattr(leaf, 'sharding', None)
  if sharding is None:
    # Not jnp.asarray, which makes a copy on the way.
    return jax.device_put(part((slice(None),) * len(leaf.shape)))
  return jax.make_array_from_callback(leaf.shape, sharding, part)


def _read_part(tensors, where, spans, dtype):
  index = tuple(slice(start, stop) for start, stop in spans)
  if not where.stacked:
    return tensors.read(where.names[0], index).astype(dtype, copy=False)
  names = where.names[index[0]]
  part = np.empty([stop - start for start, stop in spans], dtype)
  for i, name in enumerate(names):
    part[i] = tensors.read(name, index[1:])
  return part


def _wanted_shapes(wanted: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
  for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
    where = tensor_names(path, leaf.shape)
    for name in where.names:
      yield name, where.shape


def _matches(name, patterns):
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _both_names(tensors, name):
  stored = tensors.stored_name(name)
  return stored if stored == name else f'{stored} ({name})'


def _perhaps_renamed(tensors, extra, shape):
  """What a missing tensor may be called there."""
  same = [name for name in extra if tuple(tensors.shapes[name]) == shape]
  return (f'; {_both_names(tensors, same[0])} of that shape has no place in '
          'this model' if same else '')


def _and_more(names):
  return f' (and {len(names) - 1} more)' if len(names) > 1 else ''

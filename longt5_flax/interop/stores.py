"""Tensors that lie in tensorstore arrays: what T5X and Orbax checkpoints share.

Both keep layers stacked or not; here every layer is a tensor of its own, of
which only the part asked for is read.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from longt5_flax.config import LongT5Config
from longt5_flax.interop.tensors import Index, Tensors, WeightsError

# Some seconds are enough to see that an address does not answer.
_RETRIES = {f'{driver}_request_retries': {'max_retries': 4}
            for driver in ('gcs', 'http', 's3')}


class Place(NamedTuple):
  """Where a tensor lies.

  Attributes:
    stored: what the checkpoint calls the array.
    array: in memory, or the tensorstore spec of what is opened when read.
    shape: of the array.
    axis: of the array, along which layers are stacked; None if they are not.
    layer: along that axis.
  """
  stored: str
  array: np.ndarray | dict[str, Any]
  shape: tuple[int, ...]
  axis: int | None = None
  layer: int = 0

  @property
  def layer_shape(self) -> tuple[int, ...]:
    """The array's shape without the axis of layers."""
    if self.axis is None:
      return self.shape
    return self.shape[:self.axis] + self.shape[self.axis + 1:]


class StoredTensors(Tensors):
  """See `Tensors`.

  Args:
    origin: what messages call the checkpoint.
    config: the architecture, or None.
    places: of every tensor, by name.
    shapes: as read, where they are not the arrays' own: a head's dimensions
      joined in one.
    report: lines about the checkpoint.
  """

  def __init__(self, origin: str, config: LongT5Config | None,
               places: Mapping[str, Place],
               shapes: Mapping[str, tuple[int, ...]] | None = None,
               report: Sequence[str] = ()):
    self.origin, self.config, self.report = origin, config, list(report)
    self._places = dict(places)
    self._opened: dict[str, ts.TensorStore] = {}
    self.shapes = {name: place.layer_shape for name, place in places.items()
                   } | dict(shapes or {})
    # A chunk that holds many layers is decoded once, not once a layer.
    self._context = ts.Context(_RETRIES | {'cache_pool': {
        'total_bytes_limit': max(
            (4 * math.prod(place.shape) for place in places.values()
             if place.axis is not None), default=0)}})
    self.dtypes = {name: self._dtype(place) for name, place in places.items()}

  def stored_name(self, name: str) -> str:
    """What the checkpoint calls a tensor."""
    return self._places[name].stored if name in self._places else name

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `Tensors.read`.

    Raises:
      WeightsError: the array is not there, cut off, or of another shape than
        the checkpoint's index says.
    """
    place, shape = self._places[name], self.shapes[name]
    index = tuple(slice(*part.indices(size)) for part, size in zip(
        index or (slice(None),) * len(shape), shape, strict=True))
    if place.layer_shape != shape:  # Two dimensions are joined in one.
      whole = (slice(None),) * len(place.layer_shape)
      return self._read(place, whole).reshape(shape)[index]
    return self._read(place, index)

  def _read(self, place, index):
    if place.axis is not None:
      index = (*index[:place.axis], place.layer, *index[place.axis:])
    if isinstance(place.array, np.ndarray):
      return place.array[index]
    try:
      return self._open(place)[index].read().result()
    except ValueError as error:
      raise WeightsError(self._message(place, error)) from None

  def _open(self, place):
    if place.stored not in self._opened:
      store = ts.open(
          place.array | {'fill_missing_data_reads': False},
          open=True, context=self._context).result()
      if store.shape != place.shape:
        raise ValueError(f'its array has shape {store.shape}, not {place.shape}'
                         ' as the index says')
      self._opened[place.stored] = store
    return self._opened[place.stored]

  def _dtype(self, place):
    if isinstance(place.array, np.ndarray):
      return place.array.dtype
    if 'dtype' in place.array:
      return ts.dtype(place.array['dtype']).numpy_dtype
    try:
      return self._open(place).dtype.numpy_dtype
    except ValueError as error:
      raise WeightsError(self._message(place, error)) from None

  def _message(self, place, error):
    return f'{self.origin}: cannot read {place.stored}: {reason(error)}.'


def open_folder(path: str) -> ts.KvStore:
  """The files in a folder.

  Args:
    path: local, or a URL: file://, gs://, s3://, http:// or https://.

  Raises:
    WeightsError: no such kind of URL.
  """
  spec: Any = path.rstrip('/') + '/'
  if '://' not in path:
    spec = {'driver': 'file', 'path': os.path.abspath(path) + '/'}
  try:
    return ts.KvStore.open(spec, context=ts.Context(_RETRIES)).result()
  except ValueError as error:
    raise WeightsError(f'{path}: {reason(error)}.') from None


def reason(error: Exception) -> str:
  """What tensorstore complains of, in one line without its specs."""
  text = re.sub(r' \[\w+=.*', '', str(error), flags=re.DOTALL)
  return ' '.join(text.split()).rstrip('.')

"""Parameters in one safetensors file that needs nothing beside it.

Names and layout are those of `Tensors`; the config is in the file's metadata,
as JSON.
"""

import json
from typing import Any

import numpy as np

from longt5_flax.config import LongT5Config
from longt5_flax.interop.array_files import (
    Entry,
    SafetensorsFile,
    write_safetensors,
)
from longt5_flax.interop.atomic import written_whole
from longt5_flax.interop.tensors import (
    Index,
    ParamTensors,
    Tensors,
    WeightsError,
)

_CONFIG, _ARCHITECTURE = 'longt5_config', 'architecture'


class _SingleFile(Tensors):
  """See `open_single_file`."""

  def __init__(self, path: str):
    self._file = SafetensorsFile(path)
    text = self._file.metadata.get(_CONFIG)
    if text is None:
      raise WeightsError(f'{path}: holds no config of this package; if its '
                         "names are Hugging Face's, it is hf:FILE.")
    self.origin = path
    self.config = LongT5Config.from_dict(json.loads(text))
    self.architecture = self._file.metadata.get(_ARCHITECTURE)
    self.shapes = {name: entry.shape
                   for name, entry in self._file.entries.items()}
    self.dtypes = {name: entry.dtype
                   for name, entry in self._file.entries.items()}
    self.report = [f'{path}: {len(self.shapes)} tensors.']

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `Tensors.read`."""
    return self._file.read(name, index)


def open_single_file(path: str) -> Tensors:
  """Opens what `save_single_file` wrote.

  Raises:
    WeightsError: it is damaged, or another program's.
  """
  return _SingleFile(path)


def save_single_file(path: str, config: LongT5Config, params: Any) -> None:
  """Writes one file, one tensor in memory at a time.

  Args:
    path: of the file, which must not be there.
    config: the architecture.
    params: nested dicts of arrays, layers stacked or not, or `Tensors`.

  Raises:
    WeightsError: the file is there, or cannot be written.
  """
  tensors = (params if isinstance(params, Tensors)
             else ParamTensors(params, config))
  entries = {name: Entry(tuple(shape), np.dtype(tensors.dtypes[name]))
             for name, shape in tensors.shapes.items()}
  metadata = {_CONFIG: json.dumps(config.to_dict())}
  if tensors.architecture:
    metadata[_ARCHITECTURE] = tensors.architecture
  with written_whole(path) as place:
    write_safetensors(place, map(tensors.read, entries), entries, metadata)

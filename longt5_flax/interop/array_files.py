"""Files of named arrays, read one array, or a part of one, at a time.

Safetensors, Flax's msgpack and PyTorch's pickles, each alone or as the shards
of an index. Nothing is ever unpickled but by PyTorch's weights-only loader.
"""

import abc
import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.serialization
import jax.numpy as jnp
import msgpack
import numpy as np
import safetensors

from longt5_flax.config import read_json_object
from longt5_flax.interop.tensors import Index, WeightsError


class Entry(NamedTuple):
  """An array in a file."""
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def num_bytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class ArrayFile(abc.ABC):
  """Arrays by name.

  Attributes:
    path: of the file, or of the index of several.
    entries: shape and dtype of every array.
  """
  path: str
  entries: dict[str, Entry]

  @abc.abstractmethod
  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """An array, or the part of it at `index`, a slice for each dimension."""


_CHUNK_BYTES = 1 << 26
_SAFETENSORS_DTYPES = {
    'F64': np.float64, 'F32': np.float32, 'F16': np.float16,
    'BF16': jnp.bfloat16, 'I64': np.int64, 'I32': np.int32, 'I16': np.int16,
    'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_,
}


class SafetensorsFile(ArrayFile):
  """A .safetensors file.

  Attributes:
    metadata: text that the file holds beside its arrays.
  """

  def __init__(self, path: str):
    self.path, self.entries = path, {}
    with self._open() as file:
      self.metadata: dict[str, str] = file.metadata() or {}
      for name in file.keys():  # noqa: SIM118 (it is no dict)
        stored = file.get_slice(name)
        code = stored.get_dtype()
        if code not in _SAFETENSORS_DTYPES:
          raise WeightsError(f'{path}: tensor {name} is of type {code}, which '
                             'is not read here.')
        self.entries[name] = Entry(tuple(stored.get_shape()),
                                   np.dtype(_SAFETENSORS_DTYPES[code]))

  def _open(self):
    try:
      return safetensors.safe_open(self.path, 'np')
    except (OSError, safetensors.SafetensorError) as error:
      raise WeightsError(
          f'{self.path}: is no whole safetensors file ({error}).') from None

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `ArrayFile.read`."""
    shape, dtype = self.entries[name]
    spans = [range(size)[span] for span, size in zip(
        index or (slice(None),) * len(shape), shape, strict=True)]
    part = np.empty([len(span) for span in spans], dtype)
    others = [slice(span.start, span.stop) for span in spans[1:]]
    for rows in row_chunks(part.shape, dtype.itemsize):
      # Opened anew each time: the file is mapped into memory, and pages that
      # were read count as this process's until it is closed.
      with self._open() as file:
        start = spans[0].start
        part[rows] = file.get_slice(name)[
            (slice(start + rows.start, start + rows.stop), *others)]
    return part


def row_chunks(shape: Sequence[int], itemsize: int) -> Iterator[slice]:
  """Ranges of an array's rows, of so many bytes as may be in memory beside it.
  """
  step = max(1, _CHUNK_BYTES // max(1, itemsize * math.prod(shape[1:])))
  for start in range(0, shape[0], step):
    yield slice(start, min(start + step, shape[0]))


class MsgpackFile(ArrayFile):
  """A file of `flax.serialization.to_bytes`: nested dicts, joined by `/`.

  Opening it reads it through once, for there is no table of contents.
  """

  def __init__(self, path: str):
    self.path, self.entries = path, {}
    self._spans: dict[str, tuple[int, int]] = {}
    try:
      with open(path, 'rb') as file, open(path, 'rb') as again:
        # 0: arrays as large as the format allows.
        unpacker = msgpack.Unpacker(file, ext_hook=_array_header,
                                    max_buffer_size=0)
        for name, start, entry in _walk(unpacker, again, ''):
          self.entries[name] = entry
          self._spans[name] = start, unpacker.tell()
        if unpacker.tell() != os.fstat(file.fileno()).st_size:
          raise ValueError('bytes after its end')
    except OSError as error:
      raise WeightsError(
          f'{path}: cannot be read ({error.strerror}).') from None
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException,
            msgpack.OutOfData) as error:
      raise WeightsError(f'{path}: is no whole msgpack file of Flax '
                         f'({error or type(error).__name__}).') from None

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `ArrayFile.read`; the whole array is read either way."""
    start, stop = self._spans[name]
    with open(self.path, 'rb') as file:
      file.seek(start)
      array = flax.serialization.msgpack_restore(file.read(stop - start))
    return array[index] if index else array


def _array_header(code: int, data: bytes) -> Entry:
  """An array as Flax packs it, (shape, dtype, bytes), without its bytes."""
  if code != 1:
    raise ValueError(f'extension type {code} is no array')
  header = msgpack.Unpacker()
  header.feed(data[:256])
  if header.read_array_header() != 3:
    raise ValueError('an array is not (shape, dtype, bytes)')
  shape, dtype = header.unpack(), np.dtype(header.unpack())
  if not all(isinstance(size, int) for size in shape):
    raise ValueError('a shape is not of integers')
  entry = Entry(tuple(shape), dtype)
  # The bytes follow, after a type and a length of 1, 2 or 4 bytes.
  rest = len(data) - header.tell() - entry.num_bytes
  if entry.dtype.hasobject or rest not in (2, 3, 5):
    raise ValueError('an array is not of the size of its shape')
  return entry


_CHUNKED = '__msgpack_chunked_array__'


def _walk(unpacker: msgpack.Unpacker, file: Any,
          prefix: str) -> Iterator[tuple[str, int, Entry]]:
  """(name, where it starts, entry) of the arrays of the map that comes next;
  the unpacker stands behind each when it is given."""
  map_start = unpacker.tell()
  for i in range(unpacker.read_map_header()):
    key = unpacker.unpack()
    if i == 0 and key == _CHUNKED:
      yield prefix, map_start, _chunked(unpacker)
      return
    name, start = f'{prefix}/{key}' if prefix else str(key), unpacker.tell()
    if _is_map(file, start):
      yield from _walk(unpacker, file, name)
      continue
    entry = unpacker.unpack()
    if not isinstance(entry, Entry):
      raise ValueError(f'{name} is no array')
    yield name, start, entry


def _chunked(unpacker):
  """The rest of the map by which Flax packs an array above 1 GiB."""
  unpacker.unpack()
  rest = {unpacker.unpack(): unpacker.unpack() for _ in range(2)}
  shape, chunks = rest.get('shape'), rest.get('chunks')
  if not isinstance(shape, dict) or not isinstance(chunks, dict) or not all(
      isinstance(chunk, Entry) for chunk in chunks.values()):
    raise ValueError('an array in chunks lacks its shape or chunks')
  return Entry(tuple(shape[str(i)] for i in range(len(shape))),
               chunks['0'].dtype)


def _is_map(file, position):
  file.seek(position)
  byte = file.read(1)
  return bool(byte) and (0x80 <= byte[0] <= 0x8f or byte[0] in (0xde, 0xdf))


class TorchFile(ArrayFile):
  """A file of `torch.save`: a dict of tensors, if PyTorch is installed."""

  def __init__(self, path: str):
    self.path, self.entries = path, {}
    try:
      import torch
    except ImportError:
      raise WeightsError(
          f'{path}: is a pickle, read only where PyTorch is installed (pip '
          'install torch); or write safetensors where it is: '
          'torch.load(FILE, weights_only=True), then '
          'safetensors.torch.save_file(TENSORS, "model.safetensors").'
      ) from None
    if not zipfile.is_zipfile(path):
      raise WeightsError(f'{path}: is damaged, or not of torch.save since '
                         'PyTorch 1.6.')
    self._torch = torch
    try:
      # Refuses every pickle that could run code; mapped, not read.
      self._arrays = torch.load(
          path, map_location='cpu', weights_only=True, mmap=True)
    except pickle.UnpicklingError:
      raise WeightsError(f'{path}: holds more than tensors, and loading it '
                         'could run code.') from None
    except (OSError, RuntimeError, ValueError, EOFError, KeyError):
      raise WeightsError(f'{path}: is damaged.') from None
    if not isinstance(self._arrays, dict) or not all(
        isinstance(value, torch.Tensor) for value in self._arrays.values()):
      raise WeightsError(f'{path}: holds something other than tensors.')
    for name, value in self._arrays.items():
      dtype = str(value.dtype).removeprefix('torch.')
      self.entries[name] = Entry(
          tuple(value.shape),
          np.dtype(jnp.bfloat16 if dtype == 'bfloat16' else dtype))

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `ArrayFile.read`."""
    value = self._arrays[name]
    value = value[index] if index else value
    if value.dtype == self._torch.bfloat16:  # NumPy has no such type.
      return value.contiguous().view(self._torch.int16).numpy().view(
          jnp.bfloat16)
    return value.numpy()


class ShardedFile(ArrayFile):
  """Several files, and the index that says which holds what."""

  def __init__(self, path: str):
    self.path, self.entries = path, {}
    places = read_json_object(path).get('weight_map')
    if not isinstance(places, dict) or not places:
      raise WeightsError(f'{path}: has no weight_map.')
    self._shards: dict[str, ArrayFile] = {}
    for shard in sorted(set(map(str, places.values()))):
      if shard != os.path.basename(shard):
        raise WeightsError(f'{path}: names a file in another folder, {shard}.')
      file = open_array_file(os.path.join(os.path.dirname(path), shard))
      for name, entry in file.entries.items():
        if places.get(name) != shard:
          raise WeightsError(
              f'{file.path}: tensor {name} is not in this file by {path}.')
        self._shards[name], self.entries[name] = file, entry
    for name, shard in places.items():
      if name not in self.entries:
        raise WeightsError(f'{path}: tensor {name} is missing in {shard}.')

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `ArrayFile.read`."""
    return self._shards[name].read(name, index)


def open_array_file(path: str) -> ArrayFile:
  """Opens a file by the end of its name.

  Raises:
    WeightsError: it cannot be read, is damaged, or is of no known format.
  """
  if not os.path.isfile(path):
    raise WeightsError(f'{path}: there is no such file.')
  if path.endswith('.index.json'):
    return ShardedFile(path)
  if path.endswith('.safetensors'):
    return SafetensorsFile(path)
  if path.endswith('.msgpack'):
    return MsgpackFile(path)
  if path.endswith(('.bin', '.pt', '.pth')):
    return TorchFile(path)
  raise WeightsError(f'{path}: must end in .safetensors, .msgpack, .bin or '
                     '.index.json.')


def write_safetensors(path: str, arrays: Iterator[np.ndarray],
                      entries: dict[str, Entry],
                      metadata: dict[str, str]) -> None:
  """Writes a .safetensors file, one array in memory at a time.

  The library's own writer wants all of them at once.

  Args:
    path: of the file.
    arrays: in the order of `entries`.
    entries: name to shape and dtype.
    metadata: text to keep in the file.
  """
  codes = {np.dtype(dtype): code
           for code, dtype in _SAFETENSORS_DTYPES.items()}
  header: dict[str, Any] = {'__metadata__': metadata}
  offset = 0
  for name, entry in entries.items():
    end = offset + entry.num_bytes
    header[name] = {'dtype': codes[entry.dtype], 'shape': entry.shape,
                    'data_offsets': [offset, end]}
    offset = end
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # Arrays start at a multiple of 8 bytes.
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for entry in entries.values():
      array = next(arrays)
      if array.shape != entry.shape or array.dtype != entry.dtype:
        raise ValueError(f'{path}: {array.shape} {array.dtype} is not {entry}.')
      for rows in row_chunks(array.shape, array.itemsize):
        file.write(np.ascontiguousarray(array[rows]).view(np.uint8).data)
      del array  # Before the next one is made.

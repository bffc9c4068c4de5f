"""A folder of shards while it is being written: what belongs into it, and what
is there."""

import array
import hashlib
import json
import os
from typing import Any

import numpy as np

from longt5_flax.data.prepared import (
    FORMAT,
    METADATA,
    UNFINISHED,
    check_shard,
)
from longt5_flax.data.shard_writer import Shard
from longt5_flax.data.sources import DataError, Documents

# One shard a so much text, but not more than so many.
_SHARD_BYTES, _MOST_SHARDS = 8 << 20, 256
# Text that is compressed together, and read together for one document of it.
_GROUP_BYTES, _MOST_GROUPED = 64 << 10, 64


def make_plan(
    documents: Documents, settings: dict[str, Any], num_shards: int = 0
) -> tuple[dict[str, Any], np.ndarray]:
  """The metadata of a folder, but for the sizes of its shards.

  Args:
    documents: all of them.
    settings: `settings_that_matter`.
    num_shards: at most; 0: by the size of the text.

  Returns:
    The metadata, and the bytes of text of each document.
  """
  digest, lengths = hashlib.sha256(), array.array('q')
  for text in documents:
    encoded = text.encode('utf-8')
    lengths.append(len(encoded))
    digest.update(len(encoded).to_bytes(8, 'little') + encoded)
  sizes = np.asarray(lengths)
  ends = np.cumsum(sizes)
  total = int(ends[-1])
  count = num_shards or min(max(total // _SHARD_BYTES, 1), _MOST_SHARDS)
  cuts = np.searchsorted(ends, total * np.arange(1, count) / count, 'right')
  cuts = np.unique([0, *cuts, len(sizes)])
  return {
      'format': FORMAT,
      'settings': settings,
      'documents': len(sizes),
      'skipped': documents.skipped,
      'text_sha256': digest.hexdigest(),
      'group_size': min(max(_GROUP_BYTES * len(sizes) // total, 1),
                        _MOST_GROUPED),
      'shards': [{'file': f'{number:05}.array_record', 'documents': size}
                 for number, size in enumerate(np.diff(cuts).tolist())],
  }, sizes


class ShardFolder:
  """A folder for the shards of a plan, new or left by who was stopped.

  Args:
    path: of the folder.
    plan: from `make_plan`.

  Raises:
    DataError: it holds anything else, or cannot be made.
  """

  def __init__(self, path: str, plan: dict[str, Any]):
    self._path = path
    self._plan = plan
    self._metadata = os.path.join(path, METADATA)
    self._sizes: dict[str, int] = {}
    try:
      os.makedirs(path, exist_ok=True)
      for name in (self._metadata, self._metadata + UNFINISHED):
        if os.path.exists(name):
          self._continue(name)
          return
      if os.listdir(path):
        raise DataError(f'{path} holds files that longt5_flax.prepare has not '
                        'made: choose another --output')
      self._write(self._metadata + UNFINISHED, plan)
    except OSError as error:
      raise DataError(f'cannot write {path}: {error.strerror}') from None

  def _continue(self, name: str) -> None:
    with open(name, encoding='utf-8') as file:
      try:
        found = json.load(file)
        old, new = _identity(found), _identity(self._plan)
      except (ValueError, LookupError, TypeError) as error:
        raise DataError(f'{name} is damaged ({error!r}): delete {self._path}'
                        ) from None
    for key in old | new:
      if old.get(key) != new.get(key):
        raise DataError(
            f'{self._path} was prepared with {key}={old.get(key)!r}, not '
            f'{new.get(key)!r}: keep the value, or choose another --output')
    self._sizes = {shard['file']: shard['bytes'] for shard in found['shards']
                   if 'bytes' in shard}

  @property
  def shards(self) -> list[Shard]:
    """All of them."""
    ends = np.cumsum([0, *(s['documents'] for s in self._plan['shards'])])
    return [Shard(shard['file'], int(start), int(stop)) for shard, start, stop
            in zip(self._plan['shards'], ends[:-1], ends[1:], strict=True)]

  def missing(self) -> list[Shard]:
    """Those that are not there as a whole."""
    return [shard for shard in self.shards if not self._is_whole(shard.file)]

  def _is_whole(self, file: str) -> bool:
    path = os.path.join(self._path, file)
    if file not in self._sizes:  # A shard has its name only when it is whole.
      return os.path.exists(path)
    try:
      check_shard(path, self._sizes[file])
    except DataError:
      return False
    return True

  def finish(self) -> None:
    """Writes the metadata, and deletes what interrupted writers left."""
    shards = [shard | {'bytes': os.path.getsize(
        os.path.join(self._path, shard['file']))}
              for shard in self._plan['shards']]
    self._write(self._metadata, self._plan | {'shards': shards})
    for file in os.listdir(self._path):
      if file.endswith('.part'):
        os.remove(os.path.join(self._path, file))

  def _write(self, path: str, metadata: dict[str, Any]) -> None:
    part = f'{path}.{os.getpid()}.part'
    with open(part, 'w', encoding='utf-8') as file:
      json.dump(metadata, file, indent=2)
      file.write('\n')
    os.replace(part, path)


def _identity(metadata: dict[str, Any]) -> dict[str, Any]:
  """What two folders of the same content share, causes first."""
  return metadata['settings'] | {
      'documents': metadata['documents'],
      'text_sha256': metadata['text_sha256'],
      'format': metadata['format'],
      'shards': len(metadata['shards'])}

"""Prepared documents: split, tokenised and scored once, in ArrayRecord shards.

A folder holds the shards and `metadata.json`, which appears last: what they
were made with, and of each how many documents and bytes it has.
"""

import bisect
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from longt5_flax.data.documents import TokenizedDocument, Words
from longt5_flax.data.options import PipelineOptions, objective_weights
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

METADATA = 'metadata.json'
# Stands under METADATA's name and this until all shards are there.
UNFINISHED = '.part'
# Of the shards; to be raised when records or metadata mean something else.
FORMAT = 1
# Options of gap sentences that decide what is stored.
_SCORING = ('stop_words', 'ngram', 'metric', 'option')


def settings_that_matter(
    vocabulary: Vocabulary, options: PipelineOptions) -> dict[str, Any]:
  """What prepared documents depend on: setting -> JSON value.

  Lengths, strategy, ratio, noise and long_documents are not among it.
  """
  settings: dict[str, Any] = {
      'data.vocabulary': f'{vocabulary.size} ids, sha256 '
                         f'{vocabulary.fingerprint[:16]}'}
  if 'gap_sentences' in objective_weights(options.objective):
    for name in _SCORING:
      value = getattr(options.gap_sentences, name)
      settings[f'gap_sentences.{name}'] = (
          list(value) if name == 'stop_words' else value)
  return settings


def to_record(document: TokenizedDocument) -> bytes:
  """A document as a record: arrays in the smallest type that holds them."""
  words = document.words
  arrays = {'ids': document.ids, 'lengths': np.diff(document.ends),
            'words': words.ids, 'word_counts': np.diff(words.ends)}
  fields: dict[str, Any] = {'vocabulary': words.size}
  for name, array in arrays.items():
    kind = np.min_scalar_type(array.max(initial=0)).newbyteorder('<')
    fields[name] = kind.str, array.astype(kind).tobytes()
  if document.scores is not None:
    fields['scores'] = '<f4', document.scores.astype('<f4').tobytes()
  return msgpack.packb(fields)


def from_record(record: bytes) -> TokenizedDocument:
  """The document of `to_record`."""
  fields = msgpack.unpackb(record)

  def array(name: str, dtype: type) -> np.ndarray:
    kind, data = fields[name]
    return np.frombuffer(data, kind).astype(dtype)

  def ends(name: str) -> np.ndarray:
    return np.append(0, np.cumsum(array(name, np.int64)))

  return TokenizedDocument(
      array('ids', np.int32), ends('lengths'),
      Words(array('words', np.int64), ends('word_counts'),
            fields['vocabulary']),
      array('scores', np.float32) if 'scores' in fields else None)


class PreparedDocuments(Sequence[TokenizedDocument]):
  """The documents of a folder of shards, read when they are asked for.

  Args:
    folder: with METADATA.
    settings: `settings_that_matter` of those who read it.

  Attributes:
    skipped: bad records that were left out.

  Raises:
    DataError: the folder is not what it should be, or was made with other
      settings.
  """

  def __init__(self, folder: str, settings: dict[str, Any]):
    metadata = read_metadata(folder)
    _check_settings(folder, metadata['settings'], settings)
    self.skipped: int = metadata['skipped']
    self._paths = [os.path.join(folder, shard['file'])
                   for shard in metadata['shards']]
    for path, shard in zip(self._paths, metadata['shards'], strict=True):
      check_shard(path, shard['bytes'])
    self._ends = list(itertools.accumulate(
        shard['documents'] for shard in metadata['shards']))
    self._readers: dict[int, ArrayRecordReader] = {}

  def __getstate__(self) -> dict[str, Any]:
    return vars(self) | {'_readers': {}}  # Each process opens its own.

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: Any) -> Any:
    index = range(len(self))[index]  # Raises IndexError.
    shard = bisect.bisect_right(self._ends, index)
    try:
      if shard not in self._readers:
        self._readers[shard] = ArrayRecordReader(
            self._paths[shard], options='readahead_buffer_size:0',
            file_reader_buffer_size=1 << 15)
      reader = self._readers[shard]
      first = self._ends[shard] - reader.num_records()
      return from_record(reader.read([index - first])[0])
    except (IndexError, RuntimeError, ValueError) as error:
      reason = str(error).partition('\n')[0]
      raise DataError(f'shard {self._paths[shard]} is damaged ({reason}): '
                      'delete it, and the command that prepared it makes it '
                      'again') from None


def read_metadata(folder: str) -> dict[str, Any]:
  """What METADATA of a folder says.

  Raises:
    DataError: there is none, or none that this version can read.
  """
  path = os.path.join(folder, METADATA)
  try:
    with open(path, encoding='utf-8') as file:
      metadata = json.load(file)
  except (FileNotFoundError, NotADirectoryError):
    train = os.path.join(folder, 'train')
    found = os.path.exists(os.path.join(train, METADATA))
    raise DataError(f'{folder} is no folder that longt5_flax.prepare has '
                    f'finished: it has no {METADATA}'
                    + f'; {train} has one' * found) from None
  except OSError as error:
    raise DataError(f'cannot read {path}: {error.strerror}') from None
  except ValueError as error:
    raise DataError(f'{path} is damaged: {error}') from None
  version = metadata.get('format') if isinstance(metadata, dict) else None
  if version != FORMAT:
    raise DataError(f'{path} has format={version!r}, not {FORMAT}: prepare it '
                    'again')
  return metadata


def check_shard(path: str, size: int) -> None:
  """Refuses a shard of another size; ArrayRecord may take it for empty.

  Raises:
    DataError: the file is missing, or has not `size` bytes.
  """
  again = 'the command that prepared it makes it again'
  try:
    found = os.path.getsize(path)
  except OSError as error:
    raise DataError(f'cannot read shard {path}: {error.strerror}; {again}'
                    ) from None
  if found < size:
    raise DataError(f'shard {path} is cut off: it has {found} of {size} bytes; '
                    f'{again}')
  if found > size:
    raise DataError(f'shard {path} has {found} bytes, not {size}; {again}')


def _check_settings(folder: str, made_with: dict[str, Any],
                    wanted: dict[str, Any]) -> None:
  for name, value in wanted.items():
    if name not in made_with:
      raise DataError(f'{folder} was prepared for data.objective without '
                      'gap_sentences: it has nothing to select them by')
    if made_with[name] != value:
      raise DataError(f'{folder} was prepared with {name}={made_with[name]!r}, '
                      f'not {value!r}: keep the value, or prepare it again')

"""Writes prepared documents to shards; runs in worker processes."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from longt5_flax.data.documents import (
    TextDocument,
    TokenizedDocument,
    Words,
    split_sentences,
)
from longt5_flax.data.gap_sentences import GapSentenceOptions, sentence_scores
from longt5_flax.data.prepared import to_record
from longt5_flax.data.sources import DataError, Documents
from longt5_flax.data.vocabulary import Vocabulary

# Bytes of text between two reports of how far a worker is.
_REPORT_EVERY = 500_000


class Shard(NamedTuple):
  """A file of the documents start to stop - 1."""
  file: str
  start: int
  stop: int


@dataclasses.dataclass(frozen=True)
class ShardWriter:
  """Writes shards. Each has its name only when all of it is on disk.

  Attributes:
    folder: that holds the shards.
    shards: to write, in turn.
    documents: all of them.
    vocabulary: to tokenise.
    scoring: how to score sentences; None for ids alone.
    group_size: documents that are compressed together.
  """
  folder: str
  shards: Sequence[Shard]
  documents: Documents
  vocabulary: Vocabulary
  scoring: GapSentenceOptions | None
  group_size: int

  def with_shards(self, shards: Sequence[Shard]) -> 'ShardWriter':
    """Writes these instead."""
    return dataclasses.replace(self, shards=shards)

  def run(self) -> Iterator[int]:
    """Writes all shards, and says now and then how many bytes of text more it
    has done.

    Raises:
      DataError: no room, or no right to write.
    """
    for shard in self.shards:
      path = os.path.join(self.folder, shard.file)
      # A writer that lost its parent may still be at work for a moment.
      part = f'{path}.{os.getpid()}.part'
      try:
        yield from self._write(part, range(shard.start, shard.stop))
        os.replace(part, path)
      except (OSError, RuntimeError) as error:
        raise DataError(f'cannot write {part}: {error}') from None

  def _write(self, path: str, numbers: range) -> Iterator[int]:
    writer = ArrayRecordWriter(path, f'group_size:{self.group_size},zstd:3')
    unreported = 0
    for number in numbers:
      text = self.documents[number]
      writer.write(to_record(self.prepare(text)))
      unreported += len(text.encode('utf-8'))
      if unreported > _REPORT_EVERY:
        yield unreported
        unreported = 0
    writer.close()
    with open(path, 'rb') as file:
      os.fsync(file.fileno())
    yield unreported

  def prepare(self, text: str) -> TokenizedDocument:
    """Splits, tokenises and scores a text."""
    sentences = split_sentences(text)
    if self.scoring is None:
      document = TextDocument(sentences, self.vocabulary.encode)
      no_words = Words(document.ids[:0], 0 * document.ends, 0)
      return TokenizedDocument(document.ids, document.ends, no_words)
    document = TextDocument(
        sentences, self.vocabulary.encode, self.scoring.stop_words)
    return TokenizedDocument(
        document.ids, document.ends, document.words,
        sentence_scores(document.words, self.scoring))

"""What `summarize` reads: texts, and what the model gets to see of them."""

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from longt5_flax.config import ConfigError
from longt5_flax.data.documents import (
    TextDocument,
    cut_long_sentences,
    split_sentences,
)
from longt5_flax.data.sources import DataError
from longt5_flax.data.tokenizer import Tokenizer

STDIN = '-'


class Document(NamedTuple):
  """A text, the file that it is of, and what messages call that."""
  path: str
  name: str
  text: str


class Pieces(NamedTuple):
  """What the model reads of a document.

  Attributes:
    ids: of each piece; each is summarised by itself.
    tokens: of the whole document.
    left_out: how many of them no piece has.
    where: 'last' or 'middle', those that are left out.
  """
  ids: list[list[int]]
  tokens: int
  left_out: int = 0
  where: str = 'last'


class Reader:
  """Documents to what the model reads.

  Args:
    tokenizer: of the model.
    prefix: in front of every document: a task's, a question.
    limit: tokens of an input at most, prefix and end included.
    on_long: what becomes of a longer document. 'truncate' reads its beginning;
      'chunk' all of it, in pieces of whole sentences and of about one length,
      each behind the prefix.
    cut_middle: 'truncate' reads as much of the beginning as of the end, as
      `data.long_inputs` has it in training.

  Raises:
    ConfigError: the prefix leaves no room.
  """

  def __init__(self, tokenizer: Tokenizer, prefix: str, limit: int,
               on_long: str, cut_middle: bool = False):
    self._tokenizer, self._prefix = tokenizer, prefix
    self.limit, self._on_long = limit, on_long
    self._cut_middle = cut_middle
    self._head = tokenizer.encode(prefix, add_special_tokens=False)
    self._room = limit - len(self._head) - 1
    if self._room < 1:
      raise ConfigError(
          f'--max_input_length={limit} leaves no room for a document behind '
          f'{prefix.strip()!r}, which has {len(self._head)} tokens.')

  def read(self, document: Document) -> Pieces:
    """Ids of a document.

    Raises:
      DataError: there is no text in it.
    """
    ids = self._tokenizer.encode(self._prefix + document.text)
    tokens = len(ids) - len(self._head) - 1
    if tokens < 1:
      raise DataError(f'{document.name}: there is no text in it.')
    if len(ids) <= self.limit:
      return Pieces([ids], tokens)
    if self._on_long == 'truncate':
      last = (self.limit - 1) // 2 if self._cut_middle else 0
      kept = ids[:self.limit - 1 - last] + ids[len(ids) - 1 - last:]
      return Pieces([kept], tokens, len(ids) - self.limit,
                    'middle' if last else 'last')
    pieces = [self._head + piece + ids[-1:]
              for piece in self._whole_sentences(document.text)]
    return Pieces(pieces, tokens)

  def _whole_sentences(self, text: str) -> Iterator[list[int]]:
    """Cuts where a sentence ends, or inside one that is longer than a piece."""
    sentences = cut_long_sentences(TextDocument(
        split_sentences(text), self._tokenizer.vocabulary.encode),
                                   self._room, self._room)
    start, last = 0, len(sentences)
    # The last sentences may have no tokens: characters that are dropped.
    while sentences.ends[start] < sentences.ends[last]:
      lengths = sentences.ends - sentences.ends[start]
      even = -(-lengths[last] // -(-lengths[last] // self._room))
      # The sentence that passes the even length goes along if there is room.
      end = int(np.searchsorted(lengths, even))
      end -= int(lengths[end] > self._room)
      yield sentences.tokens(start, end).tolist()
      start = end


def read_documents(paths: Sequence[str]) -> list[Document]:
  """The texts of files; of standard input for '-'.

  Raises:
    DataError: one cannot be read, is no text, or is empty.
  """
  return [_read_document(path) for path in paths]


def _read_document(path):
  try:
    if path == STDIN:
      content = sys.stdin.buffer.read()
    else:
      with open(path, 'rb') as file:
        content = file.read()
  except OSError as error:
    raise DataError(f'cannot read {path}: {error.strerror}.') from None
  name = _name(path)
  try:
    text = content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise DataError(
        f'{name} is no text in UTF-8, at byte {error.start}.') from None
  if '\0' in text:
    raise DataError(f'{name} is binary, no text.')
  if not text.strip():
    raise DataError(f'{name} is empty.')
  return Document(path, name, text)


def _name(path):
  return 'standard input' if path == STDIN else path

"""Documents as objectives read them: sentences, their tokens and their words.

Tokens are what the model reads. Words are what sentences are scored by, and
only whether two are the same matters: they are numbers.
"""

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

# One mark before whitespace ends the same sentences as a run of marks would,
# and stays linear: `[.!?]+\s+` is quadratic on a long run of '!'.
_BOUNDARY = re.compile(r'[.!?][ \t\n\v\f\r]+')
# ASCII letters to lower case, digits as they are, any other byte to a space.
_FOLD = bytes(byte if chr(byte).isalnum() and byte < 128 else 32
              for byte in bytes(range(256)).lower())


def split_sentences(text: str) -> list[str]:
  """Splits after every run of `.!?` and the ASCII whitespace that follows it.

  Nothing is trimmed: the sentences joined are the text, except that a literal
  "[SEP]" separates sentences too and is dropped, as in PEGASUS.
  """
  sentences = []
  for part in text.split('[SEP]'):
    ends = [match.end() for match in _BOUNDARY.finditer(part)]
    sentences += [part[start:end] for start, end in itertools.pairwise(
        [0, *ends, len(part)]) if start < end]
  return sentences


@dataclasses.dataclass(frozen=True)
class Words:
  """The words of a document's sentences, numbered.

  Attributes:
    ids: [W] int, a number for each word, the same for the same word.
    ends: [len(self) + 1] int64, words before each sentence, and of all.
    size: a number above all `ids`.
  """
  ids: np.ndarray
  ends: np.ndarray
  size: int

  def __len__(self) -> int:
    return len(self.ends) - 1

  def part(self, start: int, end: int) -> 'Words':
    """The words of sentences start to end - 1, with numbers of their own.

    Linear in the part, however large the document's numbers are.
    """
    if (start, end) == (0, len(self)):
      return self
    ids = self.ids[self.ends[start]:self.ends[end]]
    # The new number of a word is where it occurs last.
    place = np.empty(self.size, np.int64)
    place[ids] = np.arange(len(ids))
    ends = self.ends[start:end + 1]
    return Words(place[ids], ends - ends[0], len(ids))


def count_words(
    sentences: Sequence[str], stop_words: Sequence[str] = ()) -> Words:
  """The words [a-z0-9]+ of sentences, after folding ASCII letters.

  Args:
    sentences: of a document.
    stop_words: to leave out; compared as they are with folded words.
  """
  # A character outside ASCII becomes '?': a separator, as its bytes would be.
  rows = [sentence.encode('ascii', 'replace').translate(_FOLD).split()
          for sentence in sentences]
  if stop_words:
    stopped = {word.encode('ascii', 'replace') for word in stop_words}
    rows = [[word for word in row if word not in stopped] for row in rows]
  ends = ends_of(rows)
  numbers: dict[bytes, int] = collections.defaultdict(
      itertools.count().__next__)
  flat = itertools.chain.from_iterable(rows)
  ids = np.fromiter(map(numbers.__getitem__, flat), np.int64, ends[-1])
  return Words(ids, ends, len(numbers))


def ends_of(rows: Sequence[Sequence[object] | np.ndarray]) -> np.ndarray:
  """[len(rows) + 1] int64: how much comes before each row, and in all."""
  return np.cumsum([0, *map(len, rows)], dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class TokenizedDocument:
  """A document of arrays; len() is the number of its sentences.

  Attributes:
    ids: [n] int, the token ids of all sentences.
    ends: [len(self) + 1] int64, tokens before each sentence, and of all.
    words: of all sentences.
    scores: [len(self)] float32, of each sentence against the rest, or None
      where they are not known.
  """
  ids: np.ndarray
  ends: np.ndarray
  words: Words
  scores: np.ndarray | None = None

  def tokens(self, start: int, end: int, most: int | None = None) -> np.ndarray:
    """[<= most] int: the first ids of sentences start to end - 1."""
    return self.ids[self.ends[start]:self.ends[end]][:most]

  def __len__(self) -> int:
    return len(self.ends) - 1


class TextDocument:
  """A document of text, tokenised as far as it is asked for.

  It has what `TokenizedDocument` has. Of a novel that is cut to its first 4096
  tokens most sentences only count as words: tokenising all of it would cost
  most of the time.

  Args:
    sentences: in order.
    encode: from a sentence to its token ids.
    stop_words: see `count_words`.
  """

  scores = None

  def __init__(self, sentences: Sequence[str],
               encode: Callable[[str], Sequence[int]],
               stop_words: Sequence[str] = ()):
    self._sentences = sentences
    self._encode = encode
    self._stop_words = stop_words
    self._rows: list[Sequence[int] | None] = [None] * len(sentences)

  @functools.cached_property
  def words(self) -> Words:
    """See `TokenizedDocument`."""
    return count_words(self._sentences, self._stop_words)

  @functools.cached_property
  def _whole(self) -> tuple[np.ndarray, np.ndarray]:
    rows = [self._row(i) for i in range(len(self))]
    self._rows.clear()  # Lists of integers take nine times the memory.
    ends = ends_of(rows)
    flat = itertools.chain.from_iterable(rows)
    return np.fromiter(flat, np.int32, ends[-1]), ends

  @property
  def ids(self) -> np.ndarray:
    """See `TokenizedDocument`."""
    return self._whole[0]

  @property
  def ends(self) -> np.ndarray:
    """See `TokenizedDocument`."""
    return self._whole[1]

  def tokens(self, start: int, end: int, most: int | None = None) -> np.ndarray:
    """See `TokenizedDocument`."""
    if '_whole' in vars(self):
      return self.ids[self.ends[start]:self.ends[end]][:most]
    found: list[int] = []
    for i in range(start, end):
      if most is not None and len(found) >= most:
        break
      found += self._row(i)
    return np.array(found[:most], np.int32)

  def __len__(self) -> int:
    return len(self._sentences)

  def _row(self, i: int) -> Sequence[int]:
    row = self._rows[i]
    if row is None:
      row = self._rows[i] = self._encode(self._sentences[i])
    return row


Document = TokenizedDocument | TextDocument
# Of a source: text, or what is prepared.
Item = str | TokenizedDocument


def cut_long_sentences(document: Document, longest: int, size: int
                       ) -> Document:
  """The document with its long sentences cut into several.

  Args:
    document: tokenised by this if it was not yet.
    longest: tokens that a sentence may have.
    size: tokens of each part but the last of a longer one. Its words go to the
      parts in proportion, in order.
  """
  lengths = np.diff(document.ends)
  if lengths.max(initial=0) <= longest:
    return document
  parts = np.where(lengths > longest, -(-lengths // size), 1)
  owner = np.repeat(np.arange(len(parts)), parts)
  begin = size * (np.arange(len(owner)) - (np.cumsum(parts) - parts)[owner])
  words = document.words
  before = np.diff(words.ends)[owner] * begin // np.maximum(lengths, 1)[owner]
  return TokenizedDocument(
      document.ids, np.append(document.ends[owner] + begin, document.ends[-1]),
      Words(words.ids, np.append(words.ends[owner] + before, words.ends[-1]),
            words.size))

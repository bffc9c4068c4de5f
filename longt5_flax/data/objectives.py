"""From a document's text to examples: what a model reads and what it writes."""

import dataclasses
from typing import NamedTuple

import numpy as np

from longt5_flax.data.gap_sentences import (
    gap_sentence_example,
    split_sentences,
)
from longt5_flax.data.options import PipelineOptions
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary


class Example(NamedTuple):
  """Token ids, int32: inputs [at most inputs_length], targets [at most
  targets_length]; and how many target tokens were cut off."""
  inputs: np.ndarray
  targets: np.ndarray
  lost: int


@dataclasses.dataclass(frozen=True)
class Sentences:
  """A tokenised document.

  Attributes:
    texts: its sentences.
    ids: their token ids.
    ends: [len(texts) + 1] int64, tokens before each, and of all.
  """
  texts: list[str]
  ids: list[list[int]]
  ends: np.ndarray


class GapSentences:
  """Gap sentences of documents.

  With long_documents='pieces' a document that a row cannot hold is cut between
  sentences, and an example is made of each piece by itself. A piece is as long
  as it can be with at most inputs_length - 1 tokens, before masking, and no
  target cut off; for that the share of sentences to mask is drawn first.
  (Pieces of inputs_length - 1 tokens would lose every third target token of
  novels at 4096 -> 910: the sentences that score best are long ones.) A piece
  may be made to fill the room that is left in a row. What fits a row is never
  cut. Targets are still lost where a single sentence exceeds targets_length.

  A sentence of more than inputs_length - 1 tokens (text without ". ", such as
  Chinese) is cut into parts that fit both sides, each from there on a sentence.

  Args:
    vocabulary: to tokenise.
    options: of the pipeline.

  Raises:
    DataError: the vocabulary lacks the mask.
  """

  def __init__(self, vocabulary: Vocabulary, options: PipelineOptions):
    self._vocabulary = vocabulary
    self._options = options
    mask = options.gap_sentences.mask_id
    if mask >= vocabulary.size:
      raise DataError(f'gap_sentences.mask_id={mask} must be less than the '
                      f'{vocabulary.size} ids of the vocabulary')

  def read(self, text: str) -> Sentences:
    """Splits and tokenises a document."""
    texts = split_sentences(text)
    ids = self._vocabulary.encode_batch(texts)
    if self._options.long_documents == 'pieces':
      texts, ids = self._cut_long(texts, ids)
    return Sentences(texts, ids, np.cumsum([0, *map(len, ids)]))

  def _cut_long(
      self, texts: list[str], ids: list[list[int]]
  ) -> tuple[list[str], list[list[int]]]:
    longest = self._options.inputs_length - 1
    if max(map(len, ids), default=0) <= longest:
      return texts, ids
    size = max(1, min(longest, self._options.targets_length - 1))
    parts: list[tuple[str, list[int]]] = []
    for text, row in zip(texts, ids, strict=True):
      if len(row) <= longest:
        parts.append((text, row))
        continue
      for i in range(0, len(row), size):
        part = row[i:i + size]
        parts.append((self._vocabulary.decode(part), part))
    return [text for text, _ in parts], [part for _, part in parts]

  def example(self, document: Sentences, start: int, seeds: tuple[int, ...],
              room: tuple[int, int]) -> tuple[Example, int]:
    """The example that begins with a sentence, and where the next one does.

    Args:
      document: from `read`.
      start: index of the first sentence.
      seeds: of all draws.
      room: input and target tokens to fill if the document must be cut anyway.
    """
    count, ends = len(document.ids), document.ends
    if self._options.long_documents == 'cut':
      return self._make(document, slice(start, count), seeds), count
    whole = self._options.inputs_length, self._options.targets_length
    if ends[count] - ends[start] < whole[0]:
      return self._fit(document, start, seeds, whole)
    example, end = self._fit(document, start, seeds, room)
    # One sentence alone, masked, leaves nothing to tell it from.
    if end == start + 1 and room != whole:
      return self._fit(document, start, seeds, whole)
    return example, end

  def _fit(self, document: Sentences, start: int, seeds: tuple[int, ...],
           room: tuple[int, int]) -> tuple[Example, int]:
    """The longest piece found that fits a room, but at least one sentence."""
    ends, size = document.ends, self._options.inputs_length - 1
    while True:
      end = int(np.searchsorted(ends, ends[start] + size, side='right')) - 1
      end = min(len(document.ids), max(end, start + 1))
      example = self._make(document, slice(start, end), seeds)
      excess = max(len(example.inputs) / room[0],
                   (len(example.targets) + example.lost) / room[1])
      if excess <= 1 or end <= start + 1:
        return example, end
      used = int(ends[end] - ends[start])
      size = min(int(used / excess), used - 1)

  def _make(self, document: Sentences, part: slice, seeds: tuple[int, ...]
            ) -> Example:
    return Example(*gap_sentence_example(
        document.texts[part], document.ids[part], self._options.gap_sentences,
        np.random.default_rng(seeds), self._options.inputs_length,
        self._options.targets_length, self._vocabulary.eos_id))

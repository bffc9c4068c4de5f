"""From a document, or an example in text, to token ids: what a model reads and
what it writes."""

import abc
import bisect
import itertools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from longt5_flax.data import examples
from longt5_flax.data.documents import (
    Document,
    Item,
    TextDocument,
    TokenizedDocument,
    cut_long_sentences,
    split_sentences,
)
from longt5_flax.data.gap_sentences import mask_gap_sentences
from longt5_flax.data.options import (
    SUPERVISED,
    PipelineOptions,
    objective_weights,
)
from longt5_flax.data.sources import DataError
from longt5_flax.data.span_corruption import (
    noise_counts,
    span_corruption_example,
    span_lengths,
)
from longt5_flax.data.vocabulary import Vocabulary


class Example(NamedTuple):
  """Token ids, and what was cut.

  Attributes:
    inputs: [at most inputs_length] int32.
    targets: [at most targets_length] int32.
    lost: target tokens that were cut off.
    lost_inputs: input tokens that were; only SUPERVISED counts them.
    left_out: 1 for an example that is not to be used, and is empty; of others,
      how many of those came right before it.
  """
  inputs: np.ndarray
  targets: np.ndarray
  lost: int = 0
  lost_inputs: int = 0
  left_out: int = 0


class Objective(abc.ABC):
  """Makes examples of what a source holds.

  Args:
    vocabulary: to tokenise: Vocabulary, or what has as much of it as is needed.
    options: of the pipeline.

  Raises:
    DataError: the vocabulary lacks an id that stands for what is hidden.
  """

  def __init__(self, vocabulary: Any, options: PipelineOptions):
    self._vocabulary = vocabulary
    self._options = options
    self._lengths = options.inputs_length, options.targets_length

  @abc.abstractmethod
  def read(self, item: Any) -> Any:
    """What `example` takes, of an item of a source."""

  @abc.abstractmethod
  def example(
      self, document: Any, start: int, seeds: Sequence[int],
      room: tuple[int, int]) -> tuple[Example, int | None]:
    """An example, and where in the document the next one starts, if any.

    Args:
      document: from `read`.
      start: 0, or where the example before said.
      seeds: of all draws of this document.
      room: input and target tokens left in the row, for a piece of a document
        that must be cut anyway.

    Raises:
      DataError: none can be made of it.
    """


class OfDocuments(Objective):
  """An objective that makes examples of documents."""

  def read(self, item: Item) -> Document:
    """A document of a text; of one that is prepared, itself.

    With long_documents='pieces' a sentence of more than inputs_length - 1
    tokens (text without ". ", such as Chinese) is cut into parts that fit both
    sides, each from there on a sentence.
    """
    document = item if isinstance(item, TokenizedDocument) else TextDocument(
        split_sentences(item), self._vocabulary.encode,
        self._options.gap_sentences.stop_words)
    if self._options.long_documents == 'cut':
      return document
    longest = self._options.inputs_length - 1
    size = max(1, min(longest, self._options.targets_length - 1))
    return cut_long_sentences(document, longest, size)


class GapSentences(OfDocuments):
  """Gap sentences of documents; `start` counts sentences.

  With long_documents='pieces' a document that a row cannot hold is cut between
  sentences, and an example is made of each piece by itself. A piece is as long
  as it can be with at most inputs_length - 1 tokens, before masking, and no
  target cut off; for that the share of sentences to mask is drawn first.
  (Pieces of inputs_length - 1 tokens would lose every third target token of
  novels at 4096 -> 910: the sentences that score best are long ones.) A piece
  may be made to fill the room that is left in a row. What fits a row is never
  cut. Targets are still lost where a single sentence exceeds targets_length.
  """

  def __init__(self, vocabulary: Vocabulary, options: PipelineOptions):
    super().__init__(vocabulary, options)
    mask = options.gap_sentences.mask_id
    if mask >= vocabulary.size:
      raise DataError(f'gap_sentences.mask_id={mask} must be less than the '
                      f'{vocabulary.size} ids of the vocabulary')

  def example(
      self, document: Document, start: int, seeds: Sequence[int],
      room: tuple[int, int]) -> tuple[Example, int | None]:
    """See `Objective`."""
    seeds = (*seeds, start)
    count = len(document)
    if self._options.long_documents == 'cut':
      return self._make(document, range(count), seeds), None
    ends, whole = document.ends, self._lengths
    if ends[count] - ends[start] < whole[0]:
      room = whole
    example, end = self._fit(document, start, seeds, room)
    # One sentence alone, masked, leaves nothing to tell it from.
    if end == start + 1 and room != whole:
      example, end = self._fit(document, start, seeds, whole)
    return example, end if end < count else None

  def _fit(self, document: Document, start: int, seeds: Sequence[int],
           room: tuple[int, int]) -> tuple[Example, int]:
    """The longest piece found that fits a room, but at least one sentence."""
    ends, size = document.ends, self._options.inputs_length - 1
    while True:
      end = int(np.searchsorted(ends, ends[start] + size, side='right')) - 1
      end = min(len(document), max(end, start + 1))
      example = self._make(document, range(start, end), seeds)
      excess = max(len(example.inputs) / room[0],
                   (len(example.targets) + example.lost) / room[1])
      if excess <= 1 or end <= start + 1:
        return example, end
      used = int(ends[end] - ends[start])
      size = min(int(used / excess), used - 1)

  def _make(self, document: Document, part: range, seeds: Sequence[int]
            ) -> Example:
    return Example(*mask_gap_sentences(
        document, part, self._options.gap_sentences,
        np.random.default_rng(seeds), self._lengths, self._vocabulary.eos_id))


class SpanCorruption(OfDocuments):
  """Span corruption of documents; `start` counts tokens.

  A document is cut every so many tokens that the inputs fill a row exactly, but
  for those of the last piece. With long_documents='cut' only its first piece
  is used; with 'pieces' all are, and they are shorter where no row would hold
  their targets.
  """

  def __init__(self, vocabulary: Vocabulary, options: PipelineOptions):
    super().__init__(vocabulary, options)
    spans = options.span_corruption
    self._size, targets = span_lengths(options.inputs_length, spans)
    if options.long_documents == 'pieces' and targets > options.targets_length:
      # The most tokens whose targets fit: targets grow with the text.
      self._size = 1 + bisect.bisect_right(
          range(2, self._size), options.targets_length,
          key=lambda n: sum(noise_counts(n, spans)) + 1)
    self._sentinels = vocabulary.sentinel_ids(
        noise_counts(max(2, self._size), spans)[1])

  def example(
      self, document: Document, start: int, seeds: Sequence[int],
      room: tuple[int, int]) -> tuple[Example, int | None]:
    """See `Objective`."""
    del room  # Rows are filled as they are.
    if self._options.long_documents == 'cut':
      end: int | None = None
      ids = document.tokens(0, len(document), self._size)
    else:
      end = start + self._size
      ids = document.ids[start:end]
      end = end if end < len(document.ids) else None
    inputs, targets = span_corruption_example(
        ids, self._options.span_corruption,
        np.random.default_rng((*seeds, start)), self._sentinels,
        self._vocabulary.eos_id)
    cut = targets[:self._options.targets_length]
    return Example(inputs, cut, len(targets) - len(cut)), end


class Mixture(OfDocuments):
  """One of several objectives for each document, drawn by their weights."""

  def __init__(self, vocabulary: Vocabulary, options: PipelineOptions):
    super().__init__(vocabulary, options)
    weights = objective_weights(options.objective)
    self._objectives = [
        _OBJECTIVES[name](vocabulary, options) for name in weights]
    self._upto = list(itertools.accumulate(weights.values()))

  def example(
      self, document: Document, start: int, seeds: Sequence[int],
      room: tuple[int, int]) -> tuple[Example, int | None]:
    """See `Objective`."""
    draw = np.random.default_rng((*seeds, 0, zlib.crc32(b'objective'))).random()
    chosen = bisect.bisect_right(self._upto[:-1], draw * self._upto[-1])
    return self._objectives[chosen].example(document, start, seeds, room)


class Supervised(Objective):
  """Inputs and targets of `examples.Example`, each with an end of sequence,
  that is kept when they are cut, as T5 does.

  Inputs of more than inputs_length tokens, prefix and end included, follow
  `long_inputs`. 'cut_end': their last tokens go. 'cut_middle': as many of the
  first tokens stay as of the last. 'leave_out': the example is not used.
  'refuse': it is an error. Targets are cut at the end.
  """

  def read(self, item: examples.Example) -> examples.Example:
    """See `Objective`."""
    return item

  def example(
      self, document: examples.Example, start: int, seeds: Sequence[int],
      room: tuple[int, int]) -> tuple[Example, int | None]:
    """See `Objective`."""
    del start, seeds, room  # An example is one, and as it is.
    try:
      return self.encode(document.inputs, document.targets), None
    except DataError as error:
      raise DataError(f'example {document.id!r}: {error}') from None

  def encode(self, inputs: str, targets: str) -> Example:
    """The example of two texts.

    Raises:
      DataError: the inputs are too long and must not be, or the targets have
        no tokens.
    """
    input_ids, lost_inputs = self.encode_inputs(inputs)
    policy = self._options.long_inputs
    if lost_inputs and policy == 'leave_out':
      return self.nothing
    if lost_inputs and policy == 'refuse':
      raise DataError(
          f'{len(input_ids) + lost_inputs} input tokens are more than '
          f"inputs_length={self._lengths[0]}, and long_inputs='refuse'")
    ids = self._vocabulary.encode(targets)
    if not ids:
      raise DataError(f'{targets=} has no tokens')
    target_ids = self._ended(ids[:self._lengths[1] - 1])
    return Example(
        input_ids, target_ids, len(ids) + 1 - len(target_ids), lost_inputs)

  @property
  def nothing(self) -> Example:
    """Stands for an example that is left out."""
    return Example(np.zeros(0, np.int32), np.zeros(0, np.int32), left_out=1)

  def encode_inputs(self, text: str) -> tuple[np.ndarray, int]:
    """[at most inputs_length] int32: ids of inputs, and how many are lost.

    They are cut under every policy; at the end, unless it is 'cut_middle'.
    """
    ids = self._vocabulary.encode(self._options.prefix + text)
    room = self._lengths[0] - 1
    lost = max(0, len(ids) - room)
    if lost:
      last = room // 2 if self._options.long_inputs == 'cut_middle' else 0
      ids = ids[:room - last] + ids[len(ids) - last:]
    return self._ended(ids), lost

  def _ended(self, ids: Sequence[int]) -> np.ndarray:
    return np.array([*ids, self._vocabulary.eos_id], np.int32)


_OBJECTIVES: dict[str, type[Objective]] = {
    'gap_sentences': GapSentences, 'span_corruption': SpanCorruption,
    SUPERVISED: Supervised}


def make_objective(vocabulary: Vocabulary, options: PipelineOptions
                   ) -> Objective:
  """What `options.objective` asks for.

  Raises:
    DataError: see `Objective`.
  """
  weights = objective_weights(options.objective)
  kind = Mixture if len(weights) > 1 else _OBJECTIVES[next(iter(weights))]
  return kind(vocabulary, options)

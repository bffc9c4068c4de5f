"""One row of every batch: a stream of documents, made into examples, packed.

The stream of row r reads positions r, r + batch_size, ... of the shuffled
documents, whatever host or process runs it; draws depend on the seed and the
position. Shuffling and packing are Grain's.
"""

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from longt5_flax.data.documents import Item
from longt5_flax.data.examples import Example as TextExample
from longt5_flax.data.objectives import Example, Objective, make_objective
from longt5_flax.data.options import PipelineOptions
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

# The packer gives out rows when all its bins are full, so each costs time
# before the first step and after a restart.
_BINS = 8
# The least share of a row that is worth a piece of its own: smaller ones fill
# rows better and see less of their document.
_LEAST_ROOM = 1 / 16
# Of a source; examples in text are for a supervised objective.
Items = Sequence[Item] | Sequence[TextExample]
# What examples bring with them besides tokens.
COUNTS = ('lost', 'lost_inputs', 'left_out')


class Row(NamedTuple):
  """One row of a batch.

  Attributes:
    features: name -> [length] int32.
    examples: packed into it.
    lost: target tokens that were cut off its examples.
    lost_inputs: input tokens that were, where that is counted.
    cut: examples that lost targets, and inputs.
    left_out: examples that came before those in it and were not used.
  """
  features: dict[str, np.ndarray]
  examples: int
  lost: int
  lost_inputs: int
  cut: tuple[int, int]
  left_out: int


class RowStream:
  """The rows of one row number, batch after batch.

  Args:
    documents: all of them.
    vocabulary: to tokenise.
    options: of the pipeline.
    batch_size: rows of a batch, and so streams.
    row: which of them.
    held_out: one pass over the documents as they are, drawing always the same;
      instead of shuffling them without end, anew in each epoch.
  """

  def __init__(
      self, documents: Items, vocabulary: Vocabulary,
      options: PipelineOptions, batch_size: int, row: int,
      held_out: bool = False):
    name = 'held out' if held_out else 'train'
    items = grain.MapDataset.source(documents)
    if not held_out:
      items = items.shuffle(_seed(options.seed, 'shuffle')).repeat()
    examples = _ExampleDataset(
        items, make_objective(vocabulary, options), options,
        (row, batch_size), (options.seed, zlib.crc32(name.encode())))
    self._documents = len(documents)
    self._row = row
    self._rows = iter(packed_rows(examples, options, f'bins {row}'))

  def __iter__(self) -> 'RowStream':
    return self

  def __next__(self) -> Row:
    return make_row(next(self._rows))

  def get_state(self) -> dict[str, Any]:
    """A small JSON value: where the next row begins."""
    return {'documents': self._documents, 'rows': self._rows.get_state()}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes where `get_state` was called, in this or another process.

    Raises:
      DataError: the state is of another number of documents.
    """
    if state['documents'] != self._documents:
      raise DataError(
          f'row {self._row} was saved with {state["documents"]} documents and '
          f'there are {self._documents}: the order would not be the same')
    self._rows.set_state(state['rows'])


def packed_rows(examples: grain.IterDataset, options: PipelineOptions,
                name: str) -> grain.IterDataset:
  """Packs examples, dicts of the fields of `Example`, for `make_row`.

  Args:
    examples: in order.
    options: of the pipeline.
    name: different ones place rows in different order.
  """
  # One bin of one example is a row without packing.
  bins, most = (_BINS, None) if options.packing else (1, 1)
  return grain.experimental.FirstFitPackIterDataset(
      examples,
      length_struct={'inputs': options.inputs_length,
                     'targets': options.targets_length},
      num_packing_bins=bins, max_sequences_per_bin=most,
      # Bins are filled in turn, the last one least: in the same turn on all
      # rows there would be batches with more padding than others.
      shuffle_bins=True, seed=_seed(options.seed, name),
      meta_features=COUNTS,
      pack_alignment_struct={'inputs': options.global_block_size,
                             'targets': 1})


def make_row(packed: dict[str, np.ndarray]) -> Row:
  """The row of what `packed_rows` gives."""
  lost, lost_inputs, left_out = (np.array(packed[name]) for name in COUNTS)
  return Row(_features(packed), len(lost), int(lost.sum()),
             int(lost_inputs.sum()),
             (int((lost > 0).sum()), int((lost_inputs > 0).sum())),
             int(left_out.sum()))


def _seed(seed: int, name: str) -> int:
  """A seed for one use, in the 32 bits that Grain takes."""
  words = np.random.SeedSequence([seed, zlib.crc32(name.encode())])
  return int(words.generate_state(1)[0])


def _features(packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Renames as seqio does and adds what the decoder reads."""
  targets, segments = packed['targets'], packed['targets_segment_ids']
  # Targets one to the right, starting with 0 in each segment.
  decoder_inputs = np.zeros_like(targets)
  decoder_inputs[1:] = targets[:-1] * (segments[1:] == segments[:-1])
  return {
      'encoder_input_tokens': packed['inputs'],
      'encoder_segment_ids': packed['inputs_segment_ids'],
      'encoder_positions': packed['inputs_positions'],
      'decoder_input_tokens': decoder_inputs,
      'decoder_target_tokens': targets,
      'decoder_loss_weights': (targets > 0).astype(np.int32),
      'decoder_segment_ids': segments,
      'decoder_positions': packed['targets_positions'],
  }


class _ExampleDataset(grain.IterDataset):
  """Examples of the documents at positions first, first + step, ..."""

  def __init__(self, items: Any, objective: Objective,
               options: PipelineOptions, positions: tuple[int, int],
               seeds: tuple[int, int]):
    super().__init__()
    self.items = items
    self.objective = objective
    self.options = options
    self.positions = positions
    self.seeds = seeds

  def __iter__(self) -> '_ExampleIterator':
    return _ExampleIterator(self)


class _ExampleIterator(grain.DatasetIterator):
  """Its state: how many documents are done, where in the next one it is, and
  how much room there is left in the row that is being filled."""

  def __init__(self, dataset: _ExampleDataset):
    super().__init__()
    self._dataset = dataset
    self._document = self._start = 0
    self._room = dataset.options.inputs_length, dataset.options.targets_length
    self._read: Any = None

  def __next__(self) -> dict[str, Any]:
    left_out = 0
    while (example := self._example()).left_out:
      left_out += 1
    return example._replace(left_out=left_out)._asdict()

  def _example(self) -> Example:
    dataset = self._dataset
    first, step = dataset.positions
    position = first + step * self._document
    if position >= len(dataset.items):
      raise StopIteration
    if self._read is None:
      self._read = dataset.objective.read(dataset.items[position])
    example, end = dataset.objective.example(
        self._read, self._start, (*dataset.seeds, position), self._room)
    self._room = _room_after(example, self._room, dataset.options)
    if end is None:
      self._document, self._read = self._document + 1, None
    self._start = end or 0
    return example

  def get_state(self) -> dict[str, Any]:
    return {'document': self._document, 'start': self._start,
            'room': list(self._room)}

  def set_state(self, state: dict[str, Any]) -> None:
    self._document, self._start = state['document'], state['start']
    self._room = tuple(state['room'])
    self._read = None


def _room_after(
    example: Example, room: tuple[int, int], options: PipelineOptions
) -> tuple[int, int]:
  """Room for more tokens of either side in the row that took an example.

  Where little is left the next piece had better begin a row.
  """
  whole = options.inputs_length, options.targets_length
  block = options.global_block_size
  taken = -(-len(example.inputs) // block) * block, len(example.targets)
  if taken[0] > room[0] or taken[1] > room[1]:
    room = whole
  left = room[0] - taken[0], room[1] - taken[1]
  useful = options.packing and all(
      part >= all_of_it * _LEAST_ROOM
      for part, all_of_it in zip(left, whole, strict=True))
  return left if useful else whole

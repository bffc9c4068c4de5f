"""Batches for training and for held-out evaluation."""

import functools
import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from longt5_flax.data.options import SUPERVISED, PipelineOptions
from longt5_flax.data.row_streams import Items, Row, RowStream
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.data.workers import InProcess, Job, RowError, Workers

__all__ = ['BatchIterator', 'PipelineOptions', 'RowError', 'fixed_batches']

Batch = dict[str, np.ndarray]
_SUPERVISED_COUNTS = ('cut_targets', 'cut_inputs', 'lost_input_tokens',
                      'left_out_examples')


class Delivered:
  """Makes batches of rows, and counts what is in them.

  Args:
    options: of the pipeline.
  """

  def __init__(self, options: PipelineOptions):
    self._lengths = {'input': options.inputs_length,
                     'target': options.targets_length}
    self._rows = 0
    names = ['examples', 'input_tokens', 'target_tokens', 'lost_target_tokens']
    if options.objective == SUPERVISED:
      names += _SUPERVISED_COUNTS
    self._counts = dict.fromkeys(names, 0)

  def batch(self, rows: Sequence[Row]) -> Batch:
    """name -> [len(rows), length] int32."""
    for row in rows:
      self.count(row)
    return _stack([row.features for row in rows])

  def count(self, row: Row) -> None:
    """Counts what is in a row."""
    self._rows += 1
    cut_targets, cut_inputs = row.cut
    found = {'examples': row.examples, 'lost_target_tokens': row.lost,
             'cut_targets': cut_targets, 'cut_inputs': cut_inputs,
             'lost_input_tokens': row.lost_inputs,
             'left_out_examples': row.left_out}
    for name, side in (('input', 'encoder'), ('target', 'decoder')):
      real = np.count_nonzero(row.features[f'{side}_segment_ids'])
      found[f'{name}_tokens'] = int(real)
    for name in self._counts:
      self._counts[name] += found[name]

  def stats(self) -> dict[str, int | float]:
    """`rows`, `examples`, real `input_tokens` and `target_tokens`,
    `lost_target_tokens` that were cut off, and `input_padding` and
    `target_padding`: shares of the rows. Of a supervised objective also how
    many examples have `cut_targets` and `cut_inputs`, `lost_input_tokens`, and
    `left_out_examples`.
    """
    return {'rows': self._rows, **self._counts} | {
        f'{name}_padding': 1 - self._counts[f'{name}_tokens'] / (
            self._rows * length) if self._rows else 0.0
        for name, length in self._lengths.items()}


class BatchIterator:
  """Batches without end; each host asks for its own rows of them.

  Row r of every batch depends on documents, vocabulary, options, batch_size and
  r alone: not on `rows`, hence not on hosts, and not on `workers`.

  Processes start with the first batch. To be closed, or used in a `with`.

  Args:
    documents: `Documents` or `Examples`, which workers share, or any other
      sequence, of which each worker gets a copy.
    vocabulary: to tokenise.
    options: of the pipeline.
    batch_size: rows of a batch over all hosts.
    rows: the numbers of those wanted, in the order wanted.
    workers: processes to make them in; 0 makes them in this one.

  Raises:
    DataError: a value that cannot be.
  """

  def __init__(
      self, documents: Items, vocabulary: Vocabulary,
      options: PipelineOptions, batch_size: int, rows: Sequence[int],
      workers: int = 0):
    _check(documents, batch_size)
    if workers < 0:
      raise DataError(f'workers={workers} must be at least 0')
    wanted = [int(row) for row in rows]
    if (len(set(wanted)) < len(wanted) or not wanted
        or not set(wanted) <= set(range(batch_size))):
      raise DataError(f'rows={wanted} must be different numbers below '
                      f'{batch_size=}')
    self._options = options
    self._workers = workers
    self._make_stream = functools.partial(
        RowStream, documents, vocabulary, options, batch_size)
    self._filenos = (documents.fileno(),) if hasattr(
        documents, 'fileno') else ()
    # Of what was delivered; what workers have made beyond it does not count.
    self._states = {row: self._make_stream(row).get_state() for row in wanted}
    self._source: InProcess | Workers | None = None
    self._end: Any = None
    self._delivered = Delivered(options)

  def __iter__(self) -> 'BatchIterator':
    return self

  def __next__(self) -> Batch:
    """name -> [len(rows), length] int32, with seqio's names.

    Raises:
      RowError: a row could not be made. The next call tries again.
    """
    if self._source is None:
      self._start()
    try:
      made = next(self._source)  # type: ignore[arg-type]
    except BaseException:
      # Some rows may have gone further than others: start again from _states.
      self.close()
      raise
    self._states = {row: made[row].state for row in self._states}
    delivered = [made[row].row for row in self._states]
    return self._delivered.batch(delivered)

  def _start(self) -> None:
    job = Job(self._make_stream, dict(self._states), self._filenos)
    self._source = (
        Workers(job, self._workers) if self._workers else InProcess(job))
    # Also when nobody closes it, and before the interpreter ends.
    self._end = weakref.finalize(self, self._source.close)

  def get_state(self) -> dict[str, Any]:
    """str(row) -> a small JSON value: where the next batch begins."""
    return {str(row): state for row, state in self._states.items()}

  def set_state(self, states: Mapping[str, Any]) -> None:
    """Goes on behind the batch after which `get_state` was called.

    Args:
      states: of these rows at least.

    Raises:
      DataError: a row has none, or they are of other documents.
    """
    missing = [row for row in self._states if str(row) not in states]
    if missing:
      raise DataError(f'no state for rows {missing}, only for rows '
                      f'{sorted(map(int, states))}')
    for row in self._states:
      self._make_stream(row).set_state(states[str(row)])
    self.close()
    self._states = {row: states[str(row)] for row in self._states}

  def stats(self) -> dict[str, int | float]:
    """What was delivered since this object was made; see `Delivered`."""
    return self._delivered.stats()

  def close(self) -> None:
    """Ends the workers. The next batch would start them again."""
    if self._source is not None:
      self._end()
      self._source = None

  def __enter__(self) -> 'BatchIterator':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def fixed_batches(
    documents: Items, vocabulary: Vocabulary, options: PipelineOptions,
    batch_size: int, max_batches: int = 0, delivered: Delivered | None = None
) -> list[Batch]:
  """The batches of a held-out set: always the same, each document once.

  Document i belongs to stream i % batch_size; the streams' rows, in turn, fill
  the batches, so only the last one can have rows without documents: all zero.

  Args:
    documents: held out.
    vocabulary: to tokenise.
    options: of the pipeline.
    batch_size: rows of a batch.
    max_batches: the first so many; 0: all.
    delivered: to count what is in them.

  Returns:
    Batches, name -> [batch_size, length] int32, all rows on every host.

  Raises:
    DataError: a value that cannot be.
  """
  _check(documents, batch_size)
  streams = [RowStream(documents, vocabulary, options, batch_size, row,
                       held_out=True) for row in range(batch_size)]
  turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
  return stack_rows(
      filter(None, turns), batch_size, max_batches, delivered)


def stack_rows(rows: Iterable[Row], batch_size: int, max_batches: int = 0,
               delivered: Delivered | None = None) -> list[Batch]:
  """Batches of rows in their order, the last one filled up with zeros.

  Args:
    rows: any number.
    batch_size: rows of a batch.
    max_batches: the first so many; 0: all.
    delivered: to count what is in them.
  """
  features = []
  for row in itertools.islice(rows, max_batches * batch_size or None):
    features.append(row.features)
    if delivered:
      delivered.count(row)
  while len(features) % batch_size:
    features.append({name: np.zeros_like(array)
                     for name, array in features[0].items()})
  return [_stack(features[i:i + batch_size])
          for i in range(0, len(features), batch_size)]


def _check(documents: Items, batch_size: int) -> None:
  if not len(documents):
    raise DataError('there are no documents')
  if batch_size < 1:
    raise DataError(f'{batch_size=} must be at least 1')


def _stack(rows: Sequence[Batch]) -> Batch:
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

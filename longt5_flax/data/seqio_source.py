"""Batches of seqio tasks.

tf.data makes examples in the order that seqio gives them; Grain packs them as
it does those of files. One stream feeds all rows of a host, from the host's
part of the files. So, unlike with files, what is in a batch depends on the
number of hosts.
"""

import collections
import contextlib
import functools
import importlib
import os
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import grain
import numpy as np

from longt5_flax.data.examples import Examples
from longt5_flax.data.objectives import Example
from longt5_flax.data.options import PipelineOptions
from longt5_flax.data.pipeline import Batch, Delivered, stack_rows
from longt5_flax.data.row_streams import COUNTS, make_row, packed_rows
from longt5_flax.data.sources import DataError
from longt5_flax.data.task_formats import corpus_of
from longt5_flax.data.vocabulary import Vocabulary


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """TensorFlow's libraries write to stderr when they are loaded, whatever
  TF_CPP_MIN_LOG_LEVEL says; and later unless it says otherwise."""
  name = 'TF_CPP_MIN_LOG_LEVEL'
  if os.environ.get(name, '1') == '1':  # As JAX sets it.
    os.environ[name] = '3'
  stderr = os.dup(2)
  with open(os.devnull, 'wb') as nothing:
    os.dup2(nothing.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)


@functools.cache
def load_tasks() -> ModuleType:
  """longt5_flax.data.tasks, which loads TensorFlow.

  Raises:
    DataError: it is not installed.
  """
  try:
    with _quiet():
      tasks = importlib.import_module('longt5_flax.data.tasks')
      tasks.hide_accelerators()
  except ImportError as error:
    raise DataError('data.source=seqio needs the extra seqio, pip install '
                    f"'.[seqio]': {error}") from None
  return tasks


def load_paper_tasks() -> ModuleType:
  """longt5_flax.data.paper_tasks.

  Raises:
    DataError: TensorFlow is not installed.
  """
  load_tasks()
  return importlib.import_module('longt5_flax.data.paper_tasks')


def open_task(name: str, module: str = '') -> Any:
  """The task or mixture `name`.

  Args:
    name: registered by longt5_flax.data.tasks, by paper_tasks or by `module`.
    module: to import first, '' for none.

  Raises:
    DataError: no such module, no such task, or one of other features.
  """
  tasks = load_tasks()
  load_paper_tasks()
  if module:
    try:
      importlib.import_module(module)
    except Exception as error:
      frame = traceback.extract_tb(error.__traceback__)[-1]
      raise DataError(
          f'data.module={module} cannot be imported: {type(error).__name__}: '
          f'{tasks.one_line(error)} ({frame.filename}:{frame.lineno})'
          ) from None
  return tasks.find_task(name)


def register_tasks(data: Any, options: PipelineOptions) -> None:
  """Registers the tasks of this package anew, as a run wants them.

  Args:
    data: of its config: `task`, `vocabulary` ('' for the published one),
      `extra_ids` (sentinels that it is to have; see `Vocabulary`), `tfds_name`,
      `tfds_dir` ('' for TFDS's own), `task_dir`, `on_bad_record`.
    options: of the objectives.

  Raises:
    DataError: the vocabulary cannot be read, or the corpus has no version.
  """
  tasks = load_tasks()
  model: dict[str, Any] = {}
  if data.vocabulary:
    content = tasks.read_file(data.vocabulary)
    # seqio adds what it is told; `Vocabulary` what is missing.
    sizes = [Vocabulary.from_model(content, extra, data.vocabulary).size
             for extra in (data.extra_ids, 0)]
    model = dict(vocabulary=data.vocabulary, extra_ids=sizes[0] - sizes[1])
  tfds_dir = data.tfds_dir or None
  with tasks.explained(f'data.tfds_name={data.tfds_name}'):
    if corpus_of(data.task):
      load_paper_tasks().register_paper_tasks(
          **model, tfds_name=data.tfds_name, tfds_dir=tfds_dir,
          task_dir=data.task_dir, task=data.task,
          on_bad_record=data.on_bad_record, prefix=options.prefix,
          long_inputs=options.long_inputs)
    else:
      tasks.register_tasks(
          **model, tfds_name=data.tfds_name or tasks.C4, tfds_dir=tfds_dir,
          gap_sentences=options.gap_sentences,
          span_corruption=options.span_corruption,
          long_documents=options.long_documents)


def load_task_examples(name: str, split: str) -> Examples:
  """The examples of a task as text; see `paper_tasks.task_examples`.

  Args:
    name: of a task that is registered.
    split: of it.

  Raises:
    DataError: it cannot be read, or has no examples there.
  """
  examples = Examples(load_paper_tasks().task_examples(name, split))
  if not examples:
    raise DataError(f'task {name} has no examples in split {split!r}')
  return examples


def describe_task(task: Any) -> str:
  """The task, with how many examples its source says that it has."""
  sizes = load_tasks().source_sizes(task, 'train')
  return 'seqio task ' + ', '.join(
      name if size is None else f'{name} ({size:,} source examples)'
      for name, size in sizes.items())


class TaskVocabulary:
  """What a run needs of the vocabularies of a task.

  Attributes:
    size: number of ids.
    pad_id, eos_id: of the targets.
    files: that they are read from.
    fingerprint: '', as a task keeps its vocabularies.

  Raises:
    DataError: they cannot be read.
  """

  fingerprint = ''

  def __init__(self, task: Any):
    self._sides = [task.output_features[side].vocabulary
                   for side in ('inputs', 'targets')]
    self.files = sorted({
        getattr(side, 'sentencepiece_model_file', type(side).__name__)
        for side in self._sides})
    with load_tasks().explained(f'cannot read {", ".join(self.files)}'):
      self.size = max(side.vocab_size for side in self._sides)
      self.pad_id = self._sides[1].pad_id
      self.eos_id = self._sides[1].eos_id

  def encode(self, text: str) -> list[int]:
    """Token ids of inputs, without end of sequence."""
    return list(self._sides[0].encode(text))

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids up to the first end of sequence."""
    return self._sides[1].decode([int(i) for i in ids])


class _Kept(grain.IterDataset):
  """Examples for the packer, which may go back as far as they are kept."""

  def __init__(self, examples: Iterator[dict[str, Any]]):
    super().__init__()
    self._examples = examples
    self._kept: collections.deque[dict[str, Any]] = collections.deque()
    self._first = 0

  def __iter__(self) -> '_KeptIterator':
    return _KeptIterator(self)

  def example(self, number: int) -> dict[str, Any]:
    """The one of this number, the first or the last kept, or the next."""
    if number == self._first + len(self._kept):
      self._kept.append(next(self._examples))
    return self._kept[number - self._first]

  def forget(self, end: int) -> None:
    """Keeps no examples before `end`."""
    while self._first < end:
      self._kept.popleft()
      self._first += 1

  def get_state(self) -> dict[str, Any]:
    """A JSON value: what is kept."""
    return {'first': self._first, 'kept': [
        [example['inputs'].tolist(), example['targets'].tolist(),
         *(example[name] for name in COUNTS)] for example in self._kept]}

  def set_state(self, state: dict[str, Any]) -> None:
    """Keeps what was kept when `get_state` was called."""
    self._first = state['first']
    self._kept = collections.deque(
        Example(np.array(inputs, np.int32), np.array(targets, np.int32),
                *counts)._asdict()
        for inputs, targets, *counts in state['kept'])


class _KeptIterator(grain.DatasetIterator):
  """Its state: the number of the next example."""

  def __init__(self, examples: _Kept):
    super().__init__()
    self._examples = examples
    self._next = 0

  def __next__(self) -> dict[str, Any]:
    example = self._examples.example(self._next)
    self._next += 1
    return example

  def get_state(self) -> dict[str, int]:
    return {'example': self._next}

  def set_state(self, state: dict[str, int]) -> None:
    self._next = state['example']


class TaskBatches:
  """Batches without end of a task, with the methods of `BatchIterator`.

  To be closed, or used in a `with`.

  Args:
    task: from `open_task`.
    options: of the pipeline: lengths, packing and seed.
    num_rows: of a batch on this host.
    shard: (index, count): which part of the data this host reads.

  Raises:
    DataError: the task cannot be read, or where it is cannot be saved.
  """

  def __init__(self, task: Any, options: PipelineOptions, num_rows: int,
               shard: tuple[int, int]):
    self._name = task.name
    self._num_rows = num_rows
    self._shard = shard
    load_tasks().check_examples(task, 'train', _lengths(options))
    self._examples = load_tasks().TaskExamples(
        task, 'train', _lengths(options), options.seed, shard)
    self._kept = _Kept(self._examples)
    try:
      # Better refused now than after many steps.
      self._kept.example(0)
      self._examples.get_state()
    except StopIteration:
      raise DataError(f'task {task.name} has no examples') from None
    self._rows = iter(packed_rows(self._kept, options, 'bins'))
    self._delivered = Delivered(options)

  def __iter__(self) -> 'TaskBatches':
    return self

  def __next__(self) -> Batch:
    """name -> [num_rows, length] int32, with seqio's names.

    Raises:
      DataError: the data cannot be read, or has an end.
    """
    try:
      rows = [make_row(next(self._rows)) for _ in range(self._num_rows)]
    except StopIteration:
      raise DataError(f'task {self._name} has no more examples') from None
    self._kept.forget(self._rows.get_state()['parent']['example'])
    return self._delivered.batch(rows)

  def get_state(self) -> dict[str, Any]:
    """The shard -> a JSON value: where the next batch begins.

    It holds what tf.data has read ahead: a few MB, for the most part a task's
    `shuffle_buffer_size` examples.
    """
    return {_shard_name(*self._shard): {
        'rows': self._rows.get_state(), 'examples': self._kept.get_state(),
        'task': self._examples.get_state()}}

  def set_state(self, states: Mapping[str, Any]) -> None:
    """Goes on behind the batch after which `get_state` was called.

    Raises:
      DataError: the states are of another number of hosts, or task.
    """
    name = _shard_name(*self._shard)
    if name not in states:
      raise DataError(
          f'the checkpoint is of {len(states)} hosts with data of their own, '
          f'this run has {self._shard[1]}: a seqio task can go on only with as '
          'many; prepared data (docs/data.md) can with any number')
    state = states[name]
    self._examples.set_state(state['task'])
    self._kept.set_state(state['examples'])
    self._rows.set_state(state['rows'])

  def stats(self) -> dict[str, int | float]:
    """What was delivered since this object was made; see `Delivered`."""
    return self._delivered.stats()

  def close(self) -> None:
    """Ends what TensorFlow does in the background."""
    self._examples.close()

  def __enter__(self) -> 'TaskBatches':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


def held_out_task_batches(
    task: Any, split: str, options: PipelineOptions, batch_size: int,
    max_batches: int = 0, delivered: Delivered | None = None) -> list[Batch]:
  """Batches of one pass over a split: always the same, on every host.

  Args:
    task: from `open_task`.
    split: of it.
    options: of the pipeline.
    batch_size: rows of a batch.
    max_batches: the first so many; 0: all.
    delivered: to count what is in them.

  Raises:
    DataError: the task has no such split, or no examples in it.
  """
  with contextlib.closing(load_tasks().TaskExamples(
      task, split, _lengths(options), options.seed)) as examples:
    rows = packed_rows(_Kept(examples), options, 'held out')
    batches = stack_rows(
        map(make_row, rows), batch_size, max_batches, delivered)
  if not batches:
    raise DataError(f'task {task.name} has no examples in split {split!r}')
  return batches


def _lengths(options: PipelineOptions) -> tuple[int, int]:
  return options.inputs_length, options.targets_length


def _shard_name(index: int, count: int) -> str:
  return f'part {index} of {count}'

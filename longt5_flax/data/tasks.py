"""LongT5's pretraining as seqio tasks, and tasks as examples for a run.

The only module that imports seqio and TensorFlow, but for `paper_tasks`. Plain
seqio can use it:

  import longt5_flax.data.tasks
  import seqio
  seqio.get_mixture_or_task('longt5_c4_mixture').get_dataset(
      sequence_length={'inputs': 4096, 'targets': 910}, split='train', seed=0)

`longt5_c4_gap_sentences` and `longt5_c4_span_corruption` make examples of C4,
`longt5_c4_mixture` takes as many of either; `register_tasks` changes what they
read, and `examples` makes other corpora into such tasks.
"""

import base64
import contextlib
import difflib
import os
import re
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from longt5_flax.data.objectives import Example, make_objective
from longt5_flax.data.options import PipelineOptions
from longt5_flax.data.sources import DataError
from longt5_flax.data.task_formats import CORPORA, PREFIX, how_to_get
from longt5_flax.data.vocabulary import Vocabulary

# Those of the published checkpoints.
VOCABULARY = 'gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model'
C4 = 'c4/en:2.2.0'
# Name -> objective.
TASKS = {'longt5_c4_gap_sentences': 'gap_sentences',
         'longt5_c4_span_corruption': 'span_corruption'}
MIXTURE = 'longt5_c4_mixture'
_SIDES = ('inputs', 'targets')
EXAMPLE_FIELDS = Example._fields


class UnreachableError(DataError):
  """A file or dataset that is not there, or not to be had."""


_UNREACHABLE = (
    OSError, tf.errors.AbortedError, tf.errors.DeadlineExceededError,
    tf.errors.FailedPreconditionError, tf.errors.NotFoundError,
    tf.errors.PermissionDeniedError, tf.errors.UnauthenticatedError,
    tf.errors.UnavailableError)


def examples(objective: str, field: str = 'text', **options: Any
             ) -> Callable[..., tf.data.Dataset]:
  """A preprocessor of tasks: documents to examples of an objective.

  Examples end with EOS and are not padded. The work is done by the NumPy
  functions that all other sources use. They get seqio's seed of a document as a
  tensor and are declared to be stateless, so that iterators can be saved.

  Args:
    objective: 'gap_sentences', 'span_corruption', or a mix of them.
    field: that holds the text.
    **options: other fields of `PipelineOptions`, but for lengths.
  """
  def preprocess(dataset, sequence_length, output_features):
    if not sequence_length:
      raise ValueError('sequence_length must say how long inputs and targets '
                       'may be')
    lengths = {f'{side}_length': sequence_length[side] for side in _SIDES}
    make = make_objective(
        plain_vocabulary(output_features['inputs'].vocabulary),
        PipelineOptions(objective=objective, **lengths, **options))
    room = lengths['inputs_length'], lengths['targets_length']

    def of_document(text: bytes, seed: np.ndarray) -> list[np.ndarray]:
      document = make.read(text.decode('utf-8'))
      seeds = tuple(int(word) % 2**32 for word in seed)
      example, start = make.example(document, 0, seeds, room)
      found = [example]
      while start is not None:
        example, start = make.example(document, start, seeds, room)
        found.append(example)
      flat = [ids for side in _SIDES for ids in (
          np.concatenate([getattr(example, side) for example in found]),
          np.array([len(getattr(example, side)) for example in found]))]
      return [ids.astype(np.int32) for ids in flat]

    @seqio.map_over_dataset(num_seeds=1)
    def of_element(element, seed):
      flat = tf.numpy_function(of_document, [element[field], seed],
                               [tf.int32] * 4, stateful=False)
      for tensor in flat:
        tensor.set_shape([None])
      return {side: tf.RaggedTensor.from_row_lengths(*flat[i:i + 2])
              for i, side in ((0, 'inputs'), (2, 'targets'))}

    return of_element(dataset).unbatch()

  return preprocess


def plain_vocabulary(vocabulary: Any) -> Vocabulary:
  """seqio's SentencePieceVocabulary without TensorFlow."""
  return Vocabulary.from_model(
      vocabulary.sp_model, 0, vocabulary.sentencepiece_model_file)


@seqio.map_over_dataset
def _only_text(element):
  return {'text': element['text']}


def register_tasks(
    vocabulary: str = VOCABULARY, extra_ids: int = 0, tfds_name: str = C4,
    tfds_dir: str | None = None, **options: Any) -> None:
  """Registers TASKS and MIXTURE, in place of what has their names.

  Nothing is read before a dataset is asked for, and nothing is downloaded: TFDS
  must have prepared the data.

  Args:
    vocabulary: a SentencePiece model, local or gs://.
    extra_ids: sentinels that seqio adds to it.
    tfds_name: a dataset with a field `text`, with its version.
    tfds_dir: the folder of datasets; None for TFDS's own.
    **options: see `examples`.
  """
  feature = seqio.Feature(seqio.SentencePieceVocabulary(vocabulary, extra_ids))
  for registry, names in ((seqio.MixtureRegistry, [MIXTURE]),
                          (seqio.TaskRegistry, TASKS)):
    for name in set(names) & set(registry.names()):
      registry.remove(name)
  for name, objective in TASKS.items():
    seqio.TaskRegistry.add(
        name,
        source=seqio.TfdsDataSource(
            tfds_name, tfds_data_dir=tfds_dir, read_only=True),
        preprocessors=[_only_text, seqio.CacheDatasetPlaceholder(),
                       examples(objective, **options)],
        output_features=dict.fromkeys(_SIDES, feature),
        metric_fns=[])
  seqio.MixtureRegistry.add(MIXTURE, list(TASKS), default_rate=1)


register_tasks()


def hide_accelerators() -> None:
  """Leaves them to JAX; before TensorFlow computes anything."""
  for kind in ('GPU', 'TPU'):
    tf.config.set_visible_devices([], kind)


def read_file(path: str) -> bytes:
  """The bytes of a file, local or gs://.

  Raises:
    DataError: it cannot be read.
  """
  with explained(f'cannot read {path}'), tf.io.gfile.GFile(path, 'rb') as file:
    return file.read()


def find_task(name: str) -> Any:
  """The registered task or mixture.

  Raises:
    DataError: there is none, or its features are not ids of inputs and targets.
  """
  names = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
  if name not in names:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or sorted(
        {*TASKS, MIXTURE, *(PREFIX + corpus for corpus in CORPORA)})
    raise DataError(f'no seqio task or mixture {name!r}; there is '
                    + ', '.join(near))
  task = seqio.get_mixture_or_task(name)
  for side in _SIDES:
    feature = task.output_features.get(side)
    if feature is None:
      raise DataError(f'task {name} has no feature {side!r}, only '
                      f'{sorted(task.output_features)}')
    if feature.rank != 1 or not tf.as_dtype(feature.dtype).is_integer:
      raise DataError(f'task {name}: feature {side!r} must be a sequence of '
                      f'ids, not of rank {feature.rank} and type '
                      f'{tf.as_dtype(feature.dtype).name}')
  return task


def task_texts(name: str, split: str, field: str = 'text') -> Iterator[str]:
  """The documents that a task reads, in their order, as they are.

  Raises:
    DataError: it is a mixture, has no such split or field, or cannot be read.
  """
  task = find_task(name)
  if not isinstance(task, seqio.Task):
    raise DataError(f'{name} is a mixture; of a task texts can be read')
  with explained(f'task {name}'):
    check_split(task, split)
    dataset = task.source.get_dataset(split=split, shuffle=False)
    if field not in dataset.element_spec:
      raise DataError(f'task {name} reads no field {field!r}, only '
                      f'{sorted(dataset.element_spec)}')
    for element in dataset:
      yield element[field].numpy().decode('utf-8')


def check_split(task: Any, split: str) -> None:
  """Refuses a split that a task does not have.

  Raises:
    DataError: naming those that it has, or where its data should be.
  """
  for each in seqio.get_subtasks(task):
    source = each.source
    if isinstance(source, seqio.TfdsDataSource):
      tfds = source.tfds_dataset
      if not tfds.info.splits:
        raise UnreachableError(f'task {each.name}: no data of {tfds.name} in '
                               f'{tfds.builder.data_dir}'
                               + how_to_get(each.name))
  if split not in task.splits:
    raise DataError(f'task {task.name} has no split {split!r}, only '
                    f'{sorted(task.splits)}')
  for each in seqio.get_subtasks(task):
    if isinstance(each.source, seqio.FileDataSource) and split in each.splits:
      files = each.source.list_shards(split)  # A name that is no pattern as is.
      if not files or not tf.io.gfile.exists(files[0]):
        raise UnreachableError(
            f'task {each.name}: no file '
            f'{each.source._split_to_filepattern[split]}'
            + how_to_get(each.name))


def source_sizes(task: Any, split: str) -> dict[str, int | None]:
  """Task, or each of a mixture -> examples in its source, if that is known."""
  sizes = {each.name: each.num_input_examples(split)
           for each in seqio.get_subtasks(task) if split in each.splits}
  return {name: int(size) if size and np.isfinite(size) else None
          for name, size in sizes.items()}


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
  """Turns what seqio, TFDS or TensorFlow raise into a DataError of a line."""
  try:
    yield
  except (DataError, StopIteration):
    raise
  except _UNREACHABLE as error:
    raise UnreachableError(f'{what}: {one_line(error)}') from None
  except Exception as error:
    raise DataError(f'{what}: {one_line(error)}') from None


def one_line(error: Exception) -> str:
  """What a library's exception says, without its details."""
  text = re.sub(r'\{\{.*?\}\}|\[Op:.*', '', str(error)).strip()
  return text.partition('\n')[0].strip() or type(error).__name__


class TaskExamples(Iterator[dict[str, Any]]):
  """The examples of a task, as dicts of the fields of `objectives.Example`.

  Args:
    task: from `find_task`.
    split: of it.
    lengths: of inputs and targets; seqio cuts what is longer.
    seed: of order and draws.
    shard: (index, count) to shuffle a part of the files, without end; None for
      one pass over all of them in their order.

  Raises:
    DataError: the data cannot be read.
  """

  def __init__(self, task: Any, split: str, lengths: tuple[int, int], seed: int,
               shard: tuple[int, int] | None = None):
    self._name = task.name
    with explained(f'task {task.name}'):
      check_split(task, split)
      self._dataset = task.get_dataset(
          dict(zip(_SIDES, lengths, strict=True)), split=split,
          shuffle=shard is not None, seed=seed,
          shard_info=shard and seqio.ShardInfo(*shard),
          num_epochs=1 if shard is None else None,
          # What is in memory would be in the state as well.
          try_in_mem_cache=False)
      self._iterators = [iter(self._dataset)]
    # Threads of an iterator that outlives Python abort the process.
    self.close = weakref.finalize(self, self._iterators.clear)

  def __next__(self) -> dict[str, Any]:
    left_out = 0
    while (example := self._example()).left_out:
      left_out += 1
    if not len(example.targets):
      raise DataError(f'task {self._name}: an example has targets that are all '
                      'padding; its preprocessors must leave it out')
    return example._replace(left_out=left_out)._asdict()

  def _example(self) -> Example:
    with explained(f'task {self._name}'):
      element = next(self._iterators[0])
    return Example(
        *(np.trim_zeros(element[side].numpy(), 'b').astype(np.int32)
          for side in _SIDES),
        *(int(element[name]) for name in EXAMPLE_FIELDS[2:] if name in element))

  def get_state(self) -> dict[str, str]:
    """Where it is, what tf.data has read ahead included: text for JSON.

    Raises:
      DataError: a preprocessor has a state of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
      try:
        tf.train.Checkpoint(iterator=self._iterators[0]).write(f'{folder}/state')
      except tf.errors.FailedPreconditionError as error:
        raise DataError(
            f'task {self._name} cannot be resumed exactly: {one_line(error)} '
            'Use stateless random numbers and tf.numpy_function(..., '
            'stateful=False)') from None
      state = {}
      for name in os.listdir(folder):
        with open(os.path.join(folder, name), 'rb') as file:
          packed = zlib.compress(file.read(), 1)
        state[name] = base64.b64encode(packed).decode('ascii')
    return state

  def set_state(self, state: dict[str, str]) -> None:
    """Goes where `get_state` was called, in this or another process.

    Raises:
      DataError: the state is of another task or version.
    """
    with tempfile.TemporaryDirectory() as folder:
      for name, packed in state.items():
        with open(os.path.join(folder, name), 'wb') as file:
          file.write(zlib.decompress(base64.b64decode(packed)))
      self._iterators[:] = [iter(self._dataset)]
      try:
        tf.train.Checkpoint(iterator=self._iterators[0]).read(
            f'{folder}/state').assert_consumed()
      except (tf.errors.OpError, AssertionError, ValueError) as error:
        raise DataError(f'task {self._name} has changed since the checkpoint: '
                        f'{one_line(error)}') from None


def check_examples(task: Any, split: str, lengths: tuple[int, int]) -> None:
  """Refuses a task that makes no example, or a mixture with such a task.

  Of documents without end the first example would be sought without end.

  Raises:
    DataError: naming the task.
  """
  for each in seqio.get_subtasks(task):
    with contextlib.closing(TaskExamples(each, split, lengths, 0)) as examples:
      if next(examples, None) is None:
        raise DataError(f'task {each.name} has no examples')

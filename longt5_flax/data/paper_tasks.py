"""The tasks of LongT5's paper in seqio's registry, and tasks as text.

Imports seqio and TensorFlow, as `tasks` does. Plain seqio can use it:

  import longt5_flax.data.paper_tasks
  import seqio
  seqio.get_mixture_or_task('longt5_arxiv').get_dataset(
      sequence_length={'inputs': 4096, 'targets': 512}, split='train')

`register_paper_tasks` changes what they read; `supervised` makes other texts
into such tasks.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from longt5_flax.data import tasks
from longt5_flax.data.examples import Example, has_tokens
from longt5_flax.data.objectives import Supervised
from longt5_flax.data.options import SUPERVISED, PipelineOptions
from longt5_flax.data.sources import BadRecordError, DataError
from longt5_flax.data.task_formats import (
    CORPORA,
    LINE,
    PREFIX,
    Corpus,
    corpus_of,
)

_SIDES = ('inputs', 'targets')


def supervised(on_bad_record: str = 'raise', **options: Any
               ) -> Callable[..., tf.data.Dataset]:
  """A preprocessor of tasks: texts `inputs` and `targets` to token ids.

  They end with EOS and are not padded. Beside them stand the counts of
  `objectives.Example`; one that is left out is empty.

  Args:
    on_bad_record: 'raise', or 'skip' to leave out examples without targets.
    **options: `prefix` and `long_inputs` of `PipelineOptions`.
  """
  def preprocess(dataset, sequence_length, output_features):
    if not sequence_length:
      raise ValueError('sequence_length must say how long inputs and targets '
                       'may be')
    vocabulary = tasks.plain_vocabulary(output_features['inputs'].vocabulary)
    objective = Supervised(vocabulary, PipelineOptions(
        sequence_length['inputs'], sequence_length['targets'], SUPERVISED,
        **options))

    def of_texts(inputs: bytes, targets: bytes) -> list[np.ndarray]:
      text = targets.decode('utf-8')
      if on_bad_record == 'skip' and not has_tokens(text, vocabulary.encode):
        made = objective.nothing
      else:
        made = objective.encode(inputs.decode('utf-8'), text)
      return [np.asarray(field, np.int32) for field in made]

    @seqio.map_over_dataset
    def of_element(element):
      found = tf.numpy_function(
          of_texts, [element[side] for side in _SIDES],
          [tf.int32] * len(tasks.EXAMPLE_FIELDS), stateful=False)
      for name, tensor in zip(tasks.EXAMPLE_FIELDS, found, strict=True):
        tensor.set_shape([None] if name in _SIDES else [])
      return dict(zip(tasks.EXAMPLE_FIELDS, found, strict=True))

    return of_element(dataset)

  return preprocess


def _texts(corpus: Corpus) -> Callable[..., tf.data.Dataset]:
  """A preprocessor: records of a corpus to `inputs` and `targets` as text."""
  def of_record(*values: Any) -> list[bytes]:
    try:
      example = corpus.read(*values)
    except BadRecordError as bad:
      raise ValueError(str(bad)) from None
    return [example.inputs.encode('utf-8'), example.targets.encode('utf-8')]

  @seqio.map_over_dataset
  def of_element(element):
    found = tf.numpy_function(
        of_record, [_value(element, field) for field in corpus.fields],
        [tf.string] * 2, stateful=False)
    for tensor in found:
      tensor.set_shape([])
    return dict(zip(_SIDES, found, strict=True))

  return of_element


def _value(element: Any, field: str) -> Any:
  if field == LINE:
    return element
  for name in field.split('/'):
    element = element[name]
  return element


def _source(corpus: Corpus, tfds_name: str, tfds_dir: str | None,
            task_dir: str) -> Any:
  if corpus.files is None:
    return seqio.TfdsDataSource(
        tfds_name or corpus.tfds, tfds_data_dir=tfds_dir, splits=corpus.splits,
        read_only=True)
  files = {split: os.path.join(task_dir, pattern)
           for split, pattern in corpus.files.items()}
  if corpus.fields == (LINE,):
    return seqio.TextLineDataSource(files)
  return seqio.TFExampleDataSource(files, {
      field: tf.io.FixedLenFeature([], tf.string) for field in corpus.fields})


def register_paper_tasks(
    vocabulary: str = tasks.VOCABULARY, extra_ids: int = 0, tfds_name: str = '',
    tfds_dir: str | None = None, task_dir: str = '', task: str = '',
    **options: Any) -> None:
  """Registers a task for each of CORPORA, in place of what has its name.

  Nothing is read before a dataset is asked for, and nothing is downloaded.

  Args:
    vocabulary: a SentencePiece model, local or gs://.
    extra_ids: sentinels that seqio adds to it.
    tfds_name: that `task` reads; '' for its own.
    tfds_dir: the folder of TFDS's datasets; None for its own.
    task_dir: the folder of corpora that are files.
    task: whose `tfds_name` it is.
    **options: see `supervised`.
  """
  feature = seqio.Feature(seqio.SentencePieceVocabulary(vocabulary, extra_ids))
  for name, corpus in CORPORA.items():
    name = PREFIX + name
    if name in seqio.TaskRegistry.names():
      seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=_source(corpus, tfds_name if name == task else '', tfds_dir,
                       task_dir),
        preprocessors=[_texts(corpus), seqio.CacheDatasetPlaceholder(),
                       supervised(**options)],
        output_features=dict.fromkeys(_SIDES, feature),
        metric_fns=[])


register_paper_tasks()


def task_examples(name: str, split: str) -> Iterator[Example]:
  """The examples of a task as text, in their order.

  Of a task that is none of CORPORA they are what was tokenised, if its
  preprocessors keep that (`inputs_pretokenized`, as seqio's `tokenize` does),
  else decoded tokens; references are its field `answers`, if it has one. An id
  is then the number of the example.

  Raises:
    DataError: no such task or split, or it cannot be read.
  """
  task = tasks.find_task(name)
  with tasks.explained(f'task {name}'):
    tasks.check_split(task, split)
    corpus = corpus_of(name)
    yield from (_of_corpus(task, corpus, split) if corpus else
                _of_any_task(task, split))


def _of_corpus(task, corpus, split):
  dataset = task.source.get_dataset(split=split, shuffle=False)
  found: dict[str, Example] = {}
  for number, element in enumerate(dataset, 1):
    values = [_value(element, field).numpy() for field in corpus.fields]
    try:
      example = corpus.read(*values)
    except BadRecordError as bad:
      place = task.source.list_shards(split)[0] if corpus.files else split
      raise DataError(f'{place}:{number}: {bad}') from None
    if example.id in found and corpus.grouped:
      first = found[example.id]
      example = first._replace(
          references=first.references + example.references)
    elif example.id in found or not example.id:
      example = example._replace(id=f'{example.id}{"#" * bool(example.id)}'
                                    f'{number}')
    found[example.id] = example
  yield from found.values()


def _of_any_task(task, split):
  dataset = task.get_dataset(
      None, split=split, shuffle=False, num_epochs=1, try_in_mem_cache=False)
  for number, element in enumerate(dataset, 1):
    inputs, targets = (
        element[f'{side}_pretokenized'].numpy().decode('utf-8')
        if f'{side}_pretokenized' in element else
        task.output_features[side].vocabulary.decode(
            element[side].numpy().tolist()) for side in _SIDES)
    answers = element['answers'].numpy() if 'answers' in element else ()
    yield Example(str(number), inputs, targets, tuple(
        answer.decode('utf-8') for answer in answers) or (targets,))

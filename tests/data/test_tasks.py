"""longt5_flax.data.tasks: seqio's own get_dataset on a tiny C4, in the format
of TensorFlow Datasets."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from longt5_flax.data import tasks
from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.objectives import make_objective
from longt5_flax.data.options import PipelineOptions
from longt5_flax.data.row_streams import RowStream
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary
from tfds_corpus import write_c4

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
TINY = str(FOLDER / 'tiny.model')
TEXT = (FOLDER / 'owl_creek.txt').read_text('utf-8')
# Paragraphs; the longest ones have 700 tokens.
DOCUMENTS = [part.strip() for part in TEXT.split('\n\n') if part.strip()]
LENGTHS = {'inputs': 128, 'targets': 64}
GAP, SPAN, MIXTURE = *tasks.TASKS, tasks.MIXTURE


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
  return write_c4(tmp_path_factory.mktemp('tfds'), {
      'train': DOCUMENTS, 'validation': DOCUMENTS[:3]})


@pytest.fixture
def register(tfds_dir):
  """Registers the tasks to read the tiny corpus; at the end as published."""
  def register_tasks(**changes):
    tasks.register_tasks(TINY, 100, **{'tfds_dir': tfds_dir} | changes)
    for name in tasks.TASKS:  # Filling 1000 takes a second a time.
      seqio.TaskRegistry.get(name)._shuffle_buffer_size = 20

  yield register_tasks
  tasks.register_tasks()


def dataset(name, split='train', shuffle=False, seed=0, **changes):
  """What a user of seqio writes."""
  return seqio.get_mixture_or_task(name).get_dataset(
      sequence_length=LENGTHS, split=split, shuffle=shuffle, seed=seed,
      **{'num_epochs': 1} | changes)


def as_lists(examples):
  return [tuple(np.asarray(example[side]).tolist() for side in LENGTHS)
          for example in examples]


def through_grain(objective, seeds, **options):
  """Examples of all documents by the functions that files are read with."""
  options = PipelineOptions(128, 64, objective=objective, **options)
  make = make_objective(Vocabulary(TINY), options)
  found = []
  for text, seed in zip(DOCUMENTS, seeds, strict=True):
    document, start = make.read(text), 0
    while start is not None:
      example, start = make.example(document, start, seed, (128, 64))
      found.append(example._asdict())
  return found


def seeds_of(name, seed):
  """What seqio gives to the last preprocessor of a task, a document each."""
  task = seqio.TaskRegistry.get(name)
  shown = seqio.map_over_dataset(
      lambda element, seed: {'inputs': tf.stack(seed)}, num_seeds=1)
  feature = seqio.Feature(task.output_features['inputs'].vocabulary,
                          dtype=tf.int64)
  data = task.replace(
      preprocessors=[*task.preprocessors[:-1], shown],
      output_features={'inputs': feature}).get_dataset(
          None, 'train', shuffle=False, seed=seed)
  return [tuple(element['inputs'].numpy().tolist()) for element in data]


def test_corpus_is_a_tfds_dataset(tfds_dir):
  """tfds.load takes it for the real one, and needs nothing else."""
  texts = tfds.load('c4/en:2.2.0', split='train', data_dir=tfds_dir,
                    shuffle_files=False, try_gcs=False)
  assert [text['text'].numpy().decode() for text in texts] == DOCUMENTS


def test_published_tasks():
  """As importing the module registers them; nothing is read."""
  tasks.register_tasks()
  for name in (GAP, SPAN, MIXTURE):
    task = seqio.get_mixture_or_task(name)
    features = task.output_features.values()
    assert {feature.vocabulary.sentencepiece_model_file
            for feature in features} == {tasks.VOCABULARY}
    assert {each.source.tfds_dataset.name
            for each in seqio.get_subtasks(task)} == {'c4/en:2.2.0'}


@pytest.mark.parametrize('name', [GAP, SPAN, MIXTURE])
def test_get_dataset(name, register):
  register()
  data = dataset(name)
  assert data.element_spec == {
      side: tf.TensorSpec([None], tf.int32) for side in LENGTHS}
  found = list(data)
  assert len(found) >= len(DOCUMENTS)
  for example in found:
    for side, length in LENGTHS.items():
      ids = example[side].numpy()
      assert 1 <= len(ids) <= length
      assert np.all(ids > 0)
      assert ids[-1] == 1 or len(ids) == length
      assert 1 not in ids[:-1]


@pytest.mark.parametrize('long_documents', ['cut', 'pieces'])
@pytest.mark.parametrize('name', [GAP, SPAN])
def test_equals_grain_with_the_same_seeds(name, long_documents, register):
  register(long_documents=long_documents)
  found = as_lists(dataset(name, seed=7))
  expected = through_grain(
      tasks.TASKS[name], seeds_of(name, 7), long_documents=long_documents)
  assert len(found) > len(DOCUMENTS) or long_documents == 'cut'
  assert found == as_lists(expected)


def test_equals_rows_of_grain(register):
  """All of the way, with an objective that draws nothing."""
  gap_sentences = GapSentenceOptions(
      strategy='rouge', probabilities=(1.0, 0.0, 0.0, 0.0))
  register(gap_sentences=gap_sentences)
  options = PipelineOptions(128, 64, gap_sentences=gap_sentences, packing=False)
  rows = [row.features for row in RowStream(
      DOCUMENTS, Vocabulary(TINY), options, 1, 0, held_out=True)]
  found = as_lists({
      'inputs': np.trim_zeros(row['encoder_input_tokens']),
      'targets': np.trim_zeros(row['decoder_target_tokens'])} for row in rows)
  assert found == as_lists(dataset(GAP))


def test_draws_follow_the_seed_and_are_new_each_epoch(register):
  register()
  twice = as_lists(dataset(SPAN, seed=1, num_epochs=2))
  first, second = twice[:len(DOCUMENTS)], twice[len(DOCUMENTS):]
  assert first == as_lists(dataset(SPAN, seed=1))
  assert first != as_lists(dataset(SPAN, seed=2))
  assert first != second
  # Of the same documents nevertheless.
  assert len(first) == len(second)


def test_mixture_takes_as_many_of_either(register):
  register(gap_sentences=GapSentenceOptions(mask_id=3))
  sentinel = 499
  found = as_lists(dataset(MIXTURE, num_epochs=None, seed=3).take(400))
  counts = collections.Counter(sentinel in inputs for inputs, _ in found)
  # Five standard deviations.
  assert abs(counts[True] - 200) < 50


def test_options_of_the_objectives(register):
  """They reach the NumPy functions: here all sentences are copied."""
  register(gap_sentences=GapSentenceOptions(
      strategy='lead', ratio=1.0, probabilities=(0.0, 0.0, 1.0, 0.0)))
  for inputs, targets in as_lists(dataset(GAP)):
    assert inputs[:64] == targets


def test_a_task_of_ones_own():
  """Any dataset with text becomes a task by the same preprocessor."""
  feature = seqio.Feature(seqio.SentencePieceVocabulary(TINY, 100))
  as_text = seqio.map_over_dataset(lambda line: {'text': line})
  seqio.TaskRegistry.add(
      'own', seqio.TextLineDataSource({'train': str(FOLDER / 'owl_creek.txt')}),
      preprocessors=[
          as_text, tasks.examples('gap_sentences:1,span_corruption:2')],
      output_features={'inputs': feature, 'targets': feature}, metric_fns=[])
  try:
    found = as_lists(dataset('own', shuffle=True))
    assert any(499 in inputs for inputs, _ in found)
    assert any(2 in inputs for inputs, _ in found)
  finally:
    seqio.TaskRegistry.remove('own')


@pytest.mark.parametrize('name', [GAP, MIXTURE])
def test_iterator_state(name, register):
  """Saved anywhere and loaded into another iterator it gives the same; what it
  saves is text."""
  register()

  def examples(seed=5):
    return tasks.TaskExamples(tasks.find_task(name), 'train', (128, 64), seed,
                              (0, 1))

  first = examples()
  for _ in range(40):  # In the second epoch.
    next(first)
  state = json.loads(json.dumps(first.get_state()))
  expected = as_lists(next(first) for _ in range(60))
  second = examples()
  next(second)
  second.set_state(state)
  assert as_lists(next(second) for _ in range(60)) == expected
  third = examples(6)
  assert as_lists(next(third) for _ in range(60)) != expected
  for each in (first, second, third):
    each.close()


def test_state_of_another_task(register):
  register()
  one, other = (tasks.TaskExamples(tasks.find_task(name), 'train', (128, 64), 0,
                                   (0, 1)) for name in (GAP, MIXTURE))
  with pytest.raises(DataError, match=rf'task {GAP} has changed since the '
                     'checkpoint: Failed to restore dataset iterator.*') as e:
    one.set_state(other.get_state())
  assert '\n' not in str(e.value)
  one.close()
  other.close()


@pytest.mark.parametrize('split, by', [
    ('train', 'files'), ('validation', 'documents')])
def test_shards_are_parts_of_the_data(split, by, register, tfds_dir):
  """Of its files, or of its documents where there are too few files."""
  files = len(list(Path(tfds_dir).rglob(f'c4-{split}*')))
  assert (files >= 3) == (by == 'files')
  register(gap_sentences=GapSentenceOptions(strategy='none'))
  parts = []
  for index in range(3):
    data = dataset(GAP, split, shard_info=seqio.ShardInfo(index, 3))
    parts += [inputs for inputs, _ in as_lists(data)]
    assert parts
  assert sorted(parts) == sorted(
      inputs for inputs, _ in as_lists(dataset(GAP, split)))


def test_texts_of_a_task(register):
  register()
  assert list(tasks.task_texts(GAP, 'train')) == DOCUMENTS
  assert list(tasks.task_texts(SPAN, 'validation')) == DOCUMENTS[:3]
  with pytest.raises(DataError, match=f'{MIXTURE} is a mixture'):
    next(tasks.task_texts(MIXTURE, 'train'))
  with pytest.raises(DataError, match=rf"task {GAP} reads no field 'body', "
                     r"only \['content-length', "):
    next(tasks.task_texts(GAP, 'train', 'body'))


@pytest.mark.parametrize('name, near', [
    ('longt5_c4_gap_sentence', GAP), ('longt5_c4_mix', MIXTURE),
    ('nothing like it', 'longt5_arxiv, longt5_big_patent, ')])
def test_unknown_task(name, near):
  with pytest.raises(DataError, match=f"no seqio task or mixture '{name}'; "
                     f'there is {near}'):
    tasks.find_task(name)


def task_of(features):
  """Registers a task that has these features, in place of the last one."""
  if 'odd' in seqio.TaskRegistry.names():
    seqio.TaskRegistry.remove('odd')
  return seqio.TaskRegistry.add(
      'odd', seqio.FunctionDataSource(
          lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(
              {name: [1] for name in features}), splits=['train']),
      preprocessors=[], output_features=features, metric_fns=[])


IDS = seqio.Feature(seqio.ByteVocabulary())


@pytest.mark.parametrize('features, message', [
    ({'targets': IDS}, "task odd has no feature 'inputs', only ['targets']"),
    ({'inputs': IDS, 'labels': IDS}, "task odd has no feature 'targets', only "
     "['inputs', 'labels']"),
    ({'inputs': IDS, 'targets': seqio.ContinuousFeature(
        dtype=tf.float32, rank=2)},
     "task odd: feature 'targets' must be a sequence of ids, not of rank 2 and "
     'type float32'),
])
def test_features_that_are_no_ids(features, message):
  task_of(features)
  with pytest.raises(DataError) as error:
    tasks.find_task('odd')
  assert str(error.value) == message


def test_features_that_seqio_refuses():
  task_of({'inputs': IDS, 'targets': seqio.Feature(
      seqio.ByteVocabulary(), dtype=tf.int64)})
  with pytest.raises(DataError, match="task odd: Task dataset has incorrect "
                     "type for feature 'targets' after preprocessing: Got "
                     'int32, expected int64'):
    tasks.TaskExamples(tasks.find_task('odd'), 'train', (8, 8), 0)


def test_lengths_that_are_not_given(register):
  register()
  with pytest.raises(ValueError, match='sequence_length must say how long'):
    seqio.get_mixture_or_task(GAP).get_dataset(None, split='train')


def test_split_that_is_not_there(register):
  register()
  with pytest.raises(DataError, match=rf"task {GAP} has no split 'test', only "
                     r"\['train', 'validation'\]"):
    tasks.TaskExamples(tasks.find_task(GAP), 'test', (128, 64), 0)


def test_data_that_is_not_there(tmp_path, register):
  register(tfds_dir=str(tmp_path))
  with pytest.raises(tasks.UnreachableError, match=f'task {GAP}: no data of '
                     f'c4/en:2.2.0 in {tmp_path}/c4/en/2.2.0'):
    tasks.TaskExamples(tasks.find_task(MIXTURE), 'train', (128, 64), 0)


def test_shard_cut_short(tmp_path, register):
  folder = write_c4(tmp_path, {'train': DOCUMENTS})
  shard = next(tmp_path.rglob('*00001'))
  shard.write_bytes(shard.read_bytes()[:-10])
  register(tfds_dir=folder)
  with pytest.raises(DataError, match=f'task {GAP}: .*truncated record at'
                     ) as error:
    list(tasks.TaskExamples(tasks.find_task(GAP), 'train', (128, 64), 0))
  assert '\n' not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(tasks.UnreachableError,
                     match='cannot read /no/file: /no/file; No such file'):
    tasks.read_file('/no/file')
  (tmp_path / 'a').write_bytes(b'abc')
  assert tasks.read_file(str(tmp_path / 'a')) == b'abc'

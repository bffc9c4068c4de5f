"""longt5_flax.data.seqio_source: batches of tasks, on a tiny C4."""

import itertools
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf

from longt5_flax.data import seqio_source, tasks
from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.options import PipelineOptions
from longt5_flax.data.pipeline import fixed_batches
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary
from tfds_corpus import write_c4

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
TINY = str(FOLDER / 'tiny.model')
TEXT = (FOLDER / 'owl_creek.txt').read_text('utf-8')
DOCUMENTS = [part.strip() for part in TEXT.split('\n\n') if part.strip()]
GAP = 'longt5_c4_gap_sentences'
# Draws nothing, so that what was packed can be told from the documents alone.
RANKED = GapSentenceOptions(
    strategy='rouge', probabilities=(1.0, 0.0, 0.0, 0.0))


def make_options(**changes):
  return PipelineOptions(
      128, 64, **{'global_block_size': 8, 'long_documents': 'pieces'} | changes)


def settings(**changes):
  """config.data, as far as tasks look at it."""
  return types.SimpleNamespace(**{
      'task': GAP, 'vocabulary': TINY, 'extra_ids': 100, 'tfds_name': '',
      'tfds_dir': '', 'task_dir': '', 'on_bad_record': 'raise'} | changes)


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory):
  return write_c4(tmp_path_factory.mktemp('tfds'), {
      'train': DOCUMENTS, 'validation': DOCUMENTS[:9]})


@pytest.fixture
def task(tfds_dir):
  seqio_source.register_tasks(settings(tfds_dir=tfds_dir),
                              make_options(gap_sentences=RANKED))
  found = seqio_source.open_task(GAP)
  found._shuffle_buffer_size = 20  # Filling 1000 takes a second a time.
  yield found
  tasks.register_tasks()


def batches_of(task, num_rows=3, shard=(0, 1), **changes):
  return seqio_source.TaskBatches(
      task, make_options(**changes), num_rows, shard)


def examples_in(batches):
  """(inputs, targets) of all segments of all rows."""
  for batch in batches:
    for i in range(len(batch['encoder_input_tokens'])):
      row = {name: array[i] for name, array in batch.items()}
      for segment in range(1, row['encoder_segment_ids'].max() + 1):
        yield (
            tuple(row['encoder_input_tokens'][
                row['encoder_segment_ids'] == segment]),
            tuple(row['decoder_target_tokens'][
                row['decoder_segment_ids'] == segment]))


def assert_equal(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name, array in batch.items():
      np.testing.assert_array_equal(array, other[name], err_msg=name)


def test_batches_hold_the_documents(task):
  """Packed in blocks, of no other examples than Grain makes of the files."""
  with batches_of(task) as batches:
    made = list(itertools.islice(batches, 40))
    stats = batches.stats()
  for batch in made:
    assert {array.shape for array in batch.values()} == {(3, 128), (3, 64)}
    assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
    _, starts = np.nonzero((batch['encoder_segment_ids'] > 0)
                           & (batch['encoder_positions'] == 0))
    assert np.all(starts % 8 == 0)
  found = set(examples_in(made))
  expected = set(examples_in(fixed_batches(
      DOCUMENTS, Vocabulary(TINY), make_options(
          gap_sentences=RANKED, packing=False), 4)))
  assert found == expected
  assert stats['rows'] == 120
  assert stats['examples'] == len(list(examples_in(made)))


def test_without_packing(task):
  with batches_of(task, packing=False) as batches:
    assert next(batches)['encoder_segment_ids'].max() == 1


@pytest.mark.parametrize('steps', [0, 1, 11])
def test_going_on(task, steps):
  """From the state behind any batch, as JSON; into an iterator that has gone
  elsewhere."""
  with batches_of(task) as batches, batches_of(task) as others:
    for _ in range(steps):
      next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = list(itertools.islice(batches, 20))
    next(others)
    others.set_state(state)
    assert_equal(itertools.islice(others, 20), expected)
    # And a second time, so that nothing of the first is left.
    others.set_state(state)
    assert json.loads(json.dumps(others.get_state())) == state
    assert_equal(itertools.islice(others, 20), expected)


def test_state_stays_small(task):
  """Whatever was read: it keeps what the packer may come back to, no more."""
  with batches_of(task) as batches:
    kept = []
    for batch in itertools.islice(batches, 60):
      del batch
      kept.append(len(batches._kept._kept))
  assert max(kept[30:]) <= max(kept[:30]) + 5 < 100


def test_hosts_read_different_parts(task):
  with batches_of(task, shard=(0, 2)) as one, batches_of(
      task, shard=(1, 2)) as other:
    found = [set(examples_in(itertools.islice(batches, 30)))
             for batches in (one, other)]
    assert found[0].isdisjoint(found[1])
    states = one.get_state() | other.get_state()
    one.set_state(states)
    with (batches_of(task) as alone,
          pytest.raises(DataError, match='the checkpoint is of 2 hosts with '
                        'data of their own, this run has 1: a seqio task can '
                        'go on only with as many')):
      alone.set_state(states)


def test_held_out(task):
  """Every document once, the last batch filled up; always the same."""
  made, again = (seqio_source.held_out_task_batches(
      task, 'validation', make_options(), 4) for _ in range(2))
  assert_equal(made, again)
  expected = list(examples_in(fixed_batches(
      DOCUMENTS[:9], Vocabulary(TINY), make_options(
          gap_sentences=RANKED, packing=False), 4)))
  assert sorted(examples_in(made)) == sorted(expected)
  assert {len(batch['encoder_input_tokens']) for batch in made} == {4}
  some = seqio_source.held_out_task_batches(
      task, 'validation', make_options(), 2, 2)
  assert len(some) == 2


def test_vocabulary(task):
  """The task's, as a run sees it."""
  vocabulary = seqio_source.TaskVocabulary(task)
  own = Vocabulary(TINY)
  assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id) == (500, 0, 1)
  ids = own.encode(DOCUMENTS[0])
  assert vocabulary.decode([*ids, 1, 7]) == own.decode(ids)
  assert vocabulary.files == [TINY]


def test_vocabulary_with_sentinels_of_its_own(tmp_path, tfds_dir):
  """seqio is told to add only those that are missing."""
  file = tmp_path / 'm.model'
  file.write_bytes(Vocabulary(TINY, 100)._processor.serialized_model_proto())
  seqio_source.register_tasks(
      settings(vocabulary=str(file), tfds_dir=tfds_dir), make_options())
  assert seqio_source.TaskVocabulary(seqio_source.open_task(GAP)).size == 500
  tasks.register_tasks()


def test_description(task):
  assert seqio_source.describe_task(task) == (
      f'seqio task {GAP} ({len(DOCUMENTS)} source examples)')


MODULES = {
    'nothing_there': (None, 'ModuleNotFoundError: No module named '
                      "'nothing_there'"),
    'broken_module': ('import math\nx = math.tua\n', 'AttributeError: module '
                      "'math' has no attribute 'tua' ({}:2)"),
    'no_python': ('def f(:\n', 'SyntaxError: invalid syntax'),
    'empty_mixture': (
        "import seqio\nseqio.MixtureRegistry.add('none', [], default_rate=1)\n",
        'ValueError: Mixture, none, does not contain any Tasks.'),
}


@pytest.mark.parametrize('module', MODULES)
def test_modules_that_cannot_be_imported(module, tmp_path, monkeypatch):
  text, message = MODULES[module]
  file = tmp_path / f'{module}.py'
  if text:
    file.write_text(text)
  monkeypatch.syspath_prepend(str(tmp_path))
  with pytest.raises(DataError) as error:
    seqio_source.open_task('any', module)
  assert str(error.value).startswith(
      f'data.module={module} cannot be imported: ' + message.format(file))
  assert '\n' not in str(error.value)


def test_corpus_without_a_version(tfds_dir):
  with pytest.raises(DataError, match=r'data\.tfds_name=c4/en: TFDS name must '
                     'contain a version number, got: c4/en'):
    seqio_source.register_tasks(
        settings(tfds_name='c4/en', tfds_dir=tfds_dir), make_options())
  tasks.register_tasks()


def test_without_tensorflow(monkeypatch):
  seqio_source.load_tasks.cache_clear()
  monkeypatch.setitem(sys.modules, 'seqio', None)
  monkeypatch.delitem(sys.modules, 'longt5_flax.data.tasks')
  with pytest.raises(DataError, match=r'data\.source=seqio needs the extra '
                     r"seqio, pip install '\.\[seqio\]': import of seqio"):
    seqio_source.load_tasks()


def task_of_lines(name, *preprocessors):
  """A task that copies this file's lines, as bytes."""
  feature = seqio.Feature(seqio.ByteVocabulary())
  both = seqio.map_over_dataset(lambda line: {'inputs': line, 'targets': line})

  def not_empty(data):
    return data.filter(lambda line: tf.strings.length(line) > 0)

  return seqio.Task(
      name, seqio.TextLineDataSource({'train': __file__}),
      {'inputs': feature, 'targets': feature},
      preprocessors=[not_empty, both, seqio.preprocessors.tokenize,
                     *preprocessors])


def test_preprocessor_with_a_state():
  """Refused at once: resuming would not be exact."""
  def stateful(ids):
    same = tf.numpy_function(lambda x: x, [ids], tf.int32)
    return tf.ensure_shape(same, [None])

  task = task_of_lines('stateful', lambda data: data.map(
      lambda element: {side: stateful(element[side])
                       for side in ('inputs', 'targets')}))
  with pytest.raises(DataError) as error:
    batches_of(task)
  assert str(error.value) == (
      'task stateful cannot be resumed exactly: PyFunc is stateful. Use '
      'stateless random numbers and tf.numpy_function(..., stateful=False)')


@pytest.mark.parametrize('drop', [
    lambda data: data.take(0),
    # Of lines without end it would be asked about each.
    lambda data: data.filter(lambda _: False),
], ids=['none', 'filter'])
def test_task_without_examples(drop):
  empty = task_of_lines('empty', drop)
  with pytest.raises(DataError, match='task empty has no examples'):
    batches_of(empty)
  with pytest.raises(DataError,
                     match="task empty has no examples in split 'train'"):
    seqio_source.held_out_task_batches(empty, 'train', make_options(), 2)

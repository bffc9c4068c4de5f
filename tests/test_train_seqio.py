"""Training from seqio tasks: whole runs on a tiny C4, and a user's own task."""

import json
import lzma
import shutil
import sys

import numpy as np
import pytest

import runs
import tiny_runs
import train
from longt5_flax.config import ConfigError
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.inputs import make_inputs
from longt5_flax.prepare import prepare
from longt5_flax.training import run_config
from tfds_corpus import write_c4

VOCABULARY = str(runs.ROOT / 'corpus/vocabulary.model')
# A user's module: summarises lines by their last word.
MODULE = '''
import seqio
import tensorflow as tf

vocabulary = seqio.SentencePieceVocabulary({vocabulary!r})
feature = seqio.Feature(vocabulary, dtype=tf.int32)
seqio.TaskRegistry.add(
    'last_word', seqio.TextLineDataSource({{'train': {file!r}}}),
    preprocessors=[
        seqio.map_over_dataset(lambda line: {{
            'inputs': line, 'targets': tf.strings.split(line)[-1]}}),
        seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={{'inputs': feature, 'targets': feature}}, metric_fns=[])
'''


@pytest.fixture(scope='module')
def documents():
  """Real paragraphs."""
  path = runs.ROOT / 'corpus' / 'validation.jsonl.xz'
  with lzma.open(path, 'rt', encoding='utf-8') as lines:
    text = '\n\n'.join(json.loads(line)['text'] for line in lines)
  found = [' '.join(part.split()) for part in text.split('\n\n')]
  return [part for part in found if len(part) > 200][:60]


@pytest.fixture(scope='module')
def tfds_dir(tmp_path_factory, documents):
  return write_c4(tmp_path_factory.mktemp('tfds'), {
      'train': documents[10:], 'validation': documents[:10]})


@pytest.fixture(scope='module')
def settings(tfds_dir):
  """To add to a tiny run."""
  return {
      'data.source': 'seqio', 'data.path': '', 'data.tfds_dir': tfds_dir,
      'data.task': 'longt5_c4_mixture', 'data.vocabulary': VOCABULARY,
      'data.extra_ids': 96}


@pytest.fixture(scope='module')
def module(tmp_path_factory, documents):
  """Puts MODULE where it can be imported; returns what its task reads."""
  folder = tmp_path_factory.mktemp('module')
  file = folder / 'lines.txt'
  lines = [part[:120].rsplit(' ', 1)[0] for part in documents]
  file.write_text('\n'.join(lines) + '\n')
  (folder / 'users_tasks.py').write_text(
      MODULE.format(vocabulary=VOCABULARY, file=str(file)))
  sys.path.insert(0, str(folder))
  yield lines
  sys.path.remove(str(folder))


@pytest.fixture(scope='module')
def compiled(tmp_path_factory):
  with (tiny_runs.own_signals(),
        tiny_runs.cheap_compilation(tmp_path_factory.mktemp('compiled'))):
    yield


@pytest.fixture(scope='module')
def published(tmp_path_factory):
  """The published command as it stands: its folder, its process."""
  folder = tmp_path_factory.mktemp('published')
  return folder / 'run', runs.start(
      [sys.executable, 'train.py', '--config=configs/tglobal_large.py',
       f'--workdir={folder}/run'], TFDS_DATA_DIR=str(folder))


@pytest.mark.usefixtures('compiled', 'published')  # It runs meanwhile.
def test_another_process_goes_on_exactly(settings, tmp_path):
  """From a checkpoint it reads what the run that wrote it read next. (Kills,
  and what is computed, bit for bit: test_resume.py.)"""
  settings = settings | {
      'steps': 6, 'checkpoint.every_steps': 2, 'checkpoint.keep': 9}
  run = tiny_runs.run(tmp_path / 'run', settings)
  again = tmp_path / 'again'
  shutil.copytree(run.workdir, again)
  for step in ('4', '6'):
    shutil.rmtree(again / 'checkpoints' / step)
  output = runs.finish(runs.start([
      sys.executable, 'train.py', f'--workdir={again}',
      *tiny_runs.arguments(settings)]))
  assert f'{again}, from step 2' in output
  streams, expected = (runs.checkpoint(workdir, 6)[1]['part 0 of 1']
                       for workdir in (again, run.workdir))
  for name in ('rows', 'examples'):
    assert streams[name] == expected[name]
  lines = runs.metrics(again)
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
  for name in ('encoder_tokens', 'decoder_tokens'):
    assert [line[name] for line in lines] == run.column(name)
  np.testing.assert_allclose(
      [line['loss'] for line in lines], run.column('loss'), rtol=1e-4)


def test_published_run_as_it_stands(published):
  """Without network, or without C4: one line says what is missing, and what
  would run."""
  workdir, process = published
  output = runs.finish(process, 2)
  assert output.count('\n') == 1
  assert output.startswith((
      'error: cannot read gs://t5-data/vocabs/cc_all.32000.100extra/'
      'sentencepiece.model: ',
      'error: task longt5_c4_gap_sentences: no data of c4/en:2.2.0 in '))
  for override in (
      '--config.data.vocabulary=MODEL and --config.data.tfds_dir=DIR',
      '--config.data.source=jsonl --config.data.path=FILES '
      '--config.data.vocabulary=MODEL trains on local text'):
    assert override in output
  assert not workdir.exists()


def test_published_settings():
  """LongT5's pretraining: C4, T5's vocabulary, 4096 -> 910, batch 128."""
  config = tiny_runs.parse(
      f'--config={runs.ROOT}/configs/tglobal_large.py')[0]
  data = config.data
  assert (data.source, data.task) == ('seqio', 'longt5_c4_gap_sentences')
  assert data.tfds_name == ''  # The task's, c4/en:2.2.0.
  assert data.vocabulary == ''
  assert (data.inputs_length, data.targets_length) == (4096, 910)
  assert data.batch_size == 128
  assert data.long_documents == 'cut'
  assert config.optimizer.name == 'adafactor'
  assert (config.schedule.name, config.schedule.learning_rate,
          config.schedule.warmup_steps) == ('rsqrt', 1.0, 10_000)
  assert config.steps == 1_000_000


def pad(ids, length):
  return (ids + [0] * length)[:length]


@pytest.mark.usefixtures('compiled')
def test_supervised_task_of_ones_own(module, settings, tmp_path):
  run = tiny_runs.run(tmp_path / 'run', settings | {
      'data.module': 'users_tasks', 'data.task': 'last_word',
      'data.vocabulary': '', 'data.packing': False})
  vocabulary = Vocabulary(VOCABULARY, 0)
  expected = {
      (*pad([*vocabulary.encode(line), 1], 64),
       *pad([*vocabulary.encode(line.split()[-1]), 1], 24)) for line in module}
  assert len(run.batches) == 3
  for batch in run.batches:
    assert set(map(tuple, np.concatenate(
        [batch['encoder_input_tokens'], batch['decoder_target_tokens']],
        axis=1).tolist())) <= expected
  assert 'seqio task last_word' in run.printed


def read(overrides):
  """A batch of a run, and its held-out ones."""
  config = tiny_runs.tiny(overrides)
  inputs = make_inputs(config, run_config.model_config(config.model),
                       range(config.data.batch_size), (0, 1))
  with inputs.batches as batches:
    return next(batches), inputs.held_out


def test_task_is_prepared_as_files_are(settings, documents, tmp_path, capsys):
  """The shards are those of the same documents in JSON lines, to the byte."""
  config = tiny_runs.tiny(settings | {
      'data.task': 'longt5_c4_gap_sentences',
      'data.validation_split': 'validation'})
  overrides = prepare(config, str(tmp_path / 'task'), 1, 0)
  assert capsys.readouterr().out == (
      f'{tmp_path}/task/train: 50 documents in 1 shard\n'
      f'{tmp_path}/task/validation: 10 documents in 1 shard\n')
  assert overrides == [
      '--config.data.source=arrayrecord',
      f'--config.data.path={tmp_path}/task/train',
      f'--config.data.validation_path={tmp_path}/task/validation']
  paths = {}
  for key, part in (('data.path', documents[10:]),
                    ('data.validation_path', documents[:10])):
    paths[key] = str(tmp_path / f'{key}.jsonl')
    with open(paths[key], 'w', encoding='utf-8') as file:
      file.writelines(json.dumps({'text': text}) + '\n' for text in part)
  prepare(tiny_runs.tiny({
      'data.vocabulary': VOCABULARY,
      'data.extra_ids': settings['data.extra_ids'], **paths}),
          str(tmp_path / 'files'), 1, 0)
  found = [path.relative_to(tmp_path / 'files')
           for path in (tmp_path / 'files').glob('*/*')]
  assert len(found) == 4
  for path in found:
    assert (tmp_path / 'task' / path).read_bytes() == (
        tmp_path / 'files' / path).read_bytes()


def test_options_reach_the_tasks(settings):
  """Overrides of gap_sentences and span_corruption: here all is copied, and
  all but one token hidden."""
  batch, held_out = read(settings | {
      'data.task': 'longt5_c4_gap_sentences',
      'data.validation_split': 'validation', 'eval.max_batches': 1,
      'gap_sentences.strategy': 'lead', 'gap_sentences.ratio': 1.0,
      'gap_sentences.probabilities': (0.0, 0.0, 1.0, 0.0),
      'data.packing': False})
  for each in (batch, *held_out):
    np.testing.assert_array_equal(each['encoder_input_tokens'][:, :24],
                                  each['decoder_target_tokens'])
  assert len(held_out) == 1
  batch, held_out = read(settings | {
      'data.task': 'longt5_c4_span_corruption',
      'data.objective': 'span_corruption',
      'span_corruption.noise_density': 0.99,
      'span_corruption.mean_noise_span_length': 10_000.0})
  assert held_out == []
  for row in batch['encoder_input_tokens'].tolist():
    # Of each example a token, a sentinel, the end.
    assert row.count(4095) == row.count(1) > 0
    assert len([i for i in row if i > 0]) == 3 * row.count(1)


@pytest.mark.parametrize('kind, overrides, message', [
    (DataError, {'data.task': 'longt5_c4_gap_sentence'},
     "no seqio task or mixture 'longt5_c4_gap_sentence'; there is "
     'longt5_c4_gap_sentences'),
    (ConfigError, {'data.task': ''},
     'data.task is empty: it must name a task or mixture of seqio.'),
    (ConfigError, {'data.objective': 'span_corruption'},
     "data.objective='span_corruption' has no say in task "
     "'longt5_c4_mixture': leave it out, and choose a task, such as "
     'longt5_c4_span_corruption or longt5_c4_mixture.'),
    (ConfigError, {'data.path': 'books.jsonl'},
     "data.path='books.jsonl' must be empty for data.source='seqio', which "
     'reads data.task; files are read by --config.data.source=jsonl.'),
    (DataError, {'data.module': 'users_task'},
     'data.module=users_task cannot be imported: ModuleNotFoundError: No '
     "module named 'users_task'"),
    (DataError, {'data.validation_split': 'test'},
     "task longt5_c4_mixture has no split 'test', only ['train', "
     "'validation']"),
    (ConfigError, {'data.extra_ids': 100},
     'The vocabulary of task longt5_c4_mixture has 4100 ids with its '
     'sentinels, more than model.vocab_size=4096: raise that, or lower '
     'data.extra_ids.'),
    (ConfigError, {'model.eos_token_id': 2},
     'The vocabulary of task longt5_c4_mixture has eos_id=1, which must equal '
     'model.eos_token_id=2.'),
    (ConfigError, {'data.module': 'users_tasks', 'data.task': 'last_word',
                   'data.vocabulary': str(runs.ROOT / 'tests/testdata/'
                                          'vocabulary/tiny.model')},
     'data.vocabulary=*tiny.model must be empty: task last_word has its own, '
     '*vocabulary.model.'),
    (DataError, {'data.vocabulary': '/no/m.model'},
     'cannot read /no/m.model: */no/m.model; No such file or directory. '
     '--config.data.vocabulary=MODEL and *'),
    (DataError, {'data.tfds_dir': '/no'},
     'task longt5_c4_gap_sentences: no data of c4/en:2.2.0 in '
     '/no/c4/en/2.2.0. --config.data.vocabulary=MODEL and *'),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else '')
@pytest.mark.usefixtures('module')
def test_settings_that_cannot_be(kind, overrides, message, settings, tmp_path):
  with pytest.raises(kind) as error:
    train.main(tiny_runs.tiny(settings | overrides), str(tmp_path / 'run'))
  text, parts = str(error.value), message.split('*')
  assert '\n' not in text
  assert text.startswith(parts[0])
  assert all(part in text for part in parts)
  assert not (tmp_path / 'run').exists()

"""python -m longt5_flax.prepare: what it writes, also when it is killed."""

import itertools
import json
import os
import re
import resource
import shutil
import signal
import sys
import time

import numpy as np
import pytest

import runs
import train
from longt5_flax import inputs, prepare
from longt5_flax.command_line import read_config
from longt5_flax.data.prepared import METADATA, UNFINISHED
from longt5_flax.data.sources import load_documents
from longt5_flax.training import run_config

CONFIG = f'{runs.ROOT}/configs/quickstart.py'
VALIDATION = f'{runs.ROOT}/corpus/validation.jsonl.xz'
NUM_DOCUMENTS = 60
# A vocabulary of 4000 pieces, and sentinels for span corruption.
SETTINGS = {
    'data.validation_path': '', 'data.extra_ids': 96,
    'data.vocabulary': f'{runs.ROOT}/corpus/vocabulary.model',
    'data.inputs_length': 256, 'data.targets_length': 128,
    'data.objective': 'gap_sentences:1,span_corruption:1'}


@pytest.fixture(scope='module', autouse=True)
def corpus(tmp_path_factory):
  """A second's work."""
  path = tmp_path_factory.mktemp('corpus') / 'documents.jsonl'
  texts = load_documents(f'{runs.ROOT}/corpus/train.jsonl.xz')
  path.write_text(''.join(json.dumps({'text': text, 'title': text[:40]}) + '\n'
                          for text in itertools.islice(texts, NUM_DOCUMENTS)))
  SETTINGS['data.path'] = str(path)
  return path


def overrides(**changes):
  """The overrides of a run; keys of changes have dots as `__`."""
  changes = {key.replace('__', '.'): value for key, value in changes.items()}
  return [f'--config.{key}={value}'
          for key, value in (SETTINGS | changes).items()]


def arguments(folder, *more, **changes):
  return [f'--config={CONFIG}', f'--output={folder}', *more,
          *overrides(**changes)]


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """Of a command that nobody disturbed."""
  folder = tmp_path_factory.mktemp('prepared')
  assert prepare.main(arguments(folder, '--workers=2', '--shards=24')) == 0
  return folder


def made(options):
  """What a run of these overrides reads."""
  config = read_config(CONFIG, options)
  model = run_config.model_config(config.model)
  return inputs.make_inputs(config, model, range(8), (0, 1))


def test_run_reads_the_same_from_shards(tmp_path, capsys):
  options = overrides(data__validation_path=VALIDATION)
  command = [f'--config={CONFIG}', f'--output={tmp_path}', *options]
  assert prepare.main(command) == 0
  output = capsys.readouterr()
  *lines, last = output.out.splitlines()
  assert lines == [f'{tmp_path}/train: {NUM_DOCUMENTS} documents in 1 shard',
                   f'{tmp_path}/validation: 3 documents in 1 shard']
  # The last line is the run.
  assert last.startswith(f'Next: python train.py --config={CONFIG} ')
  shards = [word for word in last.split() if word.startswith('--config.')]
  text, prepared = made(options), made(shards)
  with text.batches, prepared.batches:
    for one, other in itertools.islice(
        zip(text.batches, prepared.batches, strict=True), 4):
      for name in one:
        assert np.array_equal(one[name], other[name])
  for one, other in zip(text.held_out, prepared.held_out, strict=True):
    for name in one:
      assert np.array_equal(one[name], other[name])
  assert prepared.description == text.description
  assert prepare.main(command) == 0
  assert capsys.readouterr().out.splitlines()[0] == (
      f'{tmp_path}/train: {NUM_DOCUMENTS} documents in 1 shard, 1 of them from '
      'before')


def start(folder, workers):
  return runs.start([
      sys.executable, '-m', 'longt5_flax.prepare',
      *arguments(folder, f'--workers={workers}', '--shards=24')])


def wait_for_shards(process, folder):
  """Until some are there, and not all."""
  while not (found := list(folder.glob('*.array_record'))):
    assert process.poll() is None, process.communicate()
    time.sleep(0.002)
  return {path: path.stat() for path in found}


def settled(folder):
  """Names in a folder that nobody writes to any more."""
  before = None
  while (names := sorted(os.listdir(folder))) != before:
    before = names
    time.sleep(0.5)
  return names


@pytest.mark.parametrize('number, workers', [
    (signal.SIGKILL, 2), (signal.SIGINT, 1)])
def test_stopped_and_started_again(number, workers, tmp_path, reference):
  """All shards are there, byte for byte; those that were are left alone."""
  folder = tmp_path / 'train'
  process = start(tmp_path, workers)
  wait_for_shards(process, folder)
  process.send_signal(number)
  output, _ = process.communicate(timeout=60)
  if number == signal.SIGINT:
    assert process.returncode == 130
    assert output == 'Stopped; the same command goes on.\n'
  else:
    assert process.returncode == -signal.SIGKILL
  names = settled(folder)
  assert METADATA not in names
  assert METADATA + UNFINISHED in names
  expected = contents(reference / 'train')
  finished = {path: path.stat() for path in folder.glob('*.array_record')}
  assert 0 < len(finished) < len(expected) - 1
  with pytest.raises(prepare.DataError, match='has finished'):
    made([*overrides(), '--config.data.source=arrayrecord',
          f'--config.data.path={folder}'])
  assert prepare.main(arguments(tmp_path, '--workers=2', '--shards=24')) == 0
  assert contents(folder) == expected
  for path, stat in finished.items():
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (
        stat.st_ino, stat.st_mtime_ns)


def test_run_writes_nothing_where_shards_are_not_its_own(tmp_path, reference):
  """What train.py turns into its one line."""
  cut = tmp_path / 'cut'
  shutil.copytree(reference / 'train', cut)
  shard = sorted(cut.glob('*.array_record'))[-1]
  shard.write_bytes(shard.read_bytes()[:-1])
  for folder, changes, message in (
      (cut, {}, 'is cut off'),
      (reference / 'train', {'data.extra_ids': 95}, 'data.vocabulary='),
      (reference / 'train', {'gap_sentences.ngram': 2},
       'gap_sentences.ngram=1, not 2')):
    config = read_config(CONFIG, overrides(
        data__source='arrayrecord', data__path=folder, **changes))
    with pytest.raises(prepare.DataError, match=message):
      train.main(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_killed_worker_is_one_line(tmp_path, monkeypatch, capsys, reference):
  """As where memory runs out; the same command goes on."""
  started = prepare.Worker

  def start_and_kill(*arguments):
    worker = started(*arguments)
    worker._process.kill()
    return worker

  command = arguments(tmp_path, '--workers=1', '--shards=24')
  with monkeypatch.context() as patch:
    patch.setattr(prepare, 'Worker', start_and_kill)
    assert prepare.main(command) == 1
  line, = capsys.readouterr().err.splitlines()
  assert line.startswith('error: worker process ')
  assert line.endswith(' ended by signal 9 (SIGKILL); the same command goes on')
  assert prepare.main(command) == 0
  assert contents(tmp_path / 'train') == contents(reference / 'train')


def test_damaged_shards_are_made_again(tmp_path, reference):
  folder = tmp_path / 'train'
  command = arguments(tmp_path, '--workers=1', '--shards=24')
  assert prepare.main(command) == 0
  shards = sorted(folder.glob('*.array_record'))
  shards[0].write_bytes(shards[0].read_bytes()[:100])
  shards[1].unlink()
  assert prepare.main(command) == 0
  assert contents(folder) == contents(reference / 'train')


def test_large_corpora_get_more_shards(tmp_path, monkeypatch, corpus):
  monkeypatch.setattr('longt5_flax.data.shard_folder._SHARD_BYTES', 20_000)
  assert prepare.main(arguments(tmp_path, '--workers=1')) == 0
  metadata = json.loads((tmp_path / 'train' / METADATA).read_text())
  text = sum(len(text.encode()) for text in load_documents(str(corpus)))
  assert 1 < len(metadata['shards']) <= text // 20_000
  assert sum(shard['documents'] for shard in metadata['shards']) == (
      metadata['documents'])


# Mistakes.


def refused(capsys, command):
  assert prepare.main(command) == 2
  output = capsys.readouterr()
  assert output.out == ''
  line, = output.err.splitlines()
  return line.removeprefix('error: ')


@pytest.mark.parametrize('more, changes, message', [
    (['--workers=0'], {}, '--workers=0 must be at least 1.'),
    (['--shards=-1'], {}, '--shards=-1 must be at least 0.'),
    ([], {'data__path': ''},
     'data.path is empty: it must name the files to train on.'),
    ([], {'data__path': 'no.jsonl'}, "no file 'no.jsonl'"),
    ([], {'data__validation_path': 'no.jsonl'}, "no file 'no.jsonl'"),
    ([], {'data__source': 'arrayrecord'},
     "data.source='arrayrecord' is prepared already."),
    ([], {'data__objective': 'supervised'},
     "data.objective='supervised' has nothing to prepare: train.py reads the "
     'examples as they are.'),
    ([], {'data__source': 'csv'},
     "source='csv' must be one of ('jsonl', 'tsv', 'text', 'arrayrecord', "
     "'seqio')"),
    ([], {'data__source': 'seqio', 'data__path': ''},
     'data.task is empty: it must name a task or mixture of seqio.'),
    ([], {'data__source': 'seqio', 'data__path': '', 'data__task': 'x',
          'data__vocabulary': ''},
     'data.vocabulary is empty: it must name a SentencePiece model.'),
    ([], {'data__extra_ids': 0},
     'the vocabulary has no sentinels <extra_id_n>, which span corruption '
     'needs: set data.extra_ids=100'),
    ([], {'data__objective': 'gap_sentences:0'},
     "objective='gap_sentences:0': the weight '0' of gap_sentences must be a "
     'number above 0'),
    ([], {'gap_sentences__metric': 'G'},
     "gap_sentences.metric='G' must be one of ('F', 'precision', 'recall')."),
    (['--oops'], {}, "Unknown command line flag 'oops'"),
], ids=str)
def test_mistakes_write_nothing(tmp_path, capsys, more, changes, message):
  folder = tmp_path / 'out'
  assert refused(capsys, arguments(folder, *more, **changes)) == message
  assert not folder.exists()


@pytest.mark.parametrize('more, changes, message', [
    ([], {'gap_sentences__ngram': 2},
     'gap_sentences.ngram=1, not 2: keep the value'),
    ([], {'data__objective': 'span_corruption'},
     'gap_sentences.stop_words=[], not None: keep the value'),
    ([], {'data__extra_ids': 95}, "data.vocabulary='4096 ids, sha256 "),
    (['--shards=3'], {}, 'shards=22, not 3: keep the value'),
    (['--shards=24'], {'data__field': 'title'}, 'text_sha256='),
], ids=str)
def test_folder_of_other_settings(reference, capsys, more, changes, message):
  before = contents(reference / 'train')
  line = refused(capsys, arguments(reference, *more or ['--shards=24'],
                                   **changes))
  assert line.startswith(f'{reference}/train was prepared with {message}')
  assert line.endswith(': keep the value, or choose another --output')
  assert contents(reference / 'train') == before


def test_folder_of_something_else(tmp_path, capsys):
  folder = tmp_path / 'train'
  folder.mkdir()
  (folder / 'notes.txt').write_text('mine')
  assert refused(capsys, arguments(tmp_path)) == (
      f'{folder} holds files that longt5_flax.prepare has not made: choose '
      'another --output')
  assert os.listdir(folder) == ['notes.txt']
  (folder / METADATA).write_text('[]')
  assert refused(capsys, arguments(tmp_path)).startswith(
      f'{folder}/{METADATA} is damaged (')
  assert refused(capsys, arguments(tmp_path / 'train' / 'notes.txt')) == (
      f'cannot write {folder}/notes.txt/train: Not a directory')


def test_no_room_is_one_line(tmp_path, monkeypatch, capsys, reference):
  """A disk that takes no more than a few kB."""
  started = prepare.Worker

  def start_and_limit(*arguments):
    worker = started(*arguments)
    resource.prlimit(worker._process.pid, resource.RLIMIT_FSIZE, (9000, 9000))
    return worker

  command = arguments(tmp_path, '--workers=1', '--shards=24')
  with monkeypatch.context() as patch:
    patch.setattr(prepare, 'Worker', start_and_limit)
    line = refused(capsys, command)
  assert re.match(f'cannot write {tmp_path}/train/00000.array_record.*: '
                  '.*File too large', line)
  assert prepare.main(command) == 0
  assert contents(tmp_path / 'train') == contents(reference / 'train')

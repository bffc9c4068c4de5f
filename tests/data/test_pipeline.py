"""longt5_flax.data.pipeline: the same batches, whoever makes them and when."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.pipeline import (
    BatchIterator,
    PipelineOptions,
    RowError,
    fixed_batches,
)
from longt5_flax.data.sources import DataError, Documents
from longt5_flax.data.vocabulary import Vocabulary

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
VOCABULARY = Vocabulary(str(FOLDER / 'tiny.model'))
PARAGRAPHS = (FOLDER / 'owl_creek.txt').read_text('utf-8').split('\n\n')
DOCUMENTS = Documents(
    '\n\n'.join(PARAGRAPHS[i:i + 3]) for i in range(0, len(PARAGRAPHS), 3))
# Sentences at random, or short documents would be the same in every epoch.
OPTIONS = PipelineOptions(
    256, 128, long_documents='pieces', global_block_size=8, seed=3,
    gap_sentences=GapSentenceOptions(strategy='random', ratio=0.3))
ROWS = range(5)


def iterator(rows=ROWS, workers=0, options=OPTIONS, documents=DOCUMENTS):
  return BatchIterator(documents, VOCABULARY, options, len(ROWS), rows, workers)


def take(source, count):
  return list(itertools.islice(source, count))


def check_equal(batches, expected):
  assert len(batches) == len(expected)
  for batch, other in zip(batches, expected, strict=True):
    assert list(batch) == list(other)
    for name in batch:
      assert batch[name].dtype == np.int32
      assert np.array_equal(batch[name], other[name])


@pytest.fixture(scope='module')
def expected():
  """12 batches: bins are emptied, and some row is in its second epoch."""
  with iterator() as batches:
    return take(batches, 12)


def test_batches_differ(expected):
  """Else the tests here would compare nothing."""
  rows = [batch['encoder_input_tokens'][i].tobytes()
          for batch in expected for i in ROWS]
  assert len(set(rows)) > 0.9 * len(rows)


@pytest.mark.parametrize('workers', [1, 3, 9])
def test_any_number_of_workers_makes_the_same_batches(expected, workers):
  with iterator(workers=workers) as batches, iterator() as others:
    check_equal(take(batches, 12), expected)
    take(others, 12)
    assert batches.get_state() == others.get_state()
    assert batches.stats() == others.stats()
    for worker in batches._source._workers:
      maps = Path(f'/proc/{worker._process.pid}/maps').read_text()
      assert 'sentencepiece' in maps
      assert 'jaxlib' not in maps


@pytest.mark.parametrize('workers', [0, 2])
def test_two_hosts_make_the_batches_of_one(expected, workers):
  with iterator((0, 3), workers) as some, iterator((4, 1, 2), workers) as rest:
    for batch, first, second in zip(
        expected, take(some, 12), take(rest, 12), strict=True):
      for name in batch:
        assert np.array_equal(batch[name][[0, 3]], first[name])
        assert np.array_equal(batch[name][[4, 1, 2]], second[name])


@pytest.mark.parametrize('changes', [
    {}, {'packing': False}, {'long_documents': 'cut'},
    {'packing': False, 'long_documents': 'cut'}], ids=str)
def test_resumes_after_any_batch(changes):
  options = PipelineOptions(**{**vars(OPTIONS), **changes})
  whole = take(iterator(options=options), 12)
  one = iterator(options=options)
  resumed = iterator(options=options)
  for done in range(11):
    states = json.loads(json.dumps(one.get_state()))
    assert list(states) == [str(row) for row in ROWS]
    assert all(len(json.dumps(state)) < 300 for state in states.values())
    resumed.set_state(states)
    check_equal(take(resumed, 2), whole[done:done + 2])
    next(one)


def test_state_is_of_what_was_delivered(expected):
  """Workers are some batches ahead, of different numbers for each."""
  with iterator(workers=2) as batches:
    take(batches, 3)
    time.sleep(0.3)
    states = batches.get_state()
    check_equal([next(batches)], expected[3:4])
    batches.set_state(states)
    check_equal(take(batches, 2), expected[3:5])
  # Another host takes over some of the rows.
  some = iterator((4, 2))
  some.set_state(states)
  assert np.array_equal(next(some)['encoder_input_tokens'],
                        expected[3]['encoder_input_tokens'][[4, 2]])


def run(code, *args, **kwargs):
  """A user's script: it imports JAX and has no `if __name__ == '__main__'`."""
  header = (
      'import json, jax, os, signal, sys, time\n'
      # A shell's background jobs begin with Ctrl-C ignored.
      'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
      f'sys.path[:0] = [{str(Path(__file__).parent)!r}, '
      f'{str(Path(__file__).parent.parent.parent)!r}]\n'
      'from test_pipeline import *\n')
  return subprocess.Popen(
      [sys.executable, '-c', header + code, *args], stdout=subprocess.PIPE,
      stderr=subprocess.PIPE, text=True, **kwargs)


def test_resumes_in_another_process(expected, tmp_path):
  first = iterator()
  take(first, 5)
  process = run(
      'batches = iterator(workers=2)\n'
      'batches.set_state(json.loads(sys.argv[1]))\n'
      'for i in range(4):\n'
      '  np.savez(f"{sys.argv[2]}/{i}.npz", **next(batches))\n',
      json.dumps(first.get_state()), str(tmp_path))
  output, errors = process.communicate(timeout=60)
  assert (process.returncode, output, errors) == (0, '', '')
  check_equal([dict(np.load(tmp_path / f'{i}.npz')) for i in range(4)],
              expected[5:9])


def alive(pid):
  try:
    state = Path(f'/proc/{pid}/stat').read_text().rsplit(')')[-1].split()[0]
  except FileNotFoundError:
    return False
  return state != 'Z'


@pytest.mark.parametrize('how', ['Ctrl-C', 'SIGKILL'])
def test_workers_end_with_the_run(how):
  process = run(
      'batches = iterator(workers=2)\n'
      'next(batches)\n'
      'try:\n'
      '  print(*[w._process.pid for w in batches._source._workers],\n'
      '        flush=True)\n'
      '  for _ in batches: time.sleep(0.001)\n'
      'except KeyboardInterrupt:\n'
      '  print("interrupted")\n', start_new_session=True)
  workers = list(map(int, process.stdout.readline().split()))
  assert len(workers) == 2
  assert all(map(alive, workers))
  if how == 'Ctrl-C':
    os.killpg(process.pid, signal.SIGINT)
  else:
    process.kill()
  try:
    output, errors = process.communicate(timeout=60)
  finally:
    process.kill()
  assert errors == ''
  if how == 'Ctrl-C':
    assert (process.returncode, output) == (0, 'interrupted\n')
  deadline = time.monotonic() + 20
  while any(map(alive, workers)) and time.monotonic() < deadline:
    time.sleep(0.05)
  assert not any(map(alive, workers))


def test_scheduler_that_signals_all_processes_ends_no_worker(expected):
  with iterator(workers=2) as batches:
    next(batches)
    for worker in batches._source._workers:
      worker._process.send_signal(signal.SIGTERM)
      worker._process.send_signal(signal.SIGINT)
    check_equal(take(batches, 11), expected[1:])


def test_killed_worker_is_an_error_and_no_loss():
  with iterator(workers=2) as batches:
    done = [next(batches)]
    victim = batches._source._workers[1]._process
    victim.kill()
    with pytest.raises(RowError) as error:
      done.extend(batches)
    assert str(error.value) == (
        f'rows [1, 3]: their worker process {victim.pid} ended by signal 9 '
        '(SIGKILL)')
    done += take(batches, 3)
  check_equal(done, take(iterator(), len(done)))


def test_close_ends_workers_and_threads():
  batches = iterator(workers=2)
  next(batches)
  processes = [worker._process for worker in batches._source._workers]
  batches.close()
  assert [process.returncode for process in processes] == [-9, -9]
  batches.close()


def test_deleted_iterator_ends_its_workers():
  batches = iterator(workers=1)
  next(batches)
  process = batches._source._workers[0]._process
  del batches
  assert process.returncode == -9


@pytest.mark.parametrize('workers', [0, 2])
def test_error_names_the_row(workers):
  documents = ['A b. C.'] * 4 + ['\ud800']  # Half a surrogate pair.
  with (iterator(workers=workers, documents=documents) as batches,
        pytest.raises(RowError, match=r'^row \d: RuntimeError: ') as error):
    take(batches, 100)
  if workers:
    assert 'in encode\n' in str(error.value)


def test_what_cannot_be_pickled_is_an_error():
  class Local(list):
    pass

  with (iterator(workers=1, documents=Local(['A.'])) as batches,
        pytest.raises(Exception, match='Local')):
    next(batches)


def test_stats(expected):
  with iterator() as batches:
    assert batches.stats() == {
        'rows': 0, 'examples': 0, 'input_tokens': 0, 'target_tokens': 0,
        'lost_target_tokens': 0, 'input_padding': 0.0, 'target_padding': 0.0}
    take(batches, 12)
    stats = batches.stats()
  inputs = np.concatenate([b['encoder_input_tokens'] for b in expected])
  targets = np.concatenate([b['decoder_target_tokens'] for b in expected])
  assert stats['rows'] == len(inputs) == 60
  assert stats['examples'] == sum(
      batch['encoder_segment_ids'].max(axis=1).sum() for batch in expected)
  assert stats['input_tokens'] == np.count_nonzero(inputs)
  assert stats['target_tokens'] == np.count_nonzero(targets)
  assert stats['input_padding'] == pytest.approx((inputs == 0).mean())
  assert stats['target_padding'] == pytest.approx((targets == 0).mean())


def test_stats_count_lost_target_tokens():
  options = PipelineOptions(**{
      **vars(OPTIONS), 'long_documents': 'cut', 'packing': False})
  short = PipelineOptions(**{**vars(options), 'targets_length': 4096})
  with iterator(options=options) as cut, iterator(options=short) as whole:
    take(cut, 12), take(whole, 12)
    lost = cut.stats()['lost_target_tokens']
    assert lost > 0 == whole.stats()['lost_target_tokens']
    assert lost + cut.stats()['target_tokens'] == whole.stats()['target_tokens']


@pytest.mark.parametrize('packing', [True, False])
def test_fixed_batches(packing):
  options = PipelineOptions(**{**vars(OPTIONS), 'packing': packing})
  batches = fixed_batches(DOCUMENTS, VOCABULARY, options, 7)
  check_equal(fixed_batches(DOCUMENTS, VOCABULARY, options, 7), batches)
  check_equal(fixed_batches(DOCUMENTS, VOCABULARY, options, 7, 2),
              batches[:2])
  used = np.concatenate([b['encoder_segment_ids'].any(1) for b in batches])
  assert len(used) == 7 * len(batches)
  count = used.sum()
  assert 0 < len(used) - count < 7
  assert used[:count].all()
  for name, array in batches[-1].items():
    assert array.dtype == np.int32
    assert not array[count % 7:].any(), name


def test_fixed_batches_hold_every_document_once():
  options = PipelineOptions(
      2048, 512, long_documents='cut', packing=False)
  batches = fixed_batches(DOCUMENTS, VOCABULARY, options, 4)
  kept = [row[row > 0].tolist() for batch in batches
          for row in batch['encoder_input_tokens'] if row.any()]
  # A masked sentence or two apart, in the order of the documents.
  assert len(kept) == len(DOCUMENTS)
  for text, row in zip(DOCUMENTS, kept, strict=True):
    assert set(row) - {2} <= {*VOCABULARY.encode(text), 1}


def test_fixed_batches_of_fewer_documents_than_rows():
  batches = fixed_batches(['A b. C d.'], VOCABULARY, OPTIONS, 3)
  assert len(batches) == 1
  assert batches[0]['encoder_segment_ids'].any(axis=1).tolist() == [
      True, False, False]


@pytest.mark.parametrize('changes, message', [
    ({'documents': []}, 'there are no documents'),
    ({'rows': ()}, 'rows=[] must be different numbers below batch_size=5'),
    ({'rows': (1, 1)},
     'rows=[1, 1] must be different numbers below batch_size=5'),
    ({'rows': (0, 5)},
     'rows=[0, 5] must be different numbers below batch_size=5'),
    ({'workers': -1}, 'workers=-1 must be at least 0')], ids=str)
def test_arguments_that_cannot_be(changes, message):
  with pytest.raises(DataError) as error:
    iterator(**changes)
  assert str(error.value) == message


def test_states_that_cannot_be():
  batches = iterator()
  states = batches.get_state()
  with pytest.raises(DataError, match=(
      r'^no state for rows \[1, 4\], only for rows \[0, 2, 3\]$')):
    batches.set_state({row: states[row] for row in '320'})
  with pytest.raises(DataError, match=r'^batch_size=0 must be at least 1$'):
    fixed_batches(DOCUMENTS, VOCABULARY, OPTIONS, 0)

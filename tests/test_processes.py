"""Two real processes train as one does, and hand over to one."""

import json
import signal
import socket

import numpy as np
import pytest

import runs


def start_two(workdir, cache, **settings):
  with socket.socket() as server:
    server.bind(('localhost', 0))
    port = server.getsockname()[1]
  return [runs.start([
      *runs.command(workdir, **settings), f'--coordinator=localhost:{port}',
      '--num_processes=2', f'--process_id={i}'], cache) for i in range(2)]


@pytest.fixture(scope='module')
def one(tmp_path_factory, cache):
  workdir = tmp_path_factory.mktemp('one')
  runs.finish(runs.start(runs.command(
      workdir, steps=4, data__validation_path='corpus/validation.jsonl.xz',
      eval__every_steps=2, eval__max_batches=3), cache))
  return workdir


def test_two_processes_give_the_losses_of_one(tmp_path, one, cache):
  settings = dict(data__validation_path='corpus/validation.jsonl.xz',
                  eval__every_steps=2, eval__max_batches=3)
  processes = start_two(tmp_path, cache, steps=2, **settings)
  outputs = [runs.finish(process) for process in processes]
  assert 'step 2/2' in outputs[0]
  assert 'step 2/2' not in outputs[1]  # One process speaks and writes.
  assert_same_numbers(tmp_path, one, 2)
  # One process goes on with what two began: same rows, same numbers.
  runs.finish(runs.start(runs.command(tmp_path, steps=4, **settings), cache))
  assert_same_numbers(tmp_path, one, 4)
  _, streams = runs.checkpoint(tmp_path, 4)
  _, expected = runs.checkpoint(one, 4)
  assert streams == expected


def assert_same_numbers(workdir, other, steps):
  for split, count in (('train', steps), ('validation', steps // 2)):
    lines = runs.metrics(workdir, split)
    expected = runs.metrics(other, split)[:count]
    assert len(lines) == count
    for line, right in zip(lines, expected, strict=True):
      assert line.keys() == right.keys()
      for name in line.keys() - {'split'}:
        np.testing.assert_allclose(
            line[name], right[name], rtol=1e-4, err_msg=name)
      # Tokens are counted, so equal counts mean equal rows.
      if split == 'train':
        assert line['encoder_tokens'] == right['encoder_tokens']


def test_an_error_of_one_ends_both(tmp_path, cache):
  """No process waits for one that has failed, and the checkpoint that was being
  written gets whole."""
  data = tmp_path / 'examples.jsonl'
  data.write_text(8 * (json.dumps(
      {'inputs': 'He went to the sea.', 'targets': 'It was calm.'}) + '\n'))
  workdir = tmp_path / 'run'
  workdir.mkdir()
  (workdir / 'eval').write_text('')  # Where predictions should go.
  processes = start_two(
      workdir, cache, steps=3, data__objective='supervised', data__path=data,
      data__validation_path=data, data__packing=False, eval__metric='rouge',
      eval__decode_every_steps=2)
  assert f'error: Not a directory: {workdir}/eval' in (
      runs.finish(processes[0], code=2))
  assert 'another task died' in runs.finish(processes[1], code=-signal.SIGABRT)
  assert (workdir / 'checkpoints' / '2').is_dir()


def test_the_same_error_of_both_is_a_line_of_each(tmp_path):
  for process in start_two(
      tmp_path / 'run', None, data__vocabulary='no.model'):
    assert runs.finish(process, code=2).splitlines()[-1] == (
        'error: cannot read vocabulary no.model: No such file or directory')


def test_half_given_coordinates_are_refused(tmp_path):
  output = runs.finish(runs.start([
      *runs.command(tmp_path / 'run'), '--num_processes=2']), code=2)
  assert ('error: num_processes=2 and process_id=-1 need '
          '--coordinator=HOST:PORT.') in output
  assert 'Traceback' not in output
  assert not (tmp_path / 'run').exists()

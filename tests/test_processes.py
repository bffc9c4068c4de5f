"""Two real processes train as one does, and hand over to one."""

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


def test_half_given_coordinates_are_refused(tmp_path):
  output = runs.finish(runs.start([
      *runs.command(tmp_path / 'run'), '--num_processes=2']), code=2)
  assert ('error: num_processes=2 and process_id=-1 need '
          '--coordinator=HOST:PORT.') in output
  assert 'Traceback' not in output
  assert not (tmp_path / 'run').exists()

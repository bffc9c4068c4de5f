"""Runs that are cut off go on exactly: real processes, real signals."""

import signal
import time

import numpy as np
import pytest

import runs

STEPS = 12


@pytest.fixture(scope='module')
def whole(tmp_path_factory, cache):
  """A run that nothing interrupted."""
  workdir = tmp_path_factory.mktemp('whole')
  runs.finish(runs.start(runs.command(
      workdir, steps=STEPS, checkpoint__every_steps=2), cache))
  return workdir


def interrupt(workdir, cache, number):
  """Starts a run and sends it a signal once its first checkpoint is whole."""
  process = runs.start(runs.command(
      workdir, steps=STEPS, checkpoint__every_steps=2), cache)
  while not (workdir / 'checkpoints' / '2').is_dir():
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.005)
  process.send_signal(number)
  return process


def assert_same_run(workdir, other):
  arrays, streams = runs.checkpoint(workdir, STEPS)
  expected, expected_streams = runs.checkpoint(other, STEPS)
  assert arrays.keys() == expected.keys()
  assert any('opt_state' in name for name in arrays)
  for name, array in arrays.items():
    np.testing.assert_array_equal(array, expected[name], err_msg=name)
  assert streams == expected_streams  # And so the next batch.
  lines = runs.metrics(workdir)
  assert [line['step'] for line in lines] == list(range(1, STEPS + 1))
  assert lines == runs.metrics(other)


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, whole, cache):
  process = interrupt(tmp_path, cache, signal.SIGKILL)
  runs.finish(process, code=-signal.SIGKILL)
  # What the kill may leave: lines beyond the checkpoint, one cut in half.
  with open(tmp_path / 'metrics.jsonl', 'a') as file:
    file.write('{"step": 99, "spl')
  saved = [int(path.name) for path in (tmp_path / 'checkpoints').iterdir()
           if path.name.isdigit()]
  assert 2 <= max(saved) < STEPS
  output = runs.finish(runs.start(runs.command(
      tmp_path, steps=STEPS, checkpoint__every_steps=2), cache))
  assert f'from step {max(saved)}' in output
  assert_same_run(tmp_path, whole)


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_goes_on(tmp_path, whole, cache, number):
  output = runs.finish(interrupt(tmp_path, cache, number), code=128 + number)
  assert 'the same command goes on' in output
  assert 'Traceback' not in output
  stopped = runs.metrics(tmp_path)[-1]['step']
  assert f'Stopped at step {stopped};' in output
  assert (tmp_path / 'checkpoints' / str(stopped)).is_dir()  # No step is lost.
  output = runs.finish(runs.start(runs.command(
      tmp_path, steps=STEPS, checkpoint__every_steps=2), cache))
  assert f'from step {stopped}' in output
  assert_same_run(tmp_path, whole)


def test_init_from_takes_parameters_only(tmp_path, whole, cache):
  # As a run leaves it that was killed before its first checkpoint.
  (tmp_path / 'checkpoints').mkdir()
  runs.finish(runs.start(runs.command(
      tmp_path, steps=1, init_from=f'run:{whole}',
      precision__scan_layers=False, schedule__learning_rate=1e-30), cache))
  arrays, _ = runs.checkpoint(tmp_path, 1)
  expected, _ = runs.checkpoint(whole, STEPS)
  assert arrays['/step'] == 1
  # One step at the least rate there is: the parameters hardly moved.
  for name, array in arrays.items():
    if name.startswith('/params'):
      stacked = expected[name.replace('layers_0', 'layers')]
      np.testing.assert_allclose(
          array, stacked.reshape(array.shape), atol=1e-6, err_msg=name)
  counts = [array for name, array in arrays.items() if 'count' in name]
  assert counts
  for count in counts:
    np.testing.assert_array_equal(count, 1)

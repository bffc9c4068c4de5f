"""How a process ends after an error. What several do together is
tests/test_processes.py."""

import os
import subprocess

import pytest

import runs
from longt5_flax.training import distributed

# As TensorStore said it when a checkpoint met a full disk.
FULL = (
    'RESOURCE_EXHAUSTED: Error writing "opt_state.0/0.0" in OCDBT database at '
    'local file "/runs/a/24.tmp/state/": Failed writing: '
    '"/runs/a/24.tmp/state/d/cde9": Failed to write 2328811 bytes to file 11: '
    "No space left on device [os_error_code='28']\nIn path: /runs/a")


class Ended(BaseException):
  """In place of the end of this process."""


@pytest.mark.parametrize('error, line', [
    (ValueError(FULL),
     'error: No space left on device: /runs/a/24.tmp/state/'),
    (PermissionError(13, 'Permission denied', '/runs/b'),
     'error: Permission denied: /runs/b'),
    (OSError(28, 'No space left on device'), 'error: No space left on device')])
def test_what_the_system_refuses_is_one_line(error, line, monkeypatch, capsys):
  def end(code):
    raise Ended(code)

  monkeypatch.setattr(os, '_exit', end)
  with pytest.raises(Ended, match='2'):
    distributed.leave_after(error)
  assert capsys.readouterr().err == line + '\n'


def test_other_errors_stay_what_they_are():
  with pytest.raises(ValueError, match='of the program'):
    distributed.leave_after(ValueError('a mistake of the program'))


def test_a_limit_of_the_system(tmp_path):
  """A real process that may write no file of more than 8 KiB."""
  arguments = runs.command(tmp_path / 'run', steps=1)
  ended = subprocess.run(
      ['bash', '-c', 'ulimit -f 8; exec "$0" "$@"', *arguments], cwd=runs.ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'}, capture_output=True, text=True,
      timeout=240, check=False)
  assert ended.returncode == 2, ended.stderr
  assert ended.stderr.splitlines()[-1].startswith('error: File too large')

"""Trains a list of runs one after another and compares them.

  python -m longt5_flax.sweep configs/sweeps/attention_type.py \
    --config.data.path=books.jsonl.xz --config.data.vocabulary=m.model \
    --config.data.validation_path=held_out.jsonl.xz

Ends with table.md and loss.png in the sweep's folder. The same command again
goes on where it was stopped; docs/sweeps.md says more.
"""

import argparse
import collections
import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging

from longt5_flax.config import ConfigError
from longt5_flax.data.sources import DataError
from longt5_flax.interop.atomic import replace_file
from longt5_flax.interop.orbax import checkpoint_steps
from longt5_flax.sweep_losses import check_held_out
from longt5_flax.sweep_plan import ROOT, Plan, Run, check_common, read_plan
from longt5_flax.sweep_report import write_report
from longt5_flax.training import run_config
from longt5_flax.training.checkpoints import check_same_run
from longt5_flax.training.schedules import DECAYING


class Folder:
  """What a sweep keeps on disk.

  `runs/NAME` is a run's own folder, `logs/NAME.txt` what it said on stderr,
  `sweep.json` how long each has taken and how it failed, and `compiled`, or
  what JAX_COMPILATION_CACHE_DIR names, the programs that all of them compile.

  Args:
    path: of the folder, which need not exist.
  """

  def __init__(self, path: str):
    self.path = path
    self.cache = os.path.abspath(self.file('compiled'))
    self._record_path = self.file('sweep.json')
    self.record: dict[str, dict[str, Any]] = {}
    if os.path.exists(self._record_path):
      with open(self._record_path, encoding='utf-8') as file:
        self.record = json.load(file)

  def file(self, *names: str) -> str:
    return os.path.join(self.path, *names)

  def workdir(self, run: Run) -> str:
    return self.file('runs', run.name)

  def step(self, run: Run) -> int:
    """The step that a run has reached and saved.

    Raises:
      ConfigError: its folder holds a run that is none of this sweep.
    """
    workdir = self.workdir(run)
    step = max(checkpoint_steps(workdir), default=0)
    if step:
      with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
        saved = json.load(file)
      del saved['run']
      values = run_config.resolved(run.config)
      # Whether the vocabulary is the same one, train.py finds out.
      check_same_run(
          saved, values | {'vocabulary': saved['vocabulary']}, workdir)
      # train.py would go on, but what is done could not be compared.
      for name in ('init_from', 'schedule'):
        if saved[name] != values[name]:
          raise ConfigError(f'{workdir} holds a run with another {name}: keep '
                            'it, or choose another --workdir.')
      if step > run.config.steps:
        raise ConfigError(f'{workdir} holds {step} steps, more than steps='
                          f'{run.config.steps}: choose another --workdir.')
      kind = run.config.schedule.name
      if kind in DECAYING and saved['steps'] != run.config.steps:
        raise ConfigError(
            f'{workdir} holds a run with schedule.name={kind!r} for steps='
            f'{saved["steps"]}, not {run.config.steps}: keep the value, or '
            'choose another --workdir.')
    return step

  def seconds(self, run: Run) -> float | None:
    """How long a run has taken; None if a killed sweep could not say."""
    return self.record.get(run.name, {'seconds': None})['seconds']

  def note(self, run: Run, seconds: float | None, error: str | None) -> None:
    """Records how long a run has taken, and how it failed."""
    self.record[run.name] = {'seconds': seconds, 'error': error}
    replace_file(self._record_path, json.dumps(self.record, indent=2))

  @contextlib.contextmanager
  def locked(self) -> Iterator[int]:
    """Makes the folder; gives a file that is locked while somebody has it open.

    Raises:
      ConfigError: somebody has.
    """
    os.makedirs(self.file('logs'), exist_ok=True)
    with open(self.file('lock'), 'w', encoding='utf-8') as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        raise ConfigError(f'{self.path} is in use by another sweep, or by a '
                          'run that a killed one has left.') from None
      yield file.fileno()


class StopRequest:
  """Passes a signal that ends the sweep on to the run, which then saves."""

  def __init__(self):
    self.signal = 0
    self._process: subprocess.Popen | None = None

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Until its end; signals then do again what they did."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup's.
      numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, self._request)
              for number in numbers}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def watch(self, process: subprocess.Popen) -> None:
    """Says which run to stop; at once, where a signal came before."""
    self._process = process
    if self.signal:
      process.terminate()

  def _request(self, number, frame):
    del frame
    self.signal = number
    if self._process:
      self._process.terminate()


def run_sweep(plan: Plan, folder: Folder) -> int:
  """Runs what is left of a sweep.

  Returns:
    The exit code: 0, 1 where a run failed, 128 + the signal that ended it.

  Raises:
    ConfigError, DataError: the folder holds another sweep; what all runs read
      cannot be read; or they cannot be compared on the held-out documents.
  """
  steps = [folder.step(run) for run in plan.runs]  # Raises before any starts.
  if any(step < run.config.steps
         for step, run in zip(steps, plan.runs, strict=True)):
    check_common(plan)
  check_held_out(plan)
  if not plan.held_out:
    say('No data.validation_path: runs will not be compared on the same rows.')
  stop = StopRequest()
  with folder.locked() as lock, stop.listening():
    for i, run in enumerate(plan.runs):
      title = f'[{i + 1}/{len(plan.runs)}] {run.name}:'
      if steps[i] == run.config.steps:
        say(f'{title} finished before')
        continue
      say(f'{title} from step {steps[i]} to {run.config.steps}')
      before = folder.seconds(run) if steps[i] else 0.0
      folder.note(run, None, None)  # What stays, should this be killed.
      start = time.monotonic()
      error = train(run, folder, stop, lock)
      seconds = None if before is None else before + time.monotonic() - start
      folder.note(run, seconds, None if stop.signal else error)
      if stop.signal:
        say(f'Stopped in {run.name} at step {folder.step(run)}; the same '
            'command goes on.')
        return 128 + stop.signal
      if error:
        say(f'{title} failed: {error}')
  # Only now may this process take the device.
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    jax.config.update('jax_compilation_cache_dir', folder.cache)
  finished = {run.name: folder.workdir(run) for run in plan.runs
              if folder.step(run) == run.config.steps}
  say(write_report(plan, finished, folder.record, folder.path))
  return int(len(finished) < len(plan.runs))


def train(run: Run, folder: Folder, stop: StopRequest, lock: int) -> str | None:
  """Trains a run to its end; returns the line that says why it failed."""
  process = subprocess.Popen(
      [sys.executable, os.path.join(ROOT, 'train.py'), *run.arguments,
       f'--workdir={folder.workdir(run)}'],
      stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
      errors='replace', pass_fds=(lock,),
      env={'JAX_COMPILATION_CACHE_DIR': folder.cache} | os.environ,
      # Gets its signals from `stop` alone: a second one would not let it save.
      process_group=0)
  stop.watch(process)
  lines: collections.deque[str] = collections.deque(maxlen=100)

  def copy():
    with open(folder.file('logs', f'{run.name}.txt'), 'a',
              encoding='utf-8') as log:
      for line in process.stderr or ():
        lines.append(line.strip())
        log.write(line)
        sys.stderr.write(line)

  reader = threading.Thread(target=copy, daemon=True)
  reader.start()
  code = process.wait()
  reader.join(10)  # Longer only if its workers outlived it.
  return error_line(code, lines) if code else None


def error_line(code: int, lines: Sequence[str]) -> str:
  """Why a process ended.

  Args:
    code: its exit code.
    lines: the last that it wrote to stderr.
  """
  for line in reversed(lines):
    if line.startswith('error: '):
      return line.removeprefix('error: ')
    if re.match(r'[\w.]*(Error|Exception|Interrupt)\b', line):
      return line
  if code < 0:
    return f'ended by {signal.Signals(-code).name}'
  return f'exit code {code}'


def say(text: str) -> None:
  """Prints, in order with what the runs print."""
  print(text, flush=True)


def show_list(plan: Plan, folder: Folder) -> None:
  """Says what a sweep would run."""
  for run in plan.runs:
    step = folder.step(run)
    state = ('finished' if step == run.config.steps else
             f'at step {step} of {run.config.steps}')
    own = ' '.join(f'{key}={value}' for key, value in run.overrides.items())
    say(f'{run.name} ({state}): {own or "no overrides of its own"}')
  if plan.held_out:
    names = ', '.join(objective.name for objective in plan.held_out)
    say(f'Compared on held-out documents by: {names}')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  parser = argparse.ArgumentParser(
      prog='python -m longt5_flax.sweep', allow_abbrev=False,
      description='Trains a list of runs one after another and compares them.',
      epilog='--config.KEY=VALUE is an override of all runs.')
  parser.add_argument('file', help='configs/sweeps/NAME.py')
  parser.add_argument('--workdir', metavar='DIR',
                      help='by default runs/sweeps/NAME')
  parser.add_argument('--list', action='store_true',
                      help='say what would run, and run nothing')
  options, overrides = parser.parse_known_args(argv)
  logging.set_verbosity(logging.ERROR)  # Orbax says a lot.
  try:
    plan = read_plan(options.file, overrides, needs_data=not options.list)
    folder = Folder(
        options.workdir or os.path.join('runs', 'sweeps', plan.name))
    if options.list:
      show_list(plan, folder)
      return 0
    return run_sweep(plan, folder)
  except (ConfigError, DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:  # No run was at work.
    say('Stopped; the same command goes on.')
    return 128 + signal.SIGINT


if __name__ == '__main__':
  sys.exit(main())

"""One measurement, one process: nothing of it is left for the next, and one
that runs out of memory or time ends alone.

Imports the standard library only, so that a peer's process holds no JAX.
"""

import argparse
import contextlib
import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Show = Callable[[Line], None]

ROOT = Path(__file__).parent.parent
# What JAX and PyTorch say, and the C++ below them.
_OUT_OF_MEMORY = ('RESOURCE_EXHAUSTED', 'OutOfMemoryError', 'out of memory',
                  'Out of memory')
_EXCEPTION = re.compile(r'[\w.]+(Error|Exception|Unsupported): ')
_STDERR_SHOWN = 4000  # Characters.


def run_alone(function: str, arguments: Line, timeout: float,
              environment: dict[str, str] | None = None) -> Line:
  """Calls a function in a process of its own and joins what it yields.

  Args:
    function: 'module:name' of a generator of lines.
    arguments: its keywords, as JSON has them.
    timeout: seconds until the process is killed.
    environment: variables to set in the process.

  Returns:
    One line of everything that was yielded; of a process that failed, what it
    had yielded until then, `error`, and `stderr`, the end of what it said.
  """
  return _run([sys.executable, '-m', 'benchmarks.processes', function,
               json.dumps(arguments)], timeout, ROOT,
              os.environ | (environment or {}))


def run_peer_alone(function: str, arguments: Line,
                   options: argparse.Namespace) -> Line:
  """`run_alone` of a peer, which finds packages as its interpreter does alone.

  Neither PYTHONPATH nor the folder this is started in has a say: packages that
  are there for JAX are not those that a peer was installed with.

  Args:
    function, arguments: as of `run_alone`.
    options: of a command with `add_peer_options`.
  """
  clean = {name: value for name, value in os.environ.items()
           if name not in ('PYTHONPATH', 'PYTHONHOME')}
  with tempfile.TemporaryDirectory() as folder:
    return _run([options.peer_python, '-P', os.path.abspath(__file__), function,
                 json.dumps(arguments)], options.peer_timeout, folder, clean)


def add_peer_options(parser: argparse.ArgumentParser) -> None:
  """Which interpreter a peer runs in, and how long it may take."""
  parser.add_argument(
      '--peer_python', type=_program, default=sys.executable, metavar='PYTHON',
      help='an interpreter, 3.11 or later, that has torch and transformers '
      'without PYTHONPATH')
  parser.add_argument(
      '--peer_timeout', type=float, default=200.0, metavar='SECONDS',
      help='as --case_timeout, of a peer')


def _program(text):
  path = shutil.which(text)
  if path is None:
    raise argparse.ArgumentTypeError(f'{text} is not a program.')
  return os.path.abspath(path)  # It is started in another folder.


def _run(command, timeout, folder, variables):
  with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as err:
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=err, text=True, cwd=folder,
        env=variables, process_group=0)
    error = None
    try:
      output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
      _end(process)
      output, _ = process.communicate()
      error = f'more than {timeout:g} s'
    finally:
      _end(process)  # Also what it has started itself, and on Ctrl-C.
    err.seek(0)
    said = err.read()
  result: Line = {}
  for line in output.splitlines():
    result |= json.loads(line)
  if error is None and process.returncode:
    error = _explain(process.returncode, said)
  if error:
    result |= {'error': error, 'stderr': said[-_STDERR_SHOWN:]}
  return result


def _end(process):
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)


def _explain(code, said):
  lines = said.strip().splitlines() or ['']
  errors = [line for line in lines if _EXCEPTION.match(line)]
  last = (errors or lines)[-1]
  if any(text in last for text in _OUT_OF_MEMORY):
    return 'out of memory'
  return f'exit code {code}: {last[:300]}'


def show_on(path: str | None) -> Show:
  """A function that prints a line, at once, and adds it to a file."""
  def show(line):
    text = json.dumps(line)
    print(text, flush=True)
    if path:
      with open(path, 'a', encoding='utf-8') as file:
        file.write(text + '\n')

  return show


def environment(benchmark: str, *packages: str) -> Line:
  """What ran: commit, Python, and the packages that are installed."""
  commit = subprocess.run(
      ['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD'],
      capture_output=True, text=True).stdout.strip()
  found = {}
  for name in packages:
    with contextlib.suppress(PackageNotFoundError):
      found[name] = version(name)
  return {'benchmark': benchmark, 'measure': 'environment',
          'commit': commit or None, 'python': platform.python_version(),
          **found}


def main() -> None:
  """What both start: results go to its stdout, all else to stderr."""
  parser = argparse.ArgumentParser()
  parser.add_argument('function')
  parser.add_argument('arguments', type=json.loads)
  given = parser.parse_args()
  results = os.fdopen(os.dup(1), 'w', encoding='utf-8')
  os.dup2(2, 1)
  if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # Last, so that it hides nothing.
  module, _, name = given.function.partition(':')
  for line in getattr(importlib.import_module(module), name)(**given.arguments):
    print(json.dumps(line), file=results, flush=True)


if __name__ == '__main__':
  main()

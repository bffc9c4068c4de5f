"""What other processes make: rows of batches, shards.

Workers are started afresh, not forked (JAX has threads) and not by
`multiprocessing`, which would run the user's script again in each of them. A
process owns whole rows, so what is in a batch does not depend on how many there
are.
"""

import functools
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from longt5_flax.data.row_streams import Row, RowStream
from longt5_flax.data.sources import DataError

# Batches, or what else a worker makes, that wait to be asked for: tokenising a
# long novel takes as long as several of them.
_PREFETCH = 8
# What a worker runs. It needs neither JAX nor what the package imports for
# users: without them it starts in half a second less and 100 MB smaller.
_WORKER = """
import absl.logging, multiprocessing.connection, sys, types
absl.logging.set_verbosity('error')  # Grain warns that it cannot import JAX.
pipe = multiprocessing.connection.Connection(int(sys.argv[1]))
sys.path[:], folder = pipe.recv()
sys.modules['jax'] = None
package = sys.modules['longt5_flax'] = types.ModuleType('longt5_flax')
package.__path__ = [folder]
from longt5_flax.data import workers
workers.serve(pipe)
"""


class RowError(RuntimeError):
  """A row could not be made."""


class WorkerError(RuntimeError):
  """A worker failed, or ended before its time."""


class Made(NamedTuple):
  """A row, and the state of its stream behind it."""
  row: Row
  state: dict[str, Any]


class Job(NamedTuple):
  """What makes rows.

  Attributes:
    make_stream: the stream of a row number; to be pickled for workers.
    states: row number -> state to go on from, None for the start.
    filenos: open files that workers inherit.
  """
  make_stream: Callable[[int], RowStream]
  states: dict[int, dict[str, Any] | None]
  filenos: Sequence[int] = ()


class InProcess(Iterator[dict[int, Made]]):
  """Makes rows in this process.

  Args:
    job: of all its rows.
  """

  def __init__(self, job: Job):
    self._streams = {}
    for row, state in job.states.items():
      self._streams[row] = job.make_stream(row)
      if state is not None:
        self._streams[row].set_state(state)

  def __next__(self) -> dict[int, Made]:
    made = {}
    for row, stream in self._streams.items():
      try:
        made[row] = Made(next(stream), stream.get_state())
      except DataError:
        raise
      except Exception as error:
        raise RowError(f'row {row}: {type(error).__name__}: {error}'
                       ) from error
    return made

  def close(self) -> None:
    """Nothing to end."""


class Workers:
  """Makes rows in other processes, some batches ahead.

  Args:
    job: of all their rows.
    count: of processes.
  """

  def __init__(self, job: Job, count: int):
    rows = list(job.states)
    self._rows = [rows[i::count] for i in range(min(count, len(rows)))]
    self._workers = [
        Worker(functools.partial(InProcess, job._replace(
            states={row: job.states[row] for row in part})), job.filenos)
        for part in self._rows]

  def __next__(self) -> dict[int, Made]:
    made: dict[int, Made] = {}
    for rows, worker in zip(self._rows, self._workers, strict=True):
      try:
        made.update(next(worker))
      except WorkerError as error:
        raise RowError(f'rows {sorted(rows)}: their {error}') from None
    return made

  def close(self) -> None:
    """Ends the processes."""
    for worker in self._workers:
      worker.close()


class Worker(Iterator[Any]):
  """A process that iterates, and a thread here that fetches what it makes.

  Args:
    make: gives what is to be iterated over; to be pickled.
    filenos: open files that the process inherits.
  """

  def __init__(self, make: Callable[[], Iterable[Any]],
               filenos: Sequence[int] = ()):
    self._made: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._free = threading.Semaphore(_PREFETCH)
    self._stop = threading.Event()
    # Here, because what cannot be pickled is the caller's mistake.
    pickled = pickle.dumps(make)
    here, there = socket.socketpair()
    with there:
      # Blocked signals are inherited: Ctrl-C and a scheduler's SIGTERM are for
      # the run to answer, and it may still want rows to end a step.
      mask = signal.pthread_sigmask(
          signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
      try:
        self._process = subprocess.Popen(
            [sys.executable, '-c', _WORKER, str(there.fileno())],
            pass_fds=(there.fileno(), *filenos), stdin=subprocess.DEVNULL)
      finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    threading.Thread(target=_fetch, daemon=True, args=(
        Connection(here.detach()), pickled, self._made, self._free,
        self._stop)).start()

  def __next__(self) -> Any:
    """What it made next.

    Raises:
      DataError, RowError: what it raised itself.
      WorkerError: it raised anything else, or was ended.
    """
    made = self._made.get()
    self._free.release()
    if isinstance(made, Exception):
      raise made
    if made is None:
      # The pipe closes a moment before the process has ended.
      code = self._process.wait()
      if not code:
        raise StopIteration
      raise WorkerError(f'worker process {self._process.pid} ended ' + (
          f'with exit code {code}' if code > 0 else
          f'by signal {-code} ({signal.Signals(-code).name})'))
    return made

  def close(self) -> None:
    """Ends the process."""
    self._stop.set()
    self._free.release()
    self._process.kill()
    self._process.wait()


def _fetch(pipe: Connection, make: bytes, made: queue.SimpleQueue,
           free: threading.Semaphore, stop: threading.Event) -> None:
  """Sends what to make and takes in results, a bounded number ahead.

  Ends with None when the pipe is closed.
  """
  folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  with pipe:
    try:
      pipe.send((sys.path, folder))
      pipe.send_bytes(make)
      while free.acquire() and not stop.is_set():
        made.put(pipe.recv())
    except (EOFError, OSError):
      made.put(None)


def serve(pipe: Connection) -> None:
  """A worker's life: makes what it is told to until nobody wants it."""
  try:
    for made in pickle.loads(pipe.recv_bytes())():
      pipe.send(made)
  except (EOFError, ConnectionError):
    pass  # The run is over.
  except DataError as error:
    pipe.send(error)
  except Exception as error:
    kind = RowError if isinstance(error, RowError) else WorkerError
    trace = traceback.format_exception(error.__cause__ or error)
    pipe.send(kind(f'{error}\n\nIn the worker:\n{"".join(trace)}'))

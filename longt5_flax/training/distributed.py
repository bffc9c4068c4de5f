"""Several processes of one run: one a host, each feeding its own rows."""

import json
import os
import re
import sys
import threading
import traceback
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from longt5_flax.config import ConfigError

# Seconds that a process which failed waits for the others to end as well.
_PATIENCE = 10.0


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
  """Joins the run's processes, before anything touches a device.

  With a coordinator address the three values are used. Without, the
  environment decides: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and
  JAX_PROCESS_ID; a Slurm step of several tasks; a TPU pod with several hosts.
  In all other cases the run is this process alone.

  Args:
    coordinator: host:port of process 0, or ''.
    num_processes: how many; -1 if not said.
    process_id: of this one; -1 if not said.

  Raises:
    ConfigError: some of the three values are missing or impossible.
  """
  env = os.environ
  if not coordinator and 'JAX_COORDINATOR_ADDRESS' in env:
    coordinator = env['JAX_COORDINATOR_ADDRESS']
    try:
      num_processes = int(env['JAX_NUM_PROCESSES'])
      process_id = int(env['JAX_PROCESS_ID'])
    except (KeyError, ValueError) as error:
      raise ConfigError(
          f'JAX_COORDINATOR_ADDRESS={coordinator} needs JAX_NUM_PROCESSES and '
          f'JAX_PROCESS_ID, both integers ({error}).') from None
  if coordinator:
    if not 0 <= process_id < num_processes:
      raise ConfigError(
          f'process_id={process_id} must be in [0, num_processes='
          f'{num_processes}) when coordinator={coordinator} is given.')
    jax.distributed.initialize(coordinator, num_processes, process_id)
  elif num_processes != -1 or process_id != -1:
    raise ConfigError(
        f'num_processes={num_processes} and process_id={process_id} need '
        '--coordinator=HOST:PORT.')
  elif _is_cluster(env):
    jax.distributed.initialize()


def _is_cluster(env):
  slurm_tasks = env.get('SLURM_STEP_NUM_TASKS', '1')
  tpu_hosts = env.get('TPU_WORKER_HOSTNAMES', '').split(',')
  return slurm_tasks != '1' or len(tpu_hosts) > 1


def leave(code: int) -> int:
  """Leaves the other processes after an error, which they may know nothing of.

  They would wait for this one in the next thing that all do together, and jax,
  at exit, lets it wait for them. Those that have had the same error, such as a
  mistake in the config, leave together with it. Otherwise this process ends
  here, and jax then ends the others, which say so: at once if it is the main
  one, else when they have missed its heartbeat for 100 seconds.

  Args:
    code: the exit code.

  Returns:
    The exit code, if all processes leave or there are no others.
  """
  if not jax.distributed.is_initialized():
    return code
  leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
  leaving.start()
  leaving.join(_PATIENCE)
  if leaving.is_alive():
    _end_here(code)
  return code


def _end_here(code):
  """Without what Python and other threads would still do."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def leave_after(error: BaseException) -> int:
  """The exit code after an error that is no mistake in a setting.

  What the system refused, such as to write on a full disk, is one line. Then
  the process ends here: threads that were writing too would each say so.

  Raises:
    BaseException: `error`, if it is something else and no other process waits.
  """
  refused = _refused_by_the_system(error)
  if refused:
    print(f'error: {refused}', file=sys.stderr)
    _end_here(leave(2))
  if not jax.distributed.is_initialized():
    raise error
  traceback.print_exception(error)
  return leave(1)


def _refused_by_the_system(error):
  """'reason: path', or nothing."""
  if isinstance(error, OSError) and error.strerror:
    path = error.filename
    return error.strerror + (f': {path}' if path else '')
  # TensorStore's, by which checkpoints are written.
  found = re.search(r'local file "(.*?)".*: ([^:]*) \[os_error_code=',
                    str(error), re.DOTALL)
  return f'{found[2]}: {found[1]}' if found else ''


def is_main() -> bool:
  """Whether this process writes files and logs."""
  return jax.process_index() == 0


def gather_states(states: dict[str, Any]) -> dict[str, Any]:
  """The union of every process's states; equal on all of them.

  Args:
    states: JSON values by row.
  """
  if jax.process_count() == 1:
    return states
  data = np.frombuffer(json.dumps(states).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(data)))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[:len(data)] = data
  union: dict[str, Any] = {}
  for row, length in zip(multihost_utils.process_allgather(padded), lengths,
                         strict=True):
    union |= json.loads(row[:int(length)].tobytes().decode())
  return union

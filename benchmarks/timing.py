"""How steps are timed and summarised, alike for this package and its peers."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.processes import Line

# What an H100 or H200 reaches, as measured: bf16 matrix products of 8192 x 8192
# random numbers in operations a second, and bytes a second read and written.
MATMUL_FLOPS = {'NVIDIA H200': 800e12, 'NVIDIA H100 80GB HBM3': 800e12}
MEMORY_RATE = {'NVIDIA H200': 4.3e12, 'NVIDIA H100 80GB HBM3': 3.0e12}


class Limits(NamedTuple):
  """How long to measure.

  Attributes:
    warmup: calls that are not counted.
    steps: the fewest calls,
    seconds: and the shortest time, that end a measurement;
    max_seconds: a time that ends it with fewer calls, but at least one.
  """
  warmup: int = 2
  steps: int = 10
  seconds: float = 3.0
  max_seconds: float = 60.0


def time_calls(call: Callable[[], Any], wait: Callable[[Any], Any],
               limits: Limits, ahead: bool = True) -> list[float]:
  """Seconds between the ends of consecutive calls.

  Args:
    call: starts one, and returns what `wait` takes.
    wait: returns when it has ended.
    limits: when to stop.
    ahead: as in a training loop, a call is sent off before the one before it is
      waited for, so that the device need not wait for Python.
  """
  start = time.perf_counter()
  for _ in range(limits.warmup):
    wait(call())
    if time.perf_counter() - start > limits.max_seconds / 4:
      break
  times: list[float] = []
  pending = [call()] if ahead else []
  start = last = time.perf_counter()
  while not _enough(times, last - start, limits):
    pending.append(call())
    wait(pending.pop(0))
    now = time.perf_counter()
    times.append(now - last)
    last = now
  for each in pending:
    wait(each)
  return times


def _enough(times, elapsed, limits):
  if len(times) >= limits.steps and elapsed >= limits.seconds:
    return True
  return bool(times) and elapsed >= limits.max_seconds


def spread(seconds: Sequence[float]) -> dict[str, float | int]:
  """Median, tenth and ninetieth percentile in milliseconds."""
  tenths = (statistics.quantiles(seconds, n=10, method='inclusive')
            if len(seconds) > 1 else [seconds[0]] * 9)
  return {'steps': len(seconds),
          'median_ms': round(1000 * statistics.median(seconds), 3),
          'p10_ms': round(1000 * tenths[0], 3),
          'p90_ms': round(1000 * tenths[-1], 3)}


def named(name: str, seconds: Sequence[float]) -> Line:
  """The spread of one of several measurements of a line."""
  found = spread(seconds)
  return {f'{name}_ms': found['median_ms'], f'{name}_p10_ms': found['p10_ms'],
          f'{name}_p90_ms': found['p90_ms']}


def compare(peer: Line, ours: Line | None, time_key: str = 'median_ms') -> Line:
  """The peer's line, with how much better ours is, where both ended well."""
  if ours is None or 'error' in peer or 'error' in ours:
    return peer
  line = peer | {'speedup': round(peer[time_key] / ours[time_key], 2)}
  if peer['peak_bytes'] and ours['peak_bytes']:
    line['memory_ratio'] = round(ours['peak_bytes'] / peer['peak_bytes'], 3)
  return line

"""What a person sees while a run goes on: step, loss, speed, time left."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longt5_flax.training.flops import mfu, train_flops

# Between lines about a task, where there is no bar.
_QUIET_SECONDS = 30


class Meter:
  """Real tokens a second and MFU since the last reading, and memory.

  Args:
    model: LongT5Config.
    data: `inputs_length`, `targets_length`, `batch_size`.
    device_kind: of one device.
    num_devices: all of the run's.
  """

  def __init__(self, model: Any, data: Any, device_kind: str,
               num_devices: int):
    self._step_flops = data.batch_size * train_flops(
        model, data.inputs_length, data.targets_length)
    self._device = device_kind, num_devices
    self._reset()

  def _reset(self):
    self._start = time.perf_counter()
    self._steps = 0
    self._tokens = np.zeros(2)
    self._waited = 0.0

  def take(self, batches: Iterator[Any], running: Any = None) -> Any:
    """The next of `batches`; counts how long that took, unless the device is
    still at work afterwards.

    Args:
      batches: of the pipeline.
      running: arrays that the device computes meanwhile; None is nothing.
    """
    start = time.perf_counter()
    batch = next(batches)
    if all(leaf.is_ready() for leaf in jax.tree.leaves(running)):
      self._waited += time.perf_counter() - start
    return batch

  def add(self, metrics: dict[str, Any]) -> None:
    """Counts one finished step."""
    self._steps += 1
    self._tokens += [metrics['encoder_tokens'], metrics['decoder_tokens']]

  def leave_out(self, seconds: float) -> None:
    """Does not count time in which no step was meant to run."""
    self._start += seconds

  def read(self) -> dict[str, float | None]:
    """Rates since the last reading; empty if no step was counted.

    `input_wait` is the share of time in which there was no batch yet, counting
    what the device had no work left for at its end.
    """
    seconds = time.perf_counter() - self._start
    steps, tokens, waited = self._steps, self._tokens, self._waited
    self._reset()
    if not steps:
      return {}
    return {
        'encoder_tokens_per_second': tokens[0] / seconds,
        'decoder_tokens_per_second': tokens[1] / seconds,
        'steps_per_second': steps / seconds,
        'mfu': mfu(self._step_flops * steps / seconds, *self._device),
        'input_wait': waited / seconds,
        'peak_memory_bytes': _peak_memory(),
    }


def _peak_memory():
  """Of this process's first device so far; None where it does not count."""
  stats = jax.local_devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use')


class Report:
  """Lines, and on a terminal bars below them. To be closed, or used in a
  `with`.

  Args:
    enabled: False on all processes but one.
  """

  def __init__(self, enabled: bool):
    self.console = Console(
        quiet=not enabled, highlight=False, soft_wrap=True)
    self._bars = Progress(
        TextColumn('{task.description} {task.completed}/{task.total}'),
        BarColumn(None), TextColumn('{task.fields[left]} left'),
        console=self.console,
        disable=not (enabled and self.console.is_terminal))
    self._bars.start()

  def say(self, text: str) -> None:
    """Prints a line of its own."""
    self.console.print(text, markup=False)

  @contextlib.contextmanager
  def task(self, name: str, total: int, done: int = 0
           ) -> Iterator[Callable[[int], None]]:
    """A bar for as long as the block runs; where there is no terminal, a line
    now and then.

    Args:
      name: what is counted.
      total: of it.
      done: before the block.

    Returns:
      What to call with the number of those that are done anew.
    """
    bar = self._bars.add_task(name, total=total, completed=done, left='?')
    start = said = time.monotonic()
    count = done

    def advance(more):
      nonlocal count, said
      count += more
      now = time.monotonic()
      left = _clock((now - start) / (count - done) * (total - count))
      self._bars.update(bar, completed=count, left=left)
      if not self.console.is_terminal and now - said > _QUIET_SECONDS:
        said = now
        self.say(f'{name} {count}/{total}  {left} left')

    try:
      yield advance
    finally:
      self._bars.remove_task(bar)

  def close(self) -> None:
    self._bars.stop()

  def __enter__(self) -> 'Report':
    return self

  def __exit__(self, *_: Any) -> None:
    self.close()


class ProgressReport(Report):
  """A line every log step, and a bar of steps.

  Args:
    total_steps: of the whole run.
    first_step: where this process begins.
    enabled: False on all processes but one.
  """

  def __init__(self, total_steps: int, first_step: int, enabled: bool):
    super().__init__(enabled)
    self._total = total_steps
    self._steps = self._bars.add_task(
        'step', total=total_steps, completed=first_step, left='?')

  def advance(self, step: int) -> None:
    self._bars.update(self._steps, completed=step)

  def line(self, step: int, metrics: dict[str, Any],
           rates: dict[str, Any]) -> None:
    """Prints a log step."""
    left = (self._total - step) / rates['steps_per_second']
    text = (f'step {step}/{self._total}  loss {float(metrics["loss"]):.4f}  '
            f'accuracy {float(metrics["accuracy"]):.3f}  '
            f'{rates["encoder_tokens_per_second"]:,.0f} + '
            f'{rates["decoder_tokens_per_second"]:,.0f} tokens/s  ')
    if rates['mfu'] is not None:
      text += f'MFU {rates["mfu"]:.1%}  '
    self.console.print(text + f'{_clock(left)} left')
    self._bars.update(self._steps, left=_clock(left))


def _clock(seconds):
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}'

"""Runs of train.py in this process, through its own command line and main: the
tests that look at many runs share what these compile."""

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict, config_flags

import runs
import train
from longt5_flax.data.pipeline import BatchIterator
from longt5_flax.data.seqio_source import TaskBatches
from longt5_flax.training.metrics import read_metrics

CONFIG = f'--config={runs.ROOT}/configs/quickstart.py'
# Three steps, of one row for each of the tests' 8 devices.
TINY = runs.TINY | {
    'steps': 3, 'data.batch_size': 8,
    'data.path': f'{runs.ROOT}/corpus/validation.jsonl.xz',
    'data.vocabulary': f'{runs.ROOT}/corpus/vocabulary.model',
    'schedule.warmup_steps': 1,
}


def parse(*arguments: str) -> tuple[ConfigDict, list[str]]:
  """The config that train.py reads from a command line, and what else is on
  it."""
  values = flags.FlagValues()
  argv = ['train.py', *arguments]
  config = config_flags.DEFINE_config_file(
      'config', lock_config=True, flag_values=values, sys_argv=argv)
  _, *rest = values(argv, known_only=True)
  return config.value, rest


def arguments(overrides: dict[str, Any]) -> list[str]:
  """The command line of a tiny run."""
  return [CONFIG, *(f'--config.{name}={value}' for name, value
                    in (TINY | overrides).items())]


def tiny(overrides: dict[str, Any]) -> ConfigDict:
  """The config of a tiny run; values reach it as text, as a shell's do."""
  return parse(*arguments(overrides))[0]


@dataclasses.dataclass(frozen=True)
class Run:
  """What a run left.

  Attributes:
    workdir: its folder.
    batches: that it trained on, as the host made them.
    shardings: of the saved parameters.
    printed: to the terminal.
  """
  workdir: Path
  batches: list[dict[str, np.ndarray]]
  shardings: Any
  printed: str

  @property
  def config(self) -> dict[str, Any]:
    return json.loads((self.workdir / 'config.json').read_text('utf-8'))

  def lines(self, split: str = 'train') -> list[dict[str, Any]]:
    return [line for line in read_metrics(str(self.workdir / 'metrics.jsonl'))
            if line['split'] == split]

  def column(self, name: str) -> list[float]:
    """A metric of every step."""
    return [line[name] for line in self.lines()]

  @property
  def checkpoints(self) -> list[int]:
    return sorted(map(int, os.listdir(self.workdir / 'checkpoints')))

  def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
    """path -> shape of `params` or `opt_state` in the newest checkpoint."""
    path = self.workdir / 'checkpoints' / str(self.checkpoints[-1]) / 'state'
    tree = ocp.StandardCheckpointer().metadata(path).item_metadata.tree
    return {jax.tree_util.keystr(name, simple=True, separator='/'):
            tuple(leaf.shape) for name, leaf
            in jax.tree_util.tree_leaves_with_path(tree[part])}


def run(workdir: Path, overrides: dict[str, Any], devices: int = 1) -> Run:
  """Calls train.main on a tiny config and looks over its shoulder.

  Args:
    workdir: of the run.
    overrides: key -> value, on top of TINY.
    devices: to run on; programs for several take longer to compile.
  """
  batches, shardings, printed = [], [], []
  save = train.Checkpoints.save
  say, make_mesh = train.ProgressReport.say, train.partitioning.make_mesh

  def small_mesh(sizes, all_devices):
    return make_mesh(sizes, all_devices[:devices])

  def recorded(next_batch):
    def recorded_next(self):
      batches.append(next_batch(self))
      return batches[-1]
    return recorded_next

  def recorded_save(self, step, state, *rest):
    shardings.append(jax.tree.map(lambda leaf: leaf.sharding, state.params))
    save(self, step, state, *rest)

  def recorded_say(self, text):
    printed.append(text)
    say(self, text)

  with pytest.MonkeyPatch.context() as patch:
    for kind in (BatchIterator, TaskBatches):
      patch.setattr(kind, '__next__', recorded(kind.__next__))
    patch.setattr(train.Checkpoints, 'save', recorded_save)
    patch.setattr(train.ProgressReport, 'say', recorded_say)
    patch.setattr(train.partitioning, 'make_mesh', small_mesh)
    patch.setattr('sys.argv', ['train.py', *arguments(overrides)])
    assert train.main(tiny(overrides), str(workdir)) == 0
  return Run(workdir, batches, shardings[-1] if shardings else None,
             '\n'.join(printed))


@contextlib.contextmanager
def cheap_compilation(folder: Path) -> Iterator[None]:
  """Runs within it share what they compile, and compile without polish."""
  values = {
      'jax_compilation_cache_dir': str(folder),
      'jax_persistent_cache_min_compile_time_secs': 0,
      'jax_persistent_cache_min_entry_size_bytes': 0,
      'jax_disable_most_optimizations': True,
  }
  before = {name: jax.config.values[name] for name in values}
  for name, value in values.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()  # JAX decides once whether there is one.
  try:
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
  """Gives back the handlers of Ctrl-C and SIGTERM, which main takes."""
  before = {number: signal.getsignal(number)
            for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)

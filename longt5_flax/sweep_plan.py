"""A sweep as its file describes it: the runs, and what they are compared on."""

import dataclasses
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from longt5_flax.command_line import read_config
from longt5_flax.config import ConfigError
from longt5_flax.data.sources import DataError, expand_paths
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.inputs import check_task_objective, pipeline_options
from longt5_flax.training import run_config
from longt5_flax.training.init_from import check_readable

# The checkout: train.py and configs are no part of the package.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

Overrides = Mapping[str, Any]  # key of the config -> value


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What the function `get_sweep` of a sweep file returns.

  Attributes:
    config: the config file of all runs, as seen from the checkout.
    runs: (name, overrides) of each.
    common: overrides of all runs. The command line's count more, and a run's
      own most.
    held_out: (name, overrides) of each objective on which all runs are compared
      at the end, on the documents of data.validation_path. By default the
      one that `config` and `common` train.
  """
  config: str
  runs: Sequence[tuple[str, Overrides]]
  common: Overrides = dataclasses.field(default_factory=dict)
  held_out: Sequence[tuple[str, Overrides]] = ()


@dataclasses.dataclass(frozen=True)
class Run:
  """A run, or an objective to compare runs on.

  Attributes:
    name: unique.
    overrides: its own.
    arguments: of train.py, work folder apart.
    config: all values.
  """
  name: str
  overrides: Overrides
  arguments: tuple[str, ...]
  config: ConfigDict


@dataclasses.dataclass(frozen=True)
class Plan:
  """A sweep, checked.

  Attributes:
    name: of its file.
    runs: in order.
    held_out: the objectives; none without data.validation_path.
  """
  name: str
  runs: tuple[Run, ...]
  held_out: tuple[Run, ...]


def read_plan(path: str, overrides: Sequence[str],
              needs_data: bool = True) -> Plan:
  """Reads a sweep file and the config of each of its runs.

  Args:
    path: of the file.
    overrides: the command line's, `--config.KEY=VALUE`.
    needs_data: refuse runs that are not told what to read.

  Raises:
    ConfigError: the file is no sweep, or a run cannot be; the message names it.
  """
  sweep = _read_sweep(path)
  for argument in overrides:
    if not re.match(r'--config\.[\w.]+=', argument):
      raise ConfigError(f'unexpected argument {argument!r}: overrides of all '
                        'runs are --config.KEY=VALUE.')
  file = os.path.join(ROOT, sweep.config)
  common = [*_arguments(sweep.common), *overrides]
  base = read_config(file, common)

  def read(kind: str, entries: Sequence[tuple[str, Overrides]]
           ) -> Iterator[Run]:
    for name, own in entries:
      arguments = (f'--config={file}', *common, *_arguments(own))
      try:
        config = read_config(file, arguments[1:])
        run_config.check_config(config)
        if needs_data:
          run_config.check_paths(config)
        pipeline_options(config, 1)
        if config.data.source == 'seqio':
          check_task_objective(config.data)
      except (ConfigError, DataError) as error:
        raise ConfigError(f'{kind} {name!r}: {error}') from None
      yield Run(name, own, arguments, config)

  held_out = sweep.held_out or [(base.data.objective, {})]
  return Plan(
      os.path.splitext(os.path.basename(path))[0],
      tuple(read('run', sweep.runs)),
      tuple(read('held_out', held_out)) if base.data.validation_path else ())


def check_common(plan: Plan) -> None:
  """Refuses what all runs would read and cannot: said once, not by each run.

  Files that only some runs name are those runs' own matter.

  Raises:
    ConfigError, DataError: a file is not there, or cannot be read.
  """
  first = plan.runs[0].config

  def is_common(*names: str) -> bool:
    return all(run.config.data[name] == first.data[name]
               for run in plan.runs for name in names)

  if first.data.source != 'seqio' and is_common('source'):
    if is_common('path'):
      expand_paths(first.data.path)
    if is_common('vocabulary', 'extra_ids'):
      Vocabulary(first.data.vocabulary, first.data.extra_ids)
  if first.init_from and all(
      run.config.init_from == first.init_from for run in plan.runs):
    check_readable(first.init_from)


def _arguments(overrides: Overrides) -> list[str]:
  return [f'--config.{key}={value}' for key, value in overrides.items()]


def _read_sweep(path: str) -> Sweep:
  if not os.path.isfile(path):
    raise ConfigError(f'no sweep file {path!r}.')
  if ROOT not in sys.path:
    sys.path.insert(0, ROOT)  # For `from configs.sweeps import ...`.
  spec = importlib.util.spec_from_file_location('sweep_file', path)
  if spec is None or spec.loader is None:
    raise ConfigError(f'{path} is no Python file.')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, 'get_sweep'):
    raise ConfigError(f'{path} has no function get_sweep.')
  sweep = module.get_sweep()
  if not isinstance(sweep, Sweep):
    raise ConfigError(f'{path}: get_sweep() must return a Sweep, not '
                      f'{type(sweep).__name__}.')
  if not sweep.runs:
    raise ConfigError(f'{path} has no runs.')
  for entries in (sweep.runs, sweep.held_out):
    _check_names(path, [name for name, _ in entries])
  return sweep


def _check_names(path, names):
  for name in names:
    if names.count(name) > 1:
      raise ConfigError(f'{path}: {names.count(name)} entries are named '
                        f'{name!r}.')
    if not re.fullmatch(r'\w[\w.+=-]*', name):  # A folder's, in Markdown.
      raise ConfigError(f'{path}: the name {name!r} must be letters, digits '
                        'and any of "_.+=-".')

"""What runs have left on disk, for `report`."""

import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from longt5_flax.compare import Examples, read_predictions
from longt5_flax.config import ConfigError, read_json_object
from longt5_flax.training.metrics import read_metrics

Lines = list[dict[str, Any]]
_NUMBERS = ('mean', 'low', 'high')


class Evaluation(NamedTuple):
  """A folder eval/<step>.

  Attributes:
    step: of the checkpoint.
    path: of the folder.
    record: what scores.json holds; `scores` in it has each score's `mean`,
      `low` and `high`.
    predictions: by id; {} if there are none.
  """
  step: int
  path: str
  record: dict[str, Any]
  predictions: Examples

  @property
  def scores(self) -> dict[str, dict[str, float]]:
    """By name."""
    return self.record['scores']

  @property
  def decoding(self) -> dict[str, Any]:
    """Its settings."""
    return self.record['decoding']


class Run(NamedTuple):
  """A run's folder.

  Attributes:
    name: of the run among the others.
    workdir: the folder.
    config: of config.json; {} where only another's weights were evaluated.
    train, validation: lines of metrics.jsonl.
    evaluations: in the order of steps.
    best_step: that the run has chosen by a score; None if it has not.
  """
  name: str
  workdir: str
  config: dict[str, Any]
  train: Lines
  validation: Lines
  evaluations: list[Evaluation]
  best_step: int | None

  @property
  def evaluation(self) -> Evaluation | None:
    """That of the best step, or else the last."""
    best = [it for it in self.evaluations if it.step == self.best_step]
    return next(iter(best or self.evaluations[-1:]), None)

  @property
  def history(self) -> list[Evaluation]:
    """Evaluations that differ from `evaluation` in nothing but the step."""
    def kind(it):
      return [it.record.get(name) for name in ('decoding', 'data', 'metric')]

    return [it for it in self.evaluations
            if self.evaluation and kind(it) == kind(self.evaluation)]


def read_runs(workdirs: Sequence[str]) -> list[Run]:
  """Reads folders.

  Raises:
    ConfigError: one is there twice, is none of a run, or a file in it is
      damaged.
  """
  workdirs = [os.path.normpath(workdir) for workdir in workdirs]
  for workdir in workdirs:
    if workdirs.count(workdir) > 1:
      raise ConfigError(f'{workdir} is there twice.')
  return [_read_run(workdir, name)
          for workdir, name in zip(workdirs, _names(workdirs), strict=True)]


def _names(workdirs):
  """As many of a path's last parts as tell the paths apart."""
  parts = [os.path.abspath(workdir).split(os.sep) for workdir in workdirs]
  for count in range(1, max(map(len, parts)) + 1):
    names = [os.sep.join(path[-count:]) for path in parts]
    if len({*names}) == len(names):
      break
  return names


def _read_run(workdir, name):
  if not os.path.isdir(workdir):
    raise ConfigError(f'{workdir}: there is no such folder.')
  config = os.path.join(workdir, 'config.json')
  metrics = os.path.join(workdir, 'metrics.jsonl')
  evaluations = _read_evaluations(os.path.join(workdir, 'eval'))
  if not evaluations and not os.path.isfile(metrics):
    raise ConfigError(f'{workdir} is no run: there is neither metrics.jsonl '
                      'nor an eval/STEP/scores.json in it.')
  splits: dict[str, Lines] = {'train': [], 'validation': []}
  try:
    for line in read_metrics(metrics):
      splits.setdefault(line['split'], []).append(line)
  except (ValueError, KeyError, TypeError) as error:
    raise ConfigError(f'{metrics} is damaged: {error}') from None
  best = _read_if_there(os.path.join(workdir, 'best.json'))
  return Run(name, workdir, _read_if_there(config), splits['train'],
             splits['validation'], evaluations, best.get('best'))


def _read_if_there(path):
  return read_json_object(path) if os.path.isfile(path) else {}


def _read_evaluations(folder):
  if not os.path.isdir(folder):
    return []
  evaluations = []
  for name in sorted(filter(str.isdigit, os.listdir(folder)), key=int):
    path = os.path.join(folder, name)
    scores = os.path.join(path, 'scores.json')
    predictions = os.path.join(path, 'predictions.jsonl')
    if os.path.isfile(scores):  # Else it was stopped half way.
      evaluations.append(Evaluation(
          int(name), path, _read_scores(scores),
          read_predictions(predictions) if os.path.isfile(predictions) else {}))
  return evaluations


def _read_scores(path):
  record = read_json_object(path)
  try:
    record['scores'] = {
        name: {key: float(score[key]) for key in _NUMBERS}
        for name, score in record['scores'].items()}
    record['decoding'] = dict(record.get('decoding', {}))
  except (KeyError, TypeError, ValueError, AttributeError):
    raise ConfigError(f'{path}: scores={json.dumps(record.get("scores"))} must '
                      'hold mean, low and high of each score, and decoding, '
                      'if it is there, settings by name.') from None
  return record

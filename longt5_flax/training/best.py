"""Which checkpoint of a run is the best one so far, and when to stop."""

import json
import os

from longt5_flax.interop.atomic import replace_file
from longt5_flax.interop.orbax import BEST_FILE, best_step, read_scores


class BestCheckpoint:
  """The scores of a run's evaluations, kept in `best.json` of its folder.

  Args:
    workdir: of the run.
    keep_best: name of the score that counts; '' if no checkpoint is to be kept
      for it.
    last_step: scores of later steps, of a run that was cut off after its last
      checkpoint, are dropped.

  Attributes:
    name: `keep_best`.

  Raises:
    ConfigError: the file is damaged.
  """

  def __init__(self, workdir: str, keep_best: str, last_step: int):
    self._path = os.path.join(workdir, BEST_FILE)
    self.name = keep_best
    name, scores = read_scores(workdir)
    self._scores = {step: score for step, score in scores.items()
                    if name == keep_best and step <= last_step}

  def __contains__(self, step: int) -> bool:
    return step in self._scores

  @property
  def step(self) -> int | None:
    """Whose checkpoint is to be kept; None if none is."""
    return best_step(self._scores) if self.name else None

  def add(self, step: int, score: float, write: bool) -> None:
    """Adds an evaluation.

    Args:
      step: that was evaluated.
      score: higher is better.
      write: also to the file; for one process of a run.
    """
    self._scores[step] = score
    if write:
      record = {'keep_best': self.name, 'best': self.step,
                'scores': {str(step): score for step, score
                           in sorted(self._scores.items())}}
      replace_file(self._path, json.dumps(record, indent=2) + '\n')

  def is_over(self, patience: int) -> bool:
    """Whether so many evaluations in turn were no better; 0: never."""
    since = [step for step in self._scores if step > (self.step or 0)]
    return 0 < patience <= len(since)

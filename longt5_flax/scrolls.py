"""The SCROLLS score of a model: the mean over the seven tasks.

  python -m longt5_flax.scrolls runs/*/eval/2000/scores.json

takes one scores.json of eval.py for each task, scored with the task's name as
`eval.metric`. SCROLLS itself scores hidden test sets.
"""

import argparse
import sys
from collections.abc import Sequence

from longt5_flax.config import ConfigError, read_json_object
from longt5_flax.evaluation.metrics import SCROLLS, scrolls_average

# The score that counts: its name, and `mean`, `low` and `high`.
Score = tuple[str, dict[str, float]]


def read_scores(paths: Sequence[str]) -> dict[str, Score]:
  """The score that counts of each task.

  Raises:
    ConfigError: a file is none of eval.py's for a task, a task is there twice,
      or one is missing.
  """
  tasks: dict[str, Score] = {}
  for path in paths:
    record = read_json_object(path)
    task = record.get('metric')
    if task not in SCROLLS:
      raise ConfigError(f'{path}: metric={task!r} must be one of '
                        f'{", ".join(SCROLLS)}.')
    if task in tasks:
      raise ConfigError(f'{path}: there is another scores.json of {task}.')
    tasks[task] = record['main'], record['scores'][record['main']]
  missing = [task for task in SCROLLS if task not in tasks]
  if missing:
    raise ConfigError(f'no scores.json of {", ".join(missing)}.')
  return {task: tasks[task] for task in SCROLLS}


def table(tasks: dict[str, Score]) -> str:
  """As Markdown, the average last."""
  average = scrolls_average(
      {task: score['mean'] for task, (_, score) in tasks.items()})
  return '\n'.join([
      '| task | score | mean | 95 % interval |', '|---|---|---|---|',
      *(f'| {task} | {name} | {score["mean"]:.2f} | {score["low"]:.2f} to '
        f'{score["high"]:.2f} |' for task, (name, score) in tasks.items()),
      f'| SCROLLS | mean | {average:.2f} | |'])


def make_parser() -> argparse.ArgumentParser:
  """Of the command line."""
  parser = argparse.ArgumentParser(
      prog='python -m longt5_flax.scrolls', allow_abbrev=False,
      description='The mean over the seven tasks of SCROLLS.')
  parser.add_argument('scores', nargs='+', metavar='SCORES_JSON',
                      help='one of each task')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  options = make_parser().parse_args(argv)
  try:
    print(table(read_scores(options.scores)))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())

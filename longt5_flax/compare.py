"""Compares two files of predictions by a paired bootstrap.

  python -m longt5_flax.compare A/predictions.jsonl B/predictions.jsonl

prints the score of both, the difference, its 95 % interval and a p-value, for
each number of the metric. Lines are objects with `id`, `prediction` and
`references`; both files must have the same examples.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from longt5_flax.config import ConfigError
from longt5_flax.evaluation import bootstrap
from longt5_flax.evaluation.metrics import METRICS, SCROLLS, find_metric

Examples = dict[str, dict[str, Any]]


def compare(first: str, second: str, metric: str, seed: int = 0
            ) -> dict[str, bootstrap.Difference]:
  """How much better the second file is.

  Args:
    first, second: files of predictions.
    metric: one of METRICS, or a task of SCROLLS.
    seed: of the draws.

  Raises:
    ConfigError: a file is not one of predictions, or they are of different
      examples.
  """
  files = [read_predictions(path) for path in (first, second)]
  if files[0].keys() != files[1].keys():
    only = files[0].keys() ^ files[1].keys()
    raise ConfigError(f'{first} and {second} must have the same examples; '
                      f'{len(only)} are in one of them, as {min(only)!r}.')
  for key, example in files[0].items():
    if example['references'] != files[1][key]['references']:
      raise ConfigError(f'{first} and {second} have other references for '
                        f'{key!r}.')
  chosen = find_metric(metric)
  first_scores, second_scores = (chosen.score(
      [file[key]['prediction'] for key in files[0]],
      [file[key]['references'] for key in files[0]]) for file in files)
  return bootstrap.compare(chosen, first_scores, second_scores, seed)


def read_predictions(path: str) -> Examples:
  """The examples of a file, by id.

  Raises:
    ConfigError: it cannot be read, has no lines, or a line is not what it
      must be.
  """
  try:
    with open(path, encoding='utf-8') as file:
      lines = list(file)
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read ({error.strerror}).') from None
  except UnicodeDecodeError as error:
    raise ConfigError(f'{path}: {error}') from None
  examples: Examples = {}
  for number, line in enumerate(lines, start=1):
    where = f'{path}, line {number}'
    try:
      example = json.loads(line)
    except json.JSONDecodeError as error:
      raise ConfigError(f'{where}: {error}') from None
    problem = _problem(example)
    if problem:
      raise ConfigError(f'{where}: {problem}')
    if example['id'] in examples:
      raise ConfigError(f'{where}: id {example["id"]!r} was there before.')
    examples[example['id']] = example
  if not examples:
    raise ConfigError(f'{path} is empty.')
  return examples


def _problem(example):
  if not isinstance(example, dict):
    return 'must be an object.'
  for key in ('id', 'prediction'):
    if not isinstance(example.get(key), str):
      return f'{key}={example.get(key)!r} must be a text.'
  references = example.get('references')
  if (not isinstance(references, list) or not references
      or not all(isinstance(text, str) for text in references)):
    return f'references={references!r} must be a list of one text or more.'
  return None


def table(differences: dict[str, bootstrap.Difference]) -> str:
  """As Markdown."""
  def row(name, it):
    interval = f'{it.difference.low:+.2f} to {it.difference.high:+.2f}'
    return (f'| {name} | {it.first.mean:.2f} | {it.second.mean:.2f} | '
            f'{it.difference.mean:+.2f} | {interval} | {it.p_value:.3f} |')

  return '\n'.join([
      '| | first | second | difference | 95 % interval | p |',
      '|---|---|---|---|---|---|',
      *(row(name, it) for name, it in differences.items())])


def make_parser() -> argparse.ArgumentParser:
  """Of the command line."""
  parser = argparse.ArgumentParser(
      prog='python -m longt5_flax.compare', allow_abbrev=False,
      description='Compares two files of predictions by a paired bootstrap.')
  parser.add_argument('first', help='a predictions.jsonl')
  parser.add_argument('second', help='another one, of the same examples')
  parser.add_argument('--metric', choices=[*METRICS, *SCROLLS], default='rouge')
  parser.add_argument('--seed', type=int, default=0, help='of the draws')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  options = make_parser().parse_args(argv)
  try:
    print(table(compare(options.first, options.second, options.metric,
                        options.seed)))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())

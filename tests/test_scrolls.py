"""SCROLLS' average from the files of eval.py."""

import json

import pytest

from longt5_flax import scrolls
from longt5_flax.evaluation.metrics import SCROLLS


@pytest.fixture
def files(tmp_path):
  """One of each task; the number that counts is 10, 20, ..., 70."""
  paths = {}
  for i, (task, (_, main)) in enumerate(SCROLLS.items(), 1):
    scores = {name: {'mean': mean, 'low': mean - 1, 'mid': mean,
                     'high': mean + 1}
              for name, mean in ((main, 10.0 * i), ('another', 99.0))}
    paths[task] = tmp_path / f'{task}.json'
    paths[task].write_text(json.dumps(
        {'metric': task, 'main': main, 'scores': scores}))
  return paths


def test_average_over_tasks(files, capsys):
  assert scrolls.main([str(path) for path in reversed(files.values())]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[2] == '| gov_report | geometric_mean | 10.00 | 9.00 to 11.00 |'
  assert lines[7] == '| quality | exact_match | 60.00 | 59.00 to 61.00 |'
  assert lines[-1] == '| SCROLLS | mean | 40.00 | |'


def test_mistakes_are_one_line(files, tmp_path, capsys):
  def said(*paths):
    assert scrolls.main([str(path) for path in paths]) == 2
    return capsys.readouterr().err

  first, *rest = files.values()
  assert said(*rest) == 'error: no scores.json of gov_report.\n'
  assert said(first, first) == (
      f'error: {first}: there is another scores.json of gov_report.\n')
  first.write_text('{"metric": "rouge"}')
  assert said(first) == (f"error: {first}: metric='rouge' must be one of "
                         f'{", ".join(SCROLLS)}.\n')

"""python -m longt5_flax.compare."""

import json

import pytest

from longt5_flax import compare


def example(number, prediction, references=('the king had a ring',)):
  return {'id': f'story-{number}', 'prediction': prediction,
          'references': list(references)}


def write(path, *lines):
  path.write_text(''.join(
      (line if isinstance(line, str) else json.dumps(line)) + '\n'
      for line in lines), 'utf-8')
  return str(path)


def test_table(tmp_path, capsys):
  """Matched by id, whatever the order."""
  first = write(tmp_path / 'a', example(1, 'the king'), example(2, 'a ring'))
  second = write(tmp_path / 'b', example(2, 'a ring'),
                 example(1, 'the king had a ring'))
  assert compare.main([first, second, '--metric=squad']) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[2].startswith('| exact_match | 0.00 | 50.00 | +50.00 | +0.00 ')
  assert lines[3].startswith('| f1 | 50.00 | 75.00 | +25.00 | +0.00 to +50.00')


def test_a_task_of_scrolls_is_a_metric(tmp_path, capsys):
  same = write(tmp_path / 'a', example(1, 'the king had a ring'))
  assert compare.main([same, same, '--metric=qmsum']) == 0
  assert '| geometric_mean | 100.00 | 100.00 |' in capsys.readouterr().out


GOOD = example(1, 'a ring')


@pytest.mark.parametrize('lines, message', [
    ([], 'b is empty'),
    ([GOOD, '{"id": '], 'b, line 2: Expecting value'),
    (['[]'], 'b, line 1: must be an object'),
    ([{'id': 'x', 'references': ['y']}],
     'b, line 1: prediction=None must be a text'),
    ([example(1, 'a ring', [])],
     'b, line 1: references=[] must be a list of one text or more'),
    ([GOOD, GOOD], "b, line 2: id 'story-1' was there before"),
    ([GOOD, example(2, 'a ring')],
     "must have the same examples; 1 are in one of them, as 'story-2'"),
    ([example(1, 'a ring', ['another'])], "other references for 'story-1'")])
def test_mistakes_are_one_line(tmp_path, capsys, lines, message):
  first = write(tmp_path / 'a', GOOD)
  assert compare.main([first, write(tmp_path / 'b', *lines)]) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.count('\n') == 1
  assert not captured.out


def test_no_file(tmp_path, capsys):
  missing = str(tmp_path / 'none.jsonl')
  assert compare.main([missing, missing]) == 2
  assert capsys.readouterr().err == (
      f'error: {missing}: cannot be read (No such file or directory).\n')

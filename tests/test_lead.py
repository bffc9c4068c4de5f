"""longt5_flax.lead: the first words of documents, as eval.py would have written
them."""

import json
import re

import pytest

from longt5_flax import lead
from longt5_flax.compare import read_predictions

EXAMPLES = [
    {'id': 'a', 'inputs': 'What came first?\n\none two three four',
     'targets': 'one two'},
    {'id': 'b', 'inputs': 'five six seven', 'targets': 'seven',
     'references': ['five six', 'none']},
]


@pytest.fixture
def data(tmp_path):
  path = tmp_path / 'data.jsonl'
  path.write_text(''.join(json.dumps(example) + '\n' for example in EXAMPLES))
  return str(path)


def run(tmp_path, data, *arguments):
  return lead.main([data, f'--workdir={tmp_path / "lead"}', *arguments])


def test_the_number_of_words_is_chosen(tmp_path, data, capsys):
  """Behind the question, and of the document that has none."""
  assert run(tmp_path, data, '--question', '--words', '1', '2', '3',
             f'--choose={data}') == 0
  folder = tmp_path / 'lead' / 'eval' / '0'
  examples = read_predictions(str(folder / 'predictions.jsonl'))
  assert [example['prediction'] for example in examples.values()] == [
      'one two', 'five six']
  assert examples['b']['references'] == ['five six', 'none']
  scores = json.loads((folder / 'scores.json').read_text())
  assert scores['scores']['rougeLsum']['mean'] == 100
  assert scores['checkpoint'] == 'the first 2 words'
  assert 'rougeLsum 100.00' in capsys.readouterr().out


def test_a_task_of_scrolls_chooses_by_its_number(tmp_path, data, capsys):
  assert run(tmp_path, data, '--metric=qmsum', '--words', '1', '2',
             f'--choose={data}') == 0
  assert 'geometric_mean on ' in capsys.readouterr().out


def test_question_is_part_of_a_document_unless_told(tmp_path, data):
  assert run(tmp_path, data, '--words=2') == 0
  examples = read_predictions(
      str(tmp_path / 'lead' / 'eval' / '0' / 'predictions.jsonl'))
  assert examples['a']['prediction'] == 'What came'


@pytest.mark.parametrize('arguments, message', [
    (['--words', '0'], '--words=0 must be 1 or more'),
    (['--words', '1', '2'], '--words has 2 numbers: --choose must name'),
    (['--targets_field=summary'], "no field 'summary'")])
def test_bad_input(tmp_path, data, capsys, arguments, message):
  assert run(tmp_path, data, *arguments) == 2
  error = capsys.readouterr().err
  assert re.match(r'error: .*\n$', error)
  assert message in error
  assert not (tmp_path / 'lead').exists()


def test_predictions_of_something_else_stay(tmp_path, data, capsys):
  assert run(tmp_path, data, '--words=2') == 0
  assert run(tmp_path, data, '--words=1') == 2
  assert 'choose another' in capsys.readouterr().err

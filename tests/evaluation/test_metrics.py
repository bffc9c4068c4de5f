"""Metrics equal t5's and SCROLLS'; testdata/metrics/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest

from longt5_flax.evaluation import bootstrap, metrics

T5 = json.loads((Path(__file__).parent.parent / 'testdata' / 'metrics'
                 / 't5.json').read_text('utf-8'))


def corpus_scores(name, predictions, references):
  metric = metrics.METRICS[name]
  scores = metric.score(predictions, references)
  return bootstrap.intervals(metric, scores, seed=0)


def test_rouge_is_what_t5_reports():
  """`mid` of the resampled means, by the same draws."""
  case = T5['rouge']
  actual = corpus_scores('rouge', case['predictions'], case['references'])
  for name, expected in case['t5_seed_0'].items():
    assert actual[name].mid == pytest.approx(expected, abs=1e-6), name
    assert actual[name].low < actual[name].mean < actual[name].high


@pytest.mark.parametrize('name', ['squad', 'trivia_qa'])
def test_answers_are_scored_as_t5_does(name):
  case = T5['answers']
  actual = corpus_scores(name, case['predictions'], case['references'])
  assert actual['exact_match'].mean == pytest.approx(case[name]['em'], abs=1e-6)
  assert actual['f1'].mean == pytest.approx(case[name]['f1'], abs=1e-6)


def test_scrolls_example():
  """What SCROLLS' metric says in its own documentation."""
  texts = (['exact match example', 'hello there', 'general kenobi'],
           [['exact match example'], ['hello', 'hi there'],
            ['commander kenobi']])
  rouge, answers = (corpus_scores(name, *texts) for name in ('rouge', 'squad'))
  expected = {'rouge1': 72.2222, 'rouge2': 33.3333, 'rougeL': 72.2222,
              'rougeLsum': 72.2222, 'geometric_mean': 55.8136}
  assert {name: round(rouge[name].mean, 4) for name in expected} == expected
  assert round(answers['exact_match'].mean, 4) == 33.3333
  assert round(answers['f1'].mean, 4) == 72.2222


def test_stems():
  texts = ['the dogs were running'], [['a dog runs']]
  plain, stemmed = (metrics.METRICS[name].score(*texts)['rouge1'][0]
                    for name in ('rouge', 'rouge_stemmed'))
  assert plain == 0
  assert stemmed == pytest.approx(100 * 2 * 2 / 7)  # dog, run.


def test_scrolls_average():
  scores = dict.fromkeys(metrics.SCROLLS, 10.0) | {'qmsum': 80.0}
  assert metrics.scrolls_average(scores) == 20
  del scores['qasper']
  with pytest.raises(ValueError, match=r"tasks .* must be .*'qasper'"):
    metrics.scrolls_average(scores)
  for name, number in metrics.SCROLLS.values():
    metric = metrics.find_metric(name)
    assert number in metric.means(metric.score(['a word'], [['a word']]))


@pytest.mark.parametrize('references, message', [
    ([], '1 predictions do not go with 0 lists of references'),
    ([[]], 'Example 0 has an empty list of references')])
def test_refused(references, message):
  for metric in metrics.METRICS.values():
    with pytest.raises(ValueError, match=message):
      metric.score(['text'], references)


def test_nothing_to_score():
  with pytest.raises(ValueError, match='No predictions to score'):
    metrics.rouge([], [])
  with pytest.raises(ValueError, match=r"metric='bleu' must be one of rouge"):
    metrics.find_metric('bleu')


def test_paired_bootstrap_sees_a_small_steady_gain():
  """One point better on every example: certain, though examples differ by
  far more; unpaired intervals overlap."""
  metric = metrics.METRICS['squad']
  first = {'f1': np.random.default_rng(0).uniform(0, 90, 50)}
  second = {'f1': first['f1'] + 1}
  result = bootstrap.compare(metric, first, second)['f1']
  assert result.difference.mean == pytest.approx(1)
  assert result.difference.low == pytest.approx(1)
  assert result.first.high > result.second.low
  assert result.p_value == pytest.approx(2 / 1001)


def test_paired_bootstrap_sees_no_gain_in_noise():
  metric = metrics.METRICS['squad']
  random = np.random.default_rng(1)
  first, second = ({'f1': random.uniform(0, 100, 200)} for _ in range(2))
  result = bootstrap.compare(metric, first, second)['f1']
  assert result.difference.low < 0 < result.difference.high
  assert result.p_value > 0.05
  assert bootstrap.compare(metric, first, first)['f1'].p_value == 1

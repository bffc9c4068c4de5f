"""Scores of single examples: ROUGE, exact match and F1.

A metric maps predictions and references to an array of scores, from 0 to 100,
for each of its names. Corpus scores are means of these (`bootstrap`).
"""

import collections
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rouge_score import rouge_scorer

Scores = dict[str, np.ndarray]

_ROUGE = ('rouge1', 'rouge2', 'rougeL', 'rougeLsum')
# What TriviaQA's evaluation takes for punctuation besides ASCII's.
_QUOTES = '‘’´`'


class Metric(NamedTuple):
  """How predictions of a task are scored.

  Attributes:
    score: from predictions and references to scores of each example.
    main: the name that one number is asked for by; of `score`'s, or
      `GEOMETRIC_MEAN`.
    geometric_mean: names whose means are joined; none: nothing is.
  """
  score: Callable[[Sequence[str], Sequence[Sequence[str]]], Scores]
  main: str
  geometric_mean: tuple[str, ...] = ()

  def means(self, scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Means over examples, with the geometric mean of those that have one."""
    means = {name: float(np.mean(array)) for name, array in scores.items()}
    if self.geometric_mean:
      factors = [means[name] for name in self.geometric_mean]
      means[GEOMETRIC_MEAN] = math.prod(factors) ** (1 / len(factors))
    return means

  @property
  def names(self) -> tuple[str, ...]:
    """Of `means`."""
    return tuple(self.means(self.score([''], [['']])))


GEOMETRIC_MEAN = 'geometric_mean'


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]],
          stemmed: bool = False) -> Scores:
  """F-measures of rouge-score as t5.evaluation.metrics.rouge prepares texts:
  " . " ends a sentence, for rougeLsum, and there is no stemming. Of several
  references the best one counts, for each name by itself.

  Args:
    predictions: texts.
    references: of each prediction, one or more.
    stemmed: compare words by their Porter stems, as many papers do.
  """
  scorer = rouge_scorer.RougeScorer(_ROUGE, use_stemmer=stemmed)

  def best(prediction, targets):
    scores = [scorer.score(_sentences(target), _sentences(prediction))
              for target in targets]
    return [max(score[name].fmeasure for score in scores) for name in _ROUGE]

  table = [best(*pair) for pair in _pairs(predictions, references)]
  return _columns(_ROUGE, table)


def squad(predictions: Sequence[str], references: Sequence[Sequence[str]]
          ) -> Scores:
  """Exact match and F1 of words as SQuAD 1.1 scores them, and SCROLLS."""
  return _answers(predictions, references, _normalize_squad)


def trivia_qa(predictions: Sequence[str], references: Sequence[Sequence[str]]
              ) -> Scores:
  """Exact match and F1 of words as TriviaQA scores them."""
  return _answers(predictions, references, _normalize_trivia_qa)


def _stemmed_rouge(predictions, references):
  return rouge(predictions, references, stemmed=True)


_GEOMETRIC = ('rouge1', 'rouge2', 'rougeL')
METRICS = {
    'rouge': Metric(rouge, 'rougeLsum', _GEOMETRIC),
    'rouge_stemmed': Metric(_stemmed_rouge, 'rougeLsum', _GEOMETRIC),
    'squad': Metric(squad, 'f1'),
    'trivia_qa': Metric(trivia_qa, 'f1'),
}
# SCROLLS: the metric of each task, and which of its numbers is the task's.
SCROLLS = {
    'gov_report': ('rouge', GEOMETRIC_MEAN),
    'summ_screen_fd': ('rouge', GEOMETRIC_MEAN),
    'qmsum': ('rouge', GEOMETRIC_MEAN),
    'narrative_qa': ('squad', 'f1'),
    'qasper': ('squad', 'f1'),
    'quality': ('squad', 'exact_match'),
    'contract_nli': ('squad', 'exact_match'),
}


def find_metric(name: str) -> Metric:
  """The metric of a name, of METRICS or a task of SCROLLS.

  Raises:
    ValueError: there is none.
  """
  if name in SCROLLS:
    metric, main = SCROLLS[name]
    return METRICS[metric]._replace(main=main)
  if name not in METRICS:
    raise ValueError(
        f'metric={name!r} must be one of {", ".join((*METRICS, *SCROLLS))}.')
  return METRICS[name]


def scrolls_average(scores: Mapping[str, float]) -> float:
  """SCROLLS' score: the mean over its seven tasks.

  Args:
    scores: of each task, by the number that `SCROLLS` names.

  Raises:
    ValueError: a task is missing, or there is another one.
  """
  if scores.keys() != SCROLLS.keys():
    raise ValueError(f'tasks {sorted(scores)} must be {sorted(SCROLLS)}.')
  return sum(scores.values()) / len(scores)


def _pairs(predictions, references):
  """
  Raises:
    ValueError: nothing to score, an example without a reference, or numbers
      of predictions and references that differ.
  """
  if len(predictions) != len(references):
    raise ValueError(f'{len(predictions)} predictions do not go with '
                     f'{len(references)} lists of references.')
  if not predictions:
    raise ValueError('No predictions to score.')
  for i, targets in enumerate(references):
    if not targets:
      raise ValueError(f'Example {i} has an empty list of references.')
  return zip(predictions, references, strict=True)


def _columns(names, table):
  return {name: 100 * np.array(column, np.float64)
          for name, column in zip(names, zip(*table, strict=True), strict=True)}


def _sentences(text):
  return text.replace(' . ', ' .\n')


def _answers(predictions, references, normalize):
  def best(prediction, targets):
    prediction = normalize(prediction)
    targets = [normalize(target) for target in targets]
    return (max(prediction == target for target in targets),
            max(_f1(prediction, target) for target in targets))

  table = [best(*pair) for pair in _pairs(predictions, references)]
  return _columns(('exact_match', 'f1'), table)


def _f1(prediction, target):
  """Of words, each as often as it occurs. Two empty texts score 0, as in
  SQuAD 1.1."""
  words, wanted = prediction.split(), target.split()
  common = collections.Counter(words) & collections.Counter(wanted)
  same = sum(common.values())
  return 2 * same / (len(words) + len(wanted)) if same else 0.0


def _normalize_squad(text):
  return _normalize(text, string.punctuation, '')


def _normalize_trivia_qa(text):
  return _normalize(text, string.punctuation + _QUOTES, ' ')


def _normalize(text, punctuation, replacement):
  table = dict.fromkeys(map(ord, punctuation), replacement)
  text = re.sub(r'\b(a|an|the)\b', ' ', text.lower().translate(table))
  return ' '.join(text.split())

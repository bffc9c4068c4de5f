"""Intervals of corpus scores, by drawing examples with replacement."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from longt5_flax.evaluation.metrics import Metric

_SAMPLES = 1000


class Interval(NamedTuple):
  """A corpus score.

  Attributes:
    mean: of the examples as they are.
    low, mid, high: percentiles 2.5, 50 and 97.5 of the resampled means. `mid`
      is what t5 reports for ROUGE, up to its unseeded draws.
  """
  mean: float
  low: float
  mid: float
  high: float


class Difference(NamedTuple):
  """Two systems on the same examples.

  Attributes:
    first, second: their corpus scores.
    difference: second minus first, with its interval.
    p_value: two-sided; how often a resample turns the difference's sign round,
      twice, never below 2 / (samples + 1).
  """
  first: Interval
  second: Interval
  difference: Interval
  p_value: float


def intervals(metric: Metric, scores: Mapping[str, np.ndarray], seed: int = 0
              ) -> dict[str, Interval]:
  """The corpus scores of a metric.

  Draws are those of rouge-score's BootstrapAggregator after
  `numpy.random.seed(seed)`.

  Args:
    metric: whose `score` gave
    scores: [n] for each name.
    seed: of the draws.
  """
  means, samples = metric.means(scores), _resample(metric, scores, seed)
  return {name: _interval(means[name], samples[name]) for name in means}


def compare(metric: Metric, first: Mapping[str, np.ndarray],
            second: Mapping[str, np.ndarray], seed: int = 0
            ) -> dict[str, Difference]:
  """The paired bootstrap: both are resampled by the same draws.

  Args:
    metric: whose `score` gave
    first, second: [n] for each name, of the same examples in the same order.
    seed: of the draws.
  """
  means = [metric.means(scores) for scores in (first, second)]
  samples = [_resample(metric, scores, seed) for scores in (first, second)]

  def of(name):
    (a, b), (drawn_a, drawn_b) = ([x[name] for x in xs]
                                  for xs in (means, samples))
    drawn = drawn_b - drawn_a
    turned = min(np.sum(drawn <= 0), np.sum(drawn >= 0))
    return Difference(
        _interval(a, drawn_a), _interval(b, drawn_b), _interval(b - a, drawn),
        float(min(1, 2 * (turned + 1) / (_SAMPLES + 1))))

  return {name: of(name) for name in means[0]}


def _interval(mean, samples):
  return Interval(float(mean), *map(float, np.percentile(
      samples, (2.5, 50, 97.5))))


def _resample(metric, scores, seed):
  """[samples] for each name of `metric.means`."""
  count = len(next(iter(scores.values())))
  random = np.random.RandomState(seed)
  draws = (random.choice(np.arange(count), size=count)
           for _ in range(_SAMPLES))
  means = [metric.means({name: array[draw] for name, array in scores.items()})
           for draw in draws]
  return {name: np.array([mean[name] for mean in means]) for name in means[0]}

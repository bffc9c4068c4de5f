r"""How far the training losses of runs on the same batches are apart.

  python -m benchmarks.loss_differences \
    runs/sweeps/implementation/runs/reference \
    runs/sweeps/implementation/runs/other-order \
    runs/sweeps/implementation/runs/fused

compares every run with the first one, step by step, prints a JSON line a run,
and draws the differences. `over_noise` is the mean absolute difference over
that of the second run, which should differ from the first in the order of sums
alone.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

import numpy as np

from longt5_flax.config import ConfigError
from longt5_flax.training.metrics import read_metrics


def losses(workdir: str) -> dict[int, float]:
  """The training loss of each logged step.

  Raises:
    ConfigError: the folder is not one of a run.
  """
  path = os.path.join(workdir, 'metrics.jsonl')
  if not os.path.isfile(path):
    raise ConfigError(f'{path} is missing: {workdir} must be a run.')
  return {line['step']: line['loss'] for line in read_metrics(path)
          if line['split'] == 'train'}


def differences(workdirs: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Steps that all runs have, [n], and how much each later run's loss is above
  the first one's, [runs - 1, n].

  Raises:
    ConfigError: a folder is not one of a run, or runs have no step in common.
  """
  runs = [losses(workdir) for workdir in workdirs]
  steps = sorted(set.intersection(*(set(run) for run in runs)))
  if not steps:
    raise ConfigError(f'{", ".join(workdirs)} have no logged step in common.')
  table = np.array([[run[step] for step in steps] for run in runs])
  return np.array(steps), table[1:] - table[0]


def draw(names: Sequence[str], steps: np.ndarray, table: np.ndarray, path: str
         ) -> None:
  """Absolute differences over steps, as a PNG."""
  import matplotlib
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  for name, row in zip(names[1:], table, strict=True):
    axes.semilogy(steps, np.abs(row), label=name, linewidth=1)
  axes.set(xlabel='step', ylabel=f'|loss - loss of {names[0]}|')
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path, dpi=120)
  plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.loss_differences', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('first', metavar='WORKDIR')
  parser.add_argument('others', nargs='+', metavar='WORKDIR')
  parser.add_argument('--output', default='loss_differences.png')
  options = parser.parse_args(argv)
  workdirs = [options.first, *options.others]
  try:
    steps, table = differences(workdirs)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  names = [os.path.basename(os.path.normpath(path)) for path in workdirs]
  means = np.mean(np.abs(table), axis=1)
  for name, row, mean in zip(names[1:], table, means, strict=True):
    print(json.dumps({
        'benchmark': 'loss_differences', 'run': name, 'against': names[0],
        'steps': len(steps), 'mean_absolute': float(mean),
        'largest': float(np.max(np.abs(row))),
        'mean': float(np.mean(row)),
        'over_noise': float(mean / means[0]) if means[0] else None}))
  draw(names, steps, table, options.output)
  return 0


if __name__ == '__main__':
  sys.exit(main())

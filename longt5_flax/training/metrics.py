"""Where numbers go: metrics.jsonl, TensorBoard, and the picture of the loss."""

import json
import os
from typing import Any

import numpy as np
import tensorboardX

from longt5_flax.interop.atomic import replace_file


class MetricsWriter:
  """Writes metrics of steps to `metrics.jsonl` and `tensorboard/`.

  Args:
    workdir: of the run.
    first_step: lines of this step and later ones, left by a run that was cut
      off after its last checkpoint, are dropped: every step is there once.
  """

  def __init__(self, workdir: str, first_step: int):
    self._path = os.path.join(workdir, 'metrics.jsonl')
    self._drop_from(first_step)
    self._file = open(self._path, 'a', encoding='utf-8')  # noqa: SIM115
    self._tensorboard = tensorboardX.SummaryWriter(
        os.path.join(workdir, 'tensorboard'), purge_step=first_step or None)

  def _drop_from(self, first_step):
    kept = [line for line in read_metrics(self._path)
            if line['step'] < first_step]
    replace_file(self._path, ''.join(json.dumps(line) + '\n' for line in kept))

  def write(self, step: int, split: str, values: dict[str, Any]) -> None:
    """Writes one line; `split` is 'train', 'validation' or 'scores'."""
    numbers = {name: _number(value) for name, value in values.items()
               if value is not None}
    line = {'step': step, 'split': split, **numbers}
    self._file.write(json.dumps(line) + '\n')
    self._file.flush()
    for name, number in numbers.items():
      self._tensorboard.add_scalar(f'{split}/{name}', number, step)

  def write_text(self, step: int, name: str, text: str) -> None:
    """Writes a text to TensorBoard."""
    self._tensorboard.add_text(name, text, step)

  def close(self) -> None:
    self._file.close()
    self._tensorboard.close()


def _number(value):
  value = np.asarray(value).item()
  return value if isinstance(value, int) else float(f'{value:.7g}')


def read_metrics(path: str) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl; a last one cut off by a kill is left out."""
  if not os.path.exists(path):
    return []
  lines = []
  with open(path, encoding='utf-8') as file:
    for line in file:
      if line.endswith('\n'):
        lines.append(json.loads(line))
  return lines


def plot_loss(workdir: str) -> str:
  """Draws `loss.png` from metrics.jsonl; returns its path."""
  import matplotlib  # Slow to import, and only here needed.
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  lines = read_metrics(os.path.join(workdir, 'metrics.jsonl'))
  figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
  for split, style in (('train', '-'), ('validation', 'o-')):
    points = [(line['step'], line['loss']) for line in lines
              if line['split'] == split]
    if points:
      axes.plot(*zip(*points, strict=True), style, label=split, markersize=4)
  axes.set(xlabel='step', ylabel='loss per target token')
  axes.grid(alpha=0.3)
  axes.legend()
  path = os.path.join(workdir, 'loss.png')
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return path

"""The figures of `report`: SVG for its page, and PNG files."""

import dataclasses
import io
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from longt5_flax.report_runs import Run
from longt5_flax.sweep_report import line_style, smoothed

# Inches. Small, so that letters stay legible on a phone.
_SIZE = (4.8, 3.0)
# Stands for the page's own colour of text, whatever a reader has chosen.
_TEXT = '#123321'
_STYLE: dict[Any, Any] = {
    'axes.spines.right': False, 'axes.spines.top': False, 'axes.grid': True,
    'font.size': 10, 'font.family': 'sans-serif', 'grid.alpha': 0.18,
    'lines.linewidth': 1.8, 'text.parse_math': False,
}
_ON_PAGE: dict[Any, Any] = {
    'svg.fonttype': 'none', 'svg.hashsalt': 'report', 'text.color': _TEXT,
    'axes.edgecolor': _TEXT, 'axes.labelcolor': _TEXT, 'xtick.color': _TEXT,
    'ytick.color': _TEXT, 'grid.color': _TEXT,
}


@dataclasses.dataclass(frozen=True)
class Figure:
  """A figure of the report.

  Attributes:
    name: of its PNG file.
    title: what it shows.
    draw: draws a list of runs on matplotlib's axes.
    runs: those that it shows.
    height: in inches.
  """
  name: str
  title: str
  draw: Callable[[Any, Sequence[Run]], None]
  runs: Sequence[Run]
  height: float = _SIZE[1]

  def svg(self) -> str:
    """An element of HTML, without names; its text has the page's colour."""
    with _style(_ON_PAGE):
      out = io.StringIO()
      self._drawn().savefig(
          out, format='svg', transparent=True, metadata=dict.fromkeys(
              ('Creator', 'Date', 'Format', 'Type')))
    text = out.getvalue()
    text = text[text.index('<svg'):].replace(_TEXT, 'currentColor')
    # Inside HTML no names of namespaces are needed.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', '', text)
    return re.sub(r' (width|height)="[\d.]+pt"', '', text, count=2)

  def save(self, path: str) -> None:
    """Writes a PNG with the names of the runs."""
    with _style({}):
      names = [f'{letter(i)}  {run.name}' for i, run in enumerate(self.runs)]
      self._drawn(names).savefig(path, format='png', dpi=160)

  def _drawn(self, names=()):
    from matplotlib.figure import Figure as Canvas
    # About 60 letters have room below the axes.
    columns = max(1, min(len(names), 60 // max(map(len, names), default=60)))
    below = 0.5 + 0.17 * -(-len(names) // columns) if names else 0
    figure = Canvas(figsize=(_SIZE[0], self.height + below),
                    layout='constrained')
    axes = figure.subplots()
    self.draw(axes, self.runs)
    if names:
      axes.set_title(self.title)
      handles = [axes.plot([], [], **line_style(i))[0]
                 for i in range(len(names))]
      figure.legend(handles, names, loc='outside lower center',
                    ncols=columns, fontsize=8, frameon=False)
    return figure


def _style(more):
  import matplotlib  # Slow to import, and only here needed.
  return matplotlib.rc_context(_STYLE | more)


def letter(i: int) -> str:
  """What the i-th run is called in figures: A, B, ..., Z, AA, BB, ..."""
  return string.ascii_uppercase[i % 26] * (i // 26 + 1)


def figures(runs: Sequence[Run]) -> dict[str, list[Figure]]:
  """Those that there are numbers for, by section of the page.

  Colours follow a run's place among all.
  """
  curves = [
      Figure('train_loss', 'Training loss', _draw_train_loss, runs),
      Figure('held_out_loss', 'Held-out loss', _draw_held_out_loss, runs)]
  names = list(dict.fromkeys(
      name for run in runs if run.evaluation for name in run.evaluation.scores))
  several = any(len(run.history) > 1 for run in runs)
  found = {
      'loss': curves,
      'training': [
          Figure('learning_rate', 'Learning rate',
                 _line_drawer('learning_rate'), runs),
          Figure('throughput', 'Throughput: real input and target tokens',
                 _draw_throughput, runs),
          Figure('mfu', 'Model FLOPs utilisation', _line_drawer('mfu'), runs)],
      'scores': [
          Figure(f'score_{_file_name(name)}', name, _score_drawer(name), runs,
                 0.7 + 0.28 * len(runs)) for name in names],
      'scores_by_step': [
          Figure(f'score_{_file_name(name)}_by_step', f'{name} by step',
                 _history_drawer(name), runs) for name in names if several]}
  return {section: [figure for figure in group if _has_data(figure)]
          for section, group in found.items()}


def _file_name(score):
  return re.sub(r'\W+', '_', score)


def _has_data(figure):
  """Whether it would show anything."""
  with _style({}):
    axes = figure._drawn().axes[0]
  return bool(axes.lines or axes.collections)


def _draw_train_loss(axes, runs):
  for i, run in enumerate(runs):
    steps, losses = _column(run.train, 'loss')
    if len(steps):
      axes.plot(steps, losses, alpha=0.2, linewidth=1, **line_style(i))
      _curve(axes, i, *smoothed(steps, losses))
  _by_step(axes, 'loss per target token')


def _draw_held_out_loss(axes, runs):
  for i, run in enumerate(runs):
    steps, losses = _column(run.validation, 'loss')
    if len(steps):
      _curve(axes, i, steps, losses, marker='o', markersize=4)
  _by_step(axes, 'loss per target token')


def _draw_throughput(axes, runs):
  from matplotlib import ticker
  for i, run in enumerate(runs):
    lines = [line | {'tokens': line['encoder_tokens_per_second']
                     + line['decoder_tokens_per_second']}
             for line in run.train if 'encoder_tokens_per_second' in line]
    # The first counts compiling.
    steps, rates = _column(lines[1:] or lines, 'tokens')
    if len(steps):
      _curve(axes, i, steps, rates)
  axes.set_ylim(bottom=0)
  axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  _by_step(axes, 'tokens/s')


def _line_drawer(key):
  def draw(axes, runs):
    for i, run in enumerate(runs):
      steps, values = _column(run.train, key)
      if len(steps):
        _curve(axes, i, steps, values)
    axes.set_ylim(bottom=0)
    _by_step(axes, '')

  return draw


def _score_drawer(name):
  def draw(axes, runs):
    """Mean and interval."""
    for i, run in enumerate(runs):
      if run.evaluation and name in run.evaluation.scores:
        score, color = run.evaluation.scores[name], line_style(i)['color']
        axes.plot([score['low'], score['high']], [i, i], linewidth=2.5,
                  solid_capstyle='butt', color=color)
        axes.plot(score['mean'], i, 'o', color=color)
    axes.set(yticks=range(len(runs)),
             yticklabels=map(letter, range(len(runs))),
             ylim=(len(runs) - 0.5, -0.5))

  return draw


def _history_drawer(name):
  def draw(axes, runs):
    for i, run in enumerate(runs):
      points = [(it.step, it.scores[name]) for it in run.history
                if name in it.scores]
      if points:
        steps = [step for step, _ in points]
        means, low, high = (np.array([score[key] for _, score in points])
                            for key in ('mean', 'low', 'high'))
        axes.fill_between(steps, low, high, alpha=0.15, linewidth=0,
                          color=line_style(i)['color'])
        _curve(axes, i, steps, means, marker='o', markersize=4)
    _by_step(axes, '')

  return draw


def _curve(axes, i, places, values, **style):
  """The line of run `i`, with its letter at the end."""
  axes.plot(places, values, **line_style(i), **style)
  # Side by side, so that curves may end in one point.
  axes.annotate(letter(i), (places[-1], values[-1]), (5 + 9 * (i % 4), 0),
                textcoords='offset points', va='center', fontweight='bold',
                color=line_style(i)['color'])


def _column(lines, key):
  found = [(line['step'], line[key]) for line in lines if key in line]
  return np.array([step for step, _ in found]), np.array(
      [value for _, value in found])


def _by_step(axes, label):
  axes.set(xlabel='step', ylabel=label)
  axes.xaxis.get_major_locator().set_params(integer=True)

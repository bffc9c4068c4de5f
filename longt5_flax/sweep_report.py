"""The table and the figure that a sweep ends with."""

import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from longt5_flax.sweep_losses import Losses, held_out_losses
from longt5_flax.sweep_plan import Plan
from longt5_flax.training.metrics import read_metrics

_NOTES = '''\
- Held-out loss: per target token, z-loss included, of the parameters at the
  end. All runs get the same rows: compare the numbers of a column. The columns
  are different objectives: do not compare the numbers of a line.
- Tokens: real ones that the run trained on, padding left out.
- Tokens a second and MFU: medians over log steps. Minutes: everything, start
  and compilation included; empty where a killed sweep could not tell.'''


class Curve(NamedTuple):
  """What a run's metrics.jsonl says of training; a number a log step.

  Attributes:
    inputs, targets: real tokens seen so far.
    loss: of the step, by the run's own objective.
  """
  inputs: np.ndarray
  targets: np.ndarray
  loss: np.ndarray


def write_report(plan: Plan, workdirs: Mapping[str, str],
                 record: Mapping[str, Any], folder: str) -> str:
  """Evaluates finished runs and writes table.md, results.json and loss.png.

  Args:
    plan: the sweep.
    workdirs: name -> folder of the runs that are finished.
    record: name -> `seconds`, None if they are not known, and `error`.
    folder: to write to.

  Returns:
    What to tell the user.

  Raises:
    ConfigError, DataError: the held-out documents cannot be read.
  """
  metrics = {name: read_metrics(os.path.join(workdir, 'metrics.jsonl'))
             for name, workdir in workdirs.items()}
  lines = {name: [line for line in metrics[name] if line['split'] == 'train']
           for name in workdirs}
  losses = (held_out_losses(plan, workdirs) if plan.held_out else
            {name: own_loss(metrics[name]) for name in workdirs})
  curves = {name: read_curve(lines[name]) for name in workdirs}
  results = []
  for run in plan.runs:
    seconds = record.get(run.name, {}).get('seconds')
    result = {'run': run.name, 'overrides': dict(run.overrides),
              'minutes': None if seconds is None else seconds / 60}
    if run.name in workdirs:
      result |= {'steps': run.config.steps, 'held_out': losses[run.name],
                 'input_tokens': round(curves[run.name].inputs[-1]),
                 'target_tokens': round(curves[run.name].targets[-1]),
                 **rates(lines[run.name])}
    else:
      result['error'] = record[run.name]['error']
    results.append(result)
  text = table(results)
  with open(os.path.join(folder, 'results.json'), 'w', encoding='utf-8') as out:
    json.dump(results, out, indent=2)
  with open(os.path.join(folder, 'table.md'), 'w', encoding='utf-8') as out:
    out.write(f'# {plan.name}\n\n{text}\n\n{_NOTES}\n\n'
              + provenance(plan, workdirs))
  said = [text, f'Table: {os.path.join(folder, "table.md")}']
  if curves:
    said.append(f'Figure: {plot(curves, losses, folder)}')
  return '\n'.join(['', *said])


def own_loss(metrics: Sequence[Mapping[str, Any]]) -> Losses:
  """The held-out loss that a run computed last, if it did."""
  losses = [line['loss'] for line in metrics if line['split'] == 'validation']
  return {'own objective': losses[-1]} if losses else {}


def read_curve(lines: Sequence[Mapping[str, Any]]) -> Curve:
  """Cumulated tokens and loss of a run's training lines.

  A line has the rates since the one before, and so the tokens of all steps
  between the two.
  """
  steps = np.diff([line['step'] for line in lines], prepend=0)
  inputs, targets = (np.cumsum([
      count * line[f'{side}_tokens_per_second'] / line['steps_per_second']
      for count, line in zip(steps, lines, strict=True)])
                     for side in ('encoder', 'decoder'))
  return Curve(inputs, targets, np.array([line['loss'] for line in lines]))


def rates(lines: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
  """Medians over log steps, without the first, which compiles; and memory."""
  def median(name):
    values = [line[name] for line in lines[1:] or lines if name in line]
    return statistics.median(values) if values else None

  return {
      'input_tokens_per_second': median('encoder_tokens_per_second'),
      'target_tokens_per_second': median('decoder_tokens_per_second'),
      'mfu': median('mfu'),
      'input_wait': median('input_wait'),
      'peak_memory_bytes': max(
          line.get('peak_memory_bytes', 0) for line in lines) or None}


def table(results: Sequence[Mapping[str, Any]]) -> str:
  """The results in Markdown, with a line for each run that failed."""
  names = list(dict.fromkeys(
      name for result in results for name in result.get('held_out', ())))
  cells = [['run', 'steps', 'input tokens', 'target tokens',
            *(f'held-out loss: {name}' for name in names),
            'input + target tokens/s', 'MFU', 'peak memory', 'minutes']]
  for result in results:
    minutes = ('' if result['minutes'] is None else
               f'{result["minutes"]:.1f}')
    if 'error' in result:
      cells.append([result['run'], 'failed', *[''] * (len(cells[0]) - 3),
                    minutes])
      continue
    mfu, memory = result['mfu'], result['peak_memory_bytes']
    cells.append([
        result['run'], f'{result["steps"]:,}',
        short_count(result['input_tokens']),
        short_count(result['target_tokens']),
        *(f'{result["held_out"][name]:.4f}' for name in names),
        f'{short_count(result["input_tokens_per_second"])} + '
        f'{short_count(result["target_tokens_per_second"])}',
        '' if mfu is None else f'{mfu:.1%}',
        '' if memory is None else f'{memory / 1e9:.1f} GB', minutes])
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  cells.insert(1, ['-' * width for width in widths])
  rows = ['| ' + ' | '.join(cell.ljust(width) for cell, width in zip(
      row, widths, strict=True)) + ' |' for row in cells]
  failed = [f'{result["run"]} failed: {result["error"]}' for result in results
            if 'error' in result]
  return '\n'.join(rows + [''] * bool(failed) + failed)


def short_count(number: float) -> str:
  """12345 as 12.3k."""
  for size, unit in ((1e6, 'M'), (1e3, 'k')):
    if number >= size:
      return f'{number / size:.1f}{unit}'
  return f'{number:.0f}'


def provenance(plan: Plan, workdirs: Mapping[str, str]) -> str:
  """What ran: the command, each run's overrides, code and devices."""
  lines = ['```', f'python -m longt5_flax.sweep {shlex.join(sys.argv[1:])}',
           '```', '']
  for kind, entries in (('', plan.runs), ('held-out loss by ', plan.held_out)):
    for run in entries:
      own = ' '.join(f'`{key}={value}`' for key, value in run.overrides.items())
      lines.append(f'- {kind}{run.name}: {own or "no overrides of its own"}')
  for workdir in list(workdirs.values())[:1]:
    with open(os.path.join(workdir, 'config.json'), encoding='utf-8') as file:
      lines += ['', 'Of the first run: ' + ', '.join(
          f'{name} {value}' for name, value in json.load(file)['run'].items())]
  return '\n'.join(lines) + '\n'


def smoothed(places: np.ndarray, values: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray]:
  """A curve's means over a 40th of it: where each ends, and the mean."""
  width = max(len(values) // 40, 1)
  return (places[width - 1:],
          np.convolve(values, np.ones(width) / width, 'valid'))


def line_style(i: int) -> dict[str, Any]:
  """Of the i-th run in a figure: 30 of them can be told apart."""
  return {'color': f'C{i % 10}', 'linestyle': ('-', '--', ':')[i // 10 % 3]}


def plot(curves: Mapping[str, Curve], losses: Mapping[str, Losses],
         folder: str) -> str:
  """Draws loss.png; returns its path."""
  import matplotlib  # Slow to import, and only here needed.
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  from matplotlib import ticker
  runs, names = list(curves), list(next(iter(losses.values())))
  figure, panels = plt.subplot_mosaic(
      [['curves', name] for name in names] or [['curves']],
      figsize=(7 + 5 * bool(names), max(5, len(names) * len(runs) / 4)),
      width_ratios=[3, 2] if names else None, layout='constrained')
  for i, run in enumerate(runs):
    panels['curves'].plot(
        *smoothed(curves[run].targets, curves[run].loss), **line_style(i),
        label=run)
    for name in names:
      panels[name].plot(losses[run][name], i, f'C{i % 10}', marker='o')
  panels['curves'].set(xlabel='target tokens seen',
                       ylabel="training loss by the run's own objective")
  panels['curves'].xaxis.set_major_formatter(ticker.EngFormatter(sep=''))
  panels['curves'].legend()
  for name in names:
    panels[name].set(title=f'held-out loss: {name}', yticks=range(len(runs)),
                     yticklabels=runs, ylim=(len(runs) - 0.5, -0.5))
  for panel in panels.values():
    panel.grid(alpha=0.3)
  path = os.path.join(folder, 'loss.png')
  figure.savefig(path, dpi=120)
  plt.close(figure)
  return path

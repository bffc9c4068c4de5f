"""From lines of benchmarks to Markdown tables and a figure.

  python -m benchmarks.report lines.jsonl more.jsonl

prints a table for each benchmark that has lines, and draws, for each preset,
throughput and memory of the train step against length to docs/images. Where a
case was measured more than once, the last line counts.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.processes import Line
from longt5_flax.config import ConfigError

# What tells one case of a benchmark from another.
_CASE = ('benchmark', 'measure', 'implementation', 'preset', 'length', 'rows',
         'targets', 'beams', 'new_tokens', 'attention', 'remat', 'scan_layers',
         'scan_unroll', 'override', 'optimizer', 'dtype', 'device')
_STYLES = {'longt5_flax': ('C0', 'o'), 'transformers eager': ('C1', 's'),
           'transformers compile': ('C3', '^')}

Cells = list[tuple[str, Callable[[Line], str]]]


def read_lines(paths: Iterable[str]) -> list[Line]:
  """The measurements of some files, without what ran them.

  Raises:
    ConfigError: a file cannot be read, or a line is no measurement.
  """
  found: dict[str, Line] = {}
  for path in paths:
    try:
      text = Path(path).read_text('utf-8')
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f'{path}: {error}') from None
    for number, row in enumerate(text.splitlines(), start=1):
      try:
        line = json.loads(row)
        is_case = line.get('measure') != 'environment'
        key = str([line['benchmark'], *(line.get(name) for name in _CASE)])
      except (ValueError, AttributeError, KeyError):
        raise ConfigError(
            f'{path}, line {number}: must be a JSON object with `benchmark`, '
            'as the benchmarks print it.') from None
      if is_case:
        found.pop(key, None)  # Moves to the end.
        found[key] = line
  return list(found.values())


def select(lines: Iterable[Line], benchmark: str, measure: str | None = None
           ) -> list[Line]:
  """The lines of a benchmark."""
  return [line for line in lines if line['benchmark'] == benchmark
          and line.get('measure') == measure]


def series(line: Line) -> str:
  """What was measured, without its sizes."""
  name = line['implementation']
  if name != 'longt5_flax':
    return name
  options = [line['attention']]
  if line.get('remat', 'none') != 'none':
    options.append(f'remat {line["remat"]}')
  if line.get('scan_unroll'):
    options.append('in a loop')
  elif not line.get('scan_layers', True):
    options.append('layers apart')
  return f'{name} {", ".join(options)}'


def tables(lines: Sequence[Line]) -> str:
  """One table for each benchmark, in Markdown."""
  parts = []
  for benchmark, cells in (('train_step', _TRAIN_STEP), ('generate', _GENERATE),
                           ('attention', _ATTENTION),
                           ('compile_time', _COMPILE_TIME)):
    chosen = select(lines, benchmark)
    if chosen:
      parts.append(f'## {benchmark}\n\n' + _table(cells, chosen))
  for line in lines:
    if line.get('measure') == 'profile' and 'parts_ms' in line:
      total = sum(line['parts_ms'].values())
      parts.append(
          f'## Where {line["benchmark"]} goes: {line["preset"]}, '
          f'{_case(line)}, {line["busy_ms"]:.1f} ms\n\n' + _markdown(
              [['part', 'ms', 'share']] + [
                  [part, f'{ms:.2f}', f'{ms / total:.1%}']
                  for part, ms in line['parts_ms'].items()]))
  return '\n\n'.join(parts)


def _table(cells, lines):
  rows = [[name for name, _ in cells]]
  for line in lines:
    row = []
    for _, cell in cells:
      try:
        row.append(cell(line))
      except KeyError:
        row.append('')
    if 'error' in line:  # Where what is not known begins.
      row[row.index('')] = line['error']
    rows.append(row)
  return _markdown(rows)


def _markdown(rows):
  rows = [rows[0], ['---'] * len(rows[0]), *rows[1:]]
  return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def _case(line):
  return f'{line["length"]} x {line["rows"]}'


def _time(line, name='median', prefix=''):
  median, low, high = (
      line[key] for key in (f'{name}_ms', f'{prefix}p10_ms', f'{prefix}p90_ms'))
  digits = 1 if median >= 10 else 3
  return f'{median:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})'


def _memory(line):
  peak = line['peak_bytes']
  return '' if peak is None else f'{peak / 1e9:.1f} GB'


def _optional(name: str, form: str) -> Callable[[Line], str]:
  def cell(line):
    value = line.get(name)
    return '' if value is None else format(value, form)

  return cell


_TRAIN_STEP: Cells = [
    ('preset', lambda line: line['preset']),
    ('inputs', _case),
    ('', series),
    ('ms (p10 to p90)', _time),
    ('of it kernels, ms', _optional('busy_ms', '.1f')),
    ('input tokens/s', lambda line: f'{line["input_tokens_per_second"]:,}'),
    ('peak memory', _memory),
    ('MFU', _optional('mfu', '.1%')),
    ('of the floor', _optional('share_of_floor', '.1%')),
    ('ours is faster', _optional('speedup', '.2f')),
    ("ours over its memory", _optional('memory_ratio', '.2f')),
]
_GENERATE: Cells = [
    ('preset', lambda line: line['preset']),
    ('inputs', lambda line: (
        f'{_case(line)}, beams {line["beams"]}, {line["new_tokens"]} tokens')),
    ('', lambda line: line['implementation']),
    ('ms (p10 to p90)', _time),
    ('tokens/s', lambda line: f'{line["tokens_per_second"]:,.0f}'),
    ('encoder ms', _optional('encode_ms', '.1f')),
    ('ms a step', _optional('step_ms', '.3f')),
    ('of the floor', _optional('share_of_floor', '.1%')),
    ('peak memory', _memory),
    ('ours is faster', _optional('speedup', '.2f')),
    ("ours over its memory", _optional('memory_ratio', '.2f')),
]
_ATTENTION: Cells = [
    ('', lambda line: line['implementation']),
    ('inputs', _case),
    ('forward, ms (p10 to p90)', lambda line: _time(
        line, 'forward', 'forward_')),
    ('and backward', lambda line: _time(
        line, 'forward_backward', 'forward_backward_')),
    ('temporary memory',
     lambda line: f'{line["temporary_bytes"] / 2**20:,.0f} MiB'),
    ('peak memory', _memory),
    ('MFU', _optional('mfu', '.1%')),
    ('ours is faster', _optional('speedup', '.2f')),
]
_COMPILE_TIME: Cells = [
    ('preset', lambda line: line['preset']),
    ('inputs', _case),
    ('layers', lambda line: ', '.join(
        ['stacked' if line['scan_layers'] else 'apart', *line['override']])),
    ('cold, s', lambda line: f'{line["cold_seconds"]:.1f}'),
    ('from the cache, s', lambda line: f'{line["cached_seconds"]:.1f}'),
    ('of it tracing, s', lambda line: f'{line["trace_seconds"]:.1f}'),
]


def plot(lines: Sequence[Line], path: str) -> None:
  """Draws throughput and memory of the train step of one preset."""
  import matplotlib  # Slow to import, and only here needed.
  matplotlib.use('Agg')
  from matplotlib import pyplot as plt
  from matplotlib import ticker
  figure, (speed, memory) = plt.subplots(
      1, 2, figsize=(11, 4.5), layout='constrained')
  groups: dict[str, list[Line]] = {}
  for line in lines:
    groups.setdefault(line['implementation'], []).append(line)
  for i, (name, group) in enumerate(groups.items()):
    color, marker = _STYLES.get(
        name.removesuffix('-remat'), (f'C{4 + i}', 'd'))
    style = {'color': color, 'marker': marker, 'label': name}
    if name.endswith('-remat'):
      style |= {'linestyle': '--', 'fillstyle': 'none'}
    done = [line for line in group if 'error' not in line]
    speed.plot(*_highest(done, _tokens_per_second), **style)
    memory.plot(*memory_by_tokens(done), **style)
    for line in group:
      if line.get('error') == 'out of memory':
        memory.plot(line['length'] * line['rows'], 0.97, marker='x',
                    color=color, transform=memory.get_xaxis_transform())
  floor = [line for line in lines if 'floor_ms' in line]
  if floor:
    speed.plot(*_highest(floor, partial(_tokens_per_second, of='floor_ms')),
               color='0.5', linestyle=':', label='floor')
  speed.set(xlabel='input tokens of a row',
            ylabel='input tokens a second, peers: of kernels alone')
  memory.set(xlabel='input tokens of a step, in few rows (x: out of memory)',
             ylabel='peak memory, GB')
  if any('median_ms' in line for line in lines):  # Else there is no scale.
    speed.set_yscale('log')
  memory.set_ylim(bottom=0)
  for axes in (speed, memory):
    axes.set_xscale('log', base=2)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(
        lambda value, _: f'{value / 1024:g}k'))
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=''))
    axes.grid(alpha=0.3)
  figure.legend(*speed.get_legend_handles_labels(),
                loc='outside lower center', ncols=5)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _tokens_per_second(line: Line, of: str = '') -> float:
  """Of a peer that Python holds up, what its kernels could do."""
  ms = line[of] if of else line.get('busy_ms') or line['median_ms']
  return 1000 * line['length'] * line['rows'] / ms


def _highest(lines: Sequence[Line], value: Callable[[Line], float]
             ) -> tuple[list[int], list[float]]:
  """The highest value at each length."""
  found: dict[int, float] = {}
  for line in lines:
    length = line['length']
    found[length] = max(value(line), found.get(length, 0.0))
  return sorted(found), [found[length] for length in sorted(found)]


def memory_by_tokens(lines: Sequence[Line]) -> tuple[list[int], list[float]]:
  """Input tokens of a step and the most memory in use, in GB; of several cases
  with as many tokens that with the fewest rows."""
  found: dict[int, float] = {}
  for line in sorted(lines, key=lambda line: -line['rows']):
    if line['peak_bytes']:
      found[line['length'] * line['rows']] = line['peak_bytes'] / 1e9
  return sorted(found), [found[tokens] for tokens in sorted(found)]


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the tables; a user's mistake is one line and exit code 2."""
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.report', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('lines', nargs='+', metavar='LINES.jsonl')
  parser.add_argument('--images', default='docs/images', metavar='FOLDER')
  arguments = parser.parse_args(argv)
  try:
    lines = read_lines(arguments.lines)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print(tables(lines))
  steps = select(lines, 'train_step')
  os.makedirs(arguments.images, exist_ok=True)
  for preset in dict.fromkeys(line['preset'] for line in steps):
    path = os.path.join(arguments.images, f'train_step_{preset}.png')
    plot([line for line in steps if line['preset'] == preset], path)
    print(f'\n![Throughput and memory of {preset}]({path})')
  return 0


if __name__ == '__main__':
  sys.exit(main())

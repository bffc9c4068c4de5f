"""The page of `report`: one file of HTML that asks the network for nothing."""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from longt5_flax.report_figures import Figure, letter
from longt5_flax.report_runs import Evaluation, Run
from longt5_flax.sweep_report import line_style, rates, short_count
from longt5_flax.training.checkpoints import flatten

# Even a text that got past the escaping could load and run nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_CSS = '''
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 76rem; background: Canvas; color: CanvasText; }
h1 { font-size: 1.5rem; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
p, ul { max-width: 48rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .9rem; }
nav a { color: inherit; }
.runs { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; padding: .7rem 0;
  list-style: none; margin: 0; max-width: none; }
.run { font-weight: 600; overflow-wrap: anywhere; }
.run b { display: inline-block; min-width: 1.5em; margin-right: .45em;
  padding: 0 .3em; border-radius: .25em; color: #fff; text-align: center;
  line-height: 1.5; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
.note { font-size: .88rem; opacity: .8; }
.figures { display: grid; gap: 1rem 2rem; margin: 1rem 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); }
figure { margin: 0; max-width: 32rem; break-inside: avoid; }
figcaption { font-weight: 600; font-size: .95rem; }
svg { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; }
tbody th { font-weight: 400; min-width: 9rem; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
.settings td { min-width: 9rem; max-width: 22rem; white-space: normal; }
.settings th { min-width: 12rem; }
.range { font-size: .85em; opacity: .75; }
code, .code { font-family: ui-monospace, monospace; font-size: .85rem;
  overflow-wrap: anywhere; }
.example { border: 1px solid var(--line); border-radius: .5rem;
  padding: .8rem 1rem; margin: 0 0 1rem; }
.texts { display: grid; gap: .8rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(14rem, 100%), 1fr)); }
.texts div { padding: .5rem .7rem; border-radius: .3rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 0;
  max-width: 44rem; font-size: .95rem; }
.reference { background: var(--soft); }
details { margin: .8rem 0; }
summary { cursor: pointer; }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  nav { display: none; }
  .wide { overflow: visible; }
  table { font-size: 8pt; }
  .figures { grid-template-columns: 1fr 1fr; }
  tr, .texts div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
'''
# Settings that decide what a loss is of.
_OF_LOSS = ('data.objective', 'data.task', 'data.validation', 'data.vocabulary',
            'gap_sentences.', 'span_corruption.', 'loss.')


def page(runs: Sequence[Run], figures: Mapping[str, Sequence[Figure]],
         samples: int) -> str:
  """All of it.

  Args:
    runs: to compare.
    figures: by section.
    samples: how many examples to show.
  """
  settings = [flatten(run.config) for run in runs]
  sections = [
      ('summary', 'Summary', _summary(runs)),
      ('loss', 'Loss', _figures(figures['loss'], _about_loss(settings))),
      ('training', 'Learning rate and throughput',
       _figures(figures['training'])),
      ('scores', 'Scores', _scores(runs) + ''.join(
          _figures(figures[part], absent='')
          for part in ('scores', 'scores_by_step'))),
      ('configuration', 'Configuration', _configuration(runs, settings)),
      ('samples', 'Samples', _samples(runs, samples)),
  ]
  title = 'Report: ' + ', '.join(run.name for run in runs)
  links = ''.join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
  names = ''.join(f'<li>{_run(runs, i)}</li>' for i in range(len(runs)))
  body = ''.join(f'<section id="{key}"><h2>{name}</h2>{content}</section>\n'
                 for key, name, content in sections)
  return f'''<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{len(runs)} run{'s' * (len(runs) > 1)} of LongT5</h1>
<nav>{links}</nav>
<ul class="runs">{names}</ul>
{body}</body>
</html>
'''


def _escape(value: Any) -> str:
  return html.escape(str(value))


def _run(runs, i):
  """The name of a run, with its letter in its colour."""
  from matplotlib import colors
  color = colors.to_hex(line_style(i)['color'])
  return (f'<span class="run"><b style="background:{color}">{letter(i)}</b>'
          f'{_escape(runs[i].name)}</span>')


def _note(text):
  return f'<p class="note">{text}</p>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]],
           kind: str = '') -> str:
  """Of HTML, of a class `kind`; the first cell of a row is its head."""
  heads = ''.join(f'<th scope="col">{cell}</th>' for cell in head)
  lines = ''.join(
      f'<tr><th scope="row">{row[0]}</th>'
      + ''.join(f'<td>{cell}</td>' for cell in row[1:])
      + '</tr>' for row in rows)
  return (f'<div class="wide"><table class="{kind}">'
          f'<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody>'
          '</table></div>')


def _figures(found, note='', absent='No numbers of it.'):
  if not found:
    return _note(absent) if absent else ''
  return (note and _note(note)) + '<div class="figures">' + ''.join(
      f'<figure role="img" aria-label="{_escape(figure.title)}">'
      f'<figcaption>{_escape(figure.title)}</figcaption>{figure.svg()}</figure>'
      for figure in found) + '</div>'


def _summary(runs):
  rows = []
  for i, run in enumerate(runs):
    speed = rates(run.train) if run.train else {}
    machine = run.config.get('run', {})
    rows.append([
        _run(runs, i), _model(run.config.get('model', {})),
        f'{run.train[-1]["step"]:,}' if run.train else '',
        f'{run.train[-1]["loss"]:.4f}' if run.train else '',
        _best(run.validation), _speed(speed),
        _present(speed.get('mfu'), '{:.1%}'),
        _present(speed.get('peak_memory_bytes'), '{:.1f} GB', 1e-9),
        _escape(machine.get('devices', '')),
        _escape((machine.get('commit') or '')[:7])])
  heads = ['run', 'model', 'steps', 'training loss, last step',
           'held-out loss, least', 'input + target tokens/s', 'MFU',
           'peak memory', 'devices', 'commit']
  known = [i for i in range(len(heads)) if any(row[i] for row in rows)]
  return _table([heads[i] for i in known],
                [[row[i] for i in known] for row in rows]) + _note(
      'Tokens: real ones, padding left out. Tokens a second and MFU are '
      'medians over log steps.')


def _model(settings):
  if not settings:
    return ''
  return (f'{_escape(settings.get("preset"))} <span class="range">'
          f'{_escape(settings.get("encoder_attention_type"))}</span>')


def _best(lines):
  if not lines:
    return ''
  best = min(lines, key=lambda line: line['loss'])
  return (f'{best["loss"]:.4f} <span class="range">at step {best["step"]:,}'
          '</span>')


def _speed(speed):
  found = [speed.get(f'{side}_tokens_per_second')
           for side in ('input', 'target')]
  return '' if None in found else ' + '.join(map(short_count, found))


def _present(value, text, factor=1.0):
  return '' if value is None else text.format(value * factor)


def _about_loss(settings):
  """What must be known to compare losses."""
  differing = [name for name in _differing(settings)
               if name.startswith(_OF_LOSS)]
  note = ('Loss per target token, z-loss included. Thick lines are means over '
          'a 40th of the run.')
  if differing:
    note += (' <strong>Do not compare the runs by it</strong>: they differ in '
             + ', '.join(f'<code>{_escape(name)}</code>' for name in differing)
             + '.')
  return note


def _scores(runs):
  evaluated = [(i, run.evaluation) for i, run in enumerate(runs)
               if run.evaluation]
  if not evaluated:
    return _note('No run has an eval/STEP/scores.json: eval.py writes it.')
  names = list(dict.fromkeys(name for _, it in evaluated for name in it.scores))
  rows = [[
      _run(runs, i), f'{it.step:,}', _escape(it.record.get('metric', '')),
      _escape(it.record.get('examples', len(it.predictions))),
      _escape(it.decoding.get('num_beams', '')),
      *(_score(it.scores.get(name)) for name in names)]
          for i, it in evaluated]
  note = ('Mean of all examples and its 95 % bootstrap interval; of the best '
          'checkpoint where a run has kept it, else of the last evaluation.')
  # Of whatever evaluation says of its data, only that it differs counts.
  data = {json.dumps([it.record.get('data'), it.record.get('examples')])
          for _, it in evaluated}
  if len(data) > 1:
    note += (' <strong>Not all runs were scored on the same examples.'
             '</strong>')
  return _table(['run', 'step', 'metric', 'examples', 'beams',
                 *map(_escape, names)], rows) + _note(note)


def _score(score):
  if score is None:
    return ''
  return (f'{score["mean"]:.2f} <span class="range">{score["low"]:.2f} to '
          f'{score["high"]:.2f}</span>')


def _differing(settings):
  """Names of values that are not the same in all configs that there are."""
  present = [values for values in settings if values]
  names = dict.fromkeys(name for values in present for name in values)
  return [name for name in names
          if len({json.dumps(values.get(name)) for values in present}) > 1]


def _configuration(runs, settings):
  decoding = [{f'decoding.{name}': value
               for name, value in run.evaluation.decoding.items()}
              if run.evaluation else {} for run in runs]
  # Apart, as a run need not have both.
  differing = _differing(settings) + _differing(decoding)
  settings = [values | more for values, more in zip(
      settings, decoding, strict=True)]
  rows = [[f'<code>{_escape(name)}</code>', *(
      f'<span class="code">{_value(values, name)}</span>'
      for values in settings)] for name in differing]
  heads = ['', *(_run(runs, i) for i in range(len(runs)))]
  found = (_table(heads, rows, 'settings') if rows else
           _note('The runs have the same settings.') if len(runs) > 1 else '')
  same = {name: value for values in settings for name, value in values.items()
          if name not in differing}
  listed = '\n'.join(f'{name}={json.dumps(value, ensure_ascii=False)}'
                     for name, value in same.items())
  return found + (
      f'<details><summary>{len(same)} settings that all runs share</summary>'
      f'<div class="text code">{_escape(listed)}</div></details>'
      if same else _note('No run has a config.json.'))


def _value(values, name):
  if name not in values:
    return '–'
  return _escape(json.dumps(values[name], ensure_ascii=False))


def _samples(runs: Sequence[Run], count: int) -> str:
  """Examples, spread over the data, beside what each run wrote for them."""
  written: dict[int, Evaluation] = {
      i: run.evaluation for i, run in enumerate(runs)
      if run.evaluation and run.evaluation.predictions}
  if not written:
    return _note('No run has an eval/STEP/predictions.jsonl.')
  keys = list(next(iter(written.values())).predictions)
  shared = [key for key in keys if all(
      key in it.predictions for it in written.values())] or keys
  chosen = shared[::max(1, len(shared) // max(1, count))][:count]
  return _note(
      f'{len(chosen)} of {len(shared):,} examples, evenly spaced, not chosen '
      'by what was written.') + ''.join(_example(runs, written, key)
                                     for key in chosen)


def _example(runs, written, key):
  examples = {i: it.predictions[key] for i, it in written.items()
              if key in it.predictions}
  references = next(iter(examples.values()))['references']
  title = 'Reference' if len(references) == 1 else 'References'
  texts = '\n\n'.join(references)
  cells = [f'<div class="reference"><span class="run">{title}</span>'
           f'<p class="text">{_escape(texts)}</p></div>']
  cells += [
      f'<div>{_run(runs, i)}<p class="text">{_escape(example["prediction"])}'
      '</p></div>' for i, example in examples.items()]
  return (f'<article class="example"><h3>{_escape(key)}</h3>'
          f'<div class="texts">{"".join(cells)}</div></article>\n')

"""Sweeps: what their files may say, and one of real processes that fails in one
run and is stopped in another."""

import fcntl
import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

import runs
from longt5_flax import sweep, sweep_report
from longt5_flax.config import ConfigError
from longt5_flax.sweep_plan import read_plan

TINY_MODEL = 'tests/testdata/vocabulary/tiny.model'
SHIPPED = sorted((runs.ROOT / 'configs' / 'sweeps').glob('*.py'))
DATA = ['--config.data.path=a.jsonl', '--config.data.vocabulary=m.model',
        '--config.data.validation_path=b.jsonl']
STEPS = 12
COMMON = runs.TINY | {
    'steps': STEPS, 'checkpoint.every_steps': 2,
    'model.encoder_attention_type': 'full',  # Compiles fastest.
    'data.validation_path': 'corpus/validation.jsonl.xz',
    'eval.every_steps': STEPS, 'eval.max_batches': 2}
FILE = f'''
from longt5_flax.sweep_plan import Sweep

RANDOM = {{'gap_sentences.strategy': 'random'}}

def get_sweep():
  return Sweep(
      'configs/quickstart.py',
      [('first', {{}}), ('broken', {{'data.path': 'no.jsonl'}}),
       ('second', RANDOM)],
      {COMMON},
      [('rouge', {{}}), ('random', RANDOM)])
'''


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_give_every_run_the_same_budget(path):
  plan = read_plan(str(path), DATA)
  settings = [run.config.to_json() for run in plan.runs]
  assert len({*settings}) == len(settings), 'a run is there twice'
  for run in plan.runs:
    run.config.optimizer.microbatches = 1  # Others are the same rows in parts.
  budgets = {json.dumps([
      run.config.steps, run.config.optimizer.to_json(),
      run.config.schedule.to_json(), *(run.config.data[name] for name in (
          'inputs_length', 'targets_length', 'batch_size', 'path'))])
             for run in plan.runs}
  assert len(budgets) == 1
  assert len(plan.runs) >= 3


def test_two_sweeps_in_one_repeat_no_run():
  settings = {}
  for name in ('attention_type', 'objective', 'attention_and_objective'):
    plan = read_plan(f'{runs.ROOT}/configs/sweeps/{name}.py', DATA)
    settings[name] = {run.config.to_json() for run in plan.runs}
  assert settings.pop('attention_and_objective') == set.union(
      *settings.values())
  assert len(set.intersection(*settings.values())) == 1


def answer(capsys, path, *arguments):
  """Exit code and the one line of a mistake."""
  code = sweep.main([str(path), *arguments])
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.endswith('\n')
  return code, captured.err[:-1]


SWEEP = '''
from longt5_flax.sweep_plan import Sweep
def get_sweep():
  return Sweep('configs/quickstart.py', {})
'''


@pytest.mark.parametrize('text, line', [
    ('', '{} has no function get_sweep.'),
    ('def get_sweep(): return []',
     '{}: get_sweep() must return a Sweep, not list.'),
    (SWEEP.format([]), '{} has no runs.'),
    (SWEEP.format([('a', {}), ('b', {}), ('a', {})]),
     "{}: 2 entries are named 'a'."),
    (SWEEP.format([('../a', {})]), "{}: the name '../a' must be letters, "
     'digits and any of "_.+=-".'),
    (SWEEP.format([('a', {}), ('b', {'modle.d_ff': 1})]), "run 'b': no key "
     '\'modle\'. Did you mean "model" instead of "modle"?'),
    (SWEEP.format([('a', {'steps': 0})]),
     "run 'a': steps=0 must be at least 1."),
    (SWEEP.format([('a', {}), ('b', {'optimizer.name': 'sgd'})]),
     "run 'b': optimizer.name='sgd' must be one of "),
    (SWEEP.format([('a', {'data.objective': 'spans'})]), "run 'a': "
     "objective='spans' must be one of "),
    (SWEEP.format([('a', {'data.path': '', 'data.source': 'seqio',
                          'data.validation_path': '',
                          'data.task': 'longt5_c4_gap_sentences',
                          'data.objective': 'span_corruption'})]),
     "run 'a': data.objective='span_corruption' has no say in task "
     "'longt5_c4_gap_sentences': leave it out, and choose a task"),
    (SWEEP.format([('a', {'data.path': ''})]), "run 'a': data.path is empty: "
     'it must name the files to train on.'),
    (SWEEP.format("[('a', {})], held_out=[('x', {'loss.z': 1})]"),
     "held_out 'x': no key 'z'"),
    (SWEEP.replace('quickstart', 'quick').format([('a', {})]),
     f"[Errno 2] No such file or directory: '{runs.ROOT}/configs/quick.py'"),
])
def test_files_that_are_no_sweep(text, line, tmp_path, capsys):
  path = tmp_path / 'a.py'
  path.write_text(text)
  code, error = answer(capsys, path, f'--workdir={tmp_path}/out')
  assert code == 2
  assert error.startswith('error: ' + line.format(path)), error
  assert '\n' not in error
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('arguments, line', [
    (['no.py'], "no sweep file 'no.py'."),
    ([str(SHIPPED[0]), '--config.modle.x=1'],
     'no key \'modle\'. Did you mean "model" instead of "modle"?'),
    ([str(SHIPPED[0]), '--confg.steps=1'], "unexpected argument "
     "'--confg.steps=1': overrides of all runs are --config.KEY=VALUE."),
])
def test_commands_that_cannot_be(arguments, line, capsys):
  assert answer(capsys, *arguments) == (2, f'error: {line}')


@pytest.mark.parametrize('code, lines, expected', [
    (2, ['error: no file', 'goodbye'], 'no file'),
    (1, ['  raise ValueError', 'jax.errors.JaxRuntimeError: OOM', 'more', ''],
     'jax.errors.JaxRuntimeError: OOM'),
    (-9, ['a warning'], 'ended by SIGKILL'),
    (3, [], 'exit code 3'),
])
def test_error_line(code, lines, expected):
  assert sweep.error_line(code, lines) == expected


def test_held_out_rows_that_cannot_be_made(tmp_path, capsys):
  """Said before the first run, not after the last."""
  path = tmp_path / 'a.py'
  path.write_text(SWEEP.format(
      "[('a', {})], {'data.validation_path': 'no.jsonl'}"))
  assert answer(capsys, path, f'--workdir={tmp_path}/out') == (
      2, "error: held_out 'gap_sentences': no file 'no.jsonl'")
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('common, line', [
    ({'data.path': 'no.jsonl'}, "no file 'no.jsonl'"),
    ({'data.vocabulary': 'no.model'},
     'cannot read vocabulary no.model: No such file or directory'),
    ({'init_from': 'hf:no'}, 'init_from=hf:no: there is no such folder or file '
     'on disk; nothing is downloaded.'),
])
def test_what_no_run_could_read(common, line, tmp_path, capsys):
  """Said once, not by each run in turn."""
  path = tmp_path / 'a.py'
  runs_of = "[('a', {}), ('b', {'loss.z_loss': 0.1})]"
  path.write_text(SWEEP.format(f'{runs_of}, {common}'))
  assert answer(capsys, path, f'--workdir={tmp_path}/out') == (
      2, f'error: {line}')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('own, line', [
    # 4000 pieces; the objective has sentinels.
    ({}, "for run 'a' data.vocabulary has 4096 ids with its sentinels, more "
     'than model.vocab_size=4000: raise that, or lower data.extra_ids.'),
    ({'data.vocabulary': TINY_MODEL, 'model.vocab_size': 4096},
     f"data.vocabulary=corpus/vocabulary.model, but run 'a' has {TINY_MODEL}: "
     'losses per token of different vocabularies cannot be compared.'),
])
def test_held_out_rows_that_a_run_cannot_read(own, line, tmp_path, capsys):
  """Not a loss of nan, or of other words, at the end."""
  path = tmp_path / 'a.py'
  common = {'data.validation_path': 'corpus/validation.jsonl.xz',
            'model.vocab_size': 4000}
  spans = [('x', {'data.objective': 'span_corruption', 'data.extra_ids': 96})]
  path.write_text(SWEEP.format(f"[('a', {own})], {common}, {spans}"))
  assert answer(capsys, path, f'--workdir={tmp_path}/out') == (
      2, f"error: held_out 'x': {line}")
  assert not (tmp_path / 'out').exists()


def test_own_loss_is_the_last_held_out_one():
  metrics = [{'split': 'train', 'loss': 4.0},
             {'split': 'validation', 'loss': 3.0},
             {'split': 'validation', 'loss': 2.0}]
  assert sweep_report.own_loss(metrics) == {'own objective': 2.0}
  assert sweep_report.own_loss(metrics[:1]) == {}


def test_table_of_failures():
  failed = {'run': 'a', 'minutes': 2.0, 'error': 'no device'}
  *_, line, empty, last = sweep_report.table([failed]).splitlines()
  assert [cell.strip() for cell in line.split('|') if cell.strip()] == [
      'a', 'failed', '2.0']
  assert (empty, last) == ('', 'a failed: no device')
  line = sweep_report.table([failed | {'minutes': None}]).splitlines()[2]
  assert [cell.strip() for cell in line.split('|')[-2:]] == ['', '']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sweep')
  (folder / 'tiny.py').write_text(FILE)
  return folder


def start(folder, *arguments, **environment):
  return runs.start(
      [sys.executable, '-m', 'longt5_flax.sweep', f'{folder}/tiny.py',
       f'--workdir={folder}/out', *arguments],
      JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS='0',
      JAX_DISABLE_MOST_OPTIMIZATIONS='1', **environment)


@pytest.fixture(scope='module')
def stopped(folder):
  """(output, step) of the sweep stopped in its last run."""
  process = start(folder)
  saved = folder / 'out' / 'runs' / 'second' / 'checkpoints' / '2'
  while not saved.is_dir():
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.005)
  process.send_signal(signal.SIGTERM)
  output = runs.finish(process, code=128 + signal.SIGTERM)
  step, = re.findall('Stopped in second at step (.*); the same command goes on',
                     output)
  return output, int(step)


@pytest.fixture(scope='module')
def finished(folder, stopped):
  """The output of the same command again, and a file from before it."""
  before = (folder / 'out' / 'runs' / 'first' / 'metrics.jsonl').stat()
  return runs.finish(start(folder), code=1), before


def test_a_stopped_sweep_goes_on(folder, stopped, finished):
  output, step = stopped
  assert 2 <= step < STEPS
  assert f'[1/3] first: from step 0 to {STEPS}\n' in output
  assert "[2/3] broken: failed: no file 'no.jsonl'\n" in output
  assert 'Traceback' not in output
  output, before = finished
  first, second = folder / 'out/runs/first', folder / 'out/runs/second'
  assert '[1/3] first: finished before\n' in output
  assert (first / 'metrics.jsonl').stat() == before
  assert "[2/3] broken: failed: no file 'no.jsonl'\n" in output
  assert f'[3/3] second: from step {step} to {STEPS}\n' in output
  for workdir in (first, second):
    assert [line['step'] for line in runs.metrics(workdir)] == list(
        range(1, STEPS + 1))


def test_results(folder, finished):
  del finished
  results = {result['run']: result for result in json.loads(
      (folder / 'out' / 'results.json').read_text())}
  assert results['broken']['error'] == "no file 'no.jsonl'"
  for name, objective in (('first', 'rouge'), ('second', 'random')):
    result, workdir = results[name], folder / 'out' / 'runs' / name
    lines = runs.metrics(workdir)
    assert result['input_tokens'] == sum(
        line['encoder_tokens'] for line in lines)
    assert result['target_tokens'] == sum(
        line['decoder_tokens'] for line in lines)
    # The loss by the run's own objective is the one that it evaluated itself.
    assert result['held_out'][objective] == pytest.approx(
        runs.metrics(workdir, 'validation')[-1]['loss'], rel=1e-6)
    assert result['held_out']['rouge'] != result['held_out']['random']
    assert 0 < result['minutes'] < 10


def test_table_and_figure(folder, finished):
  out = folder / 'out'
  table = [line for line in (out / 'table.md').read_text().splitlines()
           if line.startswith('|')]
  assert [line.split('|')[1].strip() for line in table] == [
      'run', '-' * 6, 'first', 'broken', 'second']
  assert len({line.count('|') for line in table}) == 1
  assert '\n'.join(table) in finished[0]
  assert f'Table: {out}/table.md\nFigure: {out}/loss.png\n' in finished[0]
  assert (out / 'loss.png').read_bytes().startswith(b'\x89PNG')


def test_list_starts_nothing(folder, finished):
  """And does not take the device, which here is none."""
  del finished
  output = runs.finish(start(folder, '--list', JAX_PLATFORMS='none'))
  assert output.splitlines() == [
      'first (finished): no overrides of its own',
      f'broken (at step 0 of {STEPS}): data.path=no.jsonl',
      'second (finished): gap_sentences.strategy=random',
      'Compared on held-out documents by: rouge, random']


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_list_of_a_shipped_sweep_needs_no_data(path, tmp_path, capsys):
  arguments = [str(path), f'--workdir={tmp_path}/out', '--config.steps=7']
  assert sweep.main([*arguments, '--list']) == 0
  assert [line.partition(':')[0]
          for line in capsys.readouterr().out.splitlines()] == [
              f'{run.name} (at step 0 of 7)'
              for run in read_plan(str(path), DATA).runs]
  code, line = answer(capsys, *arguments)
  assert code == 2
  assert 'data.path is empty' in line
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('override, line', [
    ('loss.z_loss=0', 'loss.z_loss=0.0001, not 0.0: keep the value'),
    ('schedule.learning_rate=9.0', 'another schedule: keep it'),
    ('init_from=hf:DIR', 'another init_from: keep it'),
], ids=['key', 'schedule', 'init_from'])
def test_another_sweep_in_the_folder(override, line, folder, finished, capsys):
  del finished
  code, error = answer(capsys, folder / 'tiny.py', f'--workdir={folder}/out',
                       f'--config.{override}')
  assert (code, error) == (2, f'error: {folder}/out/runs/first holds a run '
                           f'with {line}, or choose another --workdir.')


def test_more_steps_than_asked_for(folder, finished):
  del finished
  plan = read_plan(f'{folder}/tiny.py', ['--config.steps=8'])
  with pytest.raises(ConfigError, match=f'holds {STEPS} steps, more than '
                     'steps=8: choose another --workdir'):
    sweep.run_sweep(plan, sweep.Folder(f'{folder}/out'))


def test_schedule_of_another_length(folder, finished, tmp_path):
  """Where the rate depends on the last step, more steps are another run."""
  del finished
  workdir = tmp_path / 'runs' / 'first'
  shutil.copytree(folder / 'out' / 'runs' / 'first', workdir)
  config = json.loads((workdir / 'config.json').read_text())
  config['schedule']['name'] = 'cosine'
  (workdir / 'config.json').write_text(json.dumps(config))
  arguments = ['--config.schedule.name=cosine', f'--config.steps={2 * STEPS}']
  run, *_ = read_plan(f'{folder}/tiny.py', arguments).runs
  with pytest.raises(ConfigError, match="schedule.name='cosine' for steps="
                     f'{STEPS}, not {2 * STEPS}: keep the value'):
    sweep.Folder(str(tmp_path)).step(run)
  # Of a constant rate: just more of it.
  run, *_ = read_plan(f'{folder}/tiny.py', arguments[1:]).runs
  assert sweep.Folder(f'{folder}/out').step(run) == STEPS


def test_minutes_of_a_killed_sweep_are_not_known(tmp_path, monkeypatch):
  path, out = tmp_path / 'a.py', str(tmp_path / 'out')
  path.write_text(SWEEP.format("[('a', {})], {'data.validation_path': ''}"))
  plan = read_plan(str(path), [])

  def killed(*_):
    raise SystemExit

  def attempt(step, train=lambda *_: 'no memory'):
    monkeypatch.setattr(sweep.Folder, 'step', lambda self, run: step)
    monkeypatch.setattr(sweep, 'train', train)
    assert sweep.run_sweep(plan, sweep.Folder(out)) == 1
    result, = json.loads(Path(out, 'results.json').read_text())
    assert result['error'] == 'no memory'
    return result['minutes']

  first = attempt(step=0)
  assert attempt(step=1) > first > 0
  with pytest.raises(SystemExit):
    attempt(step=1, train=killed)
  assert attempt(step=1) is None
  assert attempt(step=0) > 0  # All of it is known again.


def test_one_sweep_a_folder(folder, finished, capsys):
  del finished
  with open(Path(folder, 'out', 'lock'), 'w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    code, error = answer(
        capsys, folder / 'tiny.py', f'--workdir={folder}/out')
  assert (code, error) == (2, f'error: {folder}/out is in use by another '
                           'sweep, or by a run that a killed one has left.')

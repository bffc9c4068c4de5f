"""The README's fine-tuning, command by command, at a smaller size: from the
quickstart's checkpoint to scores on real meetings, a summary and a report."""

import io
import json
import lzma
import shlex

import numpy as np
import pytest

import eval as eval_command
import runs
import tiny_runs
import train
from longt5_flax import compare, convert, report, summarize
from longt5_flax.interop.open import open_tensors
from longt5_flax.training import partitioning

PRETRAIN = 'train.py --config=configs/quickstart.py'
FINETUNE = 'train.py --config=configs/quickstart_finetune.py'
EVALUATE = ('eval.py --workdir=runs/quickstart_finetune '
            '--config.eval.num_beams=4')
SUMMARIZE = '--checkpoint=run:runs/quickstart_finetune --num_beams=4'
REPORT = 'runs/quickstart runs/quickstart_finetune --output=report'
# A layer of 32 features, and few steps.
MODEL = {'model.num_layers': 1, 'model.d_model': 32, 'model.d_ff': 64}
SMALLER = {
    PRETRAIN: MODEL | {'steps': 1, 'schedule.warmup_steps': 0,
                       'data.inputs_length': 64,
                       'data.targets_length': 24, 'eval.samples': 0,
                       'data.path': 'corpus/validation.jsonl.xz',
                       'data.validation_path': ''},
    FINETUNE: MODEL | {'steps': 4, 'data.inputs_length': 160,
                       'data.targets_length': 24, 'eval.decode_every_steps': 2},
    EVALUATE: {},
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, cache):
  """Where the commands have been run, one after the other."""
  folder = tmp_path_factory.mktemp('walkthrough')
  for name in ('configs', 'corpus', 'tests'):
    (folder / name).symlink_to(runs.ROOT / name)
  with (pytest.MonkeyPatch.context() as patch, tiny_runs.own_signals(),
        tiny_runs.cheap_compilation(cache)):
    patch.chdir(folder)
    make_mesh = partitioning.make_mesh
    patch.setattr(partitioning, 'make_mesh', lambda sizes, devices: make_mesh(
        sizes, devices[:1]))  # Of several, compilation takes longer.
    for command, overrides in SMALLER.items():
      script, *argv = shlex.split(command)
      argv += [f'--config.{key}={value}' for key, value in overrides.items()]
      if script == 'eval.py':
        assert eval_command.run(argv) == 0
      else:
        patch.setattr('sys.argv', [script, *argv])
        config, rest = tiny_runs.parse(*argv)
        assert not rest
        name = shlex.split(command)[1].rpartition('/')[2].removesuffix('.py')
        assert train.main(config, f'runs/{name}') == 0
  return folder


def test_fine_tuning_starts_from_the_quickstart(folder):
  record = json.loads(
      (folder / 'runs/quickstart_finetune/config.json').read_text('utf-8'))
  assert record['init_from'] == 'run:runs/quickstart'
  started, ended = (open_tensors(f'run:{folder}/runs/{name}') for name in (
      'quickstart', 'quickstart_finetune'))
  name = 'encoder/layers_0/attention/query/kernel'
  moved = np.linalg.norm(ended.read(name) - started.read(name))
  assert 0 < moved < 0.2 * np.linalg.norm(started.read(name))


def test_evaluation_is_of_the_best_checkpoint(folder):
  workdir = folder / 'runs/quickstart_finetune'
  best = json.loads((workdir / 'best.json').read_text('utf-8'))
  assert best['scores'].keys() == {'2', '4'}
  results = workdir / 'eval' / str(best['best'])
  scores = json.loads((results / 'scores.json').read_text('utf-8'))
  assert scores['decoding']['num_beams'] == 4
  assert scores['main'] == 'geometric_mean'
  assert scores['cut_inputs'] == scores['examples'] == 5
  predictions = compare.read_predictions(str(results / 'predictions.jsonl'))
  assert next(iter(predictions)) == 'qmsum-val-Bed002-g0'
  [other] = {'2', '4'} - {str(best['best'])}
  assert compare.read_predictions(
      str(workdir / 'eval' / other / 'predictions.jsonl')
      ).keys() == predictions.keys()


def test_summary_is_what_was_evaluated(folder, cache, monkeypatch, capsys):
  """The same checkpoint, vocabulary, cut and lengths, found by themselves."""
  path = runs.ROOT / 'tests/testdata/qmsum/validation.jsonl.xz'
  with lzma.open(path) as file:
    example = json.loads(file.readline())
  monkeypatch.chdir(folder)
  monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(
      example['inputs'].encode())))
  with tiny_runs.cheap_compilation(cache):
    assert summarize.main(shlex.split(SUMMARIZE)) == 0
  written = capsys.readouterr()
  assert 'standard input: ' in written.err
  best = json.loads((folder / 'runs/quickstart_finetune/best.json').read_text())
  predictions = compare.read_predictions(
      f'runs/quickstart_finetune/eval/{best["best"]}/predictions.jsonl')
  prediction = predictions[example['id']]['prediction']
  assert len(prediction) > 10
  assert written.out == f'{prediction}\n'


def test_converted_run_brings_its_vocabulary(
    folder, cache, monkeypatch, capsys):
  monkeypatch.chdir(folder)
  command = ['--from', 'run:runs/quickstart_finetune', '--to']
  assert convert.main([*command, 'hf:mine']) == 0
  assert 'corpus/vocabulary.model: copied as spiece.model.' in (
      capsys.readouterr().out)
  monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'A ship.')))
  with tiny_runs.cheap_compilation(cache):
    assert summarize.main(['--checkpoint=hf:mine', '--max_length=4']) == 0
  config = json.loads((folder / 'mine/tokenizer_config.json').read_text())
  assert config['extra_ids'] == 0


def test_converted_run_without_its_vocabulary(
    folder, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  command = ['--from', f'run:{folder}/runs/quickstart_finetune', '--to']
  assert convert.main([*command, 'hf:missing']) == 0
  assert 'not copied: cannot read vocabulary' in capsys.readouterr().out
  (tmp_path / 'corpus').mkdir()
  (tmp_path / 'corpus/vocabulary.model').symlink_to(
      runs.ROOT / 'tests/testdata/vocabulary/tiny.model')
  assert convert.main([*command, 'hf:another']) == 0
  assert 'is not the one that the run was trained with' in (
      capsys.readouterr().out)
  for name in ('missing', 'another'):
    assert not (tmp_path / name / 'spiece.model').exists()


def test_report_of_both_runs(folder, monkeypatch):
  monkeypatch.chdir(folder)
  assert report.main(shlex.split(REPORT)) == 0
  page = (folder / 'report/report.html').read_text('utf-8')
  for words in ('quickstart_finetune', 'data.objective', 'rougeLsum',
                'qmsum-val-Bed002-g0', 'Do not compare the runs by it'):
    assert words in page

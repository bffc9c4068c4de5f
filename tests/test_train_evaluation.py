"""Predictions and scores in training: the best checkpoint stays, and a run that
gets no better ends."""

import json

import pytest

import tiny_runs
import train
from longt5_flax.config import ConfigError
from longt5_flax.data.sources import DataError
from longt5_flax.evaluation.bootstrap import Interval
from longt5_flax.interop.open import open_tensors
from longt5_flax.interop.orbax import run_checkpoint


@pytest.fixture(autouse=True, scope='module')
def shared(cache):
  with tiny_runs.cheap_compilation(cache), tiny_runs.own_signals():
    yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Examples to train on, and to write."""
  path = tmp_path_factory.mktemp('data') / 'examples.jsonl'
  path.write_text(''.join(json.dumps({
      'id': str(i), 'inputs': 'He went to the sea. ' * (1 + i),
      'targets': 'The sea was calm.'}) + '\n' for i in range(11)))
  return path


def settings(data, **more):
  return {'data.objective': 'supervised', 'data.path': data,
          'data.validation_path': data, 'data.packing': False,
          'eval.every_steps': 100, 'eval.metric': 'rouge',
          'eval.decode_every_steps': 2, 'eval.batch_size': 4,
          'eval.keep_best': 'rouge1', 'checkpoint.keep': 1,
          'checkpoint.every_steps': 100} | {
              key.replace('__', '.'): value for key, value in more.items()}


class Scripted:
  """An evaluator whose scores are known before."""
  main = 'rouge1'

  def __init__(self, scores):
    self.scores, self.calls = scores, []

  def __call__(self, params, folder, checkpoint, report, replace):
    self.calls.append(int(folder.rpartition('/')[2]))
    score = self.scores[self.calls[-1]]
    return {'rouge1': Interval(score, score, score, score)}


def run(workdir, data, scores, monkeypatch, **more):
  evaluator = Scripted(scores)
  with monkeypatch.context() as patch:
    patch.setattr(train, 'make_evaluator', lambda *_: evaluator)
    result = tiny_runs.run(workdir, settings(data, **more))
  return evaluator.calls, result


def test_the_best_checkpoint_stays(tmp_path, data, monkeypatch):
  """Also that of a process before; of equal ones the first."""
  calls, result = run(tmp_path, data, {2: 1.0, 4: 3.0, 6: 2.0}, monkeypatch,
                      steps=6)
  assert calls == [2, 4, 6]
  assert result.checkpoints == [4, 6]
  calls, result = run(tmp_path, data, {8: 2.5, 10: 3.0, 11: 0.0}, monkeypatch,
                      steps=11)
  assert calls == [8, 10, 11]  # The last step is evaluated too.
  assert result.checkpoints == [4, 11]
  assert [line['rouge1'] for line in result.lines('scores')] == [
      1.0, 3.0, 2.0, 2.5, 3.0, 0.0]
  directory, line = run_checkpoint(str(tmp_path))
  assert directory == f'{tmp_path}/checkpoints/4'
  assert line == f'{directory}: the best checkpoint, by rouge1, of the run.'
  assert open_tensors(f'run:{tmp_path}').report == [line]
  newest = f'{tmp_path}/checkpoints/11'
  assert open_tensors(f'run:{newest}').report == [
      f'{newest}: a checkpoint of a run.']
  # A run that keeps no best one has scores, too.
  best = tmp_path / 'best.json'
  best.write_text(best.read_text().replace('"rouge1"', '""'))
  assert run_checkpoint(str(tmp_path)) == (
      newest, f'{newest}: the newest checkpoint of the run.')
  best.write_text('{"scores": 3}')
  with pytest.raises(ConfigError, match=r'best\.json: must hold keep_best'):
    run_checkpoint(str(tmp_path))


def test_a_checkpoint_gets_whole_before_an_error_ends_the_run(
    tmp_path, data, monkeypatch):
  with pytest.raises(KeyError):  # Of the step, which has no score.
    run(tmp_path, data, {}, monkeypatch, steps=6)
  assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == ['2']


def test_a_run_that_gets_no_better_ends(tmp_path, data, monkeypatch):
  """It was killed once between a checkpoint and its evaluation, which comes
  first; and what is said of a step without a checkpoint is forgotten."""
  scores = {2: 1.0, 4: 3.0, 6: 2.0, 8: 3.0}
  run(tmp_path, data, scores, monkeypatch, steps=4)
  best = tmp_path / 'best.json'
  record = json.loads(best.read_text())
  assert record == {'keep_best': 'rouge1', 'best': 4,
                    'scores': {'2': 1.0, '4': 3.0}}
  best.write_text(json.dumps(record | {'scores': {'2': 1.0, '6': 9.0}}))
  calls, result = run(tmp_path, data, scores, monkeypatch, steps=20,
                      eval__patience=2)
  assert calls == [4, 6, 8]
  assert json.loads(best.read_text())['scores'] == {
      str(step): score for step, score in scores.items()}
  assert result.checkpoints == [4, 8]
  assert 'Ends at step 8: the best rouge1 is of step 4.' in result.printed
  # The same command once more takes no step.
  calls, result = run(tmp_path, data, scores, monkeypatch, steps=20,
                      eval__patience=2)
  assert (calls, len(result.batches)) == ([], 0)


def test_a_run_writes_predictions_and_scores(tmp_path, data):
  """Without anything scripted."""
  result = tiny_runs.run(tmp_path, settings(
      data, steps=2, eval__max_examples=10))
  scores = json.loads((tmp_path / 'eval' / '2' / 'scores.json').read_text())
  lines = (tmp_path / 'eval' / '2' / 'predictions.jsonl').read_text('utf-8')
  assert [json.loads(line)['id'] for line in lines.splitlines()] == [
      str(i) for i in range(10)]
  assert scores['checkpoint'] == f'run:{tmp_path}/checkpoints/2'
  assert result.lines('scores') == [{'step': 2, 'split': 'scores'} | {
      name: float(f'{score["mean"]:.7g}')
      for name, score in scores['scores'].items()}]
  assert json.loads((tmp_path / 'best.json').read_text())['scores'] == {
      '2': scores['scores']['rouge1']['mean']}
  assert f'eval.py --workdir={tmp_path}' in result.printed


@pytest.mark.parametrize('more, message', [
    ({'eval__metric': 'bleu'},
     "eval.metric='bleu' must be one of rouge, rouge_stemmed, squad, trivia_qa,"
     ' gov_report, summ_screen_fd, qmsum, narrative_qa, qasper, quality, '
     'contract_nli.'),
    ({'eval__keep_best': 'rougeX'},
     "eval.keep_best='rougeX' must be one of rouge1, rouge2, rougeL, "
     "rougeLsum, geometric_mean, as eval.metric='rouge' has them."),
    ({'eval__decode_every_steps': 0},
     "eval.keep_best='rouge1' needs eval.decode_every_steps."),
    ({'eval__keep_best': '', 'eval__patience': 2},
     'eval.patience=2 needs eval.keep_best, the score that must get better.'),
    ({'data__validation_path': ''}, 'data.validation_path is empty: it must '
     'name the examples to decode.'),
    ({'eval__num_beams': 0}, 'eval.num_beams=0 must be an integer, at least '
     '1.'),
    ({'eval__batch_size': 0}, 'eval.batch_size=0 must be at least 1.'),
])
def test_mistakes_are_one_line(tmp_path, data, more, message):
  with pytest.raises((ConfigError, DataError)) as caught:
    train.main(tiny_runs.tiny(settings(data, **more)), str(tmp_path / 'run'))
  assert str(caught.value) == message
  assert not (tmp_path / 'run').exists()

"""eval.py: real processes, killed and started again; what it writes; mistakes
of a user."""

import json
import shutil
import signal
import socket
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

import eval as command
import golden
import runs
import t5x_files
import tiny_runs
from longt5_flax import (
    FlaxLongT5ForConditionalGeneration,
    LongT5ForConditionalGeneration,
    compare,
    convert,
    evaluator,
)
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.evaluation import bootstrap
from longt5_flax.evaluation.metrics import METRICS, SCROLLS
from longt5_flax.interop.open import open_tensors
from longt5_flax.interop.orbax import save_orbax
from longt5_flax.training import run_config
from longt5_flax.training.checkpoints import Checkpoints

EXAMPLES, BATCH = 50, 2
SETTINGS = {
    'model.num_layers': 1, 'model.d_model': 32, 'model.d_ff': 64,
    'data.objective': 'supervised', 'data.inputs_length': 256,
    'data.targets_length': 96,
    'data.vocabulary': f'{runs.ROOT}/corpus/vocabulary.model',
    'eval.metric': 'rouge', 'eval.batch_size': BATCH, 'eval.num_beams': 2}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  """KIND:PATH of a tiny model that writes something, of any length."""
  config = run_config.model_config(tiny_runs.tiny(SETTINGS).model)
  tokens = jnp.ones((1, 1), jnp.int32)
  folder = tmp_path_factory.mktemp('weights') / 'model'
  save_orbax(str(folder), golden.random_params(
      LongT5ForConditionalGeneration(config), tokens, tokens), config)
  return f'orbax:{folder}'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """A number of examples that batches do not divide, of many lengths."""
  path = tmp_path_factory.mktemp('data') / 'examples.jsonl'
  path.write_text(''.join(json.dumps({
      'id': f'example {i}', 'inputs': 'He went to the sea. ' * (1 + i % 40),
      'targets': 'The sea .', 'references': ['The sea .', 'A sea .']}) + '\n'
                          for i in range(EXAMPLES + 1)))
  return path


def arguments(weights, data, workdir, **settings):
  """After `python eval.py`; keys of settings have dots as `__`."""
  settings = SETTINGS | {'data.validation_path': data} | {
      key.replace('__', '.'): value for key, value in settings.items()}
  return ['--config=configs/quickstart.py', f'--checkpoint={weights}',
          f'--workdir={workdir}', *(f'--config.{key}={value}'
                                    for key, value in settings.items())]


@pytest.mark.parametrize('devices', [1, 8])
def test_a_killed_evaluation_goes_on(devices, weights, data, tmp_path, cache):
  def start(workdir):
    return runs.start(
        [sys.executable, 'eval.py', *arguments(weights, data, workdir)], cache,
        JAX_NUM_CPU_DEVICES=str(devices))

  whole, killed = tmp_path / 'whole', tmp_path / 'killed'
  runs.finish(start(whole))
  process = start(killed)
  partial = killed / 'eval' / '0' / 'partial.jsonl'
  while not partial.exists() or partial.read_bytes().count(b'\n') < 4:
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.002)
  process.kill()
  runs.finish(process, code=-signal.SIGKILL)
  done = partial.read_bytes().count(b'\n') - 1
  assert 3 <= done < EXAMPLES // BATCH
  with open(partial, 'a') as file:
    file.write('["cut in ha')
  output = runs.finish(start(killed))
  assert f'{BATCH * done} of {EXAMPLES + 1} were decoded before' in output
  for name in ('predictions.jsonl', 'scores.json'):
    assert (killed / 'eval' / '0' / name).read_bytes() == (
        whole / 'eval' / '0' / name).read_bytes()
  assert not partial.exists()


def evaluate(capsys, *argv):
  """(exit code, what eval.py printed), in this process."""
  code = command.run(argv)
  captured = capsys.readouterr()
  return code, captured.out + captured.err


@pytest.fixture(scope='module')
def finished(weights, data, tmp_path_factory, cache):
  """A workdir with the evaluation of 5 examples."""
  workdir = tmp_path_factory.mktemp('finished') / 'workdir'
  with tiny_runs.cheap_compilation(cache):
    assert command.run(arguments(
        weights, data, workdir, eval__max_examples=5)) == 0
    yield workdir


@pytest.fixture
def done(finished, tmp_path):
  """Its folder, to work on."""
  shutil.copytree(finished, tmp_path / 'workdir')
  return tmp_path / 'workdir' / 'eval' / '0'


def test_files_say_what_was_done(weights, data, done):
  scores = json.loads((done / 'scores.json').read_text('utf-8'))
  lines = [json.loads(line) for line in
           (done / 'predictions.jsonl').read_text('utf-8').splitlines()]
  assert [line['id'] for line in lines] == [f'example {i}' for i in range(5)]
  assert all(line['references'] == ['The sea .', 'A sea .'] for line in lines)
  expected = bootstrap.intervals(METRICS['rouge'], METRICS['rouge'].score(
      [line['prediction'] for line in lines],
      [line['references'] for line in lines]))
  assert scores['scores'] == {
      name: interval._asdict() for name, interval in expected.items()}
  assert (scores['checkpoint'], scores['path'], scores['main'],
          scores['examples']) == (weights, str(data), 'rougeLsum', 5)
  assert scores['decoding']['num_beams'] == 2
  assert compare.compare(*[str(done / 'predictions.jsonl')] * 2, 'rouge')


def test_predictions_are_in_order(weights, data, done):
  """Each is what `generate` writes for its example; the longest was decoded
  first."""
  vocabulary = Vocabulary(SETTINGS['data.vocabulary'], 0)
  inputs = [[*vocabulary.encode(json.loads(line)['inputs']), 1]
            for line in data.read_text().splitlines()[:5]]
  ids = np.zeros((5, len(inputs[-1])), int)
  for row, tokens in zip(ids, inputs, strict=True):
    row[:len(tokens)] = tokens
  model = FlaxLongT5ForConditionalGeneration.from_pretrained(weights)
  written = model.generate(ids, num_beams=2, max_new_tokens=96).sequences
  expected = [vocabulary.decode(row) for row in written[:, 1:].tolist()]
  assert len(set(expected)) == 5
  lines = (done / 'predictions.jsonl').read_text('utf-8').splitlines()
  assert [json.loads(line)['prediction'] for line in lines] == expected


def test_what_is_there_is_not_decoded_again(
    weights, data, done, capsys, monkeypatch):
  """Another metric scores it again; other settings start anew."""
  before = (done / 'predictions.jsonl').read_bytes()
  same = arguments(weights, data, done.parents[1], eval__max_examples=5)
  with monkeypatch.context() as patch:
    patch.delattr(evaluator.Predictor, '__call__')
    code, output = evaluate(capsys, *same, '--config.eval.metric=squad')
  assert code == 0
  assert 'predictions.jsonl is there already.' in output
  assert (done / 'predictions.jsonl').read_bytes() == before
  assert json.loads((done / 'scores.json').read_text())['main'] == 'f1'
  code, output = evaluate(capsys, *same, '--config.eval.num_beams=1')
  assert code == 0
  assert ('held predictions of num_beams=2, not 1: starting anew.'
          in ' '.join(output.split()))
  assert (done / 'predictions.jsonl').read_bytes() != before


def test_predictions_of_something_else_stay(
    weights, data, done, tmp_path, capsys):
  before = {path: path.read_bytes() for path in done.iterdir()}
  other = tmp_path / 'other.jsonl'
  other.write_text(data.read_text().replace('He', 'She'))
  code, output = evaluate(capsys, *arguments(weights, other, done.parents[1]))
  assert code == 2
  assert (f'error: {done} holds predictions of other data: choose another '
          '--workdir, or move it away.\n') in output
  (done / 'scores.json').rename(tmp_path / 'scores.json')
  code, output = evaluate(capsys, *arguments(weights, data, done.parents[1]))
  assert code == 2
  assert (f'error: {done}/predictions.jsonl has no scores.json that says what '
          'it is of: move it away, or choose another --workdir.\n') in output
  for name in ('scores.json', 'partial.jsonl'):
    (done / name).write_text('[]\n')
    code, output = evaluate(capsys, *arguments(weights, data, done.parents[1]))
    assert code == 2
    assert (f'error: {done}/{name} was not written by eval.py: move it away, '
            'or choose another --workdir.\n') in output
    (done / name).unlink()
  (tmp_path / 'scores.json').rename(done / 'scores.json')
  assert {path: path.read_bytes() for path in done.iterdir()} == before


def test_two_processes_write_the_same(weights, data, done, tmp_path, cache):
  with socket.socket() as server:
    server.bind(('localhost', 0))
    port = server.getsockname()[1]
  outputs = [runs.finish(process) for process in [runs.start([
      sys.executable, 'eval.py',
      *arguments(weights, data, tmp_path, eval__max_examples=5),
      f'--coordinator=localhost:{port}', '--num_processes=2',
      f'--process_id={i}'], cache) for i in range(2)]]
  assert ['rougeLsum' in output for output in outputs] == [True, False]
  for name in ('predictions.jsonl', 'scores.json'):
    assert (tmp_path / 'eval' / '0' / name).read_bytes() == (
        done / name).read_bytes()


def test_other_formats_write_the_same(weights, data, done, tmp_path, capsys):
  """Of a Hugging Face folder the architecture is its own, whatever the config
  says; of a T5X checkpoint the step is in its name."""
  folder, steps = tmp_path / 'converted', tmp_path / 'checkpoint_30'
  assert convert.main([f'--from={weights}', f'--to=hf:{folder}']) == 0
  t5x_files.write_t5x(steps, t5x_files.read_all(open_tensors(weights)))
  theirs = arguments(f'hf:{folder}', data, tmp_path, eval__max_examples=5)
  for step, argv in {
      '0': [word for word in theirs if not word.startswith('--config.model.')],
      '30': arguments(f't5x:{steps}', data, tmp_path, eval__max_examples=5),
  }.items():
    code, output = evaluate(capsys, *argv)
    assert code == 0, output
    assert (tmp_path / 'eval' / step / 'predictions.jsonl').read_bytes() == (
        done / 'predictions.jsonl').read_bytes()


RUN = '--workdir={run}'
MISTAKES = {
    'nothing named': (
        [], '--workdir=DIR is missing: the folder of a run, or with '
        '--checkpoint=KIND:PATH a folder for the results.'),
    'no checkpoint': (
        ['--workdir={tmp}'], '{tmp}: no checkpoint in {tmp}/checkpoints.'),
    'no such step': (
        ['--checkpoint=run:{run}/checkpoints/7'],
        '{run}/checkpoints/7: no whole checkpoint.'),
    'no such step, and a slash': (
        ['--checkpoint=run:{run}/checkpoints/7/'],
        '{run}/checkpoints/7/: no whole checkpoint.'),
    'no such kind': (
        ['--checkpoint=tf:x', RUN], "'tf:x' must be one of hf:DIR_OR_FILE, "
        't5x:DIR_OR_URL, t5:DIR_OR_URL, orbax:DIR, run:WORKDIR, '
        'safetensors:FILE, or the path of a Hugging Face folder on disk.'),
    'no folder for the results': (
        ['--checkpoint={weights}'],
        '--workdir=DIR is missing: a folder for the results.'),
    'no config': (
        ['--checkpoint={weights}', RUN], '--config=FILE is missing: {weights} '
        'is of no run that would bring its own.'),
    'no metric': (
        [RUN, '--config.eval.metric='], "eval.metric='' must be one of "
        + ', '.join((*METRICS, *SCROLLS)) + '.'),
    'no metric, and no examples, as of a run of pretraining': (
        [RUN, '--config.eval.metric=', '--config.data.inputs_field=x'],
        "eval.metric='' must be one of "
        + ', '.join((*METRICS, *SCROLLS)) + '.'),
    'no such key': (
        [RUN, '--config.eval.beams=4'], "no key 'beams'"),
    'a word too many': ([RUN, 'more'], "unexpected argument 'more'."),
    'no such argument': ([RUN, '--beams=4'], "unknown argument '--beams=4'."),
    'no data': (
        [RUN, '--config.data.validation_path='],
        'data.validation_path is empty: it must name the examples to decode.'),
    'no vocabulary': (
        [RUN, '--config.data.vocabulary='],
        'data.vocabulary is empty: it must name a SentencePiece model.'),
    'a larger vocabulary': (
        ['--checkpoint={weights}', RUN, f'--config={runs.ROOT}/configs/base.py',
         f'--config.data.vocabulary={runs.ROOT}/corpus/vocabulary.model'],
        'data.vocabulary has 4100 ids with its sentinels, more than '
        'model.vocab_size=4096: raise that, or lower data.extra_ids.'),
    'another vocabulary than that of the run, and larger': (
        [RUN, '--config.data.extra_ids=100'],
        f'data.vocabulary={runs.ROOT}/corpus/vocabulary.model with '
        'data.extra_ids=100 is not the vocabulary that the checkpoint was '),
    'another vocabulary': (
        [RUN, '--config.data.extra_ids=90'],
        f'data.vocabulary={runs.ROOT}/corpus/vocabulary.model with '
        'data.extra_ids=90 is not the vocabulary that the checkpoint was '
        f'trained with, {runs.ROOT}/corpus/vocabulary.model with 0.'),
    'an empty list of references': (
        [RUN, '--config.data.validation_path={tmp}/empty.jsonl'],
        "{tmp}/empty.jsonl:2: field 'references' is an empty list"),
    'inputs that are too long': (
        [RUN, '--config.data.inputs_length=50',
         '--config.data.long_inputs=refuse'], '35 inputs of {data} have more '
        "than inputs_length=50 tokens, and long_inputs='refuse'"),
}


@pytest.fixture(scope='module')
def trained(weights, tmp_path_factory):
  """The folder of a run with one checkpoint, as train.py saves it."""
  workdir = tmp_path_factory.mktemp('trained') / 'run'
  config = tiny_runs.tiny(SETTINGS)
  vocabulary = Vocabulary(config.data.vocabulary, config.data.extra_ids)
  arrays = t5x_files.read_all(open_tensors(weights))
  checkpoints = Checkpoints(str(workdir / 'checkpoints'), config.checkpoint)
  checkpoints.save(
      1, {'params': unflatten_dict(arrays, sep='/')}, {},
      run_config.resolved(config) | {'vocabulary': vocabulary.fingerprint})
  checkpoints.close()
  return workdir


@pytest.mark.parametrize('name', MISTAKES)
def test_mistakes_are_one_line(
    name, trained, weights, data, tmp_path, capsys):
  lines = data.read_text().splitlines()
  (tmp_path / 'empty.jsonl').write_text('\n'.join(
      [lines[0], json.dumps(json.loads(lines[1]) | {'references': []})]))
  before = sorted(trained.iterdir())
  names = {'tmp': tmp_path, 'run': trained, 'weights': weights, 'data': data}
  words, message = MISTAKES[name]
  words = ['--config.eval.metric=rouge', '--config.data.validation_path={data}',
           *words]
  code, output = evaluate(capsys, *(word.format(**names) for word in words))
  assert code == 2
  assert output.startswith('error: ' + message.format(**names))
  assert output.count('\n') == 1
  assert sorted(trained.iterdir()) == before

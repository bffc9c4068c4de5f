"""Fine-tuning: whole runs on inputs and targets of one's own, and on a task of
the paper."""

import itertools
import json
import re
import sys

import numpy as np
import pytest

import eval as eval_command
import runs
import tiny_runs
import train
from longt5_flax import compare
from longt5_flax.config import ConfigError
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

VOCABULARY = Vocabulary(str(runs.ROOT / 'corpus/vocabulary.model'), 0)
TEXT = 'the owl hoots the fox barks and the hare runs away from them'
WORDS = TEXT.split()
# Their inputs have about 12 tokens, and each fourth one 100; their targets 2
# to 10.
EXAMPLES = [{'inputs': ' '.join(itertools.islice(
    itertools.cycle(WORDS[i % 9:]), 90 if i % 4 == 3 else 9)),
             'targets': ' '.join(WORDS[i % 7:][:1 + i % 6])}
            for i in range(24)]


def write(path, examples):
  path.write_text(''.join(json.dumps(each) + '\n' for each in examples))
  return str(path)


@pytest.fixture(scope='module')
def settings(tmp_path_factory):
  """To add to a tiny run."""
  folder = tmp_path_factory.mktemp('examples')
  return {'data.objective': 'supervised',
          'data.path': write(folder / 'train.jsonl', EXAMPLES),
          'data.validation_path': write(folder / 'held_out.jsonl',
                                        EXAMPLES[:8]),
          'data.packing': False, 'data.targets_length': 8,
          'eval.every_steps': 3}


@pytest.fixture(scope='module', autouse=True)
def compiled(tmp_path_factory):
  with (tiny_runs.own_signals(),
        tiny_runs.cheap_compilation(tmp_path_factory.mktemp('compiled'))):
    yield


def ids(text, length):
  """As a row has them: cut, ended, filled up."""
  ended = [*VOCABULARY.encode(text)[:length - 1], 1]
  return ended + [0] * (length - len(ended))


def pairs_of(batches):
  return [(inputs.tolist(), targets.tolist()) for batch in batches
          for inputs, targets in zip(batch['encoder_input_tokens'],
                                     batch['decoder_target_tokens'],
                                     strict=True)]


def expected_pairs(examples):
  return [(ids(each['inputs'], 64), ids(each['targets'], 8))
          for each in examples]


@pytest.fixture(scope='module')
def parts(settings, tmp_path_factory):
  """Two steps, and after them one more in the same folder."""
  workdir = tmp_path_factory.mktemp('parts') / 'run'
  return [tiny_runs.run(workdir, settings | {'steps': steps})
          for steps in (2, 3)]


def test_an_epoch_of_examples_and_going_on(parts):
  """Three steps of 8 rows show each of 24 examples once."""
  run, rest = parts
  assert f'{run.workdir}, from step 2' in rest.printed
  assert [len(part.batches) for part in parts] == [2, 1]
  assert sorted(pairs_of(run.batches + rest.batches)) == sorted(
      expected_pairs(EXAMPLES))
  assert [line['step'] for line in rest.lines()] == [1, 2, 3]
  assert np.all(np.isfinite(rest.column('loss')))
  assert 0 < rest.lines('validation')[-1]['loss'] < 20


def test_what_is_cut_is_said(parts):
  """At the start, of held-out examples and a look at the others; at the end of
  what was trained on."""
  def cut_targets(examples):
    return sum(len(VOCABULARY.encode(each['targets'])) > 7 for each in examples)

  assert 0 < cut_targets(EXAMPLES[:8]) < 8
  assert ("24 examples, 6 of 24 looked at longer than 64 tokens (long_inputs="
          "'cut_end'); of 8 held out 2 inputs and "
          f'{cut_targets(EXAMPLES[:8])} targets cut') in parts[0].printed
  for name, count in (('cut_targets', cut_targets(EXAMPLES)),
                      ('cut_inputs', 6), ('left_out_examples', 0)):
    assert sum(int(re.search(rf'{name} (\d+)', part.printed)[1])
               for part in parts) == count


def test_tsv_with_other_columns_packed_by_workers(settings, tmp_path):
  """The same examples in the same order as from JSON lines, some of them in a
  row; the prefix is read and the long ones are not."""
  path = tmp_path / 'a.tsv'
  path.write_text('summary\ttext\n' + ''.join(
      f'{each["targets"]}\t{each["inputs"]}\n' for each in EXAMPLES))
  changes = settings | {
      'data.packing': True, 'data.prefix': 'fox ', 'data.validation_path': '',
      'data.long_inputs': 'leave_out', 'steps': 2}
  other = tiny_runs.run(tmp_path / 'tsv', changes | {
      'data.source': 'tsv', 'data.path': str(path), 'data.workers': 2,
      'data.inputs_field': 'text', 'data.targets_field': 'summary'})
  same = tiny_runs.run(tmp_path / 'jsonl', changes)
  assert pairs_of(other.batches) == pairs_of(same.batches)
  first = other.batches[0]
  assert first['encoder_segment_ids'].max() > 1
  prefix = VOCABULARY.encode('fox the')[0]
  starts = first['encoder_positions'] == 0
  used = first['encoder_segment_ids'] > 0
  assert {*first['encoder_input_tokens'][starts & used]} == {prefix}
  assert 'cut_inputs 0,' in other.printed


def test_task_of_the_paper(settings, tmp_path):
  """SCROLLS' QMSum, through seqio: the same examples, counted as well."""
  folder = tmp_path / 'scrolls' / 'qmsum'
  folder.mkdir(parents=True)
  for split, examples in (('train', EXAMPLES), ('validation', EXAMPLES[:8])):
    write(folder / f'{split}.jsonl', [
        {'id': str(i), 'pid': f'{i}_0', 'input': each['inputs'],
         'output': each['targets']} for i, each in enumerate(examples)])
  run = tiny_runs.run(tmp_path / 'run', settings | {
      'data.source': 'seqio', 'data.task': 'longt5_qmsum', 'data.path': '',
      'data.validation_path': '', 'data.validation_split': 'validation',
      'data.task_dir': str(tmp_path)})
  found = pairs_of(run.batches)
  assert all(pair in expected_pairs(EXAMPLES) for pair in found)
  long = sum(inputs[-2] > 0 for inputs, _ in found)
  assert long > 0
  assert f'cut_inputs {long},' in run.printed
  assert 'seqio task longt5_qmsum; of 8 held out 2 inputs and' in run.printed
  assert run.lines('validation')[-1]['loss'] > 0
  assert eval_command.run([
      f'--workdir={run.workdir}', '--config.eval.metric=qmsum']) == 0
  [predictions] = run.workdir.glob('eval/*/predictions.jsonl')
  written = compare.read_predictions(str(predictions))
  assert [each['references'] for each in written.values()] == [
      [each['targets']] for each in EXAMPLES[:8]]


def refuses(kind, message, workdir, overrides):
  with pytest.raises((ConfigError, DataError)) as caught:
    train.main(tiny_runs.tiny(overrides), str(workdir))
  assert str(caught.value) == message
  assert caught.type is kind
  assert not workdir.exists()


GOOD = '{"inputs": "a b", "targets": "c"}\n'


@pytest.mark.parametrize('content, message', [
    ('', 'no examples in {}'),
    (GOOD * 16 + '{"inputs": "a b", "target": "c"}\n',
     "{}:17: no field 'targets', only ['inputs', 'target']"),
    (GOOD + '{"inputs": "a", "targets": " "}\n',
     "{}:2: field 'targets' is empty"),
    (GOOD + '{"inputs": "a", "targets": "\\u200b"}\n',
     r"{}:2: field 'targets' has no tokens: '\u200b'"),
    (GOOD + '{"inputs": "a", "targets": "b", "references": []}\n',
     "{}:2: field 'references' is an empty list"),
])
@pytest.mark.parametrize('key', ['data.path', 'data.validation_path'])
def test_bad_files(key, content, message, settings, tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(content)
  refuses(DataError, message.format(path), tmp_path / 'run',
          settings | {key: str(path)})


@pytest.mark.parametrize('overrides, kind, message', [
    ({'data.long_inputs': 'cut'}, DataError, "long_inputs='cut' must be one of "
     "('cut_end', 'cut_middle', 'leave_out', 'refuse')"),
    ({'data.source': 'text'}, DataError, "data.source='text' is not for "
     "data.objective='supervised', which reads one of ('jsonl', 'tsv')"),
    ({'data.source': 'arrayrecord'}, DataError, "data.source='arrayrecord' is "
     "not for data.objective='supervised', which reads one of ('jsonl', "
     "'tsv')"),
    ({'data.source': 'tsv', 'data.objective': 'gap_sentences'}, DataError,
     "data.source='tsv' is not for data.objective='gap_sentences', which reads "
     'documents'),
    ({'data.long_inputs': 'leave_out', 'data.inputs_length': 4}, DataError,
     'all inputs of {path} have more than inputs_length=4 tokens, and '
     "long_inputs='leave_out'"),
    ({'data.source': 'seqio', 'data.path': '', 'data.validation_path': '',
      'data.objective': 'gap_sentences', 'data.prefix': 'x',
      'data.task': 'longt5_c4_mixture'}, ConfigError,
     "data.prefix='x' has no say in task 'longt5_c4_mixture': leave it out."),
    ({'data.source': 'seqio', 'data.path': '', 'data.validation_path': '',
      'data.task': 'longt5_arxive'}, ConfigError,
     "data.objective='supervised' has no say in task 'longt5_arxive': leave it "
     'out, or choose a task such as longt5_arxiv, longt5_narrative_qa, '
     'longt5_qasper.'),
], ids=str)
def test_settings_that_cannot_be(overrides, kind, message, settings, tmp_path):
  refuses(kind, message.format(path=settings['data.path']), tmp_path / 'run',
          settings | overrides)


def test_long_input_that_is_refused(settings, tmp_path):
  """Before anything runs, though it is the fourth."""
  count = len(VOCABULARY.encode(EXAMPLES[3]['inputs'])) + 1
  refuses(DataError, f"example '4': {count} input tokens are more than "
          "inputs_length=64, and long_inputs='refuse'", tmp_path / 'run',
          settings | {'data.long_inputs': 'refuse',
                      'data.validation_path': ''})


def test_checkpoint_of_another_vocabulary(settings, parts, tmp_path):
  other = f'run:{parts[0].workdir}'
  refuses(ConfigError, f'init_from={other}: the weights are of a model with '
          'vocab_size=4096, and this one has 4224.', tmp_path / 'run',
          settings | {'init_from': other, 'model.vocab_size': 4224})
  # Of a size that fits, but of other pieces.
  refuses(ConfigError, f'init_from={other}: the run was trained with another '
          f'vocabulary, data.vocabulary={runs.ROOT}/corpus/vocabulary.model '
          'with data.extra_ids=0.', tmp_path / 'run', settings | {
              'init_from': other, 'data.extra_ids': 50})


@pytest.mark.parametrize('argument, known', [
    ('own', None), ('arxive', 'own or one of arxiv, pubmed, ')])
def test_task_of_the_config(argument, known, tmp_path):
  """An unknown one is refused with those that there are."""
  process = runs.start([
      sys.executable, 'train.py', f'--config=configs/finetune.py:{argument}',
      f'--workdir={tmp_path}/run'])
  output = runs.finish(process, 2)
  assert output.count('\n') == 1
  assert output.startswith(
      f"error: task='{argument}' must be {known}" if known else
      'error: data.path is empty: it must name the files to train on.')
  assert not (tmp_path / 'run').exists()

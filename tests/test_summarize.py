"""The command that summarises: files, pieces, terminals, refusals."""

import io
import itertools
import json
import os
import pty
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import golden
import runs
import tiny_runs
from longt5_flax import (
    FlaxLongT5ForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    Tokenizer,
    summarize,
)
from longt5_flax.config import ConfigError
from longt5_flax.data.objectives import Supervised
from longt5_flax.inputs import pipeline_options
from longt5_flax.summarize_inputs import Document, Reader
from longt5_flax.training import run_config
from longt5_flax.training.checkpoints import Checkpoints
from longt5_flax.training.train_step import TrainState

VOCABULARY = runs.ROOT / 'tests' / 'testdata' / 'vocabulary'
MODEL = str(VOCABULARY / 'tiny.model')
OWL_CREEK = (VOCABULARY / 'owl_creek.txt').read_text('utf-8')
CONFIG = LongT5Config.preset(
    'tglobal-tiny', vocab_size=512, **{
        name.removeprefix('model.'): value for name, value in runs.TINY.items()
        if name.startswith('model.')})


@pytest.fixture(scope='module', autouse=True)
def quick(tmp_path_factory):
  with tiny_runs.cheap_compilation(tmp_path_factory.mktemp('cache')):
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A Hugging Face folder whose summaries are different for all texts."""
  folder = tmp_path_factory.mktemp('hf')
  ids = np.ones((1, 1), np.int32)
  model = FlaxLongT5ForConditionalGeneration(CONFIG, _do_init=False)
  model.params = golden.random_params(
      LongT5ForConditionalGeneration(CONFIG), ids, ids)
  model.save_pretrained(folder)
  Tokenizer(MODEL).save_pretrained(folder)
  return folder


@pytest.fixture
def texts(tmp_path):
  """A short text and a long one, of 16 and of about 800 tokens."""
  paths = [str(tmp_path / name) for name in ('short.txt', 'long.txt')]
  for path, text in zip(paths, (OWL_CREEK[:40], OWL_CREEK[:2000]), strict=True):
    with open(path, 'w', encoding='utf-8') as file:
      file.write(text)
  return paths


def arguments(folder, *rest):
  return [f'--checkpoint=hf:{folder}', '--max_length=12',
          '--max_input_length=128', *map(str, rest)]


def output(capsys, folder, *rest):
  assert summarize.main(arguments(folder, *rest)) == 0
  return capsys.readouterr()


def objects(capsys, folder, *rest):
  captured = output(capsys, folder, '--json', *rest)
  return [json.loads(line) for line in captured.out.splitlines()]


def summary_of(capsys, folder, path, text, *rest):
  path.write_text(text, 'utf-8')
  found, = objects(capsys, folder, path, *rest)
  return found['summary']


def test_files(capsys, folder, texts):
  """One summary each, by name; on a line of its own where it stands alone."""
  short, long = objects(capsys, folder, *texts)
  assert (short['file'], long['file']) == tuple(texts)
  assert (short['left_out'], short['pieces']) == (0, 1)
  assert long['tokens'] == 127 + long['left_out'] > 700
  assert short['summary'] != long['summary']
  assert len(short['summary']) > 5
  captured = output(capsys, folder, *texts)
  assert captured.out == (f'==> {texts[0]} <==\n{short["summary"]}\n'
                          f'\n==> {texts[1]} <==\n{long["summary"]}\n')
  assert captured.err == (
      f'{texts[1]}: {long["tokens"]} tokens, too long for --max_input_length='
      f'128: the last {long["left_out"]} are not read (--on_long=chunk reads '
      'all).\n')
  assert output(capsys, folder, texts[0]).out == f'{short["summary"]}\n'


def test_truncated_is_the_summary_of_the_beginning(capsys, folder, texts,
                                                   tmp_path):
  tokenizer = Tokenizer(MODEL)
  beginning = tokenizer.decode(tokenizer.encode(OWL_CREEK[:2000])[:127])
  expected = summary_of(capsys, folder, tmp_path / 'beginning', beginning)
  assert objects(capsys, folder, texts[1])[0]['summary'] == expected


def test_chunks_are_summarised_one_by_one(capsys, folder, texts, tmp_path):
  tokenizer = Tokenizer(MODEL)
  reader = Reader(tokenizer, '', 300, 'chunk')
  read = reader.read(Document('', '', OWL_CREEK[:2000]))
  limit = '--max_input_length=300'
  expected = [summary_of(capsys, folder, tmp_path / 'piece',
                         tokenizer.decode(ids), limit) for ids in read.ids]
  found, = objects(capsys, folder, '--on_long=chunk', limit, texts[1])
  assert found['summary'] == ' '.join(expected)
  assert (found['pieces'], found['left_out']) == (len(expected), 0)
  assert len(set(expected)) == len(expected) == 3
  assert output(
      capsys, folder, '--on_long=chunk', limit, texts[1]).err.endswith(
          '300: summarised in 3 pieces.\n')


@pytest.mark.parametrize('limit, question', [
    (128, ''), (300, 'Who?\n\n'), (20, ''), (30, 'Who?\n\n'), (7000, '')])
def test_pieces(limit, question):
  """Nothing is lost, nothing is too long, cuts are at sentences, and none is a
  small rest."""
  tokenizer = Tokenizer(MODEL)
  head = tokenizer.encode(question, add_special_tokens=False)
  read = Reader(tokenizer, question, limit, 'chunk').read(
      Document('', '', OWL_CREEK))
  assert max(map(len, read.ids)) <= limit
  for ids in read.ids:
    assert ids[:len(head)] == head
    assert ids[-1] == tokenizer.eos_token_id
  whole = [token for ids in read.ids for token in ids[len(head):-1]]
  assert tokenizer.decode(whole) == tokenizer.decode(
      tokenizer.encode(OWL_CREEK, add_special_tokens=False))
  assert read.left_out == 0
  if limit >= 300:
    assert min(map(len, read.ids)) > limit / 3 or len(read.ids) == 1
    for ids in read.ids:
      assert tokenizer.decode(ids).rstrip('</s> "')[-1] in '.!?'


@pytest.mark.parametrize('end', ['[SEP]\n', '\xa0'])
def test_pieces_end_before_sentences_without_tokens(end):
  tokenizer = Tokenizer(MODEL)
  text = 'He lay on the bank. ' * 9 + f'Then he ran. {end}'
  # Not through `read`, which would have no end if one piece were empty.
  pieces = list(itertools.islice(
      Reader(tokenizer, '', 20, 'chunk')._whole_sentences(text), 100))
  assert all(pieces)
  whole = [token for piece in pieces for token in piece]
  assert whole == Reader(tokenizer, '', 1000, 'chunk').read(
      Document('', '', text.removesuffix(end))).ids[0][:-1]


@pytest.mark.parametrize('policy', ['cut_end', 'cut_middle'])
def test_documents_are_cut_as_in_training(policy):
  tokenizer = Tokenizer(MODEL)
  for limit in (127, 128):
    options = tiny_runs.tiny({
        'data.objective': 'supervised', 'data.inputs_length': limit,
        'data.long_inputs': policy, 'data.prefix': 'Who?'})
    expected, lost = Supervised(
        tokenizer.vocabulary, pipeline_options(options, 16)).encode_inputs(
            OWL_CREEK)
    read = Reader(tokenizer, 'Who?', limit, 'truncate',
                  policy == 'cut_middle').read(Document('', '', OWL_CREEK))
    assert read.ids == [expected.tolist()]
    assert read.left_out == lost


def test_question_stands_before_the_document(capsys, folder, tmp_path):
  """As in QMSum; it stays when the document is cut."""
  text = OWL_CREEK[:40]
  asked = summary_of(capsys, folder, tmp_path / 'x', text, '--question', 'Who?')
  assert asked == summary_of(capsys, folder, tmp_path / 'x', f'Who?\n\n{text}')
  assert asked != summary_of(capsys, folder, tmp_path / 'x', text)


def test_standard_input_and_beams(capsys, folder, texts, monkeypatch):
  expected, = objects(capsys, folder, '--num_beams=3', texts[0])
  for rest in ((), ('-',)):
    monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(
        OWL_CREEK[:40].encode())))
    found, = objects(capsys, folder, '--num_beams=3', *rest)
    assert found == expected | {'file': '-'}
  greedy, = objects(capsys, folder, texts[0])
  assert greedy['summary'] != expected['summary']


class Output(io.StringIO):
  """Remembers what was written at a time."""

  def __init__(self, is_terminal):
    super().__init__()
    self.is_terminal, self.parts = is_terminal, []

  def isatty(self):
    return self.is_terminal

  def write(self, text):
    self.parts.append(text)
    return super().write(text)


def test_streams_to_a_terminal(capsys, folder, texts, monkeypatch):
  """Token by token; beams, JSON, and all that goes elsewhere, as a whole."""
  for option, is_terminal, is_streamed in (
      ('--on_long=chunk', True, True), ('--on_long=chunk', False, False),
      ('--num_beams=2', True, False), ('--json', True, False)):
    plain = output(capsys, folder, texts[1], option).out
    with monkeypatch.context() as patch:
      out = Output(is_terminal)
      patch.setattr('sys.stdout', out)
      assert summarize.main(arguments(folder, texts[1], option)) == 0
    assert out.getvalue() == plain
    parts = [part for part in out.parts if part.strip()]
    assert len(parts) > 30 if is_streamed else len(parts) == 1


def test_half_a_character_waits():
  """As a vocabulary with bytes for pieces would write it."""
  parts = summarize.growing_text(
      'aé'.encode() + b'\xc3',
      lambda ids: bytes(ids).decode('utf-8', 'replace'))
  assert list(parts) == ['a', 'é', '\N{REPLACEMENT CHARACTER}']


def test_process_on_a_terminal(capsys, folder, texts):
  """A process that writes to a pseudo-terminal and one that writes to a pipe
  show the same; stderr has what is to be said."""
  plain = output(capsys, folder, *texts).out
  master, slave = pty.openpty()
  process = subprocess.Popen(
      [sys.executable, '-m', 'longt5_flax.summarize',
       *arguments(folder, *texts)], cwd=runs.ROOT, stdout=slave,
      stderr=subprocess.PIPE, text=True,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'})
  os.close(slave)
  shown = b''
  while True:
    try:
      shown += os.read(master, 4096)
    except OSError:  # All is read, and the process has closed its end.
      break
  os.close(master)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 0, errors
  assert shown.decode().replace('\r\n', '\n') == plain
  assert 'are not read' in errors


# What a run says.


@pytest.fixture(scope='module')
def run(folder, tmp_path_factory):
  """A run's folder with the weights of `folder`, as train.py leaves it."""
  vocabulary = tmp_path_factory.mktemp('vocabulary') / 'v.model'
  shutil.copy(MODEL, vocabulary)
  config = tiny_runs.tiny({
      'model.vocab_size': CONFIG.vocab_size, 'data.vocabulary': vocabulary,
      'data.extra_ids': 7, 'data.inputs_length': 100, 'data.targets_length': 5})
  workdir = tmp_path_factory.mktemp('run')
  model = FlaxLongT5ForConditionalGeneration.from_pretrained(str(folder))
  values = run_config.resolved(config) | {
      'vocabulary': Tokenizer(MODEL, 7).vocabulary.fingerprint}
  run_config.write_config(str(workdir), values, 'test')
  checkpoints = Checkpoints(str(workdir / 'checkpoints'), config.checkpoint)
  checkpoints.save(3, TrainState(jnp.asarray(3), model.params, {}), {},
                   values)
  checkpoints.close()
  return workdir, vocabulary


def test_a_run_says_how_it_was_trained(capsys, folder, run, texts):
  """Vocabulary, lengths, and what stands before each document."""
  workdir, _ = run
  file = workdir / 'config.json'
  config = json.loads(file.read_text())
  for prefix, question in (('', ''), ('Who? ', 'Who?')):
    expected, = objects(
        capsys, folder, texts[1], '--max_length=5', '--max_input_length=100',
        f'--question={question}')
    config['data']['prefix'] = prefix
    file.write_text(json.dumps(config))
    assert summarize.main(
        [f'--checkpoint=run:{workdir}', '--json', texts[1]]) == 0
    assert json.loads(capsys.readouterr().out) == expected
    head = len(Tokenizer(MODEL).encode(question, add_special_tokens=False))
    assert expected['left_out'] == expected['tokens'] - 99 + head
  config['data']['long_inputs'] = 'cut_middle'
  file.write_text(json.dumps(config))
  assert summarize.main([f'--checkpoint=run:{workdir}', texts[1]]) == 0
  assert f'the middle {expected["left_out"]} are not' in capsys.readouterr().err


# Refusals.


def refused(capsys, *rest):
  assert summarize.main(list(rest)) == 2
  captured = capsys.readouterr()
  assert captured.out == ''
  line, = captured.err.splitlines()
  return line


@pytest.mark.parametrize('content, message', [
    (b'', '{} is empty.'), (b' \n\t', '{} is empty.'),
    (b'\xff\xfe\x00', '{} is no text in UTF-8, at byte 0.'),
    (b'PK\x03\x04\x00', '{} is binary, no text.'),
    (None, 'cannot read {}: No such file or directory.')])
def test_bad_files(capsys, folder, texts, tmp_path, content, message):
  """The line names the one of several files; nothing is written of others."""
  bad = tmp_path / 'bad.txt'
  if content is not None:
    bad.write_bytes(content)
  line = refused(capsys, *arguments(folder, texts[0], bad))
  assert line == 'error: ' + message.format(bad)


def test_bad_standard_input(capsys, folder, monkeypatch):
  monkeypatch.setattr('sys.stdin', io.TextIOWrapper(io.BytesIO(b'')))
  assert refused(capsys, *arguments(folder)) == (
      'error: standard input is empty.')


def test_bad_checkpoints(capsys, texts, tmp_path):
  assert refused(capsys, '--checkpoint=rnu:x', texts[0]).startswith(
      "error: 'rnu:x' must be one of hf:DIR_OR_FILE, ")
  assert refused(capsys, f'--checkpoint=run:{tmp_path}', texts[0]) == (
      f'error: {tmp_path}: no checkpoint in {tmp_path}/checkpoints.')


@pytest.mark.parametrize('option', ['num_beams', 'max_length'])
def test_numbers_too_small(capsys, folder, texts, option):
  assert refused(capsys, *arguments(folder, texts[0], f'--{option}=0')) == (
      f'error: --{option}=0 must be at least 1.')


def test_no_room_behind_a_question():
  with pytest.raises(ConfigError, match=(
      r"--max_input_length=5 leaves no room for a document behind 'Who was he"
      r"\?', which has \d tokens\.")):
    Reader(Tokenizer(MODEL), 'Who was he?\n\n', 5, 'truncate')


def test_vocabularies(capsys, folder, run, texts, tmp_path):
  """None, one that does not fit, and one that is not the run's."""
  bare = tmp_path / 'bare'
  shutil.copytree(folder, bare)
  (bare / 'spiece.model').unlink()
  assert refused(capsys, *arguments(bare, texts[0])) == (
      f'error: hf:{bare}: there is no vocabulary {bare}/spiece.model; name it '
      'with --vocabulary.')
  large = str(runs.ROOT / 'corpus' / 'vocabulary.model')
  assert refused(capsys, *arguments(
      bare, texts[0], f'--vocabulary={large}')) == (
          f'error: The vocabulary {large} has 4000 ids with its sentinels, '
          'more than model.vocab_size=512: it is that of another model.')
  assert objects(capsys, bare, texts[0], f'--vocabulary={MODEL}') == objects(
      capsys, folder, texts[0])
  workdir, own = run
  assert refused(capsys, f'--checkpoint=run:{workdir}', texts[0],
                 f'--vocabulary={large}') == (
      f"error: The vocabulary {large} is not the checkpoint's own, {own}.")
  moved = tmp_path / 'moved'
  shutil.copytree(workdir, moved)
  config = json.loads((moved / 'config.json').read_text())
  config['data'] |= {'vocabulary': 'gone.model', 'extra_ids': 8}
  (moved / 'config.json').write_text(json.dumps(config))
  assert refused(capsys, f'--checkpoint=run:{moved}', texts[0]) == (
      f'error: run:{moved}: there is no vocabulary gone.model; name it with '
      '--vocabulary.')
  assert refused(capsys, f'--checkpoint=run:{moved}', texts[0],
                 f'--vocabulary={own}') == (
      f'error: The vocabulary {own} is not the one that run:{moved} was '
      'trained with.')
  assert summarize.run_settings(f'run:{moved}/checkpoints/3') == (
      summarize.run_settings(f'run:{moved}'))

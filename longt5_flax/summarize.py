"""Summarises text files.

  python -m longt5_flax.summarize --checkpoint=run:runs/quickstart story.txt
  python -m longt5_flax.summarize --checkpoint=hf:long-t5-qmsum \
    --question="What was decided about the remote control?" --json meeting.txt

Without a FILE it reads standard input. Greedy output appears on a terminal as
it is written. docs/finetuning.md says more.
"""

import argparse
import filecmp
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from rich.console import Console

from longt5_flax.api import FlaxLongT5ForConditionalGeneration
from longt5_flax.config import ConfigError, LongT5Config, read_json_object
from longt5_flax.data.sources import DataError
from longt5_flax.data.tokenizer import Tokenizer
from longt5_flax.generation.options import GenerationError
from longt5_flax.interop.open import KINDS, open_tensors, split_spec
from longt5_flax.model.longt5 import ATTENTION_IMPLEMENTATIONS, DTYPES
from longt5_flax.summarize_inputs import (
    STDIN,
    Document,
    Pieces,
    Reader,
    read_documents,
)
from longt5_flax.training.run_config import check_vocabulary

# What a checkpoint says nothing about: the paper's longest inputs and outputs.
_INPUT_LENGTH, _LENGTH = 16_384, 512
# What stands beside weights.
_VOCABULARY = 'spiece.model'


def run_settings(spec: str) -> dict[str, Any]:
  """What the config.json of a run says of its `data`, and `fingerprint`, that
  of its vocabulary, if it does; of another checkpoint nothing.

  Raises:
    ConfigError: `spec` is no checkpoint's name, or the file is damaged.
  """
  kind, path = split_spec(spec)
  for folder in (path, os.path.join(path, '..', '..')):  # Of checkpoints/STEP.
    config = os.path.join(folder, 'config.json')
    if kind == 'run' and os.path.isfile(config):
      values = read_json_object(config)
      return values.get('data', {}) | {'fingerprint': values.get('vocabulary')}
  return {}


def open_tokenizer(spec: str, given: str | None, run: dict[str, Any],
                   model: LongT5Config) -> Tokenizer:
  """The vocabulary of a checkpoint.

  Args:
    spec: the checkpoint's.
    given: a SentencePiece model, or the folder of a spiece.model; else a run's
      own, else the spiece.model beside the weights.
    run: from `run_settings`.
    model: the checkpoint's architecture.

  Raises:
    ConfigError, DataError: there is none, or it does not fit the model.
  """
  own = _model_file(run.get('vocabulary') or _folder_of(spec))
  path = _model_file(given) if given else own
  if not os.path.isfile(path):
    raise ConfigError(f'{spec}: there is no vocabulary {path}; name it with '
                      '--vocabulary.')
  if os.path.isfile(own) and not filecmp.cmp(path, own, shallow=False):
    raise ConfigError(f"The vocabulary {path} is not the checkpoint's own, "
                      f'{own}.')
  if 'extra_ids' not in run and os.path.basename(path) == _VOCABULARY:
    tokenizer = Tokenizer.from_pretrained(
        os.path.dirname(os.path.abspath(path)))
  else:
    # Sentinels that the file does not hold are not added: no text needs them.
    tokenizer = Tokenizer(path, run.get('extra_ids', 0))
  check_vocabulary(tokenizer.vocabulary, model, f'The vocabulary {path}',
                   'it is that of another model.')
  if run.get('fingerprint') not in (
      None, '', tokenizer.vocabulary.fingerprint):
    raise ConfigError(
        f'The vocabulary {path} is not the one that {spec} was trained with.')
  return tokenizer


def _folder_of(spec):
  path = split_spec(spec)[1]
  return path if os.path.isdir(path) else os.path.dirname(path) or '.'


def _model_file(path):
  return os.path.join(path, _VOCABULARY) if os.path.isdir(path) else path


def growing_text(tokens: Iterable[int], decode: Callable[[list[int]], str]
                 ) -> Iterator[str]:
  """The text of tokens, in parts: what each token adds to it.

  Args:
    tokens: one after another.
    decode: gives the text of tokens.
  """
  shown, text, written = '', '', []
  for token in tokens:
    written.append(token)
    text = decode(written)
    if not text.endswith('\N{REPLACEMENT CHARACTER}'):  # Half a character.
      yield text[len(shown):]
      shown = text
  yield text[len(shown):]


class Summarizer:
  """Writes summaries.

  Args:
    model: what writes.
    tokenizer: its vocabulary.
    options: of `generate`.
  """

  def __init__(self, model: FlaxLongT5ForConditionalGeneration,
               tokenizer: Tokenizer, options: dict[str, Any]):
    self._model, self._tokenizer, self._options = model, tokenizer, options
    beams = options.get('num_beams') or model.generation_config.num_beams
    self.can_stream = beams in (None, 1)

  def write(self, ids: list[int]) -> str:
    """The summary of one piece."""
    written = self._model.generate(np.array([ids]), **self._options)
    return self._text(np.asarray(written.sequences)[0])

  def stream(self, ids: list[int]) -> Iterator[str]:
    """The same, in parts, as soon as they are certain; without beams."""
    tokens = self._model.stream(np.array([ids]), **self._options)
    return growing_text((int(token) for token, in tokens), self._text)

  def _text(self, ids):
    return self._tokenizer.decode(ids, skip_special_tokens=True)


def say_if_long(document: Document, pieces: Pieces, limit: int) -> None:
  """Says on stderr what becomes of a document over the limit."""
  if pieces.left_out:
    fate = (f'the {pieces.where} {pieces.left_out:,} are not read '
            '(--on_long=chunk reads all)')
  elif len(pieces.ids) > 1:
    fate = f'summarised in {len(pieces.ids)} pieces'
  else:
    return
  print(f'{document.name}: {pieces.tokens:,} tokens, too long for '
        f'--max_input_length={limit}: {fate}.', file=sys.stderr)


def summarize(documents: Sequence[Document], reader: Reader,
              summarizer: Summarizer, as_json: bool, out: Any) -> None:
  """Writes a summary of each document, one after another.

  Args:
    documents: what to read.
    reader: of documents.
    summarizer: of what it has read.
    as_json: one object a line; else the texts, below their names if there are
      several.
    out: to write to; a terminal sees greedy output token by token.
  """
  console = Console(stderr=True)
  read = [reader.read(document) for document in documents]
  for i, (document, pieces) in enumerate(zip(documents, read, strict=True)):
    say_if_long(document, pieces, reader.limit)
    if len(documents) > 1 and not as_json:
      print('\n' * bool(i) + f'==> {document.name} <==', file=out)
    if out.isatty() and summarizer.can_stream and not as_json:
      for part in _parts(pieces, summarizer, console, document.name):
        print(part, end='', file=out, flush=True)
      print(file=out, flush=True)
      continue
    with console.status(f'Summarising {document.name}'):
      summary = ' '.join(map(summarizer.write, pieces.ids))
    if as_json:
      summary = json.dumps({
          'file': document.path, 'summary': summary, 'tokens': pieces.tokens,
          'left_out': pieces.left_out, 'pieces': len(pieces.ids)},
                           ensure_ascii=False)
    print(summary, file=out, flush=True)


def _parts(pieces, summarizer, console, name):
  for i, ids in enumerate(pieces.ids):
    parts = summarizer.stream(ids)
    with console.status(f'Reading {name}'):  # And compiling.
      first = next(parts)
    yield from itertools.chain([' '] if i else [], [first], parts)


def load(options: argparse.Namespace) -> tuple[Reader, Summarizer]:
  """Checkpoint and vocabulary.

  Raises:
    ConfigError, DataError: they cannot be read, or do not fit.
  """
  run = run_settings(options.checkpoint)
  config = open_tensors(options.checkpoint).config
  if config is None:
    raise ConfigError(f'{options.checkpoint} holds no config.')
  tokenizer = open_tokenizer(
      options.checkpoint, options.vocabulary, run, config)
  prefix = run.get('prefix', '')
  if options.question:  # As QMSum's inputs are.
    prefix += f'{options.question.strip()}\n\n'
  reader = Reader(
      tokenizer, prefix,
      options.max_input_length or run.get('inputs_length', _INPUT_LENGTH),
      options.on_long, run.get('long_inputs') == 'cut_middle')
  with Console(stderr=True).status(f'Loading {options.checkpoint}'):
    model = FlaxLongT5ForConditionalGeneration.from_pretrained(
        options.checkpoint, options.dtype, attention=options.attention)
  settings = model.generation_config
  length = options.max_length
  if length is None and not (settings.max_length or settings.max_new_tokens):
    length = run.get('targets_length', _LENGTH)
  return reader, Summarizer(model, tokenizer, {
      'max_new_tokens': length, 'num_beams': options.num_beams})


def make_parser() -> argparse.ArgumentParser:
  """Of the command line."""
  parser = argparse.ArgumentParser(
      prog='python -m longt5_flax.summarize', allow_abbrev=False,
      description='Summarises text files.')
  known = ', '.join(f'{kind}:{what}' for kind, what in KINDS.items())
  parser.add_argument('files', nargs='*', metavar='FILE', default=[STDIN],
                      help='texts; standard input if there is none, or for -')
  parser.add_argument('--checkpoint', required=True, metavar='KIND:PATH',
                      help=f'one of {known}')
  parser.add_argument('--vocabulary', metavar='FILE_OR_DIR',
                      help="a SentencePiece model; by default the run's, or "
                      'spiece.model beside the weights')
  parser.add_argument('--question', default='', metavar='TEXT',
                      help='for models that answer one about the document')
  parser.add_argument('--num_beams', type=int, metavar='N',
                      help="by default the checkpoint's, or 1: greedy")
  parser.add_argument('--max_length', type=int, metavar='N',
                      help="tokens of a summary; by default the checkpoint's, "
                      f"the targets' of a run, or {_LENGTH}")
  parser.add_argument('--max_input_length', type=int, metavar='N',
                      help='tokens of a document, question included; by '
                      f"default a run's, or {_INPUT_LENGTH}")
  parser.add_argument('--on_long', choices=('truncate', 'chunk'),
                      default='truncate', help='read the beginning of a longer '
                      'document, or summarise pieces of it and join them')
  parser.add_argument('--json', action='store_true',
                      help='one object a line')
  parser.add_argument('--dtype', choices=DTYPES, default='float32',
                      help='of matrix products')
  parser.add_argument('--attention', choices=ATTENTION_IMPLEMENTATIONS,
                      default='auto', help='precision.attention')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  options = make_parser().parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # Orbax says a lot.
  try:
    for name, least in (('num_beams', 1), ('max_length', 1),
                        ('max_input_length', 2)):
      value = getattr(options, name)
      if value is not None and value < least:
        raise ConfigError(f'--{name}={value} must be at least {least}.')
    documents = read_documents(options.files)
    reader, summarizer = load(options)
    summarize(documents, reader, summarizer, options.json, sys.stdout)
  except (ConfigError, DataError, GenerationError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(file=sys.stderr)
    return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())

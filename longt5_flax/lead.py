"""A baseline without a model: the first words of each document.

  python -m longt5_flax.lead --workdir=runs/lead --words 32 64 128 \
    --choose=validation.jsonl test.jsonl

writes the files that eval.py writes, WORKDIR/eval/0/predictions.jsonl and
scores.json, for `compare` and `report`. Of several lengths it takes the one
that scores best on the examples of --choose.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from longt5_flax.config import ConfigError
from longt5_flax.data.examples import Example, Fields, load_examples
from longt5_flax.data.sources import DataError
from longt5_flax.eval_folder import EvalFolder, digest
from longt5_flax.evaluation import bootstrap
from longt5_flax.evaluation.metrics import METRICS, SCROLLS, find_metric

Intervals = dict[str, bootstrap.Interval]


def lead(example: Example, words: int, has_question: bool) -> str:
  """The first words of an input.

  Args:
    example: of it the input.
    words: how many.
    has_question: the document begins after the first empty line.
  """
  text = example.inputs
  if has_question:
    text = text.partition('\n\n')[2] or text
  return ' '.join(text.split()[:words])


def score(examples: Sequence[Example], words: int, has_question: bool,
          metric: str) -> Intervals:
  """The scores of `lead` by name."""
  chosen = find_metric(metric)
  return bootstrap.intervals(chosen, chosen.score(
      [lead(example, words, has_question) for example in examples],
      [example.references for example in examples]))


def write(examples: Sequence[Example], options: argparse.Namespace, words: int
          ) -> Intervals:
  """Writes predictions and scores.

  Raises:
    ConfigError: predictions of something else are in the folder.
  """
  found = score(examples, words, options.question, options.metric)
  files = EvalFolder(os.path.join(options.workdir, 'eval', '0'), {
      'weights': f'the first {words} words',
      'data': digest(example.inputs.encode() for example in examples),
      'decoding': {'words': words, 'question': options.question}})
  files.find(replace=False)
  files.finish(
      [{'id': example.id, 'references': list(example.references),
        'prediction': lead(example, words, options.question)}
       for example in examples],
      {'checkpoint': f'the first {words} words', 'path': options.data,
       'metric': options.metric, 'main': find_metric(options.metric).main,
       'examples': len(examples),
       'scores': {name: each._asdict() for name, each in found.items()}})
  return found


def make_parser() -> argparse.ArgumentParser:
  """Of the command line."""
  parser = argparse.ArgumentParser(
      prog='python -m longt5_flax.lead', allow_abbrev=False,
      description='Scores the first words of each document.')
  parser.add_argument('data', help='JSON lines, or TSV by its name')
  parser.add_argument('--workdir', required=True, help='gets the results')
  parser.add_argument('--words', type=int, nargs='+', default=[128],
                      metavar='N', help='how many; of several the one that '
                      'scores best on --choose; by default 128')
  parser.add_argument('--choose', metavar='DATA',
                      help='examples to choose the number of words on')
  parser.add_argument('--question', action='store_true',
                      help='documents begin after an empty line')
  parser.add_argument('--metric', choices=[*METRICS, *SCROLLS],
                      default='rouge', metavar='NAME',
                      help='as eval.metric; by default rouge')
  for name, default in Fields()._asdict().items():
    parser.add_argument(f'--{name}_field', default=default, metavar='NAME',
                        help=f'as data.{name}_field')
  return parser


def run(options: argparse.Namespace) -> None:
  """Chooses, writes, prints.

  Raises:
    ConfigError, DataError: an option that cannot be, data that cannot be read.
  """
  if min(options.words) < 1:
    raise ConfigError(f'--words={min(options.words)} must be 1 or more.')
  if len(options.words) > 1 and not options.choose:
    raise ConfigError(f'--words has {len(options.words)} numbers: --choose '
                      'must name examples to choose on.')
  fields = Fields(**{name: getattr(options, f'{name}_field')
                     for name in Fields._fields})

  def load(path):
    source = 'tsv' if '.tsv' in os.path.basename(path) else 'jsonl'
    return load_examples(path, source, fields)

  examples, words = load(options.data), options.words[0]
  if options.choose:
    main, others = find_metric(options.metric).main, load(options.choose)
    means = {count: score(others, count, options.question,
                          options.metric)[main].mean
             for count in options.words}
    words = max(means, key=lambda count: means[count])
    print(f'{main} on {options.choose}: ' + ', '.join(
        f'{mean:.2f} with {count} words' for count, mean in means.items()))
  for name, each in write(examples, options, words).items():
    print(f'{name} {each.mean:.2f} ({each.low:.2f} to {each.high:.2f})')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  try:
    run(make_parser().parse_args(argv))
  except (ConfigError, DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


if __name__ == '__main__':
  sys.exit(main())

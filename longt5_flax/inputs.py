"""From a run's config to what it reads: vocabulary, batches, held-out rows."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from longt5_flax.config import ConfigError, LongT5Config
from longt5_flax.data.examples import SOURCES as EXAMPLE_SOURCES
from longt5_flax.data.examples import Examples, Fields, load_examples
from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.objectives import Supervised
from longt5_flax.data.options import SUPERVISED
from longt5_flax.data.pipeline import (
    Batch,
    BatchIterator,
    Delivered,
    PipelineOptions,
    fixed_batches,
)
from longt5_flax.data.prepared import (
    PreparedDocuments,
    settings_that_matter,
)
from longt5_flax.data.seqio_source import (
    TaskBatches,
    TaskVocabulary,
    describe_task,
    held_out_task_batches,
    load_tasks,
    open_task,
    register_tasks,
)
from longt5_flax.data.sources import (
    DataError,
    Documents,
    check_choice,
    load_documents,
)
from longt5_flax.data.span_corruption import SpanCorruptionOptions
from longt5_flax.data.task_formats import CORPORA, PREFIX, corpus_of
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.training import run_config

SOURCES = ('jsonl', 'tsv', 'text', 'arrayrecord', 'seqio')
# Examples that are looked at before a run for inputs that will be cut.
_LOOKED_AT = 50


class Inputs(NamedTuple):
  """What a run reads.

  Attributes:
    vocabulary: of its tokens.
    batches: to train on, this process' rows of them.
    held_out: batches, all rows of them; the same ones on every process.
    description: of the corpus, for the user to read; with how many inputs are
      cut.
  """
  vocabulary: Vocabulary | TaskVocabulary
  batches: BatchIterator | TaskBatches
  held_out: list[Batch]
  description: str


def make_inputs(config: Any, model: LongT5Config, rows: Sequence[int],
                shard: tuple[int, int]) -> Inputs:
  """Opens everything that a run reads, and refuses what cannot be.

  Args:
    config: the run's.
    model: the architecture.
    rows: of each batch that this process is to make.
    shard: which of how many parts of each batch they are.

  Raises:
    ConfigError, DataError: a setting that cannot be, a file that cannot be
      read.
  """
  if config.data.source == 'seqio':
    return _task_inputs(config, model, len(rows), shard)
  vocabulary = Vocabulary(config.data.vocabulary, config.data.extra_ids)
  run_config.check_vocabulary(vocabulary, model)
  options = pipeline_options(config, model.global_block_size)
  documents = load(config, config.data.path, vocabulary, options)
  batches = BatchIterator(documents, vocabulary, options,
                          config.data.batch_size, rows, config.data.workers)
  delivered = Delivered(options)
  held_out = held_out_batches(config, vocabulary, options, delivered)
  description = describe(documents)
  if isinstance(documents, Examples):
    description += lengths_of(documents, vocabulary, options)
  return Inputs(vocabulary, batches, held_out,
                description + describe_held_out(delivered.stats()))


def _task_inputs(config: Any, model: LongT5Config, num_rows: int,
                 shard: tuple[int, int]) -> Inputs:
  """What a run reads from seqio."""
  data = config.data
  check_task_objective(data)
  options = pipeline_options(config, model.global_block_size)
  if corpus_of(data.task):
    options = dataclasses.replace(options, objective=SUPERVISED)
  tasks = load_tasks()
  try:
    register_tasks(data, options)
    task = open_task(data.task, data.module)
    vocabulary = TaskVocabulary(task)
    if data.vocabulary and data.vocabulary not in vocabulary.files:
      raise ConfigError(
          f'data.vocabulary={data.vocabulary} must be empty: task {data.task} '
          f'has its own, {", ".join(vocabulary.files)}.')
    run_config.check_vocabulary(
        vocabulary, model, f'The vocabulary of task {data.task}')
    batches = TaskBatches(task, options, num_rows, shard)
    delivered = Delivered(options)
    held_out = data.validation_split and held_out_task_batches(
        task, data.validation_split, options, data.batch_size,
        config.eval.max_batches, delivered)
  except tasks.UnreachableError as error:
    if corpus_of(data.task) and not data.vocabulary:
      raise DataError(f'{error}. --config.data.vocabulary=MODEL names a local '
                      'vocabulary') from None
    if data.task not in (*tasks.TASKS, tasks.MIXTURE):
      raise
    raise DataError(
        f'{error}. --config.data.vocabulary=MODEL and --config.data.tfds_dir='
        'DIR name local copies; --config.data.source=jsonl --config.data.path='
        'FILES --config.data.vocabulary=MODEL trains on local text') from None
  return Inputs(vocabulary, batches, held_out or [],
                describe_task(task) + describe_held_out(delivered.stats()))


def check_task_objective(data: Any) -> None:
  """Refuses a `data.objective` that `data.task` would not follow."""
  if corpus_of(data.task):
    if data.objective in ('gap_sentences', SUPERVISED):
      return
  elif data.prefix:
    raise ConfigError(f'data.prefix={data.prefix!r} has no say in task '
                      f'{data.task!r}: leave it out.')
  if data.objective == SUPERVISED:
    names = [PREFIX + name for name in CORPORA]
    near = difflib.get_close_matches(data.task, names) or names
    raise ConfigError(f'data.objective={SUPERVISED!r} has no say in task '
                      f'{data.task!r}: leave it out, or choose a task such as '
                      f'{", ".join(near)}.')
  # The default may stand beside any task.
  if data.objective != 'gap_sentences' and (
      data.task != f'longt5_c4_{data.objective}'):
    raise ConfigError(
        f'data.objective={data.objective!r} has no say in task '
        f'{data.task!r}: leave it out, and choose a task, such as '
        'longt5_c4_span_corruption or longt5_c4_mixture.')


def held_out_batches(
    config: Any, vocabulary: Vocabulary, options: PipelineOptions,
    delivered: Delivered | None = None) -> list[Batch]:
  """The rows of data.validation_path, if there is one.

  Args:
    config: the run's.
    vocabulary: to tokenise.
    options: of the pipeline.
    delivered: to count what is in them.
  """
  if not config.data.validation_path:
    return []
  return fixed_batches(
      load(config, config.data.validation_path, vocabulary, options),
      vocabulary, options, config.data.batch_size, config.eval.max_batches,
      delivered)


def pipeline_options(config: Any, global_block_size: int) -> PipelineOptions:
  """What `config` asks of the input pipeline."""
  data = config.data
  return PipelineOptions(
      objective=data.objective, inputs_length=data.inputs_length,
      targets_length=data.targets_length, packing=data.packing,
      long_documents=data.long_documents, long_inputs=data.long_inputs,
      prefix=data.prefix, global_block_size=global_block_size,
      gap_sentences=gap_sentence_options(config.gap_sentences),
      span_corruption=span_corruption_options(config.span_corruption),
      seed=config.seed)


def gap_sentence_options(settings: Any) -> GapSentenceOptions:
  """What `config.gap_sentences` says."""
  values = dict(settings)
  for name in ('stop_words', 'probabilities'):
    values[name] = tuple(values[name])
  values['noise'] = values['noise'] or None
  try:
    return GapSentenceOptions(**values)
  except ValueError as error:
    raise ConfigError(f'gap_sentences.{error}') from None


def span_corruption_options(settings: Any) -> SpanCorruptionOptions:
  """What `config.span_corruption` says."""
  try:
    return SpanCorruptionOptions(**settings)
  except ValueError as error:
    raise ConfigError(f'span_corruption.{error}') from None


def load(config: Any, path: str, vocabulary: Vocabulary,
         options: PipelineOptions) -> Documents | PreparedDocuments | Examples:
  """The documents, or for a supervised objective the examples, at `path`.

  Raises:
    DataError: they cannot be read; or what `long_inputs` says of examples that
      are too long leaves no run.
  """
  check_source(config.data)
  if options.objective == SUPERVISED:
    examples = own_examples(config.data, path, vocabulary)
    check_long_inputs(examples, path, vocabulary, options)
    return examples
  if config.data.source == 'arrayrecord':
    return PreparedDocuments(path, settings_that_matter(vocabulary, options))
  return load_documents(path, config.data.source, field=config.data.field,
                        on_bad_record=config.data.on_bad_record)


def own_examples(data: Any, path: str, vocabulary: Vocabulary,
                 unique_ids: bool = False) -> Examples:
  """The examples in files, as `config.data` says to read them.

  Args:
    data: of the config.
    path: files or globs, separated by commas.
    vocabulary: to tokenise.
    unique_ids: see `load_examples`.

  Raises:
    DataError: they cannot be read.
  """
  fields = Fields(data.inputs_field, data.targets_field, data.references_field,
                  data.id_field)
  return load_examples(
      path, data.source, fields, data.on_bad_record, unique_ids,
      vocabulary.encode)


def check_long_inputs(examples: Examples, path: str, vocabulary: Vocabulary,
                      options: PipelineOptions) -> None:
  """Refuses, before anything runs, what would end a run.

  Args:
    examples: all of a file's.
    path: for messages.
    vocabulary: to tokenise.
    options: of the pipeline.

  Raises:
    DataError: an input is too long and none may be, or all would be left out.
  """
  objective = Supervised(vocabulary, options)
  made = (objective.example(each, 0, (), (0, 0))[0] for each in examples)
  if options.long_inputs == 'refuse':
    for _ in made:
      pass
  if options.long_inputs == 'leave_out' and all(
      example.left_out for example in made):
    raise DataError(f'all inputs of {path} have more than inputs_length='
                    f'{options.inputs_length} tokens, and '
                    "long_inputs='leave_out'")


def lengths_of(examples: Examples, vocabulary: Vocabulary,
               options: PipelineOptions) -> str:
  """How many inputs are too long, of some examples evenly spread."""
  some = examples[::-(-len(examples) // _LOOKED_AT)]
  objective = Supervised(vocabulary, options)
  long = sum(objective.encode_inputs(each.inputs)[1] > 0 for each in some)
  return (f', {long} of {len(some)} looked at longer than '
          f'{options.inputs_length:,} tokens (long_inputs='
          f'{options.long_inputs!r})')


def describe_held_out(stats: dict[str, int | float]) -> str:
  """How much of held-out examples is cut, if that is known and there are any.

  Args:
    stats: of `Delivered`.
  """
  if not stats.get('cut_inputs', 0) + stats.get('cut_targets', 0):
    return ''
  return (f'; of {stats["examples"]:,} held out {stats["cut_inputs"]:,} inputs '
          f'and {stats["cut_targets"]:,} targets cut')


def check_source(data: Any) -> None:
  """Refuses a `data.source` that does not exist, or has nothing for
  `data.objective`."""
  check_choice('source', data.source, SOURCES)
  supervised = data.objective == SUPERVISED
  if data.source == 'seqio' or data.source in (
      EXAMPLE_SOURCES if supervised else ('jsonl', 'text', 'arrayrecord')):
    return
  needed = f'one of {EXAMPLE_SOURCES}' if supervised else 'documents'
  raise DataError(f'data.source={data.source!r} is not for data.objective='
                  f'{data.objective!r}, which reads {needed}')


def describe(documents: Documents | PreparedDocuments | Examples) -> str:
  """How many documents or examples, and what was left out."""
  what = 'examples' if isinstance(documents, Examples) else 'documents'
  skipped = f' ({documents.skipped:,} bad records skipped)'
  return f'{len(documents):,} {what}' + skipped * bool(documents.skipped)

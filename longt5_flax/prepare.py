"""Prepares documents: splits, tokenises and scores them once, for all epochs.

  python -m longt5_flax.prepare --config=configs/tglobal_base.py \
    --config.data.source=jsonl --config.data.path=books.jsonl.xz \
    --config.data.vocabulary=m.model --output=prepared

takes the config and overrides of a run, and writes prepared/train and, with
data.validation_path, prepared/validation; the last line says how to train from
them. The same command again goes on where it was stopped. docs/data.md says
more.
"""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from longt5_flax.command_line import read_config
from longt5_flax.config import ConfigError
from longt5_flax.data.objectives import make_objective
from longt5_flax.data.options import (
    SUPERVISED,
    PipelineOptions,
    objective_weights,
)
from longt5_flax.data.prepared import settings_that_matter
from longt5_flax.data.seqio_source import (
    load_tasks,
    open_task,
    register_tasks,
)
from longt5_flax.data.shard_folder import ShardFolder, make_plan
from longt5_flax.data.shard_writer import Shard, ShardWriter
from longt5_flax.data.sources import DataError, Documents, load_documents
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.data.workers import Worker, WorkerError
from longt5_flax.inputs import check_source, pipeline_options
from longt5_flax.training import run_config


class Settings(NamedTuple):
  """How to prepare.

  Attributes:
    vocabulary, options: of the run.
    workers: processes.
    shards: of a folder, at most; 0: by the size of its text.
  """
  vocabulary: Vocabulary
  options: PipelineOptions
  workers: int
  shards: int


def prepare(config: Any, output: str, workers: int, shards: int) -> list[str]:
  """Prepares what a run reads.

  Args:
    config: the run's.
    output: the folder for `train` and `validation`.
    workers: processes.
    shards: of each of them, at most; 0: by the size of the text.

  Returns:
    The overrides of a run that is to read it.

  Raises:
    ConfigError, DataError: a setting that cannot be, a file that cannot be
      read, or a folder that holds something else.
    WorkerError: a process was killed.
  """
  for name, value, least in (('workers', workers, 1), ('shards', shards, 0)):
    if value < least:
      raise ConfigError(f'--{name}={value} must be at least {least}.')
  check_source(config.data)
  if config.data.source == 'arrayrecord':
    raise ConfigError("data.source='arrayrecord' is prepared already.")
  if config.data.objective == SUPERVISED:
    raise ConfigError("data.objective='supervised' has nothing to prepare: "
                      'train.py reads the examples as they are.')
  run_config.check_config(config)
  run_config.check_paths(config)
  if not config.data.vocabulary:
    raise ConfigError('data.vocabulary is empty: it must name a SentencePiece '
                      'model.')
  vocabulary = Vocabulary(config.data.vocabulary, config.data.extra_ids)
  model = run_config.model_config(config.model)
  run_config.check_vocabulary(vocabulary, model)
  options = pipeline_options(config, model.global_block_size)
  make_objective(vocabulary, options)  # Refuses what it cannot work with.
  settings = Settings(vocabulary, options, workers, shards)
  # All are read before anything is written.
  read = {name: _read(config.data, origin, options)
          for name, origin in _origins(config.data).items()}
  for name, documents in read.items():
    prepare_folder(os.path.join(output, name), documents, settings)
  return [f'--config.data.{key}={value}' for key, value in {
      'source': 'arrayrecord', 'path': os.path.join(output, 'train'),
      **({'validation_path': os.path.join(output, 'validation')}
         if 'validation' in read else {})}.items()]


def _origins(data):
  """Name of a folder -> files, or the split of a task, that it is made of."""
  origins = ({'train': 'train', 'validation': data.validation_split}
             if data.source == 'seqio' else
             {'train': data.path, 'validation': data.validation_path})
  return {name: origin for name, origin in origins.items() if origin}


def _read(data, origin, options):
  if data.source != 'seqio':
    return load_documents(
        origin, data.source, field=data.field, on_bad_record=data.on_bad_record)
  register_tasks(data, options)
  open_task(data.task, data.module)
  return Documents(load_tasks().task_texts(data.task, origin, data.field))


def prepare_folder(folder: str, documents: Documents, settings: Settings
                   ) -> None:
  """Writes shards and metadata, or what is missing of them.

  Raises:
    DataError: the folder holds something else, or cannot be written.
    WorkerError: a process was killed.
  """
  options = settings.options
  plan, sizes = make_plan(
      documents, settings_that_matter(settings.vocabulary, options),
      settings.shards)
  shards = ShardFolder(folder, plan)
  missing = shards.missing()
  scored = 'gap_sentences' in objective_weights(options.objective)
  writer = ShardWriter(
      folder, (), documents, settings.vocabulary,
      options.gap_sentences if scored else None, plan['group_size'])
  left = sum(int(sizes[shard.start:shard.stop].sum()) for shard in missing)
  total = int(sizes.sum())
  with _bar() as bar:
    task = bar.add_task(folder, total=total, completed=total - left)
    for done in write_shards(writer, missing, settings.workers):
      bar.advance(task, done)
  shards.finish()
  ready = len(shards.shards) - len(missing)
  plural = 's' * (len(shards.shards) > 1)
  print(f'{folder}: {len(documents):,} documents in {len(shards.shards)} shard'
        f'{plural}' + f', {ready} of them from before' * bool(ready))


def write_shards(writer: ShardWriter, shards: Sequence[Shard], count: int
                 ) -> Iterator[int]:
  """Has shards written by `count` processes; see `ShardWriter.run`."""
  parts = [shards[i::count] for i in range(min(count, len(shards)))]
  workers: list[Worker] = []
  try:
    for part in parts:
      workers.append(Worker(writer.with_shards(part).run,
                            (writer.documents.fileno(),)))
    working = list(workers)
    while working:
      for worker in list(working):
        try:
          yield next(worker)
        except StopIteration:
          working.remove(worker)
  finally:
    for worker in workers:
      worker.close()


def _bar() -> Progress:
  console = Console(stderr=True)
  return Progress(
      TextColumn('{task.description}'), BarColumn(None), DownloadColumn(),
      TransferSpeedColumn(), TimeRemainingColumn(), console=console,
      transient=True, disable=not console.is_terminal)


def make_parser() -> argparse.ArgumentParser:
  """The options that no config has."""
  parser = argparse.ArgumentParser(
      prog='python -m longt5_flax.prepare', allow_abbrev=False,
      description='Splits, tokenises and scores documents once.',
      epilog='--config.KEY=VALUE is an override, as of train.py.')
  parser.add_argument('--config', required=True, metavar='FILE',
                      help='of the run that is to read them')
  parser.add_argument('--output', required=True, metavar='DIR',
                      help='gets the folders train and validation')
  parser.add_argument('--workers', type=int, metavar='N',
                      default=os.cpu_count() or 1,
                      help='processes; by default one a core')
  parser.add_argument('--shards', type=int, default=0, metavar='N',
                      help='files, at most; by default one for 8 MB of text')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  arguments, overrides = make_parser().parse_known_args(argv)
  try:
    config = read_config(arguments.config, overrides)
    replaced = prepare(config, arguments.output, arguments.workers,
                       arguments.shards)
  except (ConfigError, DataError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except WorkerError as error:
    print(f'error: {error}; the same command goes on', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('Stopped; the same command goes on.', file=sys.stderr)
    return 128 + signal.SIGINT
  print('Next: ' + shlex.join(
      ['python', 'train.py', f'--config={arguments.config}',
       *_kept(overrides), *replaced]))
  return 0


def _kept(overrides):
  """Without those that say where documents come from."""
  gone = [f'--config.data.{key}=' for key in (
      'source', 'path', 'validation_path', 'task', 'module', 'field',
      'validation_split', 'on_bad_record', 'tfds_name', 'tfds_dir')]
  return [each for each in overrides if not each.startswith(tuple(gone))]


if __name__ == '__main__':
  sys.exit(main())

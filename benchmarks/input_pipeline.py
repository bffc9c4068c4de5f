"""The input pipeline: packed tokens a second, cost by length, memory.

  python -m benchmarks.input_pipeline --path=books.jsonl.xz --vocabulary=m.model

prints a JSON line a measurement, as it goes; --measure chooses among

  rate     tokens/s of batches from text and from prepared shards; `workers` 0
           is one core, in the process that asks; else as many processes beside
           it.
  lengths  what a token of a document costs, by the document's length.
  memory   what all processes hold for themselves over an epoch of pieces.

Tokens are real ones of inputs and targets, without padding; in `lengths` those
of the document. Each measurement has a process of its own. Where other programs
run, tokens a CPU second, of all processes, say more than tokens a second.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any

import psutil

from longt5_flax.data.documents import Item
from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.pipeline import (
    BatchIterator,
    PipelineOptions,
    fixed_batches,
)
from longt5_flax.data.prepared import (
    PreparedDocuments,
    from_record,
    settings_that_matter,
    to_record,
)
from longt5_flax.data.shard_writer import ShardWriter
from longt5_flax.data.sources import Documents, load_documents
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.prepare import Settings, prepare_folder

LENGTHS = 4096, 910
SOURCES = ('text', 'prepared')
LONG_DOCUMENTS = ('pieces', 'cut')
MEASURES = ('rate', 'lengths', 'memory')
# Of the documents of `lengths`, in characters.
SIZES = (64_000, 256_000, 1_024_000, 4_096_000, 16_384_000)
# How often memory is looked at in an epoch.
PARTS = 10

Line = dict[str, Any]


def open_batches(
    source: str, long_documents: str, workers: int,
    arguments: argparse.Namespace) -> tuple[BatchIterator, Vocabulary]:
  """Everything that a run does before its first batch."""
  vocabulary = Vocabulary(arguments.vocabulary)
  options = PipelineOptions(*LENGTHS, objective=arguments.objective,
                            long_documents=long_documents)
  documents = load_documents(arguments.path) if source == 'text' else (
      PreparedDocuments(arguments.prepared,
                        settings_that_matter(vocabulary, options)))
  return BatchIterator(
      documents, vocabulary, options, arguments.batch_size,
      range(arguments.batch_size), workers), vocabulary


def measure_rate(source: str, long_documents: str, workers: int,
                 arguments: argparse.Namespace) -> Line:
  """Tokens a second, and seconds to the first batch."""
  start = time.perf_counter()
  with open_batches(source, long_documents, workers, arguments)[0] as batches:
    next(batches)
    first = time.perf_counter() - start
    before = _tokens(batches), _cpu_seconds()
    start, seconds = time.perf_counter(), 0.0
    # The CPU's time is counted in ticks, and a few batches may not take one.
    while seconds < arguments.seconds or _cpu_seconds() == before[1]:
      next(batches)
      seconds = time.perf_counter() - start
    tokens = _tokens(batches) - before[0]
    cpu = _cpu_seconds() - before[1]
    stats = batches.stats()
  return {'tokens_per_second': round(tokens / seconds),
          'tokens_per_cpu_second': round(tokens / cpu),
          'seconds_to_first_batch': round(first, 2),
          'input_padding': round(stats['input_padding'], 3),
          'target_padding': round(stats['target_padding'], 3)}


def measure_memory(source: str, workers: int, arguments: argparse.Namespace
                   ) -> Line:
  """Memory after the first batch and after each part of an epoch."""
  batches, vocabulary = open_batches(source, 'pieces', workers, arguments)
  # A piece's tokens are in its inputs or its targets.
  epoch = sum(len(document.ids) for document in PreparedDocuments(
      arguments.prepared, settings_that_matter(
          vocabulary, PipelineOptions(*LENGTHS, arguments.objective))))
  with batches:
    next(batches)
    sizes = [_private_mb()]
    for part in range(PARTS):
      while _tokens(batches) < epoch * (part + 1) / PARTS:
        next(batches)
      sizes.append(_private_mb())
  return {'epoch_tokens': epoch, 'private_memory_mb': sizes}


class Record(Sequence[Item]):
  """A prepared document, decoded as if it came from a shard."""

  def __init__(self, record: bytes):
    self._record = record

  def __len__(self) -> int:
    return 1

  def __getitem__(self, index: Any) -> Any:
    range(1)[index]  # Raises IndexError.
    return from_record(self._record)


def measure_lengths(arguments: argparse.Namespace) -> list[Line]:
  """Cost of a document of each size, the best of some repeats."""
  vocabulary = Vocabulary(arguments.vocabulary)
  corpus = load_documents(arguments.path)
  found = []
  for size in SIZES:
    text = _long_text(corpus, size)
    document = ShardWriter('', (), corpus, vocabulary, GapSentenceOptions(),
                           1).prepare(text)
    sources = [text], Record(to_record(document))
    for (source, documents), long_documents in itertools.product(
        zip(SOURCES, sources, strict=True), LONG_DOCUMENTS):
      options = PipelineOptions(*LENGTHS, objective=arguments.objective,
                                long_documents=long_documents)
      seconds: list[float] = []
      while sum(seconds) < arguments.seconds / 10:
        start = time.perf_counter()
        fixed_batches(documents, vocabulary, options, 1)
        seconds.append(time.perf_counter() - start)
      found.append({
          'source': source, 'long_documents': long_documents,
          'characters': size, 'tokens': len(document.ids),
          'microseconds_per_token': round(
              1e6 * min(seconds) / len(document.ids), 3)})
  return found


def _long_text(documents: Documents, size: int) -> str:
  """So many characters of documents, which are repeated if need be."""
  times = -(-size // sum(map(len, documents)))
  return ''.join(itertools.chain(*itertools.repeat(documents, times)))[:size]


def _tokens(batches: BatchIterator) -> int:
  stats = batches.stats()
  return int(stats['input_tokens'] + stats['target_tokens'])


def _processes() -> list[psutil.Process]:
  this = psutil.Process()
  return [this, *this.children()]


def _cpu_seconds() -> float:
  times = [process.cpu_times() for process in _processes()]
  return sum(each.user + each.system for each in times)


def _private_mb() -> list[int]:
  """Of each process, without the corpus, which all of them map."""
  memory = [process.memory_info() for process in _processes()]
  return [round((each.rss - each.shared) / 1e6) for each in memory]


def run_alone(function: Callable[..., Any], *values: Any) -> Any:
  """Nothing of one measurement is left for the next."""
  with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
    return process.submit(function, *values).result()


def measurements(arguments: argparse.Namespace) -> Iterator[Line]:
  """All lines, one after another."""
  if 'rate' in arguments.measure:
    for values in itertools.product(
        SOURCES, LONG_DOCUMENTS, arguments.workers):
      names = ('source', 'long_documents', 'workers')
      yield {'measure': 'rate', **dict(zip(names, values, strict=True)),
             'batch_size': arguments.batch_size,
             **run_alone(measure_rate, *values, arguments)}
  if 'lengths' in arguments.measure:
    for line in run_alone(measure_lengths, arguments):
      yield {'measure': 'lengths', **line}
  if 'memory' in arguments.measure:
    workers = max(arguments.workers)
    for source in SOURCES:
      yield {'measure': 'memory', 'source': source,
             'long_documents': 'pieces', 'workers': workers,
             **run_alone(measure_memory, source, workers, arguments)}


def prepare(folder: str, arguments: argparse.Namespace) -> Line:
  """Prepares the corpus with all workers, for what is measured later."""
  start = time.perf_counter()
  documents = load_documents(arguments.path)
  loaded = time.perf_counter()
  workers = max(1, *arguments.workers)
  with contextlib.redirect_stdout(sys.stderr):  # JSON alone goes there.
    prepare_folder(folder, documents, Settings(
        Vocabulary(arguments.vocabulary),
        PipelineOptions(*LENGTHS, objective=arguments.objective), workers, 0))
  return {'measure': 'prepare', 'workers': workers,
          'seconds_to_load': round(loaded - start, 1),
          'seconds': round(time.perf_counter() - loaded, 1),
          'text_mb': round(documents.num_bytes / 1e6),
          'shards_mb': round(sum(
              entry.stat().st_size for entry in os.scandir(folder)) / 1e6)}


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.input_pipeline', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--path', required=True, help='JSON lines with `text`')
  parser.add_argument('--vocabulary', required=True)
  parser.add_argument('--prepared', help='of --path; by default made first')
  parser.add_argument('--measure', nargs='+', choices=MEASURES,
                      default=MEASURES)
  parser.add_argument('--objective', default='gap_sentences',
                      help='as data.objective')
  parser.add_argument('--workers', nargs='+', type=int,
                      default=[0, os.cpu_count()])
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--seconds', type=float, default=3.0,
                      help='of each measurement of a rate')
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the lines."""
  arguments = make_parser().parse_args(argv)

  def show(line: Line) -> None:
    print(json.dumps({'benchmark': 'input_pipeline', **line}), flush=True)

  show({'measure': 'environment', 'cores': os.cpu_count(),
        'python': platform.python_version(), **{
            name: version(name) for name in (
                'grain', 'sentencepiece', 'numpy', 'array_record')}})
  with tempfile.TemporaryDirectory() as folder:
    if not arguments.prepared:
      arguments.prepared = os.path.join(folder, 'prepared')
      show(prepare(arguments.prepared, arguments))
    for line in measurements(arguments):
      show(line)


if __name__ == '__main__':
  main()

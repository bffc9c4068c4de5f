"""Packed tokens a second of the input pipeline, from text and from shards.

  python -m benchmarks.input_pipeline --path=books.jsonl.xz --vocabulary=m.model

prints a line for each case: source, what becomes of long documents, processes
(0: one core, in the process that asks; else as many beside it). Tokens are
real ones, inputs and targets, without padding. Each case is measured in a
process of its own and the best of --repeats counts; where other programs run,
tokens a CPU second of one core say more than tokens a second.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any, NamedTuple

import psutil

from longt5_flax.data.pipeline import BatchIterator, PipelineOptions
from longt5_flax.data.prepared import PreparedDocuments, settings_that_matter
from longt5_flax.data.sources import load_documents
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.prepare import Settings, prepare_folder


class Case(NamedTuple):
  """What to measure."""
  source: str  # 'text', or 'prepared'
  long_documents: str
  objective: str
  workers: int


def measure(case: Case, path: str, arguments: argparse.Namespace
            ) -> dict[str, Any]:
  """Rates, time to the first batch, and memory of a case."""
  start = time.perf_counter()
  vocabulary = Vocabulary(arguments.vocabulary)
  options = PipelineOptions(
      4096, 910, objective=case.objective, long_documents=case.long_documents)
  documents = load_documents(path) if case.source == 'text' else (
      PreparedDocuments(path, settings_that_matter(vocabulary, options)))
  batch_size = arguments.batch_size
  rates, cpu_rates, sizes = [], [], []
  with BatchIterator(documents, vocabulary, options, batch_size,
                     range(batch_size), case.workers) as batches:
    next(batches)
    first = time.perf_counter() - start
    for _ in range(arguments.repeats):
      sizes.append(_private_mb())
      before = _tokens(batches), time.perf_counter(), time.process_time()
      for _ in range(arguments.batches):
        next(batches)
      after = _tokens(batches), time.perf_counter(), time.process_time()
      tokens, seconds, cpu = (b - a for a, b in zip(before, after, strict=True))
      rates.append(tokens / seconds)
      cpu_rates.append(tokens / cpu)
    sizes.append(_private_mb())
    stats = batches.stats()
  return {
      'tokens_per_second': round(max(rates)),
      'median_tokens_per_second': round(statistics.median(rates)),
      # The work of other processes is not in this one's CPU time.
      'tokens_per_cpu_second': None if case.workers else round(max(cpu_rates)),
      'seconds_to_first_batch': round(first, 2),
      # After the first batch, and after each repeat.
      'private_memory_mb': [round(size) for size in sizes],
      'input_padding': round(stats['input_padding'], 3),
      'target_padding': round(stats['target_padding'], 3)}


def _tokens(batches: BatchIterator) -> int:
  stats = batches.stats()
  return int(stats['input_tokens'] + stats['target_tokens'])


def _private_mb() -> float:
  """Without the corpus, which all processes map."""
  memory = psutil.Process().memory_info()
  return (memory.rss - memory.shared) / 1e6


def main() -> None:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.input_pipeline', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--path', required=True, help='JSON lines with `text`')
  parser.add_argument('--vocabulary', required=True)
  parser.add_argument('--prepared', help='of --path; by default made first')
  parser.add_argument('--source', nargs='*', default=['text', 'prepared'])
  parser.add_argument('--long_documents', nargs='*', default=['pieces', 'cut'])
  parser.add_argument('--objective', nargs='*', default=['gap_sentences'])
  parser.add_argument('--workers', nargs='*', type=int,
                      default=[0, os.cpu_count()])
  parser.add_argument('--batch_size', type=int, default=16)
  parser.add_argument('--batches', type=int, default=64,
                      help='that are timed together')
  parser.add_argument('--repeats', type=int, default=3)
  arguments = parser.parse_args()
  cases = itertools.starmap(Case, itertools.product(
      arguments.source, arguments.long_documents, arguments.objective,
      arguments.workers))
  versions = {name: version(name) for name in (
      'grain', 'sentencepiece', 'numpy', 'array_record')}
  with (tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(
      1, multiprocessing.get_context('spawn'), max_tasks_per_child=1) as pool):
    prepared = arguments.prepared or folder
    if 'prepared' in arguments.source and not arguments.prepared:
      prepare_folder(folder, load_documents(arguments.path), Settings(
          Vocabulary(arguments.vocabulary), PipelineOptions(4096, 910),
          os.cpu_count() or 1, 0))
    for case in cases:
      path = arguments.path if case.source == 'text' else prepared
      result = pool.submit(measure, case, path, arguments).result()
      print(json.dumps({
          'benchmark': 'input_pipeline', **case._asdict(),
          'batch_size': arguments.batch_size, **result,
          'cores': os.cpu_count(), 'python': platform.python_version(),
          **versions}), flush=True)


if __name__ == '__main__':
  main()

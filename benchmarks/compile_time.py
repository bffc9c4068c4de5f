"""How long compiling a train step takes: cold, and from the persistent cache.

  python -m benchmarks.compile_time --preset tglobal-base tglobal-large

prints a JSON line for each preset, with layers stacked (`scan_layers`) and
without: the medians of seconds of tracing, of compiling with an empty cache
and of compiling once more, in another process, with what that left in the cache
(JAX_COMPILATION_CACHE_DIR), each with the least and the most of --repeats.
`cold_seconds` and `cached_seconds` are what a run waits for its first step,
tracing and compiling together.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax

from benchmarks import processes
from benchmarks.processes import Line
from benchmarks.train_step import (
    CONFIG,
    compile_step,
    config_overrides,
    make_program,
    parse_case,
    whole_memory,
)
from longt5_flax.command_line import read_config
from longt5_flax.config import ConfigError
from longt5_flax.training import partitioning, run_config


def measure(overrides: list[str]) -> Iterator[Line]:
  """One compilation; in a process of its own."""
  program = make_program(overrides)
  with partitioning.active(program.mesh):
    yield {'device': jax.devices()[0].device_kind, **compile_step(program)[1]}


def compile_twice(overrides: list[str], timeout: float) -> tuple[Line, Line]:
  """Cold, and from the cache."""
  with tempfile.TemporaryDirectory() as cache:
    variables = whole_memory() | {
        'JAX_COMPILATION_CACHE_DIR': cache,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0'}
    cold, cached = (processes.run_alone(
        'benchmarks.compile_time:measure', {'overrides': overrides}, timeout,
        environment=variables) for _ in range(2))
  return cold, cached


def summary(runs: Sequence[tuple[Line, Line]]) -> Line:
  """Medians, least and most of some repeats."""
  failed = [line['error'] for pair in runs for line in pair if 'error' in line]
  if failed:
    return {'error': failed[0]}
  cold, cached = ([line['trace_seconds'] + line['compile_seconds']
                   for line in lines] for lines in zip(*runs, strict=True))
  result: Line = {
      'device': runs[0][0]['device'], 'repeats': len(runs),
      'trace_seconds': round(statistics.median(
          line['trace_seconds'] for pair in runs for line in pair), 2)}
  for name, seconds in (('cold', cold), ('cached', cached)):
    result[f'{name}_seconds'] = round(statistics.median(seconds), 2)
    result[f'{name}_range'] = [round(min(seconds), 2), round(max(seconds), 2)]
  return result


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.compile_time', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--preset', nargs='+', default=['tglobal-base', 'tglobal-large'])
  add('--case', metavar='LENGTHxROWS', default='16384x1')
  add('--targets', type=int, default=512)
  add('--attention', default='fused')
  add('--remat', default='none')
  add('--scan', nargs='+', default=['false', 'true'],
      choices=('true', 'false'), help='as precision.scan_layers')
  add('--override', nargs='+', default=[], metavar='KEY=VALUE',
      help='of configs/base.py')
  add('--repeats', type=int, default=1)
  add('--case_timeout', type=float, default=300.0,
      help='seconds that one compilation may take')
  add('--out', metavar='FILE', help='add the lines to it, too')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the lines; a user's mistake is one line and exit code 2."""
  arguments = make_parser().parse_args(argv)
  cases = [(preset, scan) for preset in arguments.preset
           for scan in arguments.scan]
  try:
    length, rows = parse_case(arguments.case)
    overrides = [[*config_overrides({
        'model.preset': preset, 'data.inputs_length': length,
        'data.targets_length': arguments.targets, 'data.batch_size': rows,
        'precision.attention': arguments.attention,
        'precision.remat': arguments.remat, 'precision.scan_layers': scan}),
                  *(f'--config.{text}' for text in arguments.override)]
                 for preset, scan in cases]
    for each in overrides:
      run_config.check_config(read_config(CONFIG, each))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  show = processes.show_on(arguments.out)
  show(processes.environment('compile_time', 'jax', 'flax', 'optax'))
  for (preset, scan), each in zip(cases, overrides, strict=True):
    runs = [compile_twice(each, arguments.case_timeout)
            for _ in range(arguments.repeats)]
    show({'benchmark': 'compile_time', 'preset': preset, 'length': length,
          'rows': rows, 'targets': arguments.targets,
          'attention': arguments.attention, 'remat': arguments.remat,
          'scan_layers': scan == 'true', 'override': arguments.override,
          **summary(runs)})
  return 0


if __name__ == '__main__':
  sys.exit(main())

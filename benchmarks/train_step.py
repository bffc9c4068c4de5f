"""A whole train step, optimizer and all: time, memory, and where it goes.

  python -m benchmarks.train_step --case 16384x1 --peer eager compile
  python -m benchmarks.train_step --all --peer --out lines.jsonl
  python -m benchmarks.train_step --case 16384x1 --profile profiles

The step is the one that train.py runs, from configs/base.py: bfloat16, random
tokens, no padding, Adafactor, on one device. Each case has a process of its
own, and prints a JSON line: the median, tenth and ninetieth percentile of the
time between steps; input tokens a second; the most memory that was in use, and
what XLA had planned; MFU (training/flops.py); and the share of the floor, the
time that the same arithmetic takes at the rate of large bf16 matrix products.
An `error` (out of memory, too slow) ends its case, not the others.

--peer measures Hugging Face's PyTorch LongT5 on the same shapes in the same
run, `eager` or by torch.`compile`, `-remat` with gradient checkpointing; its
line has `speedup`, how many times as fast the fastest of ours is, and
`memory_ratio`, our peak over its. It is bf16 throughout, parameters and all,
where ours keeps those in float32; its optimizer is PyTorch's fused AdamW or
transformers' Adafactor.

--profile prints no times of steps but where one goes: by part of the model, by
kind of kernel, and its longest kernels; and writes table, trace and compiled
program to a folder. CUDA graphs are off then, as they hide what runs.

JAX_COMPILATION_CACHE_DIR saves compiling twice, and spoils `compile_seconds`.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import processes, step_profile
from benchmarks.processes import Line, Show
from benchmarks.timing import (
    MATMUL_FLOPS,
    Limits,
    compare,
    spread,
    time_calls,
)
from longt5_flax.command_line import read_config
from longt5_flax.config import ConfigError
from longt5_flax.training import partitioning, run_config
from longt5_flax.training.flops import mfu, train_flops
from longt5_flax.training.optimizer import make_optimizer, num_parameters
from longt5_flax.training.schedules import make_schedule
from longt5_flax.training.train_step import (
    init_state,
    jit_train_step,
    make_train_step,
)

CONFIG = str(Path(__file__).parent.parent / 'configs' / 'base.py')
PEERS = ('eager', 'compile', 'eager-remat', 'compile-remat')
# Inputs of a row from which memory is short: layers are recomputed, unless
# --remat is given from inputs in the host's memory, and in a loop, which keeps
# less.
REMAT_FROM = 1 << 20


class Row(NamedTuple):
  """A case of --all, with the peers that can run it."""
  case: str
  peers: tuple[str, ...]


TABLE = (
    Row('4096x8', ('eager', 'compile')),
    Row('16384x1', ('eager',)),
    Row('16384x2', ('eager', 'compile')),
    Row('32768x1', ('eager',)),
    Row('65536x1', ('eager-remat',)),
    Row('131072x1', ('eager-remat',)),
    Row('1048576x1', ()),
)


class Program(NamedTuple):
  """A train step, before it is compiled.

  Attributes:
    config: of the run.
    mesh: of one device.
    new_state: a jitted function that makes the first state.
    abstract: the state's shapes.
    step: (state, batch) -> (state, metrics), jitted, its state donated.
    batch: random tokens, on the device.
  """
  config: Any
  mesh: Any
  new_state: Any
  abstract: Any
  step: Any
  batch: dict[str, jax.Array]


def make_program(overrides: Sequence[str]) -> Program:
  """The step of train.py, of configs/base.py with overrides."""
  config = read_config(CONFIG, overrides)
  model = run_config.make_model(config)
  mesh = partitioning.make_mesh(dict(config.mesh), jax.devices()[:1])
  schedule = make_schedule(**config.schedule, steps=config.steps)
  optimizer = make_optimizer(config.optimizer, schedule)

  def new_state():
    return init_state(model, optimizer, config.seed)

  abstract = jax.eval_shape(new_state)
  shardings = partitioning.state_shardings(abstract, abstract.params, mesh)
  step = jit_train_step(make_train_step(model, optimizer, schedule, config),
                        shardings, mesh.devices.flat[0].platform)
  abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings)
  return Program(config, mesh, jax.jit(new_state, out_shardings=shardings),
                 abstract, step, random_batch(config, model.config, mesh))


def random_batch(config: Any, model: Any, mesh: Any) -> dict[str, jax.Array]:
  """One segment a row, no padding."""
  rows, data = config.data.batch_size, config.data
  draw = np.random.default_rng(config.seed)

  def tokens(length):
    return draw.integers(2, model.vocab_size, (rows, length), np.int32)

  batch = {}
  for side, length in (('encoder', data.inputs_length),
                       ('decoder', data.targets_length)):
    batch[f'{side}_input_tokens'] = tokens(length)
    batch[f'{side}_segment_ids'] = np.ones((rows, length), np.int32)
    batch[f'{side}_positions'] = np.tile(
        np.arange(length, dtype=np.int32), (rows, 1))
  batch['decoder_target_tokens'] = tokens(data.targets_length)
  batch['decoder_loss_weights'] = np.ones_like(batch['decoder_segment_ids'])
  return partitioning.global_batch(mesh, range(rows), batch, rows)


def compile_step(program: Program) -> tuple[Any, Line]:
  """The compiled step, how long that took, and what memory it plans."""
  start = time.perf_counter()
  lowered = program.step.lower(program.abstract, program.batch)
  traced = time.perf_counter()
  compiled = lowered.compile()
  plan = compiled.memory_analysis()
  return compiled, {
      'trace_seconds': round(traced - start, 2),
      'compile_seconds': round(time.perf_counter() - traced, 2),
      'planned_temporary_bytes': plan.temp_size_in_bytes,
      'planned_bytes': (
          plan.argument_size_in_bytes + plan.output_size_in_bytes
          - plan.alias_size_in_bytes + plan.temp_size_in_bytes)}


def measure(overrides: list[str], limits: list[Any]) -> Iterator[Line]:
  """What is measured of one case; in a process of its own."""
  program = make_program(overrides)
  device = jax.devices()[0]
  yield {'device': device.device_kind, 'parameters': num_parameters(
      program.abstract.params)}
  with partitioning.active(program.mesh):
    compiled, compiling = compile_step(program)
    yield compiling
    state = program.new_state()
    metrics: Any = None

    def step():
      nonlocal state, metrics
      state, metrics = compiled(state, program.batch)
      return metrics

    seconds = time_calls(step, jax.block_until_ready, Limits(*limits))
  stats = device.memory_stats() or {}
  yield spread(seconds)
  yield rates(program.config, statistics.median(seconds), device.device_kind)
  yield {'peak_bytes': stats.get('peak_bytes_in_use'),
         'loss': round(float(metrics['loss']), 4)}


def rates(config: Any, seconds: float, device: str) -> Line:
  """Tokens a second, MFU, and the floor, of a step that takes so long."""
  data = config.data
  flops = data.batch_size * train_flops(
      run_config.model_config(config.model), data.inputs_length,
      data.targets_length)
  share = mfu(flops / seconds, device, 1)
  line: Line = {
      'input_tokens_per_second': round(
          data.batch_size * data.inputs_length / seconds),
      'tflop': round(flops / 1e12, 2),
      'mfu': None if share is None else round(share, 4)}
  if device in MATMUL_FLOPS:
    floor = flops / MATMUL_FLOPS[device]
    line |= {'floor_ms': round(1000 * floor, 2),
             'share_of_floor': round(floor / seconds, 4)}
  return line


def profile(overrides: list[str], steps: int, folder: str, name: str
            ) -> Iterator[Line]:
  """Where a step goes; in a process of its own."""
  program = make_program(overrides)
  yield {'device': jax.devices()[0].device_kind}
  with partitioning.active(program.mesh):
    compiled, compiling = compile_step(program)
    yield compiling
    state = program.new_state()

    def step():
      nonlocal state
      state, metrics = compiled(state, program.batch)
      return metrics

    yield step_profile.record(step, steps, compiled, folder, name)


def overrides_of(arguments: argparse.Namespace, case: str, attention: str,
                 remat: str, scan: str) -> list[str]:
  """The keys of configs/base.py that a case sets."""
  length, rows = parse_case(case)
  values = {
      'model.preset': arguments.preset, 'data.inputs_length': length,
      'data.targets_length': arguments.targets, 'data.batch_size': rows,
      'precision.dtype': arguments.dtype, 'precision.attention': attention,
      'precision.remat': remat, 'precision.scan_layers': scan,
      'precision.scan_unroll': int(length >= REMAT_FROM)}
  return [*config_overrides(values),
          *(f'--config.{text}' for text in arguments.override)]


def config_overrides(values: Line) -> list[str]:
  """Arguments of train.py's command line."""
  return [f'--config.{name}={value}' for name, value in values.items()]


def parse_case(case: str) -> tuple[int, int]:
  """LENGTHxROWS.

  Raises:
    ConfigError: it is something else.
  """
  length, _, rows = case.partition('x')
  if not (length.isdigit() and rows.isdigit() and int(length) and int(rows)):
    raise ConfigError(f'--case={case} must be LENGTHxROWS, as in 16384x2.')
  return int(length), int(rows)


def variants(arguments: argparse.Namespace, case: str) -> Iterator[Line]:
  """Our implementations of a case: what a line says of it, and overrides."""
  length, rows = parse_case(case)
  remats = arguments.remat or [
      'offload' if length >= REMAT_FROM else 'none']
  for attention, remat, scan in itertools.product(
      arguments.attention, remats, arguments.scan):
    overrides = overrides_of(arguments, case, attention, remat, scan)
    config = read_config(CONFIG, overrides)
    run_config.check_config(config)
    yield {'overrides': overrides, 'line': {
        'benchmark': 'train_step', 'implementation': 'longt5_flax',
        'preset': arguments.preset, 'length': length, 'rows': rows,
        'targets': arguments.targets, 'dtype': arguments.dtype,
        'attention': attention, 'remat': remat,
        'scan_layers': config.precision.scan_layers,
        'scan_unroll': config.precision.scan_unroll,
        'optimizer': config.optimizer.name, 'override': arguments.override}}


def run_case(arguments: argparse.Namespace, case: str, peers: Sequence[str],
             show: Show) -> None:
  """All lines of a case: ours, then the peers'."""
  limits = Limits(arguments.warmup, arguments.steps, arguments.seconds,
                  arguments.max_seconds)
  ours = []
  for variant in variants(arguments, case):
    if arguments.profile:
      show(run_profile(arguments, variant))
      continue
    ours.append(variant['line'] | processes.run_alone(
        'benchmarks.train_step:measure',
        {'overrides': variant['overrides'], 'limits': limits},
        arguments.case_timeout, environment=whole_memory()))
    show(ours[-1])
  done = [line for line in ours if 'error' not in line]
  best = min(done, key=lambda line: line['median_ms'], default=None)
  for peer in peers:
    show(compare(run_peer(arguments, case, peer, limits), best))


def run_profile(arguments: argparse.Namespace, variant: Line) -> Line:
  """The line of a profile; its tables go to stderr."""
  line = variant['line']
  name = '-'.join(str(line[key]) for key in (
      'preset', 'length', 'rows', 'attention', 'remat')) + (
          '' if line['scan_layers'] else '-apart')
  folder = os.path.abspath(arguments.profile)
  result = processes.run_alone(
      'benchmarks.train_step:profile',
      {'overrides': variant['overrides'], 'steps': arguments.profile_steps,
       'folder': folder, 'name': name}, arguments.case_timeout,
      environment=whole_memory() | step_profile.prepare(folder))
  if 'error' not in result:
    step_profile.show_tables(folder, name)
  return line | {'measure': 'profile'} | result


def run_peer(arguments: argparse.Namespace, case: str, peer: str,
             limits: Limits) -> Line:
  """The line of a peer."""
  length, rows = parse_case(case)
  model = run_config.model_config(read_config(CONFIG, overrides_of(
      arguments, case, arguments.attention[0], 'none', 'False')).model)
  line = {'benchmark': 'train_step', 'implementation': f'transformers {peer}',
          'preset': arguments.preset, 'length': length, 'rows': rows,
          'targets': arguments.targets}
  result = processes.run_peer_alone(
      'benchmarks.peers:train',
      {'config': model.to_dict(), 'length': length, 'rows': rows,
       'targets': arguments.targets, 'compiled': peer.startswith('compile'),
       'remat': peer.endswith('-remat'), 'optimizer': arguments.peer_optimizer,
       'limits': limits}, arguments)
  if 'median_ms' in result:
    result['input_tokens_per_second'] = round(
        1000 * rows * length / result['median_ms'])
  return line | result


def whole_memory() -> dict[str, str]:
  """The environment of a process that has the GPU to itself: JAX takes three
  quarters by default."""
  return {'XLA_PYTHON_CLIENT_MEM_FRACTION': os.environ.get(
      'XLA_PYTHON_CLIENT_MEM_FRACTION', '0.95')}


def make_parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog='python -m benchmarks.train_step', description=__doc__,
      formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--case', nargs='+', metavar='LENGTHxROWS', default=['16384x1'])
  add('--all', action='store_true', help='the whole table instead of --case')
  add('--preset', default='tglobal-base', help='as model.preset')
  add('--targets', type=int, default=512, help='length of a row of targets')
  add('--dtype', default='bfloat16', help='as precision.dtype')
  add('--attention', nargs='+', default=['fused'],
      help='as precision.attention; several are measured one by one')
  add('--remat', nargs='+',
      help='as precision.remat; by default none, and offload, in a loop, from '
      f'{REMAT_FROM}')
  add('--scan', nargs='+', default=['true'], choices=('true', 'false'),
      help='as precision.scan_layers')
  add('--override', nargs='+', default=[], metavar='KEY=VALUE',
      help='of configs/base.py')
  add('--peer', nargs='*', choices=PEERS,
      help='without a value: those of the table, or eager and compile')
  add('--peer_optimizer', choices=('adamw', 'adafactor'), default='adamw')
  processes.add_peer_options(parser)
  add('--profile', metavar='FOLDER', help='where a step goes, instead of times')
  add('--profile_steps', type=int, default=5)
  add('--warmup', type=int, default=Limits().warmup)
  add('--steps', type=int, default=Limits().steps, help='at least')
  add('--seconds', type=float, default=Limits().seconds, help='at least')
  add('--max_seconds', type=float, default=Limits().max_seconds,
      help='of measuring a case, however few steps that is')
  add('--case_timeout', type=float, default=300.0,
      help='seconds that a case may take, compilation included')
  add('--out', metavar='FILE', help='add the lines to it, too')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the lines; a user's mistake is one line and exit code 2."""
  arguments = make_parser().parse_args(argv)
  table = TABLE if arguments.all else [
      Row(case, ('eager', 'compile')) for case in arguments.case]
  try:
    for row in table:  # All of them, before any takes its time.
      list(variants(arguments, row.case))
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  show = processes.show_on(arguments.out)
  show(processes.environment('train_step', 'jax', 'flax', 'optax'))
  for row in table:
    peers = () if arguments.peer is None else arguments.peer or row.peers
    run_case(arguments, row.case, peers, show)
  return 0


if __name__ == '__main__':
  sys.exit(main())

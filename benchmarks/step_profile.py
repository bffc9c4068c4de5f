"""Where the time of one step goes, from a profiler trace and the program.

The trace says which kernel ran how long and from which instruction of the
compiled program; the program's text says what an instruction is, its sizes, and
the `op_name` of the Python code that it comes from. A fused kernel holds
instructions of several parts of the model: it counts as a whole where its last
instruction belongs, and `also` names the others.
"""

import collections
import gzip
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.hlo import (
    Instruction,
    Module,
    bytes_of,
    first,
    flops_of,
    fused,
    parse_hlo,
)

TOP = 40
OPTIMIZER = 'optimizer and metrics'
# Their time is that of the instructions in them.
_CONTAINERS = ('while', 'conditional', 'call')
DIRECTIONS = ('forward', 'recompute', 'backward', 'update')
# Parts of the model by the first pattern that is found in an op_name.
PARTS = tuple((re.compile(pattern), part) for pattern, part in (
    (r'\.logits|/logits|jvp\(\)|jvp\(jit', 'logits and loss'),
    (r'/token_embedder', 'embedding'),
    (r'/encoder_decoder_attention.*(project_key_value|/key/|/value/)',
     'decoder cross keys and values'),
    (r'/encoder_decoder_attention.*(project_|/query/|/out/)',
     'decoder cross query and out'),
    (r'/encoder_decoder_attention', 'decoder cross-attention'),
    (r'/self_attention.*(project_|/query/|/key/|/value/|/out/)',
     'decoder self projections'),
    (r'/self_attention', 'decoder self-attention'),
    (r'/attention.*_globals', 'encoder global tokens'),
    (r'/attention.*(project_query|project_key_value|/query/|/key/|/value/)',
     'encoder query, key, value'),
    (r'/attention.*(project_out|/out/)', 'encoder out'),
    (r'/attention', 'encoder attention'),
    (r'/encoder/.*/mlp', 'encoder MLP'),
    (r'/encoder/.*norm', 'encoder norms'),
    (r'/encoder/.*(_context|relpos_bias)', 'encoder biases and blocks'),
    (r'/encoder/', 'encoder rest'),
    (r'/mlp', 'decoder MLP'),  # Decoding does not say whose it is.
    (r'norm', 'decoder norms'),
    (r'/decoder/', 'decoder rest'),
    (r'jvp\(', 'rest of the model'),
))
# Kinds of kernel by the first pattern that is found in its names.
KINDS = tuple((re.compile(pattern), kind) for pattern, kind in (
    (r'longt5_\w*attention', 'attention kernels'),
    (r'cudnn|fmha|flash', 'cuDNN attention'),
    (r'memset', 'memset'),
    (r'memcpy|^copy|^transpose|copy_fusion|transpose_fusion',
     'copies and transposes'),
    (r'gemm|cublas|nvjet|cutlass|xmma|matmul|^dot', 'matrix products'),
    (r'scatter|gather|sort|dynamic.slice|dynamic.update',
     'gathers, scatters, slices'),
    (r'reduce', 'reductions'),
))


class Kernel(NamedTuple):
  """A run of a kernel; times in microseconds."""
  name: str
  instruction: str
  start: float
  duration: float


class Group(NamedTuple):
  """Runs of one kernel of all layers; numbers are of one step.

  Attributes:
    ms: all of them together.
    calls: how many.
    kind, part, direction: see KINDS, PARTS, DIRECTIONS.
    rate: of matrix products 'TFLOP/s', else 'GB/s' of what it reads and
      writes if operands are read whole.
    kernel: its name.
    shape: of its result.
    op_name: where it comes from.
    also: other parts that are fused into it.
  """
  ms: float
  calls: float
  kind: str
  part: str
  direction: str
  rate: str
  kernel: str
  shape: str
  op_name: str
  also: str


class Summary(NamedTuple):
  """Of one step, in milliseconds.

  Attributes:
    wall: from the first kernel's start to the last one's end, a step's share.
    busy: while at least one kernel ran.
    groups: the longest first.
  """
  wall: float
  busy: float
  groups: list[Group]


def record(run: Callable[[], Any], steps: int, compiled: Any, folder: str,
           name: str) -> dict[str, Any]:
  """Traces some calls of a compiled program and writes what it finds.

  Args:
    run: calls the program once, and returns something to wait for.
    steps: how many calls.
    compiled: the program.
    folder: for NAME.md, the tables; NAME.trace.json.gz; NAME.hlo.txt.gz, the
      compiled program.
    name: of the files.

  Returns:
    The numbers of a JSON line.
  """
  text = compiled.as_text()
  with gzip.open(f'{folder}/{name}.hlo.txt.gz', 'wt') as file:
    file.write(text)
  for _ in range(2):
    jax.block_until_ready(run())
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  with tempfile.TemporaryDirectory() as raw:
    jax.profiler.start_trace(raw, profiler_options=options)
    for _ in range(steps):
      last = run()
    jax.block_until_ready(last)
    jax.profiler.stop_trace()
    trace = f'{folder}/{name}.trace.json.gz'
    shutil.copy(next(Path(raw).rglob('*.trace.json.gz')), trace)
  summary = summarise(read_trace(trace), parse_hlo(text), steps)
  Path(folder, f'{name}.md').write_text(
      tables(summary, f'{name}, {steps} calls'), 'utf-8')
  return line(summary)


def prepare(folder: str) -> dict[str, str]:
  """Makes the folder; the environment in which kernels can be told apart."""
  os.makedirs(folder, exist_ok=True)
  # CUDA graphs hide which instruction a kernel is of.
  flags = os.environ.get('XLA_FLAGS', '') + ' --xla_gpu_enable_command_buffer='
  return {'XLA_FLAGS': flags.strip()}


def show_tables(folder: str, name: str) -> None:
  """Prints them to stderr, as stdout is for lines."""
  print(Path(folder, f'{name}.md').read_text('utf-8'), file=sys.stderr,
        flush=True)


def read_trace(path: str) -> list[Kernel]:
  """The kernels of a trace.json.gz: those on a GPU's streams; without a GPU,
  what the host ran of compiled programs.

  Raises:
    ValueError: there are none.
  """
  with gzip.open(path, 'rt', encoding='utf-8') as file:
    events = json.load(file)['traceEvents']
  named = {(event['name'], event['pid'], event.get('tid')):
           event['args']['name'] for event in events
           if event.get('ph') == 'M' and 'name' in event.get('args', ())}
  gpus = {pid for (kind, pid, _), name in named.items()
          if kind == 'process_name' and '/device:GPU' in name}

  def counts(event):
    if event.get('ph') != 'X' or 'dur' not in event:
      return False
    if not gpus:
      return 'hlo_op' in event.get('args', ())
    # Other lines of a GPU hold the same time once more, by module and step.
    thread = named.get(('thread_name', event['pid'], event['tid']), '')
    return event['pid'] in gpus and thread.startswith('Stream')

  kernels = [Kernel(event['name'], event.get('args', {}).get('hlo_op', ''),
                    event['ts'], event['dur'])
             for event in events if counts(event)]
  if not kernels:
    threads = sorted({name for (kind, *_), name in named.items()
                      if kind == 'thread_name'})
    raise ValueError(f'{path} holds no kernels, only {threads}.')
  return kernels


def summarise(kernels: Sequence[Kernel], module: Module, steps: int) -> Summary:
  """Groups the kernels of so many steps."""
  # A kernel without an instruction bears its instruction's name.
  by_kernel = {re.sub(r'\W', '_', name): instruction
               for name, instruction in module.instructions.items()}
  times: dict[tuple[str, ...], list[float]] = collections.defaultdict(list)
  members: dict[tuple[str, ...], tuple[Kernel, Instruction | None]] = {}
  for kernel in kernels:
    instruction = module.instructions.get(
        kernel.instruction, by_kernel.get(kernel.name))
    if instruction and instruction.opcode in _CONTAINERS:
      continue
    key = _key(kernel, instruction, module)
    times[key].append(kernel.duration)
    members.setdefault(key, (kernel, instruction))
  groups = [_group(*members[key], module, durations, steps)
            for key, durations in times.items()]
  ends = [kernel.start + kernel.duration for kernel in kernels]
  wall = max(ends) - min(kernel.start for kernel in kernels)
  return Summary(wall / 1000 / steps, _union(kernels) / 1000 / steps,
                 sorted(groups, reverse=True))


def _key(kernel, instruction, module):
  """The same for the same kernel of another layer."""
  stem = re.sub(r'[._]?\d+', '', kernel.name)
  if instruction is None:
    return stem,
  return (stem, instruction.shape, instruction.opcode,
          _without_layer(_op_name(instruction, module)))


def _without_layer(op_name):
  return re.sub(r'layers_\d+', 'layers', op_name)


def _group(kernel, instruction, module, durations, steps):
  total = sum(durations)
  if instruction is None:
    return Group(total / 1000 / steps, len(durations) / steps,
                 kind_of(kernel.name, None, module), 'not in the program', '',
                 '', kernel.name, '', '', '')
  op_name = _op_name(instruction, module)
  part = part_of(op_name)
  flops = flops_of(instruction, module)
  seconds = max(total / 1e6 / len(durations), 1e-9)  # As fine as the clock.
  rate = (f'{flops / seconds / 1e12:.0f} TFLOP/s' if flops else
          f'{bytes_of(instruction, module) / seconds / 1e9:.0f} GB/s')
  also = collections.Counter(
      part_of(inner.op_name) for inner in fused(instruction, module)
      if inner.op_name.startswith('jit('))
  also.pop(part, None)
  return Group(
      total / 1000 / steps, len(durations) / steps,
      kind_of(kernel.name, instruction, module), part, direction_of(op_name),
      rate, kernel.name, re.sub(r'\{[^}]*\}', '', instruction.shape),
      _without_layer(op_name), ', '.join(name for name, _ in
                                         also.most_common(3)))


def _op_name(instruction, module, hops=3):
  """Its own, or the most frequent one of what it fuses, or its reader's."""
  if instruction.op_name.startswith('jit('):
    return instruction.op_name
  inner = collections.Counter(
      other.op_name for other in fused(instruction, module)
      if other.op_name.startswith('jit('))
  if inner:
    return inner.most_common(1)[0][0]
  user = module.users.get(instruction.name)
  return _op_name(user, module, hops - 1) if user and hops else ''


def part_of(op_name: str) -> str:
  """The part of the model that an op_name belongs to."""
  for pattern, part in PARTS:
    if pattern.search(op_name):
      return part
  if op_name.startswith('jit(train_step)'):
    return OPTIMIZER
  return 'rest of the program' if op_name.startswith('jit(') else 'unknown'


def direction_of(op_name: str) -> str:
  """One of DIRECTIONS, or '' for what is not known."""
  if 'rematted_computation' in op_name:
    return 'recompute'
  if 'transpose(' in op_name:
    return 'backward'
  if not op_name.startswith('jit('):
    return ''
  # What is taken out of a loop has lost its 'jvp('.
  return 'update' if part_of(op_name) == OPTIMIZER else 'forward'


def kind_of(kernel: str, instruction: Instruction | None, module: Module
            ) -> str:
  """The kind of kernel; any that multiplies matrices is a matrix product."""
  names = [kernel]
  if instruction is not None:
    target = first(r'custom_call_target="([^"]*)"', instruction.rest)
    names += [instruction.opcode, target]
  for pattern, kind in KINDS:
    if any(pattern.search(name.lower()) for name in names):
      return kind
  if instruction is not None and flops_of(instruction, module):
    return 'matrix products'
  return 'other fusions'


def _union(kernels: Iterable[Kernel]) -> float:
  """The time in which at least one kernel ran."""
  busy, end = 0.0, -math.inf
  for start, stop in sorted(
      (kernel.start, kernel.start + kernel.duration) for kernel in kernels):
    busy += max(0.0, stop - max(start, end))
    end = max(end, stop)
  return busy


def total_by(groups: Iterable[Group], key: Callable[[Group], Any]
             ) -> dict[Any, float]:
  """Milliseconds by a key of the group, the largest first."""
  totals: dict[Any, float] = collections.defaultdict(float)
  for group in groups:
    totals[key(group)] += group.ms
  return dict(sorted(totals.items(), key=lambda item: -item[1]))


def line(summary: Summary) -> dict[str, Any]:
  """The numbers of a JSON line."""
  def rounded(totals):
    return {name: round(ms, 3) for name, ms in totals.items()}

  return {'wall_ms': round(summary.wall, 3), 'busy_ms': round(summary.busy, 3),
          'parts_ms': rounded(total_by(summary.groups, lambda it: it.part)),
          'kinds_ms': rounded(total_by(summary.groups, lambda it: it.kind))}


def tables(summary: Summary, title: str) -> str:
  """Three Markdown tables: parts, kinds, longest kernels."""
  groups = summary.groups
  total = sum(group.ms for group in groups)
  parts = total_by(groups, lambda it: it.part)
  cells = total_by(groups, lambda it: (it.part, it.direction))

  def part_row(part, ms):
    numbers = [cells.get((part, way), 0.0) for way in DIRECTIONS]
    return [part, *(f'{x:.2f}' if x else '' for x in numbers), f'{ms:.2f}',
            f'{ms / total:.1%}']

  directions = total_by(groups, lambda it: it.direction)
  kinds = [[kind, f'{ms:.2f}', f'{ms / total:.1%}']
           for kind, ms in total_by(groups, lambda it: it.kind).items()]
  kernels = [
      [f'{it.ms:.3f}', f'{it.calls:g}', it.kind, f'{it.part}, {it.direction}',
       it.rate, it.shape[:48], it.kernel[:48], it.op_name.rpartition('/')[2],
       it.also] for it in groups[:TOP]]
  return '\n\n'.join([
      f'# {title}',
      f'{summary.wall:.2f} ms a step, {summary.busy:.2f} with a kernel running,'
      f' {total:.2f} of kernels. Milliseconds of one step:',
      _markdown(['part', *DIRECTIONS, 'ms', ''], [
          *(part_row(*item) for item in parts.items()),
          ['all', *(f'{directions.get(way, 0.0):.2f}' for way in DIRECTIONS),
           f'{total:.2f}', '']]),
      _markdown(['kind', 'ms', ''], kinds),
      _markdown(['ms', 'calls', 'kind', 'part', 'rate', 'result', 'kernel',
                 'op', 'also'], kernels)]) + '\n'


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)

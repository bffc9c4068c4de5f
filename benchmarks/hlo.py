"""What the text of a compiled XLA program says of its instructions."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BYTES = {'pred': 1, 'bf16': 2, 'f16': 2, 's64': 8, 'u64': 8, 'f64': 8,
          's16': 2, 'u16': 2, 's8': 1, 'u8': 1}
_ARRAY = re.compile(r'\b(pred|bf16|[fsu]\d+\w*)\[([\d,]*)\]')
_INSTRUCTION = re.compile(
    r'^\s+(?:ROOT )?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')


class Instruction(NamedTuple):
  """Of the compiled program.

  Attributes:
    name: without '%'.
    shape: of its result, as text.
    opcode: 'fusion', 'dot', 'custom-call', ...
    rest: operands and attributes.
    op_name: where it comes from, or ''.
    calls: the computation that it fuses, or ''.
  """
  name: str
  shape: str
  opcode: str
  rest: str
  op_name: str
  calls: str


class Module(NamedTuple):
  """A compiled program.

  Attributes:
    instructions: by name.
    computations: those of each, in order.
    users: by name, the last instruction that reads it.
  """
  instructions: dict[str, Instruction]
  computations: dict[str, list[Instruction]]
  users: dict[str, Instruction]


def parse_hlo(text: str) -> Module:
  """Reads what `compiled.as_text()` gives."""
  computations: dict[str, list[Instruction]] = {}
  current: list[Instruction] = []
  for line in text.replace('%', '').splitlines():
    if line.endswith('{') and not line.startswith(' '):
      name = line.removeprefix('ENTRY ').split()[0]
      current = computations.setdefault(name, [])
      continue
    match = _INSTRUCTION.match(line)
    if match:
      name, shape, opcode, rest = match.groups()
      current.append(Instruction(
          name, shape, opcode, rest, first(r'op_name="([^"]*)"', rest),
          first(r'calls=([\w.\-]+)', rest)))
  module = Module({instruction.name: instruction
                   for body in computations.values() for instruction in body},
                  computations, {})
  for instruction in module.instructions.values():
    for operand in _operands(instruction, module):
      module.users[operand.name] = instruction
  return module


def fused(instruction: Instruction, module: Module) -> Iterator[Instruction]:
  """All instructions that it fuses."""
  for inner in module.computations.get(instruction.calls, ()):
    yield inner
    yield from fused(inner, module)


def _arrays(shape: str) -> list[tuple[int, list[int]]]:
  """(bytes of an element, dimensions) of each array of a result's shape."""
  return [(_BYTES.get(dtype, 1 if dtype.startswith('f8') else 4),
           [int(size) for size in sizes.split(',') if size])
          for dtype, sizes in _ARRAY.findall(shape)]


def _operands(instruction, module):
  names = instruction.rest.split(')', 1)[0]
  return [module.instructions[name] for name in re.findall(r'[\w.\-]+', names)
          if name in module.instructions]


def bytes_of(instruction: Instruction, module: Module) -> int:
  """What the kernel reads and writes, if it reads all of its operands."""
  return sum(width * math.prod(sizes) for part in (
      instruction, *_operands(instruction, module))
             for width, sizes in _arrays(part.shape))


def flops_of(instruction: Instruction, module: Module) -> int:
  """Operations of its matrix products, fused ones too."""
  total = 0
  for inner in (instruction, *fused(instruction, module)):
    contracting = (
        first(r'lhs_contracting_dims=\{([\d,]*)\}', inner.rest)
        or first(r'"lhs_contracting_dimensions":\[([\d",]*)\]', inner.rest))
    operands = _operands(inner, module)
    if contracting and operands:
      left = _arrays(operands[0].shape)[0][1]
      shared = [left[int(i)] for i in contracting.replace('"', '').split(',')]
      total += 2 * math.prod(_arrays(inner.shape)[0][1]) * math.prod(shared)
  return total


def first(pattern: str, text: str) -> str:
  """The first group of the first match, or ''."""
  match = re.search(pattern, text)
  return match.group(1) if match else ''

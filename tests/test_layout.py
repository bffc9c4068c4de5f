"""The house rules: which room imports which, and how large things may be.

Each rule is a function from sources to complaints. It is run on the repository,
and on a small bad example that it must complain about.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# What a room may import from the package, besides itself. A room is a folder of
# longt5_flax; `package` is longt5_flax/__init__.py, `config` is config.py, and
# every other file at the top, train.py and eval.py are `commands`.
ROOMS = {
    'config': set(),
    'model': {'config'},
    'generation': set(),
    'evaluation': set(),
    'data': set(),
    'training': {'config', 'model', 'interop'},
    'interop': {'config'},
    'api': {'config', 'model', 'generation', 'interop'},
    'package': {'config', 'model', 'api', 'data'},
    'commands': {'config', 'model', 'generation', 'evaluation', 'data',
                 'training', 'interop', 'api', 'package', 'commands'},
}
SCRIPTS = ('train.py', 'eval.py')
TENSORFLOW = {'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio'}
TENSORFLOW_HOMES = ('longt5_flax/data/tasks.py',
                    'longt5_flax/data/paper_tasks.py')
FORBIDDEN_NAMES = {'utils.py', 'common.py', 'helpers.py'}
MAX_FILE, MAX_FUNCTION, MAX_STEP, MAX_MAIN, MAX_ARGUMENTS = 400, 60, 40, 200, 8
# Signatures that others fixed, each with who.
LONG_SIGNATURES = {
    # The options of PEGASUS's gap-sentence selection, one a keyword.
    ('longt5_flax/data/gap_sentences.py', 'select_sentences'),
    # Hugging Face's Flax models.
    ('longt5_flax/api/models.py', '__call__'),
    ('longt5_flax/api/models.py', 'decode'),
}

Sources = dict[str, str]  # path in the repository: source text
Function = ast.FunctionDef | ast.AsyncFunctionDef


def read_sources(root: Path) -> Sources:
  paths = sorted(root.glob('longt5_flax/**/*.py'))
  paths += [root / name for name in SCRIPTS if (root / name).exists()]
  return {path.relative_to(root).as_posix(): path.read_text('utf-8')
          for path in paths}


def module_name(path: str) -> str:
  return path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')


def room_of(path: str) -> str | None:
  """The row of ROOMS that a file belongs to; None if there is none."""
  parts = path.split('/')
  if path in SCRIPTS:
    return 'commands'
  if path == 'longt5_flax/__init__.py':
    return 'package'
  if len(parts) > 2:
    named = parts[1] in ROOMS.keys() - {'config', 'package', 'commands'}
    return parts[1] if named else None
  name = parts[1].removesuffix('.py')
  return 'config' if name == 'config' else 'commands'


def imported_names(path: str, text: str) -> Iterator[tuple[int, str]]:
  """(line, dotted name) of every import, wherever in the file it stands."""
  package = module_name(path).split('.')
  if not path.endswith('/__init__.py'):
    package = package[:-1]
  for node in ast.walk(ast.parse(text, path)):
    if isinstance(node, ast.Import):
      for alias in node.names:
        yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
      parts = package[:len(package) - node.level + 1] if node.level else []
      parts = parts + (node.module.split('.') if node.module else [])
      for alias in node.names:
        yield node.lineno, '.'.join([*parts, alias.name])


def imported_modules(path: str, sources: Sources) -> dict[str, int]:
  """Files of `sources` that a file imports, with the line.

  `from longt5_flax.data import loader` is an import of loader.py if there is
  one, else of the name `loader` in data/__init__.py.
  """
  files = {module_name(other): other for other in sources}
  found: dict[str, int] = {}
  for line, name in imported_names(path, sources[path]):
    while name and name not in files:
      name = name.rpartition('.')[0]
    if name and files[name] != path:
      found.setdefault(files[name], line)
  return found


def functions(text: str) -> Iterator[Function]:
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
      yield node


def check_rows(sources: Sources) -> list[str]:
  return [f'{path}: no row of ROOMS is for this file'
          for path in sources if room_of(path) is None]


def check_edges(sources: Sources) -> list[str]:
  complaints = []
  for path in sources:
    room = room_of(path)
    for other, line in imported_modules(path, sources).items():
      target = room_of(other)
      if room and target != room and target not in ROOMS[room]:
        complaints.append(f'{path}:{line}: {room} imports {target} ({other})')
  return complaints


def check_cycles(sources: Sources) -> list[str]:
  edges = {path: imported_modules(path, sources) for path in sources}
  complaints, done = [], set()

  def visit(path: str, trail: list[str]) -> None:
    if path in trail:
      cycle = [*trail[trail.index(path):], path]
      complaints.append('cycle: ' + ' -> '.join(cycle))
    elif path not in done:
      for other in edges[path]:
        visit(other, [*trail, path])
      done.add(path)

  for path in sources:
    visit(path, [])
  return complaints


def check_tensorflow(sources: Sources) -> list[str]:
  return [f'{path}:{line}: imports {name}; only {TENSORFLOW_HOMES} may'
          for path, text in sources.items() if path not in TENSORFLOW_HOMES
          for line, name in imported_names(path, text)
          if name.split('.')[0] in TENSORFLOW]


def check_file_lengths(sources: Sources) -> list[str]:
  lengths = {path: len(text.splitlines()) for path, text in sources.items()
             if 'kernels' not in path.split('/')}
  return [f'{path}: {lines} lines, at most {MAX_FILE}'
          for path, lines in lengths.items() if lines > MAX_FILE]


def check_function_lengths(sources: Sources) -> list[str]:
  complaints = []
  for path, text in sources.items():
    for node in functions(text):
      limit = MAX_STEP if node.name.endswith('train_step') else MAX_FUNCTION
      if (path, node.name) == ('train.py', 'main'):
        limit = MAX_MAIN
      lines = (node.end_lineno or node.lineno) - node.lineno + 1
      if lines > limit:
        complaints.append(f'{path}:{node.lineno}: {node.name} has {lines} '
                          f'lines, at most {limit}')
  return complaints


def count_arguments(node: Function) -> int:
  given = node.args.posonlyargs + node.args.args
  count = len(given) + len(node.args.kwonlyargs)
  count += (node.args.vararg is not None) + (node.args.kwarg is not None)
  return count - bool(given and given[0].arg in ('self', 'cls'))


def check_arguments(sources: Sources) -> list[str]:
  return [f'{path}:{node.lineno}: {node.name} has {count_arguments(node)} '
          f'arguments, at most {MAX_ARGUMENTS}'
          for path, text in sources.items() for node in functions(text)
          if count_arguments(node) > MAX_ARGUMENTS
          and (path, node.name) not in LONG_SIGNATURES]


def check_file_names(sources: Sources) -> list[str]:
  return [f'{path}: a name that says nothing' for path in sources
          if path.split('/')[-1] in FORBIDDEN_NAMES]


def function_of(lines: int, name: str) -> str:
  return f'def {name}():\n' + '  pass\n' * (lines - 1)


# For each rule: sources that break it, what it says; sources that just do not.
EXAMPLES: list[tuple[Callable[[Sources], list[str]], Sources, str, Sources]] = [
    (check_rows,
     {'longt5_flax/attic/old.py': ''}, 'no row of ROOMS',
     {'longt5_flax/model/deep/new.py': '', 'longt5_flax/convert.py': ''}),
    (check_edges,
     {'longt5_flax/model/a.py': 'def f():\n  import longt5_flax.data.b',
      'longt5_flax/data/b.py': ''},
     'longt5_flax/model/a.py:2: model imports data',
     {'longt5_flax/training/a.py': 'from longt5_flax.model import b',
      'longt5_flax/model/__init__.py': '',
      'longt5_flax/model/b.py': 'from longt5_flax.config import C\nimport jax',
      'longt5_flax/config.py': 'C = 1'}),
    (check_edges,
     {'longt5_flax/data/a.py': 'from ..training import b',
      'longt5_flax/training/b.py': ''},
     'data imports training (longt5_flax/training/b.py)',
     {'longt5_flax/data/a.py': 'from . import b\nfrom .b import c',
      'longt5_flax/data/b.py': 'c = 1'}),
    (check_edges,
     {'longt5_flax/interop/a.py': 'from longt5_flax import LongT5Config',
      'longt5_flax/__init__.py': ''}, 'interop imports package',
     {'train.py': 'import longt5_flax', 'longt5_flax/__init__.py': ''}),
    (check_edges,
     {'longt5_flax/api/a.py': 'import train', 'train.py': ''},
     'api imports commands (train.py)',
     {'eval.py': 'import train', 'train.py': ''}),
    (check_cycles,
     {'longt5_flax/data/a.py': 'from longt5_flax.data import b',
      'longt5_flax/data/b.py': 'from longt5_flax.data.c import x',
      'longt5_flax/data/c.py': 'import longt5_flax.data.a'},
     'data/a.py -> longt5_flax/data/b.py -> longt5_flax/data/c.py -> ',
     {'longt5_flax/data/a.py': 'from longt5_flax.data import b, c',
      'longt5_flax/data/b.py': 'from longt5_flax.data.c import x',
      'longt5_flax/data/c.py': ''}),
    (check_tensorflow,
     {'longt5_flax/data/vocabulary.py': 'def f():\n  from seqio import x'},
     'longt5_flax/data/vocabulary.py:2: imports seqio.x',
     {'longt5_flax/data/tasks.py': 'import seqio\nimport tensorflow.io'}),
    (check_file_lengths,
     {'longt5_flax/model/a.py': '\n' * 401}, '401 lines, at most 400',
     {'longt5_flax/model/a.py': '\n' * 400,
      'longt5_flax/model/kernels/b.py': '\n' * 401}),
    (check_function_lengths,
     {'longt5_flax/model/a.py': function_of(61, 'f')}, 'f has 61 lines',
     {'longt5_flax/model/a.py': function_of(60, 'f')}),
    (check_function_lengths,
     {'a.py': function_of(41, 'make_train_step')}, 'at most 40',
     {'a.py': function_of(40, 'make_train_step')}),
    (check_function_lengths,
     {'train.py': function_of(201, 'main')}, 'main has 201 lines, at most 200',
     {'train.py': function_of(200, 'main')}),
    (check_function_lengths,
     {'eval.py': function_of(61, 'main')}, 'main has 61 lines, at most 60',
     {'eval.py': function_of(60, 'main')}),
    (check_arguments,
     {'a.py': 'def f(a, b, /, c, d, *e, f, g, h, **i): pass'},
     'f has 9 arguments, at most 8',
     {'a.py': 'class C:\n  def f(self, a, b, c, d, *, e, f, g, h): pass'}),
    (check_file_names,
     {'longt5_flax/model/utils.py': ''}, 'a name that says nothing',
     {'longt5_flax/model/layers.py': ''}),
]
RULES = list(dict.fromkeys(rule for rule, *_ in EXAMPLES))


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_repository_keeps_rule(rule):
  sources = read_sources(REPOSITORY)
  assert 'longt5_flax/model/attention.py' in sources
  complaints = rule(sources)
  assert not complaints, '\n'.join(complaints)


@pytest.mark.parametrize(
    'rule, bad, complaint, good', EXAMPLES,
    ids=[f'{rule.__name__}-{i}' for i, (rule, *_) in enumerate(EXAMPLES)])
def test_rule_can_fail(rule, bad, complaint, good):
  assert complaint in '\n'.join(rule(bad))
  assert rule(good) == []


def test_every_checker_has_an_example():
  checkers = {name for name in globals() if name.startswith('check_')}
  assert checkers == {rule.__name__ for rule in RULES}


def test_rooms_allow_no_cycle():
  """The table itself points one way, commands aside."""
  sources = {f'longt5_flax/{room}/__init__.py': '\n'.join(
      f'import longt5_flax.{other}' for other in allowed)
             for room, allowed in ROOMS.items() if room != 'commands'}
  assert check_cycles(sources) == []

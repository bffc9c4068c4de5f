"""Every file in configs/ can be built, and every command that the repository
shows can be run as it stands."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from absl import flags

import eval as eval_command
import runs
import tiny_runs
from configs import finetune, small_corpus
from longt5_flax import compare, convert, lead, prepare, report, summarize
from longt5_flax.command_line import read_config
from longt5_flax.config import ConfigError, LongT5Config
from longt5_flax.data.task_formats import CORPORA
from longt5_flax.evaluation.metrics import METRICS, SCROLLS
from longt5_flax.sweep_plan import read_plan
from longt5_flax.training import partitioning, run_config
from longt5_flax.training.optimizer import make_optimizer, num_parameters
from longt5_flax.training.schedules import make_schedule
from longt5_flax.training.train_step import init_state, make_train_step

# Of commands that take no config.
PARSERS = {f'longt5_flax.{command}': module.make_parser
           for command, module in {
               'compare': compare, 'convert': convert, 'lead': lead,
               'report': report, 'summarize': summarize}.items()}
CONFIGS = sorted(path.stem for path in (runs.ROOT / 'configs').glob('*.py'))
BATCH = ('encoder_input_tokens', 'encoder_segment_ids', 'encoder_positions',
         'decoder_input_tokens', 'decoder_target_tokens',
         'decoder_loss_weights', 'decoder_segment_ids', 'decoder_positions')
# Files whose commands are tried; in Python files their docstring's.
SHOWN = [path.relative_to(runs.ROOT).as_posix() for pattern in (
    'README.md', 'docs/*.md', 'corpus/*.md', '*.py', 'configs/*.py',
    'configs/sweeps/*.py', 'corpus/*.py', 'benchmarks/*.py', 'longt5_flax/*.py')
         for path in sorted(runs.ROOT.glob(pattern))]


def load(name):
  """The config of a file's stem, or of a file with an argument."""
  name = name if ':' in name else f'{name}.py'
  config, rest = tiny_runs.parse(f'--config={runs.ROOT}/configs/{name}')
  assert not rest
  return config


def closed_form(config):
  """The parameters of a LongT5, counted from its sizes."""
  joined = config.num_heads * config.d_kv
  attention = 4 * config.d_model * joined
  mlp = (3 if config.gated else 2) * config.d_model * config.d_ff
  has_globals = config.encoder_attention_type == 'transient-global'
  encoder = attention + mlp + (3 if has_globals else 2) * config.d_model
  decoder = 2 * attention + mlp + 3 * config.d_model
  bias = config.relative_attention_num_buckets * config.num_heads
  embeddings = (1 if config.tie_word_embeddings else 2) * (
      config.vocab_size * config.d_model)
  return (config.num_layers * encoder + config.num_decoder_layers * decoder
          + (3 if has_globals else 2) * bias + 2 * config.d_model + embeddings)


def built(config):
  """Model, optimizer, schedule, and the abstract state."""
  model = run_config.make_model(config)
  schedule = make_schedule(**config.schedule, steps=config.steps)
  optimizer = make_optimizer(config.optimizer, schedule)
  state = jax.eval_shape(lambda: init_state(model, optimizer, config.seed))
  return model, optimizer, schedule, state


@pytest.fixture
def abstract_mesh():
  """A mesh of more devices than there are, which partitioning's annotations
  do not name: they are not checked meanwhile."""
  jaxtyping.config.update('jaxtyping_disable', True)
  yield lambda sizes: jax.sharding.AbstractMesh(
      tuple(sizes.values()), tuple(sizes))
  jaxtyping.config.update('jaxtyping_disable', False)


@pytest.mark.parametrize('name', CONFIGS)
def test_config_can_be_built(name, abstract_mesh):
  config = load(name)
  run_config.check_config(config)
  model, optimizer, schedule, state = built(config)
  assert num_parameters(state.params) == closed_form(model.config)

  sizes = dict(config.mesh)
  assert list(sizes.values()).count(-1) == 1
  mesh = abstract_mesh(
      {axis: 2 if size == -1 else size for axis, size in sizes.items()})
  run_config.check_batch(config, partitioning.rows_divisor(mesh))
  shardings = partitioning.state_shardings(state, state.params, mesh)
  assert jax.tree.structure(shardings) == jax.tree.structure(state)

  rows = config.data.batch_size
  batch = {key: jax.ShapeDtypeStruct((rows, (
      config.data.inputs_length if key.startswith('encoder') else
      config.data.targets_length)), jnp.int32) for key in BATCH}
  after, metrics = jax.eval_shape(
      make_train_step(model, optimizer, schedule, config), state, batch)
  assert jax.tree.map(_kind, after) == jax.tree.map(_kind, state)
  assert {leaf.shape for leaf in jax.tree.leaves(metrics)} == {()}


def _kind(leaf):
  return leaf.shape, leaf.dtype


@pytest.mark.parametrize('name, millions', [
    ('tglobal_base', 248), ('tglobal_large', 783), ('tglobal_xl', 2850),
    ('local_base', 248), ('local_large', 783)])
def test_released_sizes(name, millions):
  """The paper's 250M, 780M and 3B; see `closed_form` for the exact count."""
  config = run_config.model_config(load(name).model)
  assert round(closed_form(config) / 1e6) == millions
  assert config.vocab_size == 32128


@pytest.mark.parametrize('name', sorted(
    set(CONFIGS) - {'c4', 'finetune', 'quickstart', 'quickstart_finetune',
                    'small_corpus'}))
def test_published_settings(name):
  config = load(name)
  if name != 'base':
    family, size = name.split('_')
    assert config.model.preset == f'{family}-{size}'
  assert run_config.model_config(config.model) == LongT5Config.preset(
      config.model.preset, dropout_rate=0.0)
  assert (config.data.inputs_length, config.data.targets_length,
          config.data.batch_size, config.steps) == (4096, 910, 128, 10**6)
  assert (config.schedule.name, config.schedule.learning_rate,
          config.schedule.warmup_steps) == ('rsqrt', 1.0, 10_000)
  assert (config.optimizer.name, config.optimizer.decay_rate,
          config.optimizer.clipping_threshold) == ('adafactor', 0.8, 1.0)
  assert (config.loss.z_loss, config.loss.label_smoothing) == (1e-4, 0.0)
  assert config.data.long_documents == 'cut'
  assert (config.gap_sentences.strategy,
          config.gap_sentences.ratio) == ('dynamic_rouge', 0.2)


@pytest.mark.parametrize('task', finetune.TASKS)
def test_published_fine_tuning(task):
  config = load(f'finetune.py:{task}')
  run_config.check_config(config)
  assert config.data.task == f'longt5_{task}'
  assert task in CORPORA
  assert config.eval.metric in (METRICS if task not in SCROLLS else {task})
  assert (config.model.dropout_rate, config.data.batch_size) == (0.1, 128)
  assert (config.schedule.name, config.schedule.learning_rate,
          config.schedule.warmup_steps) == ('constant', 1e-3, 0)
  assert config.optimizer.name == 'adafactor'
  assert config.data.prefix == ''
  assert config.data.packing  # As in T5X's finetune.gin.
  lengths = config.data.inputs_length, config.data.targets_length
  expected = {'natural_questions': (12288, 128), 'trivia_qa': (16384, 128)}
  if task in expected:
    assert lengths == expected[task]
  elif task not in SCROLLS:
    assert lengths == (4096, 512)
  # Its row of the docstring's table.
  assert re.search(rf'^ +{task} +\d\d\.\d', finetune.__doc__, re.MULTILINE)


@pytest.mark.parametrize('length', small_corpus.RUNS)
def test_small_corpus(length):
  config = load(f'small_corpus.py:{length}')
  run_config.check_config(config)
  assert config.data.inputs_length == int(length)
  assert run_config.model_config(config.model).tie_word_embeddings


def test_small_corpus_refuses_other_lengths():
  with pytest.raises(ConfigError, match=re.escape(
      "inputs_length='256' must be one of 128, 512, 4096.")):
    small_corpus.get_config('256')


def test_fine_tuning_has_all_tasks():
  assert finetune.TASKS.keys() == CORPORA.keys()


@pytest.mark.parametrize('name', CONFIGS)
def test_config_says_what_it_is_for(name):
  text = ast.get_docstring(ast.parse(
      (runs.ROOT / 'configs' / f'{name}.py').read_text('utf-8')))
  for word in ('Reproduces:', 'Command:', 'Hardware:'):
    assert word in text, word
  assert f'--config=configs/{name}.py' in text


def commands(text):
  """The `python ...` commands of a text, each as a list of words.

  A command goes on where a line ends in a backslash and where the next one
  begins with an option; it ends before a backtick, a quote that it did not
  open, or a comment.
  """
  text = re.sub(r'\\\n\s*', ' ', text)
  text = re.sub(r'\n[ \t]+(?=--\w)', ' ', text)
  # A file or module must follow: "python -c ..." is not for this test.
  pattern = r'\bpython3? +(?=[\w./]+\.py\b|-m +\w)[^\n`"]*'
  for match in re.finditer(pattern, text):
    yield shlex.split(match.group(), comments=True)[1:]


def problem(words):
  """Why a command cannot be run; None if it can."""
  if words[0] == '-m':
    if importlib.util.find_spec(words[1]) is None:
      return f'no module {words[1]}'
    if words[1] == 'longt5_flax.sweep':
      return sweep_problem(*words[2:])
    if words[1] in PARSERS:
      return parse_problem(PARSERS[words[1]]().parse_args, words[2:])
    if words[1] == 'longt5_flax.prepare':
      parse = prepare.make_parser().parse_known_args
      return parse_problem(parse, words[2:]) or config_problem([
          word for word in words[2:] if word.startswith('--config')])
    words = words[2:]
  else:
    if not (runs.ROOT / words[0]).is_file():
      return f'no file {words[0]}'
    script = words.pop(0)
    if script == 'eval.py':
      return eval_problem(words)
    if script != 'train.py':
      return None
    if not any(word.startswith('--config=') for word in words):
      return '--config is missing'
  return config_problem(words)


def eval_problem(words):
  if not words:  # The command's name, in a sentence.
    return None
  options, overrides = eval_command.make_parser().parse_known_args(words)
  try:
    config = read_config(options.config or 'configs/base.py', overrides)
    run_config.check_config(config)
  except ConfigError as error:
    return str(error)
  return None if options.workdir or options.checkpoint else 'no --workdir'


def config_problem(words):
  if not any(word.startswith('--config') for word in words):
    return None
  try:
    config, rest = tiny_runs.parse(*words)
    run_config.check_config(config)
  except (flags.Error, OSError, KeyError, AttributeError, TypeError,
          ValueError) as error:
    return f'{type(error).__name__}: {error}'
  unknown = [word for word in rest if not word.startswith('--')
             or word.lstrip('-').split('=')[0] not in flags.FLAGS]
  return f'unknown {unknown}' if unknown else None


def parse_problem(parse, arguments):
  if not arguments:  # The command's name, in a sentence.
    return None
  try:
    parse(arguments)
  except SystemExit:
    return 'wrong arguments'
  return None


def sweep_problem(path, *arguments):
  known = ('--workdir=', '--list')
  try:
    read_plan(path, [argument for argument in arguments
                     if not argument.startswith(known)])
  except ConfigError as error:
    return str(error)
  return None


@pytest.fixture
def in_repository(monkeypatch):
  """Commands are shown for there."""
  monkeypatch.chdir(runs.ROOT)


@pytest.mark.usefixtures('in_repository')
@pytest.mark.parametrize('path', SHOWN)
def test_shown_commands_are_right(path):
  text = Path(path).read_text('utf-8')
  if path.endswith('.py'):
    text = ast.get_docstring(ast.parse(text)) or ''
  problems = {' '.join(words): problem(words) for words in commands(text)}
  assert {words: reason for words, reason in problems.items() if reason} == {}


def test_there_are_commands_to_try():
  readme = list(commands((runs.ROOT / 'README.md').read_text('utf-8')))
  assert ['train.py', '--config=configs/quickstart.py'] in readme
  assert len([words for words in readme if words[0] == 'train.py']) >= 3


@pytest.mark.usefixtures('in_repository')
@pytest.mark.parametrize('command, reason', [
    ('python train.py --config=configs/tglobal_bse.py', 'tglobal_bse.py'),
    ('python train.py --config=configs/base.py --config.modle.d_ff=1', 'modle'),
    ('python train.py --config=configs/base.py \\\n  --config.steps=many',
     "'many'"),
    ('python train.py --config=configs/base.py\n  --config.steps=0',
     'steps=0 must be at least 1.'),
    ('python train.py --config=configs/base.py --workdri=x', '--workdri=x'),
    ('python trian.py', 'no file trian.py'),
    ('python -m longt5_flax.summarise x', 'no module longt5_flax.summarise'),
    ('python train.py', '--config is missing'),
    ('python eval.py --workdir=x --config.eval.beams=4', "'beams'"),
    ('python eval.py --workdri=x', 'workdri'),
    ('python eval.py --config=configs/base.py', 'no --workdir'),
    ('python -m longt5_flax.convert --from hf:x', 'wrong arguments'),
    ('python -m longt5_flax.summarize --checkpoint=hf:x --beams=2',
     'wrong arguments'),
    ('python -m longt5_flax.prepare --config=configs/base.py',
     'wrong arguments'),
    ('python -m longt5_flax.prepare --config=configs/base.py --output=x '
     '--config.data.pth=y', 'pth'),
    ('python -m longt5_flax.sweep configs/sweeps/attention.py',
     "no sweep file 'configs/sweeps/attention.py'"),
])
def test_wrong_commands_are_found(command, reason):
  words, = commands(f'Do this: `{command}` and\n  go on.')
  assert reason in problem(words)


@pytest.mark.usefixtures('in_repository')
@pytest.mark.parametrize('command', [
    'python train.py --config=configs/base.py --workdir=/tmp/x  # a comment',
    "srun python train.py --config=configs/full_base.py \\\n"
    "  --config.data.path='a-*.jsonl' --config.model.d_ff=96",
    '.venv/bin/python -m pytest -q tests',
])
def test_right_commands_are_not(command):
  words, = commands(command)
  assert problem(words) is None

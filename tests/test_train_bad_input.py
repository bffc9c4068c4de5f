"""Mistakes of a user: one line that names the mistake, an exit code, no
traceback, and the work folder as it was."""

import gzip
import re
import sys

import pytest

import runs
import tiny_runs
import train
from longt5_flax.config import PRESETS, ConfigError
from longt5_flax.data.gap_sentences import STRATEGIES
from longt5_flax.data.sources import DataError

QUICKSTART = '--config=configs/quickstart.py'
# Arguments after `train.py`, and what must match the one line. {} is the work
# folder.
COMMANDS = {
    'unknown key': (
        [QUICKSTART, '--config.modle.x=1', '--workdir={}'],
        'error: no key \'modle\'. Did you mean "model" instead of "modle"?'),
    'unknown key in a section': (
        [QUICKSTART, '--config.data.batchsize=1', '--workdir={}'],
        'error: no key \'batchsize\'. Did you mean "batch_size" instead of '
        '"batchsize"?'),
    'wrong type': (
        [QUICKSTART, '--config.data.batch_size=many', '--workdir={}'],
        'error: flag --config.data.batch_size=many: invalid literal for int() '
        "with base 10: 'many'"),
    'no config': (['--workdir={}'], 'error: --config=FILE is missing'),
    'missing config': (
        ['--config=configs/bse.py', '--workdir={}'],
        "error: [Errno 2] No such file or directory: 'configs/bse.py'"),
    # The two kinds of mistake that main finds.
    'missing data': (
        [QUICKSTART, '--config.data.path=no.jsonl', '--workdir={}'],
        "error: no file 'no.jsonl'"),
    'a folder in a file': (
        [QUICKSTART, '--workdir=README.md/run'],
        f'error: Not a directory: {runs.ROOT}/README.md/run'),
    'impossible heads': (
        [QUICKSTART, '--config.model.d_kv=0', '--workdir={}'],
        'error: d_kv=0 must be at least 1.'),
}


def key_of(value):
  """A short name for a case: the first key that it overrides."""
  return next(iter(value)) if isinstance(value, dict) else ''


@pytest.fixture(scope='module')
def answers(tmp_path_factory):
  """name -> (work folder, exit code, output) of COMMANDS, side by side."""
  folder = tmp_path_factory.mktemp('commands')
  started = {}
  for name, (arguments, _) in COMMANDS.items():
    workdir = folder / name.replace(' ', '_')
    started[name] = workdir, runs.start(
        [sys.executable, 'train.py',
         *(argument.format(workdir) for argument in arguments)])
  return {name: (workdir, process.communicate(timeout=240)[0],
                 process.returncode)
          for name, (workdir, process) in started.items()}


@pytest.mark.parametrize('name', COMMANDS)
def test_command_answers_with_one_line(name, answers):
  workdir, output, code = answers[name]
  assert output == COMMANDS[name][1] + '\n'
  assert code == 2
  assert not workdir.exists()


def refuses(kind, message, workdir, overrides):
  """main raises what the command turns into its line, and writes nothing."""
  with pytest.raises((ConfigError, DataError)) as caught:
    train.main(tiny_runs.tiny(overrides), str(workdir))
  assert str(caught.value) == message
  assert '\n' not in message
  assert caught.type is kind
  assert not workdir.exists()


def one_of(*names):
  return f'must be one of {names}'


@pytest.mark.parametrize('overrides, message', [
    # Nothing to run.
    ({'steps': 0}, 'steps=0 must be at least 1.'),
    ({'log_every_steps': 0}, 'log_every_steps=0 must be at least 1.'),
    ({'data.inputs_length': 0}, 'data.inputs_length=0 must be at least 1.'),
    ({'data.targets_length': 0}, 'data.targets_length=0 must be at least 1.'),
    ({'data.batch_size': 0}, 'data.batch_size=0 must be at least 1.'),
    ({'optimizer.microbatches': 0},
     'optimizer.microbatches=0 must be at least 1.'),
    ({'checkpoint.keep': 0}, 'checkpoint.keep=0 must be at least 1.'),
    ({'data.workers': -1}, 'data.workers=-1 must be at least 0.'),
    ({'loss.chunk_mib': 'inf'}, 'loss.chunk_mib=inf must be finite.'),
    ({'data.path': ''},
     'data.path is empty: it must name the files to train on.'),
    ({'data.vocabulary': ''},
     'data.vocabulary is empty: it must name a SentencePiece model.'),
    # No such model.
    ({'model.eos_token_id': 2}, 'data.vocabulary has eos_id=1, which must '
     'equal model.eos_token_id=2.'),
    ({'model.d_kv': 0}, 'd_kv=0 must be at least 1.'),
    ({'model.num_heads': 0}, 'num_heads=0 must be at least 1.'),
    ({'model.local_radius': 0}, 'local_radius=0 must be at least 1.'),
    ({'model.preset': 'tglobal-huge'},
     f"preset='tglobal-huge' must be one of {', '.join(PRESETS)}."),
    ({'model.encoder_attention_type': 'global'},
     "encoder_attention_type='global' "
     + one_of('local', 'transient-global', 'full') + '.'),
    # The vocabulary has 4000 pieces.
    ({'data.extra_ids': 100},
     'data.vocabulary has 4100 ids with its sentinels, more than '
     'model.vocab_size=4096: raise that, or lower data.extra_ids.'),
    # Sizes that do not fit each other.
    ({'mesh.fsdp': 16, 'mesh.data': 1},
     "mesh={'data': 1, 'fsdp': 16, 'sequence': 1, 'tensor': 1} needs 16 "
     'devices; there are 8.'),
    ({'mesh.fsdp': 3},
     "mesh={'data': -1, 'fsdp': 3, 'sequence': 1, 'tensor': 1} needs a "
     'multiple of 3 devices; there are 8.'),
    ({'mesh.fsdp': -1},
     "mesh={'data': -1, 'fsdp': -1, 'sequence': 1, 'tensor': 1} may have only "
     'one axis of -1.'),
    ({'mesh.tensor': 0}, 'mesh.tensor=0 must be at least 1, or -1.'),
    ({'data.batch_size': 12},
     'data.batch_size=12 must be a multiple of mesh.data * mesh.fsdp = 8 '
     'times optimizer.microbatches=1.'),
    ({'data.batch_size': 24, 'optimizer.microbatches': 2, 'mesh.fsdp': 2},
     'data.batch_size=24 must be a multiple of mesh.data * mesh.fsdp = 8 '
     'times optimizer.microbatches=2.'),
    # No such choice.
    ({'optimizer.name': 'sgd'},
     "optimizer.name='sgd' " + one_of('adafactor', 'adamw') + '.'),
    ({'schedule.name': 'step'}, "schedule.name='step' "
     + one_of('rsqrt', 'constant', 'linear', 'cosine') + '.'),
    ({'precision.dtype': 'int8'}, "precision.dtype='int8' "
     + one_of('float32', 'bfloat16', 'float16') + '.'),
    ({'precision.remat': 'all'},
     "precision.remat='all' "
     + one_of('none', 'dots', 'layer', 'offload') + '.'),
    ({'loss.normalization': 'mean'},
     "loss.normalization='mean' " + one_of('tokens', 'sum') + '.'),
    ({'gap_sentences.strategy': 'best'},
     "gap_sentences.strategy='best' " + one_of(*STRATEGIES) + '.'),
    ({'init_from': 'model.ckpt'},
     "init_from='model.ckpt' must be one of hf:DIR_OR_FILE, t5x:DIR_OR_URL, "
     't5:DIR_OR_URL, orbax:DIR, run:WORKDIR, safetensors:FILE.'),
    # Out of range.
    ({'gap_sentences.ratio': 0.0},
     'gap_sentences.ratio=0.0 must be in (0, 1].'),
    ({'gap_sentences.probabilities': (0.5, 0.1)},
     'gap_sentences.probabilities=(0.5, 0.1) must be four numbers of 0 or more '
     'that sum to exactly 1 in float32.'),
    ({'loss.label_smoothing': 1.0},
     'loss.label_smoothing=1.0 must be in [0, 1).'),
    ({'loss.z_loss': 'nan'}, 'loss.z_loss=nan must be at least 0.'),
    ({'loss.chunk_mib': -1.0}, 'loss.chunk_mib=-1.0 must be at least 0.'),
    ({'optimizer.b2': 1.5}, 'optimizer.b2=1.5 must be in [0, 1).'),
    ({'optimizer.clipping_threshold': 0.0},
     'optimizer.clipping_threshold=0.0 must be > 0.'),
    ({'schedule.learning_rate': 'nan'},
     'schedule.learning_rate=nan must be > 0 and finite.'),
    ({'schedule.name': 'linear', 'schedule.warmup_steps': 3},
     'schedule.warmup_steps=3 must be less than steps=3 for '
     "schedule.name='linear'."),
], ids=key_of)
def test_settings_that_cannot_be(overrides, message, tmp_path):
  refuses(ConfigError, message, tmp_path / 'run', overrides)


def test_attention_implementation(tmp_path):
  """One that every later implementation leaves unknown."""
  with pytest.raises(ConfigError, match=r"precision\.attention='magic' must "
                     r"be one of \('auto', 'reference'"):
    train.main(tiny_runs.tiny({'precision.attention': 'magic'}),
               str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_attention_without_its_device(tmp_path):
  refuses(ConfigError,
          "attention='fused' needs an NVIDIA GPU or a TPU, not 'cpu'.",
          tmp_path / 'run', {'precision.attention': 'fused'})


@pytest.mark.parametrize('overrides, message', [
    ({'data.objective': 'magic'},
     r"objective='magic' must be one of \(.*\), or a mix such as '.*'"),
    ({'data.long_documents': 'all'},
     r"long_documents='all' must be one of \('cut', 'pieces'\)"),
    ({'data.source': 'csv'}, r"source='csv' must be one of \('jsonl', .*\)"),
    ({'data.on_bad_record': 'stop'},
     r"on_bad_record='stop' must be one of \('raise', 'skip'\)"),
    ({'data.inputs_length': 1}, 'inputs_length=1 must be at least 2'),
    ({'seed': -1}, 'seed=-1 must be at least 0'),
    ({'gap_sentences.mask_id': 4000},
     'gap_sentences.mask_id=4000 must be less than the 4000 ids of the '
     'vocabulary'),
    ({'data.path': '/no/*.jsonl'}, r"no file matches '/no/\*\.jsonl'"),
    ({'data.validation_path': '/no/a.jsonl'}, "no file '/no/a.jsonl'"),
    ({'data.vocabulary': '/no/m.model'},
     'cannot read vocabulary /no/m.model: No such file or directory'),
    ({'data.vocabulary': str(runs.ROOT / 'train.py')},
     r'vocabulary .*/train\.py is no SentencePiece model'),
    ({'data.field': 'body'},
     r".*/validation\.jsonl\.xz:1: no field 'body', only \['author', "
     r"'chapter', 'text', 'title', 'year'\]"),
], ids=key_of)
def test_data_settings_that_cannot_be(overrides, message, tmp_path):
  workdir = tmp_path / 'run'
  with pytest.raises(DataError) as caught:
    train.main(tiny_runs.tiny(overrides), str(workdir))
  assert re.fullmatch(message, str(caught.value)), caught.value
  assert not workdir.exists()


GOOD = b'{"text": "One sentence. And another."}\n'


@pytest.mark.parametrize('content, message', [
    (b'', 'no text in {}'),
    (b'\n\n', 'no text in {}'),
    (b'{"text": ""}\n', 'no text in {}'),
    (GOOD + b'\n{"text": "One', '{}:3: not JSON: Unterminated string '
     'starting at at column 10'),
    (GOOD + b'{"txt": "a"}\n', "{}:2: no field 'text', only ['txt']"),
    (GOOD + b'{"text": 3}\n', "{}:2: field 'text' is int, not a string"),
    (GOOD + b'["a"]\n',
     "{}:2: a JSON list, not an object with field 'text'"),
    (GOOD + b'{"text": "caf\xe9"}\n',
     '{}:2: not UTF-8: byte 0xe9 at offset 13'),
])
def test_broken_files(content, message, tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(content)
  refuses(DataError, message.format(path), tmp_path / 'run',
          {'data.path': path})


def test_file_cut_short(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  path.write_bytes(gzip.compress(GOOD * 100)[:-12])
  refuses(DataError, f'{path} is cut short: its compressed data has no end',
          tmp_path / 'run', {'data.path': path})


def test_all_records_skipped(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'no\n[\n')
  refuses(
      DataError, f'no text in {path}; skipped 2 bad records, the first '
      f'{path}:1: not JSON: Expecting value at column 1', tmp_path / 'run',
      {'data.path': path, 'data.on_bad_record': 'skip'})


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run to go on with; and what compiling costs, once."""
  folder = tmp_path_factory.mktemp('finished')
  broken = folder / 'broken.jsonl'
  broken.write_bytes(b'{"text": "caf\xe9"}\n' + GOOD * 20 + b'no\n')
  with (tiny_runs.own_signals(),
        tiny_runs.cheap_compilation(tmp_path_factory.mktemp('compiled'))):
    yield tiny_runs.run(folder / 'run', {
        'steps': 1, 'data.path': broken, 'data.on_bad_record': 'skip'})


def test_skipped_records_are_counted(finished):
  assert '20 documents (2 bad records skipped)' in finished.printed
  assert finished.column('step') == [1]


@pytest.mark.parametrize('overrides, message', [
    ({'data.batch_size': 16}, '{} holds a run with data.batch_size=8, not 16: '
     'keep the value, or choose another --workdir.'),
    ({'model.d_ff': 128}, '{} holds a run with model.d_ff=64, not 128: keep '
     'the value, or choose another --workdir.'),
    ({'precision.scan_layers': False}, '{} holds a run with '
     'precision.scan_layers=True, not False: keep the value, or choose another '
     '--workdir.'),
    ({'gap_sentences.ratio': 0.3}, '{} holds a run with '
     'gap_sentences.ratio=0.2, not 0.3: keep the value, or choose another '
     '--workdir.'),
], ids=key_of)
def test_folder_of_another_run(finished, overrides, message):
  before = contents(finished.workdir)
  settings = {name: finished.config['data'][name.removeprefix('data.')]
              for name in ('data.path', 'data.on_bad_record')}
  with pytest.raises(ConfigError) as caught:
    train.main(tiny_runs.tiny({'steps': 2} | settings | overrides),
               str(finished.workdir))
  assert str(caught.value) == message.format(finished.workdir)
  assert contents(finished.workdir) == before


def test_data_changed_under_a_run(finished):
  """The path is the same, and what it holds is not."""
  path = finished.config['data']['path']
  with open(path, 'ab') as file:
    file.write(b'\n' + GOOD)
  before = contents(finished.workdir)
  with pytest.raises(DataError, match='row 0 was saved with 20 documents and '
                     'there are 21'):
    train.main(tiny_runs.tiny({
        'steps': 2, 'data.path': path, 'data.on_bad_record': 'skip'}),
               str(finished.workdir))
  assert contents(finished.workdir) == before


def contents(folder):
  """path -> bytes of all files below a folder."""
  return {path.relative_to(folder).as_posix(): path.read_bytes()
          for path in sorted(folder.rglob('*')) if path.is_file()}


def test_init_from_without_a_checkpoint(tmp_path):
  refuses(ConfigError,
          f'init_from=run:{tmp_path}: no checkpoint in {tmp_path}/checkpoints.',
          tmp_path / 'run', {'init_from': f'run:{tmp_path}'})

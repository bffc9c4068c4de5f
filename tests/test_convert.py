"""The command that converts: pairs of formats, refusals, and a kill."""

import contextlib
import itertools
import os
import signal
import sys
import tarfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import hf_folder
import runs
from longt5_flax import (
    FlaxLongT5ForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    convert,
)
from longt5_flax.interop.huggingface import save_pretrained
from longt5_flax.interop.open import open_tensors
from longt5_flax.interop.tensors import load_params

CASE = 'hf_tglobal_untied'
KINDS = ('hf', 'orbax', 'safetensors')


def target(kind, folder, name):
  return f'{kind}:{folder / name}' + ('.x' if kind == 'safetensors' else '')


def load(spec, params, dtype=np.float32):
  tensors = open_tensors(spec)
  return tensors.config, load_params(
      tensors, hf_folder.shapes_of(params, dtype))


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  """The same model in every format, made from the first."""
  folder = tmp_path_factory.mktemp('sources')
  hf_folder.write(folder / 'hf', CASE)
  specs = {'hf': f'hf:{folder}/hf'}
  for kind in ('orbax', 'safetensors'):
    specs[kind] = target(kind, folder, kind)
    convert.convert(specs['hf'], specs[kind])
  return specs


@pytest.mark.parametrize('source, to', list(itertools.permutations(KINDS, 2)))
def test_pairs(sources, tmp_path, source, to):
  case, spec = golden.load(CASE), target(to, tmp_path, 'x')
  convert.convert(sources[source], spec)
  config, params = load(spec, case.params)
  assert config == case.config
  assert_same(params, case.params)


@pytest.mark.parametrize('to', ['hf', 'orbax'])
def test_from_t5x(tmp_path, testdata, to):
  """The parameters of a golden case, in the checkpoint of another."""
  with tarfile.open(
      testdata / 'golden' / 't5x_checkpoint_tglobal.tar.xz') as file:
    file.extractall(tmp_path, filter='data')
  source = next(tmp_path.rglob('checkpoint_1000000'))
  spec = target(to, tmp_path, 'x')
  hf_folder.write_config(tmp_path / 'config', CASE, local_radius=5)
  convert.convert(f't5x:{source}', spec, str(tmp_path / 'config'))
  tensors = open_tensors(f't5x:{source}')
  written = open_tensors(spec)
  assert written.config == LongT5Config.from_dict(
      hf_folder.config_of(CASE, local_radius=5))
  assert written.shapes.keys() == tensors.shapes.keys()
  for name in tensors.shapes:
    np.testing.assert_array_equal(written.read(name), tensors.read(name))


@pytest.mark.parametrize('to, dtype', [
    ('hf', 'bfloat16'), ('orbax', 'bfloat16'), ('safetensors', 'float16')])
def test_dtype(sources, tmp_path, to, dtype):
  params = golden.load(CASE).params
  spec = target(to, tmp_path, 'x')
  convert.convert(sources['hf'], spec, dtype=dtype)
  assert set(open_tensors(spec).dtypes.values()) == {jnp.dtype(dtype)}
  expected = jax.tree.map(lambda x: x.astype(dtype), params)
  assert_same(load(spec, params, dtype)[1], expected)


def test_headless_models(tmp_path):
  """Stay what they are, through formats that say it."""
  arrays = hf_folder.arrays_of(CASE)
  del arrays['lm_head.weight']
  hf_folder.write(tmp_path / 'base', CASE, arrays,
                  architectures=['LongT5Model'])
  hf_folder.write(tmp_path / 'encoder', CASE, {
      name: value for name, value in arrays.items() if 'decoder' not in name})
  for name in ('base', 'encoder'):
    spec = f'hf:{tmp_path / name}'
    convert.convert(spec, f'safetensors:{tmp_path / name}.x')
    convert.convert(f'safetensors:{tmp_path / name}.x', f'{spec}-again')
    assert open_tensors(f'{spec}-again').shapes == open_tensors(spec).shapes


def test_what_is_beside_the_weights_goes_along(tmp_path):
  """To transformers' file and ours; old folders have it in config.json."""
  source = hf_folder.write(tmp_path / 'source', CASE, num_beams=4)
  (source / 'spiece.model').write_bytes(b'pieces')
  (source / 'tokenizer_config.json').write_text('{"extra_ids": 300}')
  report = convert.convert(f'hf:{source}', f'orbax:{tmp_path}/x')
  assert report[-4:] == [
      'spiece.model: copied.', 'tokenizer_config.json: copied.',
      'Settings of generation copied: num_beams=4.',
      f'orbax:{tmp_path}/x: written.']
  convert.convert(f'orbax:{tmp_path}/x', f'hf:{tmp_path}/y')
  assert (tmp_path / 'y' / 'spiece.model').read_bytes() == b'pieces'
  assert (tmp_path / 'y' / 'tokenizer_config.json').read_text() == (
      '{"extra_ids": 300}')
  for spec in (f'orbax:{tmp_path}/x', f'hf:{tmp_path}/y'):
    model = FlaxLongT5ForConditionalGeneration.from_pretrained(spec)
    assert model.generation_config.num_beams == 4


def test_report_is_printed(sources, tmp_path, capsys):
  """With the progress on the other stream."""
  assert convert.main(
      ['--from', sources['hf'], '--to', f'hf:{tmp_path}/x']) == 0
  output = capsys.readouterr()
  assert output.out.splitlines()[-2:] == [
      '55 tensors, 0.000225 GB, in 1 file.', f'hf:{tmp_path}/x: written.']
  assert 'Converting' in output.err


def refused(capsys, *arguments):
  """The one line, after which nothing more is in the folder."""
  assert convert.main(arguments) == 2
  output = capsys.readouterr()
  assert output.out == ''
  line, = output.err.splitlines()
  return line


@pytest.mark.parametrize('to, message', [
    ('t5x:x', "--to 't5x:x' must be one of hf:DIR, orbax:DIR, "
     'safetensors:FILE.'),
    ('x', "--to 'x' must be one of hf:DIR, orbax:DIR, safetensors:FILE."),
])
def test_refused_targets(sources, capsys, to, message):
  assert refused(capsys, '--from', sources['hf'], '--to', to) == (
      f'error: {message}')


def test_refused_sources(tmp_path, capsys):
  def line(source, *more):
    found = refused(capsys, '--from', source, '--to', f'hf:{tmp_path}/x', *more)
    assert not os.listdir(tmp_path)
    return found

  assert line('google/long-t5-local-base') == (
      "error: 'google/long-t5-local-base' must be one of hf:DIR_OR_FILE, "
      't5x:DIR_OR_URL, t5:DIR_OR_URL, orbax:DIR, run:WORKDIR, '
      'safetensors:FILE, or the path of a Hugging Face folder on disk.')
  assert line('hf:missing') == (
      'error: missing: there is no such folder or file on disk; nothing is '
      'downloaded.')
  assert line('hf:missing', '--architecture=tiny').startswith(
      "error: --architecture 'tiny' must be the folder of a config.json, or "
      'one of local-tiny, ')


def test_refused_weights(tmp_path, capsys):
  """Found before anything is written."""
  def line():
    found = refused(capsys, '--from', f'hf:{tmp_path}/source',
                    '--to', f'orbax:{tmp_path}/x')
    assert os.listdir(tmp_path) == ['source']
    return found

  source = hf_folder.write(tmp_path / 'source', CASE, d_kv=16)
  assert line().endswith('has shape (32, 32) there and (32, 64) in this model.')
  assert 'decoder/layers_0/encoder_decoder_attention/key/kernel' in line()
  arrays = hf_folder.arrays_of(CASE)
  del arrays['lm_head.weight']
  hf_folder.write(source, CASE, arrays)
  assert 'lm_head.weight (decoder/logits_dense/kernel)' in line()
  path = source / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:-4])
  assert 'is no whole safetensors file' in line()


def test_never_overwrites(sources, tmp_path, capsys):
  (tmp_path / 'kept').write_text('kept')
  for kind in KINDS:
    assert refused(capsys, '--from', sources['hf'],
                   '--to', f'{kind}:{tmp_path}') == (
        f'error: {tmp_path}: is there already; nothing is overwritten.')
  assert os.listdir(tmp_path) == ['kept']


def test_too_large_for_float16(tmp_path, capsys):
  arrays = hf_folder.arrays_of(CASE)
  arrays['shared.weight'] = arrays['shared.weight'] * 1e5
  hf_folder.write(tmp_path / 'source', CASE, arrays)
  assert convert.main(['--from', f'hf:{tmp_path}/source', '--to',
                       f'safetensors:{tmp_path}/x', '--dtype=float16']) == 2
  assert capsys.readouterr().err.splitlines()[-1] == (
      f'error: {tmp_path}/source/model.safetensors: tensor '
      'token_embedder/embedding has numbers too large for float16.')
  assert os.listdir(tmp_path) == ['source']


@pytest.fixture(scope='module')
def large(tmp_path_factory):
  """A folder of 100 MB: enough for a kill to find the writing under way."""
  config = LongT5Config(
      vocab_size=50_000, d_model=256, num_layers=1, tie_word_embeddings=False)
  ids = jax.ShapeDtypeStruct((1, 1), np.int32)
  shapes = jax.eval_shape(lambda *ids: LongT5ForConditionalGeneration(
      config).init(jax.random.key(0), *ids), ids, ids)['params']
  folder = tmp_path_factory.mktemp('large') / 'hf'
  params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), shapes)
  params['decoder']['logits_dense']['kernel'] += 0.5
  save_pretrained(str(folder), config, params)
  return folder, params


def bytes_in(folder):
  """Of all files that are there when one looks."""
  size = 0
  for parent, _, files in os.walk(folder):
    for file in files:
      with contextlib.suppress(FileNotFoundError):
        size += os.path.getsize(os.path.join(parent, file))
  return size


@pytest.mark.parametrize('to', ['hf', 'orbax'])
def test_kill_half_way(large, tmp_path, to):
  """The target is absent or complete, and the next try is not disturbed."""
  source, params = large
  spec = target(to, tmp_path, 'x')
  process = runs.start([sys.executable, '-m', 'longt5_flax.convert', '--from',
                        f'hf:{source}', '--to', spec])
  while process.poll() is None and not bytes_in(tmp_path):
    time.sleep(0.001)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  if 'x' in os.listdir(tmp_path):  # The machine was too slow to kill in time.
    assert_same(load(spec, params)[1], params)
  else:
    left, = os.listdir(tmp_path)
    assert left.startswith('.x.')
    assert left.endswith('.incomplete')
    convert.convert(f'hf:{source}', spec)
    assert_same(load(spec, params)[1], params)

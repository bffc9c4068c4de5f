"""Hugging Face's folders read right, or refused in one line."""

import json
import pickle
import sys

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

import golden
import hf_folder
from longt5_flax import LongT5Config
from longt5_flax.config import ConfigError
from longt5_flax.interop.huggingface import open_huggingface
from longt5_flax.interop.tensors import WeightsError, load_params

# Whose parameters are stored; the base model's are enc3_dec1's.
CASES = [name for name in golden.names('hf_') if hf_folder.arrays_of(name)]
CASE = 'hf_tglobal_untied'
TIED = 'hf_tglobal_tied'
HEAD, SHARED = 'lm_head.weight', 'shared.weight'
COPY = 'encoder.embed_tokens.weight'
QUERY = 'encoder.block.1.layer.0.TransientGlobalSelfAttention.q.weight'


def load(path, name=CASE, dtype=np.float32, **options):
  """(config, parameters) of a folder, for the model of a golden case."""
  tensors = open_huggingface(str(path))
  params = load_params(tensors, hf_folder.shapes_of(
      golden.load(name).params, dtype), **options)
  return tensors.config, params


def assert_same(actual, expected):
  actual, expected = golden.flatten(actual), golden.flatten(expected)
  assert actual.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value, err_msg=name)


@pytest.mark.parametrize('name', CASES)
def test_golden_folder(name, tmp_path):
  """By the map of tests/golden.py, whose parameters give golden logits."""
  case = golden.load(name)
  config, params = load(hf_folder.write(tmp_path, name), name)
  assert config == case.config
  assert_same(params, case.params)


def test_base_model(tmp_path):
  """LongT5Model has no head, whatever the config says of one."""
  name = 'hf_local_enc3_dec1'
  arrays = hf_folder.arrays_of(name)
  del arrays[HEAD]
  folder = hf_folder.write(
      tmp_path, name, arrays, architectures=['LongT5Model'])
  expected = golden.load('hf_local_base_model').params
  tensors = open_huggingface(str(folder))
  assert tensors.architecture == 'LongT5Model'
  assert_same(load_params(tensors, hf_folder.shapes_of(expected)), expected)


@pytest.mark.parametrize('part, unused', [
    ('encoder', ['decoder/*']), ('base', ['decoder/logits_dense/kernel'])])
def test_smaller_models_leave_the_rest_unread(tmp_path, part, unused):
  params = dict(golden.load(CASE).params)
  decoder = params.pop('decoder')
  if part == 'base':
    params['decoder'] = {name: value for name, value in decoder.items()
                         if name != 'logits_dense'}
  tensors = open_huggingface(str(hf_folder.write(tmp_path, CASE)))
  shapes = hf_folder.shapes_of(params)
  assert_same(load_params(tensors, shapes, allow_extra=unused), params)
  with pytest.raises(WeightsError, match='has no place in this model'):
    load_params(tensors, shapes)


def sharded(folder, arrays, end, write):
  """Three files and their index."""
  names, places = sorted(arrays), {}
  for i in range(3):
    shard = f'part-{i}{end}'
    write(folder / shard, {name: arrays[name] for name in names[i::3]})
    places |= dict.fromkeys(names[i::3], shard)
  return {'metadata': {'total_size': 1}, 'weight_map': places}


@pytest.mark.parametrize('layout', [
    'file', 'shards', 'msgpack', 'msgpack shards', 'msgpack chunks'])
@pytest.mark.parametrize('name', [CASE, TIED])
def test_layouts(tmp_path, monkeypatch, layout, name):
  arrays, path = hf_folder.arrays_of(name), tmp_path
  if layout == 'file':
    path = hf_folder.write(tmp_path, name) / 'model.safetensors'
  elif layout == 'shards':
    index = sharded(tmp_path, arrays, '.safetensors',
                    hf_folder.write_safetensors)
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
  else:
    arrays = hf_folder.flax_arrays(arrays)
    if layout == 'msgpack shards':
      index = sharded(tmp_path, arrays, '.msgpack', hf_folder.write_msgpack)
      (tmp_path / 'flax_model.msgpack.index.json').write_text(json.dumps(index))
    else:
      if layout == 'msgpack chunks':  # As Flax does above 1 GiB.
        monkeypatch.setattr('flax.serialization.MAX_CHUNK_SIZE', 3000)
      hf_folder.write_msgpack(tmp_path / 'flax_model.msgpack', arrays)
  hf_folder.write_config(tmp_path, name)
  config, params = load(path, name)
  assert config == golden.load(name).config
  assert_same(params, golden.load(name).params)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('layout', ['safetensors', 'msgpack'])
def test_stored_in_half_precision(tmp_path, dtype, layout):
  arrays = {name: value.astype(dtype)
            for name, value in hf_folder.arrays_of(CASE).items()}
  hf_folder.write_config(tmp_path, CASE)
  if layout == 'safetensors':
    hf_folder.write_safetensors(tmp_path / 'model.safetensors', arrays)
  else:
    hf_folder.write_msgpack(tmp_path / 'flax_model.msgpack',
                            hf_folder.flax_arrays(arrays))
  stored = jax.tree.map(lambda x: x.astype(dtype), golden.load(CASE).params)
  _, params = load(tmp_path, dtype=dtype)
  assert_same(params, stored)
  _, params = load(tmp_path)
  assert_same(params, jax.tree.map(lambda x: x.astype(np.float32), stored))


@pytest.mark.parametrize('keys, head, tied, scaled', [
    # The released files, and fine-tunes of them.
    (dict(tie_word_embeddings=False), 'own', False, False),
    (dict(), None, True, True),
    (dict(tie_word_embeddings=True), 'equal', True, True),
    # As transformers 5 writes an untied and a tied one.
    (dict(tie_word_embeddings=True, scale_decoder_outputs=False), 'own',
     False, False),
    (dict(tie_word_embeddings=True, scale_decoder_outputs=True), None,
     True, True),
    (dict(tie_word_embeddings=True, scale_decoder_outputs=False), None,
     True, False),
    # The stored head decides, whatever the config says.
    (dict(tie_word_embeddings=False), 'equal', True, False),
    (dict(), 'own', False, True),
    (dict(tie_word_embeddings=False, scale_decoder_outputs=True), 'own',
     False, True),
])
def test_head(tmp_path, keys, head, tied, scaled):
  arrays = hf_folder.arrays_of(CASE)
  own = arrays.pop(HEAD)
  if head:
    arrays[HEAD] = own if head == 'own' else arrays[SHARED]
  changes = dict(tie_word_embeddings=None) | keys
  hf_folder.write(tmp_path, CASE, arrays, **changes)
  config, params = load(tmp_path, TIED if tied else CASE)
  assert config.tie_word_embeddings is tied
  assert config.scale_decoder_outputs is scaled
  if not tied:
    np.testing.assert_array_equal(
        params['decoder']['logits_dense']['kernel'], own.T)


def test_one_number_makes_a_head_its_own(tmp_path):
  """Far down, where only a comparison of everything finds it."""
  arrays = hf_folder.arrays_of(TIED)
  arrays[HEAD] = arrays[SHARED].copy()
  arrays[HEAD][-1, -1] += 1
  config = open_huggingface(str(hf_folder.write(tmp_path, TIED, arrays))).config
  assert not config.tie_word_embeddings


def test_untied_without_a_head(tmp_path):
  arrays = hf_folder.arrays_of(CASE)
  del arrays[HEAD]
  path = hf_folder.write(tmp_path, CASE, arrays) / 'model.safetensors'
  assert refusal(tmp_path) == (
      f'{path}: tensor lm_head.weight (decoder/logits_dense/kernel) of shape '
      '(32, 96) is missing.')


@pytest.mark.parametrize('copies, kept', [
    ([COPY], SHARED), ([COPY, 'decoder.embed_tokens.weight'], SHARED),
    ([COPY], None), (['decoder.embed_tokens.weight'], None), ([HEAD], None)])
@pytest.mark.parametrize('layout', ['safetensors', 'msgpack'])
def test_copies_of_the_embedding(tmp_path, layout, copies, kept):
  arrays = hf_folder.arrays_of(TIED)
  embedding = arrays.pop(SHARED)
  arrays |= dict.fromkeys([*copies, *([kept] if kept else [])], embedding)
  hf_folder.write_config(tmp_path, TIED)
  if layout == 'safetensors':
    hf_folder.write_safetensors(tmp_path / 'model.safetensors', arrays)
  else:
    hf_folder.write_msgpack(tmp_path / 'flax_model.msgpack',
                            hf_folder.flax_arrays(arrays))
  config, params = load(tmp_path, TIED)
  assert config == golden.load(TIED).config
  assert_same(params, golden.load(TIED).params)


def test_copies_that_differ(tmp_path):
  arrays = hf_folder.arrays_of(CASE)
  arrays[COPY] = arrays[SHARED] + 1
  hf_folder.write(tmp_path, CASE, arrays)
  assert refusal(tmp_path).endswith(
      'encoder.embed_tokens.weight differs from shared.weight; a LongT5 has '
      'one embedding.')


def test_vocabulary_of_the_file_wins(tmp_path):
  arrays = hf_folder.arrays_of(CASE)
  for name in (SHARED, HEAD):
    arrays[name] = arrays[name][:90]
  tensors = open_huggingface(str(hf_folder.write(tmp_path, CASE, arrays)))
  assert tensors.config.vocab_size == 90
  assert tensors.shapes['token_embedder/embedding'] == (90, 32)
  assert ('vocab_size: 90, the rows of shared.weight, not 96 of the config.'
          in tensors.report)


def test_report(tmp_path):
  arrays = hf_folder.arrays_of(CASE)
  arrays[COPY] = arrays[SHARED]
  unused = ('decoder.block.0.layer.1.EncDecAttention.relative_attention_bias'
            '.weight')
  arrays[unused] = np.zeros((32, 4), np.float32)
  folder = hf_folder.write(tmp_path, CASE, arrays)
  (folder / 'pytorch_model.bin').write_bytes(b'never opened')
  assert open_huggingface(str(folder)).report == [
      f'{folder}/model.safetensors: 57 tensors, 0.000237 GB.',
      'pytorch_model.bin: ignored, for model.safetensors is there.',
      f'{unused}: ignored, nothing uses it.',
      f'{COPY}: ignored, equal to {SHARED}.',
      f'{HEAD}: differs from {SHARED}, the head is untied (config: '
      'tie_word_embeddings=False, scale_decoder_outputs=False).',
      "55 tensors by T5X's names, 40 of them transposed.",
  ]


def refusal(path, name=CASE, **options):
  """The one line by which a folder is refused."""
  with pytest.raises(ConfigError) as caught:
    load(path, name, **options)
  message = str(caught.value)
  assert '\n' not in message
  return message


def test_renamed_tensor(tmp_path):
  arrays = hf_folder.arrays_of(CASE)
  arrays['encoder.query'] = arrays.pop(QUERY)
  path = hf_folder.write(tmp_path, CASE, arrays) / 'model.safetensors'
  ours = 'encoder/layers_1/attention/query/kernel'
  assert refusal(tmp_path) == (
      f'{path}: tensor {QUERY} ({ours}) of shape (32, 32) is missing; '
      'encoder.query of that shape has no place in this model.')
  assert refusal(tmp_path, allow_missing=['encoder/layers_*']) == (
      f'{path}: tensor encoder.query of shape (32, 32) has no place in this '
      'model.')
  _, params = load(tmp_path, allow_missing=[ours],
                   allow_extra=['encoder.query'])
  missing = params['encoder']['layers_1']['attention']['query']['kernel']
  assert isinstance(missing, jax.ShapeDtypeStruct)


def test_several_missing_tensors_are_counted(tmp_path):
  arrays = {name: value for name, value in hf_folder.arrays_of(CASE).items()
            if 'decoder.block.1' not in name}
  hf_folder.write(tmp_path, CASE, arrays)
  assert refusal(tmp_path).endswith('is missing (and 13 more).')


def test_another_size(tmp_path):
  """A config.json with another d_kv than its weights'."""
  path = hf_folder.write(tmp_path, CASE, d_kv=16) / 'model.safetensors'
  tensors = open_huggingface(str(tmp_path))
  assert tensors.config.d_kv == 16
  shapes = hf_folder.shapes_of(golden.load(CASE).params)
  kernel = shapes['encoder']['layers_1']['attention']['query']
  kernel['kernel'] = jax.ShapeDtypeStruct((32, 64), np.float32)
  with pytest.raises(WeightsError) as caught:
    load_params(tensors, shapes)
  assert str(caught.value) == (
      f'{path}: tensor {QUERY} (encoder/layers_1/attention/query/kernel) has '
      'shape (32, 32) there and (32, 64) in this model.')


def test_integers_are_no_weights(tmp_path):
  arrays = hf_folder.arrays_of(CASE)
  arrays[QUERY] = arrays[QUERY].astype(np.int8)
  hf_folder.write(tmp_path, CASE, arrays)
  assert refusal(tmp_path).endswith(
      'is of type int8, not of floating-point numbers.')


@pytest.mark.parametrize('kind, hint', [
    ('t5', '; t5:{folder} starts a LongT5 from it'), ('bert', '')])
def test_another_model(tmp_path, kind, hint):
  folder = hf_folder.write(tmp_path, CASE, model_type=kind)
  assert refusal(folder) == (
      f"{folder}/config.json: model_type={kind!r} must be one of ('longt5',)"
      f'{hint.format(folder=folder)}.')


@pytest.mark.parametrize('size', [0, 7, 8, 200, 8000, -1])
def test_cut_off_safetensors(tmp_path, size):
  path = hf_folder.write(tmp_path, CASE) / 'model.safetensors'
  path.write_bytes(path.read_bytes()[:size])
  assert refusal(tmp_path).startswith(
      f'{path}: is no whole safetensors file (')


def test_damaged_safetensors(tmp_path):
  path = hf_folder.write(tmp_path, CASE) / 'model.safetensors'
  for content in (b'\xff' * 100, path.read_bytes() + b'more',
                  path.read_bytes().replace(b'"F32"', b'"X32"', 1)):
    path.write_bytes(content)
    assert refusal(tmp_path).startswith(
        f'{path}: is no whole safetensors file (')


@pytest.mark.parametrize('size', [0, 1, 5, 100, 5000, -1])
def test_cut_off_msgpack(tmp_path, size):
  path = tmp_path / 'flax_model.msgpack'
  hf_folder.write_config(tmp_path, CASE)
  hf_folder.write_msgpack(
      path, hf_folder.flax_arrays(hf_folder.arrays_of(CASE)))
  path.write_bytes(path.read_bytes()[:size])
  assert refusal(tmp_path).startswith(
      f'{path}: is no whole msgpack file of Flax (')


def packed(shape, dtype, content):
  """As Flax packs an array."""
  data = msgpack.packb((shape, dtype, content))
  return msgpack.packb(msgpack.ExtType(1, data))


@pytest.mark.parametrize('content', [
    b'\x93\x01\x02\x03', b'\x81\xa1a\x01', b'\x81\xa1a\xc7\x03\x02abc',
    b'\x81\xa1a\xc7\x03\x01abc', b'\x80\x80',
    b'\x81\xa1a' + packed((2, 3), 'float32', b'1234'),
    b'\x81\xa1a' + packed(('x',), 'float32', b'1234'),
    b'\x81\xa1a' + packed((1,), 'O', b'12345678'),
    b'\x81\xa1a' + packed((1,), 'float33', b'1234'), b'\x81\xa1a' * 100_000,
    b'\x81\xa1a\x81\xbc__msgpack_chunked_array__\xc3'])
def test_damaged_msgpack(tmp_path, content):
  path = tmp_path / 'flax_model.msgpack'
  hf_folder.write_config(tmp_path, CASE)
  path.write_bytes(content)
  assert refusal(tmp_path).startswith(
      f'{path}: is no whole msgpack file of Flax (')


class Malicious:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, 'w')


def test_pickle_is_not_executed(tmp_path, monkeypatch):
  """Where PyTorch is not installed; where it is, transformers_parity/check.py
  shows the same."""
  monkeypatch.setitem(sys.modules, 'torch', None)
  executed, path = tmp_path / 'executed', tmp_path / 'pytorch_model.bin'
  hf_folder.write_config(tmp_path, CASE)
  path.write_bytes(pickle.dumps(Malicious(str(executed))))
  message = refusal(tmp_path)
  assert message.startswith(
      f'{path}: is a pickle, read only where PyTorch is installed')
  assert 'safetensors.torch.save_file' in message
  assert not executed.exists()
  pickle.loads(path.read_bytes())  # It would have been.
  assert executed.exists()


def test_nothing_there(tmp_path):
  assert refusal(tmp_path / 'x') == (
      f'{tmp_path}/x: there is no such folder or file on disk; nothing is '
      'downloaded.')
  assert refusal(tmp_path).startswith(
      f'{tmp_path}: holds none of model.safetensors, ')
  hf_folder.write(tmp_path, CASE)
  (tmp_path / 'config.json').unlink()
  assert refusal(tmp_path) == (
      f'{tmp_path}/config.json: cannot be read (No such file or directory).')
  config = golden.load(CASE).config
  assert open_huggingface(str(tmp_path), config).config == config


@pytest.mark.parametrize('places, message', [
    ([], 'has no weight_map.'),
    ({}, 'has no weight_map.'),
    ({'shared.weight': '../x.safetensors'},
     'names a file in another folder, ../x.safetensors.'),
    ({'shared.weight': 'y.safetensors'}, 'y.safetensors: there is no such file.'
     ),
    ({'shared.weight': 'x.safetensors', 'a': 'x.safetensors'},
     'tensor a is missing in x.safetensors.'),
    ({'a': 'x.safetensors'}, 'x.safetensors: tensor shared.weight is not in '
     'this file by {index}.'),
])
def test_wrong_index(tmp_path, places, message):
  hf_folder.write_config(tmp_path, CASE)
  hf_folder.write_safetensors(
      tmp_path / 'x.safetensors', {SHARED: np.ones((96, 32), np.float32)})
  index = tmp_path / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': places}))
  assert refusal(tmp_path).endswith(message.format(index=index))


def test_given_config_replaces_the_folders(tmp_path):
  hf_folder.write(tmp_path, CASE, local_radius=9)
  config = LongT5Config.from_dict(hf_folder.config_of(CASE))
  assert open_huggingface(str(tmp_path), config).config.local_radius == 7
  assert open_huggingface(str(tmp_path)).config.local_radius == 9

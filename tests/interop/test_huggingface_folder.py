"""Folders written for transformers. That it reads them as the same model is
shown by transformers_parity/check.py, which needs PyTorch."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import golden
import hf_folder
from longt5_flax import LongT5ForConditionalGeneration
from longt5_flax.interop.huggingface import open_huggingface, save_pretrained
from longt5_flax.interop.layers import stack_layers
from longt5_flax.interop.tensors import (
    ParamTensors,
    WeightsError,
    load_params,
)

CASES = [name for name in golden.names('hf_') if hf_folder.arrays_of(name)]
CASE, TIED = 'hf_tglobal_untied', 'hf_tglobal_tied'


def load(folder, shapes):
  tensors = open_huggingface(str(folder))
  return tensors.config, load_params(tensors, shapes)


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('stacked', [False, True])
def test_writes_the_file_that_transformers_wrote(name, stacked, tmp_path):
  """Tensor by tensor, and the config key by key."""
  case = golden.load(name)
  params = stack_layers(case.params) if stacked else case.params
  save_pretrained(str(tmp_path / 'x'), case.config, params)
  expected = hf_folder.arrays_of(name)
  actual = load_file(tmp_path / 'x' / 'model.safetensors')
  assert actual.keys() == expected.keys()
  for key, value in expected.items():
    np.testing.assert_array_equal(actual[key], value, err_msg=key)
  with safe_open(tmp_path / 'x' / 'model.safetensors', 'np') as file:
    assert file.metadata() == {'format': 'pt'}
  written = json.loads((tmp_path / 'x' / 'config.json').read_text())
  for key, value in hf_folder.config_of(name).items():
    if key not in ('transformers_version', 'use_cache'):
      assert written[key] == value, key
  assert written['tie_word_embeddings'] is case.config.tie_word_embeddings
  config, again = load(tmp_path / 'x', hf_folder.shapes_of(params))
  assert config == case.config
  assert_same(again, params)


def test_base_model(tmp_path):
  case = golden.load('hf_local_base_model')
  save_pretrained(str(tmp_path / 'x'), case.config, case.params)
  written = json.loads((tmp_path / 'x' / 'config.json').read_text())
  assert written['architectures'] == ['LongT5Model']


def test_shards(tmp_path):
  case, folder = golden.load(CASE), tmp_path / 'x'
  report = save_pretrained(
      str(folder), case.config, case.params, max_shard_bytes=30_000)
  index = json.loads((folder / 'model.safetensors.index.json').read_text())
  arrays = hf_folder.arrays_of(CASE)
  assert index['metadata']['total_size'] == sum(
      value.nbytes for value in arrays.values())
  files = sorted(path.name for path in folder.glob('*.safetensors'))
  assert len(files) == 8
  assert files == [f'model-{i:05}-of-00008.safetensors' for i in range(1, 9)]
  for file in files:
    stored = load_file(folder / file)
    assert sum(value.nbytes for value in stored.values()) <= 30_000
    for key, value in stored.items():
      assert index['weight_map'].pop(key) == file
      np.testing.assert_array_equal(value, arrays[key])
  assert not index['weight_map']
  assert report == ['55 tensors, 0.000225 GB, in 8 files.']
  assert_same(load(folder, hf_folder.shapes_of(case.params))[1], case.params)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_other_dtype(tmp_path, dtype):
  case = golden.load(TIED)
  save_pretrained(str(tmp_path / 'x'), case.config, case.params, dtype=dtype)
  written = json.loads((tmp_path / 'x' / 'config.json').read_text())
  assert written['dtype'] == jnp.dtype(dtype).name
  expected = jax.tree.map(lambda x: x.astype(dtype), case.params)
  _, params = load(tmp_path / 'x', hf_folder.shapes_of(expected, dtype))
  assert_same(params, expected)


def test_tied_but_not_scaled(tmp_path):
  """As an untied one whose head is a copy; read back, it is tied again."""
  case = golden.load(TIED)
  config = dataclasses.replace(case.config, scale_decoder_outputs=False)
  report = save_pretrained(str(tmp_path / 'x'), config, case.params)
  assert report[0].startswith('lm_head.weight: a copy of shared.weight')
  stored = load_file(tmp_path / 'x' / 'model.safetensors')
  np.testing.assert_array_equal(stored['lm_head.weight'],
                                stored['shared.weight'])
  written = json.loads((tmp_path / 'x' / 'config.json').read_text())
  assert written['tie_word_embeddings'] is False
  again, params = load(tmp_path / 'x', hf_folder.shapes_of(case.params))
  assert again == config
  assert_same(params, case.params)


def test_untied_but_scaled(tmp_path):
  """As one that is not scaled and whose head is smaller: the same logits."""
  case = golden.load(CASE)
  config = dataclasses.replace(case.config, scale_decoder_outputs=True)
  report = save_pretrained(str(tmp_path / 'x'), config, case.params)
  assert report[0].startswith('lm_head.weight: multiplied by d_model**-0.5')
  again, params = load(tmp_path / 'x', hf_folder.shapes_of(case.params))
  assert again == case.config
  tokens, targets = case['input_ids'][:1], case['decoder_input_ids'][:1]

  def logits(config, params):
    return golden.jit(lambda params: LongT5ForConditionalGeneration(
        config).apply({'params': params}, tokens, targets))(params)

  golden.assert_close(logits(again, params), logits(config, case.params))


def test_folder_that_is_there(tmp_path):
  """Its other files stay, and weights of before go."""
  case = golden.load(CASE)
  save_pretrained(str(tmp_path), case.config, case.params,
                  max_shard_bytes=100_000)
  (tmp_path / 'spiece.model').write_text('kept')
  other = golden.load(TIED)
  save_pretrained(str(tmp_path), other.config, other.params)
  assert sorted(os.listdir(tmp_path)) == [
      'config.json', 'generation_config.json', 'model.safetensors',
      'spiece.model']
  assert_same(load(tmp_path, hf_folder.shapes_of(other.params))[1],
              other.params)


def refusal(folder, config, params):
  with pytest.raises(WeightsError) as caught:
    save_pretrained(str(folder), config, params)
  return str(caught.value)


def test_refused_models(tmp_path):
  case = golden.load(CASE)
  full = dataclasses.replace(case.config, encoder_attention_type='full')
  assert refusal(tmp_path / 'x', full, case.params) == (
      "encoder_attention_type='full' must be 'local' or 'transient-global': "
      "Hugging Face's LongT5 has no other.")
  flat = golden.flatten(case.params)
  del flat['encoder/encoder_norm/scale']
  assert refusal(tmp_path / 'x', case.config, golden.tree_from_paths(flat)) == (
      'params: tensor encoder/encoder_norm/scale is missing.')
  flat = golden.flatten(case.params) | {'encoder/more': np.ones(3)}
  assert refusal(tmp_path / 'x', case.config, golden.tree_from_paths(flat)) == (
      'params: tensor encoder/more has no place in a LongT5 of this config.')
  assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path):
  case = golden.load(CASE)
  (tmp_path / 'file').write_text('')
  assert refusal(tmp_path / 'file', case.config, case.params) == (
      f'{tmp_path}/file: is there already; nothing is overwritten.')
  assert refusal(tmp_path / 'file' / 'x', case.config, case.params) == (
      f'{tmp_path}/file/x: cannot be written (File exists: {tmp_path}/file).')


class Broken(ParamTensors):
  """Fails half way."""

  def read(self, name, index=None):
    if name == 'decoder/layers_0/mlp/wo/kernel':
      raise WeightsError('cannot be read.')
    return super().read(name, index)


@pytest.mark.parametrize('existing', [False, True])
def test_nothing_is_left_of_a_failed_save(tmp_path, existing):
  case, folder = golden.load(CASE), tmp_path / 'x'
  if existing:
    save_pretrained(str(folder), case.config, case.params)
  before = {path: path.read_bytes() for path in folder.glob('*')}
  broken = Broken(case.params, case.config)
  assert refusal(folder, case.config, broken) == 'cannot be read.'
  assert os.listdir(tmp_path) == (['x'] if existing else [])
  assert {path: path.read_bytes() for path in folder.glob('*')} == before

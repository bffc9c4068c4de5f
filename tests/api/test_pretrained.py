"""Models out of folders and into them."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import golden
from longt5_flax import (
    ConfigError,
    FlaxLongT5EncoderModel,
    FlaxLongT5ForConditionalGeneration,
    FlaxLongT5Model,
    LongT5Config,
)
from longt5_flax.api import GenerationConfig
from longt5_flax.api.base import _bytes
from longt5_flax.interop.orbax import save_orbax

CASE = golden.load('hf_tglobal_untied')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A whole LongT5, as save_pretrained writes it."""
  path = tmp_path_factory.mktemp('saved') / 'model'
  model = FlaxLongT5ForConditionalGeneration(CASE.config, _do_init=False)
  model.params = CASE.params
  model.generation_config = GenerationConfig(num_beams=2, max_new_tokens=20)
  model.save_pretrained(path)
  return path


def assert_same_params(actual, expected):
  actual, expected = golden.flatten(actual), golden.flatten(expected)
  assert sorted(actual) == sorted(expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(actual[name], value)
    assert actual[name].dtype == jnp.float32


@pytest.mark.parametrize('prefix', ['', 'hf:'])
def test_round_trip(folder, prefix):
  model = FlaxLongT5ForConditionalGeneration.from_pretrained(
      f'{prefix}{folder}')
  assert model.config == CASE.config
  assert model.generation_config == GenerationConfig(
      num_beams=2, max_new_tokens=20, eos_token_id=1, pad_token_id=0,
      decoder_start_token_id=0)
  assert_same_params(model.params, CASE.params)
  output = model(*(CASE[name] for name in (
      'input_ids', 'attention_mask', 'decoder_input_ids')))
  golden.assert_close(output.logits, CASE['logits_no_decoder_mask'])


def test_files_are_hugging_faces(folder):
  config = json.loads((folder / 'config.json').read_text())
  assert config['architectures'] == ['LongT5ForConditionalGeneration']
  stored = load_file(folder / 'model.safetensors')
  np.testing.assert_array_equal(
      stored['lm_head.weight'].T,
      CASE.params['decoder']['logits_dense']['kernel'])


def test_parts_of_a_whole_model(folder):
  model = FlaxLongT5Model.from_pretrained(folder)
  assert 'logits_dense' not in model.params['decoder']
  assert not model.can_generate()
  encoder = FlaxLongT5EncoderModel.from_pretrained(folder / 'model.safetensors',
                                                   config=folder)
  assert_same_params(encoder.params, {
      name: CASE.params[name] for name in ('token_embedder', 'encoder')})


def test_a_part_is_written_and_read(folder, tmp_path):
  for model_class in (FlaxLongT5Model, FlaxLongT5EncoderModel):
    path = tmp_path / model_class.__name__
    model = model_class.from_pretrained(folder)
    model.save_pretrained(path)
    assert_same_params(model_class.from_pretrained(path).params, model.params)


def test_a_missing_head_is_an_error_unless_allowed(folder, tmp_path):
  FlaxLongT5Model.from_pretrained(folder).save_pretrained(tmp_path / 'base')
  load = FlaxLongT5ForConditionalGeneration.from_pretrained
  with pytest.raises(ConfigError, match=(
      r'lm_head.weight \(decoder/logits_dense/kernel\) of shape \(32, 96\) '
      r'is missing')):
    load(tmp_path / 'base')
  first, again, other = (load(tmp_path / 'base', seed=seed, allow_missing=(
      'decoder/logits_dense/*',)) for seed in (1, 1, 2))
  assert_same_params(first.params['encoder'], CASE.params['encoder'])
  heads = [model.params['decoder']['logits_dense']['kernel']
           for model in (first, again, other)]
  np.testing.assert_array_equal(heads[0], heads[1])
  assert np.any(heads[0] != heads[2])
  assert 0 < np.std(heads[0]) < 1


def test_a_wrong_shape_is_an_error(folder):
  with pytest.raises(ConfigError, match=r'mlp/w.*has shape \(.*\) there and'):
    FlaxLongT5Model.from_pretrained(folder, d_ff=65)


def test_options(folder):
  model, params = FlaxLongT5Model.from_pretrained(
      folder.parent, jnp.float16, subfolder='model', dropout_rate=0.3,
      gradient_checkpointing=True, _do_init=False, from_pt=True,
      local_files_only=True)
  assert model.dtype == jnp.float16
  assert model.config.dropout_rate == 0.3
  assert model.module.remat == 'layer'
  assert_same_params(params['encoder'], CASE.params['encoder'])
  with pytest.raises(ConfigError, match='holds no parameters'):
    _ = model.params


@pytest.mark.parametrize('arguments, error, message', [
    ({'dtypes': 'float16'}, TypeError, "has no argument 'dtypes'"),
    ({'ignore_mismatched_sizes': True}, ConfigError, 'a checkpoint must fit'),
    ({'dtype': 'int8'}, ConfigError, 'dtype=int8 must be one of'),
    ({'subfolder': 'nowhere'}, ConfigError, 'nowhere'),
])
def test_refused(folder, arguments, error, message):
  with pytest.raises(error, match=message) as raised:
    FlaxLongT5Model.from_pretrained(folder, **arguments)
  assert '\n' not in str(raised.value)


def test_names_on_a_hub_are_not_looked_up():
  with pytest.raises(ConfigError, match=(
      r"'google/long-t5-tglobal-base' must be one of .* on disk")):
    FlaxLongT5Model.from_pretrained('google/long-t5-tglobal-base')


def test_orbax(tmp_path):
  save_orbax(str(tmp_path / 'weights'), CASE.params, CASE.config)
  model = FlaxLongT5ForConditionalGeneration.from_pretrained(
      f'orbax:{tmp_path}/weights')
  assert model.config == CASE.config
  assert_same_params(model.params, CASE.params)


def test_narrow_parameters_are_written_as_they_are(tmp_path):
  model = FlaxLongT5EncoderModel(CASE.config)
  model.save_pretrained(tmp_path, params=model.to_bf16(model.params))
  config = json.loads((tmp_path / 'config.json').read_text())
  assert config['dtype'] == 'bfloat16'
  read = FlaxLongT5EncoderModel.from_pretrained(tmp_path).params
  jax.tree.map(np.testing.assert_array_equal, read, model.to_fp32(
      model.to_bf16(model.params)))


def test_shards(folder, tmp_path):
  model = FlaxLongT5Model.from_pretrained(folder)
  model.save_pretrained(tmp_path, max_shard_size='40KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  assert_same_params(
      FlaxLongT5Model.from_pretrained(tmp_path).params, model.params)


@pytest.mark.parametrize('size, number', [
    (7, 7), ('5GB', 5 * 10**9), ('40 kb', 40_000), ('2MiB', 2**21)])
def test_sizes(size, number):
  assert _bytes(size) == number


@pytest.mark.parametrize('arguments, error, message', [
    ({'max_shard_size': '5 boxes'}, ConfigError, "max_shard_size='5 boxes'"),
    ({'max_shard_size': 0}, ConfigError, 'max_shard_size=0 must be'),
    ({'max_shard_size': '0GB'}, ConfigError, "max_shard_size='0GB' must be"),
    ({'push_to_hub': True}, ConfigError, 'writes to disk only'),
    ({'dtypes': 1}, TypeError, "no argument 'dtypes'"),
    ({'params': {}}, ConfigError, 'has shape None: must be'),
])
def test_nothing_is_written(tmp_path, arguments, error, message):
  model = FlaxLongT5EncoderModel(CASE.config)
  with pytest.raises(error, match=message):
    model.save_pretrained(tmp_path / 'new', **arguments)
  assert not (tmp_path / 'new').exists()


def test_what_was_read_is_logged(folder, tmp_path, caplog):
  stored = load_file(folder / 'model.safetensors')
  stored['encoder.embed_tokens.weight'] = stored['shared.weight']
  save_file(stored, tmp_path / 'model.safetensors')
  with caplog.at_level(logging.INFO, 'longt5_flax'):
    FlaxLongT5Model.from_pretrained(tmp_path, config=str(folder))
  assert 'encoder.embed_tokens.weight: ignored, equal to' in caplog.text


def test_config_of_any_kind(folder):
  class Theirs:
    def to_dict(self):
      return CASE.config.to_dict() | {'use_cache': True}

  for config in (folder, CASE.config.to_dict(), CASE.config, Theirs()):
    model = FlaxLongT5Model(config, _do_init=False)
    assert isinstance(model.config, LongT5Config)
    assert model.config == CASE.config

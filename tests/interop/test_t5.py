"""T5.1.1 as a start for LongT5, from T5X and from Hugging Face."""

import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import golden
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.config import ConfigError
from longt5_flax.interop.t5 import open_t5
from longt5_flax.interop.tensors import WeightsError, load_params
from t5x_files import SIZES, random_tensors, write_t5x

TABLE = 'encoder/side_relpos_bias/rel_embedding'
NORM = 'encoder/layers_{}/attention/T5LayerNorm_0/scale'


def long(kind='transient-global', **fields):
  return LongT5Config(encoder_attention_type=kind, **SIZES | fields)


@pytest.fixture(scope='module')
def t5x(tmp_path_factory):
  return str(write_t5x(tmp_path_factory.mktemp('t5x') / 'checkpoint_1',
                       random_tensors(side=False)))


def huggingface_tensors():
  """A T5's, by the names that transformers' T5 has."""
  generator = np.random.default_rng(1)
  tensors = {}

  def add(name, *shape):
    tensors[f'{name}.weight'] = generator.standard_normal(
        shape).astype(np.float32)

  add('shared', 96, 32)
  add('lm_head', 96, 32)
  for stack in ('encoder', 'decoder'):
    add(f'{stack}.final_layer_norm', 32)
    add(f'{stack}.block.0.layer.0.SelfAttention.relative_attention_bias', 32, 4)
    parts = ('SelfAttention', 'EncDecAttention')[:1 + (stack == 'decoder')]
    for block in (f'{stack}.block.0', f'{stack}.block.1'):
      for i, part in enumerate(parts):
        add(f'{block}.layer.{i}.layer_norm', 32)
        for letter in 'qkvo':
          add(f'{block}.layer.{i}.{part}.{letter}', 32, 32)
      last = f'{block}.layer.{len(parts)}'
      add(f'{last}.layer_norm', 32)
      add(f'{last}.DenseReluDense.wi_0', 64, 32)
      add(f'{last}.DenseReluDense.wi_1', 64, 32)
      add(f'{last}.DenseReluDense.wo', 32, 64)
  return tensors


@pytest.fixture(scope='module')
def huggingface(tmp_path_factory):
  folder = tmp_path_factory.mktemp('t5')
  save_file(huggingface_tensors(), folder / 'model.safetensors')
  write_config(folder)
  return str(folder)


def write_config(folder, **values):
  """The config.json of google/t5-v1_1-base, but for its sizes."""
  (folder / 'config.json').write_text(json.dumps({
      'architectures': ['T5ForConditionalGeneration'], 'model_type': 't5',
      'd_ff': 64, 'd_kv': 8, 'd_model': 32, 'decoder_start_token_id': 0,
      'dropout_rate': 0.1, 'eos_token_id': 1, 'feed_forward_proj': 'gated-gelu',
      'initializer_factor': 1.0, 'is_encoder_decoder': True,
      'layer_norm_epsilon': 1e-06, 'num_decoder_layers': 2, 'num_heads': 4,
      'num_layers': 2, 'output_past': True, 'pad_token_id': 0,
      'relative_attention_num_buckets': 32, 'tie_word_embeddings': False,
      'use_cache': True, 'vocab_size': 96} | values))


@pytest.fixture(params=['t5x', 'huggingface'])
def start(request):
  """(path, what it holds by our names) of a T5 of either kind."""
  expected = (random_tensors(side=False) if request.param == 't5x' else
              golden.flatten(golden.tree_from_hf(huggingface_tensors())))
  return request.getfixturevalue(request.param), expected


@pytest.mark.parametrize('config', [
    None, long(), long('local', local_radius=31), long('full')],
                         ids=['none', 'tglobal', 'local', 'full'])
def test_t5_is_used_and_the_rest_initialised(config, start):
  path, expected = start
  tensors = open_t5(path, config)
  config = config or long()
  assert tensors.config == config
  new = [TABLE, NORM.format(0), NORM.format(1)] * (
      config.encoder_attention_type == 'transient-global')
  assert {*tensors.shapes} == {*expected, *new}
  for name, array in expected.items():
    np.testing.assert_array_equal(tensors.read(name), array, err_msg=name)
  report = '\n'.join(tensors.report)
  assert f'used with {config.encoder_attention_type} attention' in report
  assert (f'initialised: {TABLE} at random (seed 0), T5LayerNorm_0/scale of 2 '
          'encoder layers as ones.' in report) == bool(new)


def test_new_parameters_are_as_the_model_makes_them(t5x):
  tensors = open_t5(t5x)
  model = LongT5ForConditionalGeneration(tensors.config)
  tokens = jnp.ones((1, 1), jnp.int32)
  params = golden.flatten(golden.jit(
      lambda: model.init(jax.random.key(3), tokens, tokens)['params'])())
  assert {**tensors.shapes} == {
      name: array.shape for name, array in params.items()}
  for name in (NORM.format(0), NORM.format(1)):
    np.testing.assert_array_equal(tensors.read(name), params[name])
  # Both uniform between the same bounds.
  table, limit = tensors.read(TABLE), np.sqrt(3 / ((4 + 32) / 2))
  for values in (table, params[TABLE]):
    assert 0.9 * limit < np.abs(values).max() <= limit
  np.testing.assert_array_equal(table, open_t5(t5x).read(TABLE))
  part = slice(1, 3), slice(0, 5)
  np.testing.assert_array_equal(tensors.read(TABLE, part), table[part])
  wanted = flax.traverse_util.unflatten_dict(params, sep='/')
  assert load_params(tensors, wanted).keys() == wanted.keys()


def test_a_longt5_is_refused(tmp_path):
  folder = write_t5x(tmp_path / 'c', random_tensors())
  with pytest.raises(WeightsError) as caught:
    open_t5(str(folder))
  assert str(caught.value) == (
      f'{folder}: is no T5 but a LongT5 already, for it holds {TABLE}.')
  write_config(tmp_path, model_type='longt5')
  save_file(huggingface_tensors(), tmp_path / 'model.safetensors')
  with pytest.raises(ConfigError, match="model_type='longt5' must be one of"):
    open_t5(str(tmp_path))


def test_another_t5_is_refused(huggingface):
  with pytest.raises(WeightsError) as caught:
    open_t5(huggingface, long(layer_norm_epsilon=1e-5))
  assert str(caught.value) == (
      f'{huggingface}: the weights are of a model with '
      'layer_norm_epsilon=1e-06, and this one has 1e-05.')

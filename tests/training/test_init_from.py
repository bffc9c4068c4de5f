"""config.init_from: parameters of any kind, onto a mesh, layers stacked or
not; and what does not fit."""

import dataclasses
from types import SimpleNamespace

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.config import ConfigError
from longt5_flax.interop.huggingface import save_pretrained
from longt5_flax.interop.layers import stack_layers, unstack_layers
from longt5_flax.interop.orbax import save_orbax
from longt5_flax.interop.single_file import save_single_file
from longt5_flax.training import partitioning
from longt5_flax.training.checkpoints import Checkpoints, abstract_state
from longt5_flax.training.init_from import check_spec, initial_params
from longt5_flax.training.train_step import TrainState
from t5x_files import SIZES, random_tensors, write_t5x

CONFIG = LongT5Config(encoder_attention_type='transient-global',
                      local_radius=7, global_block_size=4, **SIZES)
NEW = ('side_relpos_bias', 'T5LayerNorm_0')  # What T5 does not have.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The same parameters in every kind of checkpoint."""
  folder = tmp_path_factory.mktemp('weights')
  params = flax.traverse_util.unflatten_dict(random_tensors(), sep='/')
  save_pretrained(str(folder / 'hf'), CONFIG, params)
  save_orbax(str(folder / 'orbax'), params, CONFIG)
  save_single_file(str(folder / 'safetensors'), CONFIG, params)
  write_t5x(folder / 't5x', random_tensors())
  write_t5x(folder / 't5', random_tensors(side=False))
  checkpoints = Checkpoints(str(folder / 'run' / 'checkpoints'),
                            SimpleNamespace(keep=1, keep_every_steps=0))
  checkpoints.save(
      3, TrainState(jnp.int32(3), stack_layers(params), {}), {},
      {'model': dataclasses.asdict(CONFIG) | {'preset': 'tglobal-tiny'}})
  checkpoints.close()
  return folder


def wanted(stacked, devices):
  """Shapes and shardings, as train.py has them."""
  mesh = partitioning.make_mesh(
      dict(data=1, fsdp=devices // 2, tensor=2, sequence=1),
      jax.devices()[:devices])
  tokens = jnp.ones((1, 1), jnp.int32)
  model = LongT5ForConditionalGeneration(CONFIG, scan_layers=stacked)
  params = jax.eval_shape(lambda: model.init(
      jax.random.key(0), tokens, tokens))['params']
  return abstract_state(
      params, partitioning.state_shardings(params, params, mesh))


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize(
    'kind', ['hf', 'orbax', 'safetensors', 't5x', 't5', 'run'])
def test_every_kind_gives_the_parameters(kind, stacked, folder):
  shapes = wanted(stacked, devices=4)
  params, report = initial_params(f'{kind}:{folder}/{kind}', CONFIG, shapes)
  assert report
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), params
                      ) == jax.tree.map(
                          lambda x: (x.shape, x.dtype, x.sharding), shapes)
  kernel = params['token_embedder']['embedding']
  assert kernel.addressable_shards[0].data.shape == (48, 16)
  flat = flax.traverse_util.flatten_dict(unstack_layers(params), sep='/')
  for name, array in random_tensors().items():
    if kind != 't5' or not any(part in name for part in NEW):
      np.testing.assert_array_equal(flat[name], array, err_msg=name)


def refuses(spec, config, message):
  with pytest.raises(ConfigError) as caught:
    initial_params(spec, config, wanted(False, devices=2))
  assert str(caught.value) == message
  assert '\n' not in message


@pytest.mark.parametrize('kind', ['hf', 'orbax', 'safetensors', 'run'])
@pytest.mark.parametrize('field, value', [
    # Shapes do not tell of these.
    ('local_radius', 15), ('global_block_size', 8),
    ('relative_attention_max_distance', 64), ('layer_norm_epsilon', 1e-5),
    ('scale_decoder_outputs', True),
    # Of these they do, but not so well.
    ('encoder_attention_type', 'local'), ('num_layers', 3),
])
def test_another_model_is_refused(field, value, kind, folder):
  origin = {'hf': f'{folder}/hf/model.safetensors: '}.get(kind, '')
  refuses(f'{kind}:{folder}/{kind}',
          dataclasses.replace(CONFIG, **{field: value}),
          f'init_from={kind}:{folder}/{kind}: {origin}the weights are of a '
          f'model with {field}={getattr(CONFIG, field)!r}, and this one has '
          f'{value!r}.')


def test_heads_of_the_same_shapes_are_counted(folder):
  """2 heads of 16 have the kernels of 4 heads of 8."""
  refuses(f'hf:{folder}/hf',
          dataclasses.replace(CONFIG, num_heads=2, d_kv=16),
          f'init_from=hf:{folder}/hf: {folder}/hf/model.safetensors: the '
          'weights are of a model with d_kv=8, and this one has 16.')


@pytest.mark.parametrize('values', [
    dict(dropout_rate=0.3, initializer_factor=0.5),
    dict(pad_token_id=3, eos_token_id=2, decoder_start_token_id=3)])
def test_what_may_differ(values, folder):
  initial_params(f'orbax:{folder}/orbax',
                 dataclasses.replace(CONFIG, **values), wanted(False, 2))


def test_fields_that_nothing_reads_may_differ(folder, tmp_path):
  """Full attention has neither a radius nor global tokens."""
  full = dataclasses.replace(CONFIG, encoder_attention_type='full')
  tensors = random_tensors(side=False)
  save_orbax(str(tmp_path / 'a'), flax.traverse_util.unflatten_dict(
      tensors, sep='/'), full)
  shapes = jax.eval_shape(
      lambda: flax.traverse_util.unflatten_dict(tensors, sep='/'))
  initial_params(f'orbax:{tmp_path}/a', dataclasses.replace(
      full, local_radius=99, global_block_size=99), shapes)


def test_shapes_of_a_checkpoint_without_a_config(folder, tmp_path):
  arrays = random_tensors() | {
      'encoder/encoder_norm/scale': np.ones(16, np.float32)}
  write_t5x(tmp_path / 'a', arrays)
  refuses(f't5x:{tmp_path}/a', CONFIG,
          f'init_from=t5x:{tmp_path}/a: tensor encoder/encoder_norm/scale has '
          'shape (16,) there and (32,) in this model.')
  refuses(f't5x:{folder}/t5', CONFIG,
          f'init_from=t5x:{folder}/t5: tensor encoder/layers_0/attention/'
          'T5LayerNorm_0/scale of shape (32,) is missing (and 2 more).')


@pytest.mark.parametrize(
    'spec', ['model.ckpt', '/a/b', 'gs://a/b', 'hf:', ':a'])
def test_no_known_kind(spec):
  with pytest.raises(ConfigError) as caught:
    check_spec(spec)
  assert str(caught.value) == (
      f'init_from={spec!r} must be one of hf:DIR_OR_FILE, t5x:DIR_OR_URL, '
      't5:DIR_OR_URL, orbax:DIR, run:WORKDIR, safetensors:FILE.')


@pytest.mark.parametrize('kind', ['hf', 'orbax', 'safetensors', 't5x', 't5'])
def test_nothing_there(kind, tmp_path):
  with pytest.raises(ConfigError) as caught:
    initial_params(f'{kind}:{tmp_path}/no', CONFIG, {})
  message = str(caught.value)
  assert message.startswith(f'init_from={kind}:{tmp_path}/no: ')
  assert '\n' not in message

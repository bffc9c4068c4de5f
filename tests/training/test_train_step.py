"""One step on 1 and on 8 devices, whole and in microbatches."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from golden import assert_close, assert_trees_close, jit, random_params
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.config import ConfigError
from longt5_flax.interop.layers import unstack_layers
from longt5_flax.training import partitioning
from longt5_flax.training.optimizer import make_optimizer
from longt5_flax.training.schedules import make_schedule
from longt5_flax.training.train_step import (
  TrainState,
  batch_loss,
  init_state,
  make_train_step,
)

CONFIG = LongT5Config.preset(
    'tglobal-tiny', vocab_size=96, local_radius=7, global_block_size=4,
    dropout_rate=0.0)
ROWS, INPUTS, TARGETS = 8, 40, 12
# Logits of an eighth of the batch, or of one of 4 microbatches on 2 devices,
# take 4608 bytes: three chunks of the loss.
CHUNKS = {'loss.chunk_mib': 1700 / 2**20}


def settings(**values):
  config = ConfigDict(dict(
      seed=0, loss=dict(z_loss=1e-4, label_smoothing=0.0,
                        normalization='tokens', chunk_mib=0.0),
      optimizer=dict(
          name='adafactor', microbatches=1, clip_global_norm=0.0,
          decay_rate=0.8, clipping_threshold=1.0,
          multiply_by_parameter_scale=True, min_dim_size_to_factor=32,
          b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)))
  config.update_from_flattened_dict(values)
  return config


def make_batch(seed=0):
  """Packed rows with unequal numbers of targets, as real ones have."""
  rng = np.random.default_rng(seed)
  batch = {}
  for side, length in (('encoder', INPUTS), ('decoder', TARGETS)):
    segments = np.zeros((ROWS, length), np.int32)
    for row in segments:
      first, second = sorted(rng.integers(1, length + 1, 2))
      row[:first], row[first:second] = 1, 2
    starts = np.maximum.accumulate(np.where(
        np.diff(segments, prepend=-1), np.arange(length), 0), axis=1)
    batch[f'{side}_segment_ids'] = segments
    batch[f'{side}_positions'] = (np.arange(length) - starts) * (segments > 0)
    batch[f'{side}_input_tokens'] = rng.integers(
        2, 96, (ROWS, length)) * (segments > 0)
  batch['decoder_target_tokens'] = rng.integers(
      2, 96, (ROWS, TARGETS)) * (batch['decoder_segment_ids'] > 0)
  batch['decoder_loss_weights'] = batch['decoder_target_tokens'] > 0
  return {name: array.astype(np.int32) for name, array in batch.items()}


@functools.cache
def first_state(model_config, scan_layers):
  """Parameters on the host; the same for every mesh."""
  model = LongT5ForConditionalGeneration(
      model_config, scan_layers=scan_layers)
  optimizer = make_optimizer(settings().optimizer, lambda step: 1e-2)
  return jax.device_get(jit(lambda: init_state(model, optimizer, 0))())


@functools.cache
def compiled(sizes, model_config, scan_layers, overrides):
  """A mesh, the first state on it, and the step; compiled once a variant."""
  config = settings(**dict(overrides))
  count = int(np.prod([size for _, size in sizes]))
  mesh = partitioning.make_mesh(
      dict(data=1, fsdp=1, tensor=1, sequence=1) | dict(sizes),
      jax.devices()[:count])
  model = LongT5ForConditionalGeneration(model_config, scan_layers=scan_layers)
  schedule = make_schedule('constant', 1e-2, 0, 10)
  optimizer = make_optimizer(config.optimizer, schedule)
  first = first_state(model_config, scan_layers)
  state = TrainState(first.step, first.params,
                     jit(optimizer.init)(first.params))
  shardings = partitioning.state_shardings(state, state.params, mesh)
  step = jit(make_train_step(model, optimizer, schedule, config),
             out_shardings=(shardings, None))
  return mesh, jax.device_put(state, shardings), step


def run(sizes, steps=2, model_config=CONFIG, scan_layers=True, **overrides):
  """Takes steps on a mesh of the given sizes; returns state and metrics."""
  mesh, state, step = compiled(tuple(sizes.items()), model_config, scan_layers,
                               tuple(overrides.items()))
  rows = partitioning.local_rows(mesh, ROWS)
  metrics = []
  with partitioning.active(mesh):
    for i in range(steps):
      batch = partitioning.global_batch(mesh, rows, make_batch(i), ROWS)
      state, values = step(state, batch)
      metrics.append(jax.device_get(values))
  return state, metrics


def relative_norm(actual, expected):
  """The distance of two trees in units of the second's norm."""
  squares = [(np.sum(np.square(a - b)), np.sum(np.square(b)))
             for a, b in zip(jax.tree.leaves(jax.device_get(actual)),
                             jax.tree.leaves(jax.device_get(expected)),
                             strict=True)]
  distance, norm = np.sum(squares, axis=0)
  return np.sqrt(distance / norm)


@pytest.fixture(scope='module')
def one_device():
  return run(dict(data=1))


@pytest.mark.parametrize('sizes, overrides', [
    (dict(data=8), {}), (dict(fsdp=8), CHUNKS),
    (dict(data=2, fsdp=2, tensor=2), CHUNKS)], ids=str)
def test_eight_devices_equal_one(one_device, sizes, overrides):
  state, metrics = run(sizes, **overrides)
  for actual, expected in zip(metrics, one_device[1], strict=True):
    for name in expected:
      np.testing.assert_allclose(
          actual[name], expected[name], rtol=2e-5, err_msg=name)
  assert relative_norm(state.params, one_device[0].params) < 1e-3
  kernel = state.params['encoder']['layers']['mlp']['wi_0']['kernel']
  parts = sizes.get('fsdp', 1) * sizes.get('tensor', 1)
  assert kernel.addressable_shards[0].data.size * parts == kernel.size


def test_fsdp_splits_the_optimizer_like_the_parameters():
  state, _ = run(dict(fsdp=8), steps=0)
  moments = {
      jax.tree_util.keystr(path, simple=True, separator='/'): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)}
  for kernel, split in (('wi_0/kernel', [8, 1]), ('wo/kernel', [1, 8])):
    # Row moments keep the smaller dimension: features of the model, which fsdp
    # splits; column moments those of the MLP.
    parts = []
    for kind in ('v_row', 'v_col'):
      name, = (name for name in moments if f'{kind}/encoder/layers/mlp/'
               f'{kernel}' in name)
      leaf = moments[name]
      parts.append(leaf.size // leaf.addressable_shards[0].data.size)
    assert sorted(parts) == sorted(split), kernel


def test_gradient_accumulation_equals_the_large_batch(one_device):
  state, metrics = run(
      dict(data=2), **{'optimizer.microbatches': 4}, **CHUNKS)
  for actual, expected in zip(metrics, one_device[1], strict=True):
    for name in ('loss', 'z_loss', 'accuracy', 'grad_norm'):
      np.testing.assert_allclose(
          actual[name], expected[name], rtol=2e-5, err_msg=name)
  assert relative_norm(state.params, one_device[0].params) < 1e-3


def test_scan_trains_as_unrolled_layers(one_device):
  """Given the same parameters, two Adafactor steps end in the same ones."""
  config = settings()
  schedule = make_schedule('constant', 1e-2, 0, 10)
  optimizer = make_optimizer(config.optimizer, schedule)
  first = first_state(CONFIG, True)
  params = unstack_layers(first.params)
  state = TrainState(first.step, params, optimizer.init(params))
  step = jit(make_train_step(
      LongT5ForConditionalGeneration(CONFIG), optimizer, schedule, config))
  for i in range(2):
    state, _ = step(state, make_batch(i))
  expected = unstack_layers(one_device[0].params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
    other = expected
    for key in path:
      other = other[key.key]
    assert relative_norm(leaf, other) < 1e-3, path


def test_loss_is_the_mean_over_all_target_tokens():
  """Rows with few targets must not count more than others."""
  model = LongT5ForConditionalGeneration(CONFIG, scan_layers=True)
  params = first_state(CONFIG, True).params
  loss = jit(lambda params, batch: batch_loss(
      model, settings().loss, params, batch))
  batch = make_batch()
  whole = loss(params, batch)
  rows = [loss(params, jax.tree.map(
      lambda x, i=i: x[i:i + 1], batch)) for i in range(ROWS)]
  assert_close(whole.loss_sum, np.sum([row.loss_sum for row in rows]))
  assert whole.weight_sum == np.sum(batch['decoder_loss_weights'])
  _, metrics = run(dict(data=8), steps=1)
  np.testing.assert_allclose(
      metrics[0]['loss'], whole.loss_sum / whole.weight_sum, rtol=2e-5)


def loss_gradient(model, chunk_mib):
  """Sums of the loss and their gradient, as a function of params and batch."""
  config = settings(**{'loss.chunk_mib': chunk_mib, 'loss.z_loss': 1e-2,
                       'loss.label_smoothing': 0.1})

  def loss_sum(params, batch):
    sums = batch_loss(model, config.loss, params, batch)
    return sums.loss_sum, sums

  return jax.grad(loss_sum, has_aux=True)


@pytest.mark.parametrize('tied, dtype', [
    (False, 'float32'), (True, 'float32'), (False, 'bfloat16')])
def test_chunked_loss_equals_the_whole(tied, dtype):
  """On packed rows of 11 targets, in chunks of 4."""
  model = LongT5ForConditionalGeneration(
      dataclasses.replace(
          CONFIG, num_layers=1, num_decoder_layers=1, tie_word_embeddings=tied,
          encoder_attention_type='full'), jnp.dtype(dtype))
  batch = {name: array[:, :11] if name.startswith('decoder') else array
           for name, array in make_batch().items()}
  params = random_params(model, jnp.asarray(batch['encoder_input_tokens']),
                         jnp.asarray(batch['decoder_input_tokens']))
  chunk = 4 * ROWS * 96 * 4 / 2**20
  (expected, sums), (actual, chunked_sums) = jit(
      lambda *arguments: [loss_gradient(model, size)(*arguments)
                          for size in (0.0, chunk)])(params, batch)
  for field, value in sums._asdict().items():
    assert_close(getattr(chunked_sums, field), value, what=field)
  if dtype == 'float32':
    assert_trees_close(actual, expected)
  else:  # What the decoder rounds may be rounded the other way.
    assert_close(actual['decoder']['logits_dense']['kernel'],
                 expected['decoder']['logits_dense']['kernel'])
    assert relative_norm(actual, expected) < 1e-3


def sizes_of_floats(jaxpr):
  """The number of elements of every float array that a program computes."""
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      if jnp.issubdtype(variable.aval.dtype, jnp.floating):
        yield variable.aval.size
    for value in jax.tree.leaves(list(equation.params.values())):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from sizes_of_floats(inner)


@pytest.mark.parametrize('chunk_mib, positions', [(16.0, 2), (0.0, TARGETS)])
def test_logits_are_never_larger_than_a_chunk(chunk_mib, positions):
  """mLongT5's vocabulary: all logits would take 94 MiB, the head 16."""
  config = dataclasses.replace(
      CONFIG, vocab_size=256384, d_model=16, num_layers=1,
      num_decoder_layers=1)
  model = LongT5ForConditionalGeneration(config)
  batch = make_batch()
  state = jax.eval_shape(lambda: init_state(
      model, make_optimizer(settings().optimizer, lambda step: 1e-2), 0))
  program = jax.make_jaxpr(loss_gradient(model, chunk_mib))(
      state.params, batch)
  largest = max(sizes_of_floats(program.jaxpr))
  assert largest == ROWS * positions * 256384
  if chunk_mib:
    compiled = jit(loss_gradient(model, chunk_mib)).lower(
        state.params, batch).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (
        ROWS * TARGETS * 256384)


def test_sum_normalization_keeps_the_published_gradient(one_device):
  _, metrics = run(dict(data=1), steps=1, **{'loss.normalization': 'sum'})
  tokens = np.sum(make_batch()['decoder_loss_weights'])
  np.testing.assert_allclose(
      metrics[0]['grad_norm'], tokens * one_device[1][0]['grad_norm'],
      rtol=1e-4)


def test_dropout_depends_on_seed_and_step_alone():
  config = dataclasses.replace(CONFIG, dropout_rate=0.3)
  first = run(dict(data=1), model_config=config)[1]
  again = run(dict(data=1), model_config=config)[1]
  other = run(dict(data=1), steps=1, model_config=config, seed=1)[1]
  assert [m['loss'] for m in first] == [m['loss'] for m in again]
  mesh, state, step = compiled((('data', 1),), config, True, ())
  with partitioning.active(mesh):
    losses = [step(state.replace(step=state.step + i), make_batch(0))[1]['loss']
              for i in range(2)]
  assert losses[0] == first[0]['loss']
  assert losses[1] != losses[0]
  assert first[0]['loss'] != other[0]['loss']


def test_metrics_count_real_tokens(one_device):
  _, metrics = one_device
  batch = make_batch()
  for side in ('encoder', 'decoder'):
    real = np.sum(batch[f'{side}_segment_ids'] > 0)
    assert metrics[0][f'{side}_tokens'] == real
    np.testing.assert_allclose(
        metrics[0][f'{side}_padding'],
        1 - real / batch[f'{side}_segment_ids'].size, rtol=1e-5)
  assert metrics[0]['learning_rate'] == np.float32(1e-2)


@pytest.mark.parametrize('sizes, text', [
    (dict(data=3), r'needs 3 devices; there are 8'),
    (dict(data=-1, fsdp=3), r'needs a multiple of 3 devices; there are 8'),
    (dict(data=-1, fsdp=-1), r'only one axis of -1'),
    (dict(data=0), r'mesh.data=0 must be at least 1'),
], ids=str)
def test_impossible_meshes_are_refused(sizes, text):
  with pytest.raises(ConfigError, match=text):
    partitioning.make_mesh(
        dict(data=1, fsdp=1, tensor=1, sequence=1) | sizes, jax.devices())


def test_every_parameter_has_logical_axes():
  model = LongT5ForConditionalGeneration(
      dataclasses.replace(CONFIG, feed_forward_proj='relu'))
  optimizer = make_optimizer(settings().optimizer, lambda step: 1e-3)
  abstract = jax.eval_shape(lambda: init_state(model, optimizer, 0))
  mesh = partitioning.make_mesh(
      dict(data=1, fsdp=8, tensor=1, sequence=1), jax.devices())
  shardings = partitioning.state_shardings(
      abstract.params, abstract.params, mesh)
  assert all(isinstance(x, jax.sharding.NamedSharding)
             for x in jax.tree.leaves(shardings))
  other = {'other': {'kernel': jnp.ones((8, 8))}}
  with pytest.raises(KeyError, match='other/kernel: no logical axes'):
    partitioning.state_shardings(other, other, mesh)

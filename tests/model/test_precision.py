"""bfloat16 and float16: finite on 16,384 tokens, and as close to float32 as
their rounding allows, also where float16's largest number is passed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.model.precision import contract

CONFIG = LongT5Config(
    vocab_size=64, d_model=16, d_kv=8, num_heads=1, d_ff=16, num_layers=1,
    encoder_attention_type='transient-global', feed_forward_proj='gated-gelu',
    tie_word_embeddings=False)
FLOAT16_MAX = 65504
# Every method whose output is added to the residual stream.
ADDED = (
    'encoder/layers_0/attention/__call__', 'encoder/layers_0/mlp/__call__',
    'decoder/layers_0/self_attention/__call__',
    'decoder/layers_0/encoder_decoder_attention/attend_to_encoded',
    'decoder/layers_0/mlp/__call__')


def with_large_outputs(params):
  """Attention and MLP outputs beyond float16, kernels within it."""
  def scale(path, leaf):
    return leaf * 5e4 if path[-2].key in ('out', 'wo') else leaf
  params = jax.tree_util.tree_map_with_path(scale, params)
  assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(params)
             ) < FLOAT16_MAX
  return params


@functools.cache
def compiled(config, dtype, length):
  """params -> (logits, modules' outputs), gradients."""
  generator = np.random.default_rng(length)
  inputs = jnp.asarray(generator.integers(2, 64, (1, length)), jnp.int32)
  targets = jnp.asarray(generator.integers(2, 64, (1, 24)), jnp.int32)
  model = LongT5ForConditionalGeneration(config, dtype=dtype)

  def loss(params):
    logits, state = model.apply(
        {'params': params}, inputs, targets, mutable=['intermediates'],
        capture_intermediates=lambda module, _: module.name in (
            'mlp', 'attention', 'self_attention',
            'encoder_decoder_attention'))
    outputs = {
        path: value[0]
        for path, value in golden.flatten(state['intermediates']).items()
        if path in ADDED}
    return jnp.mean(jnp.square(logits)), (logits, outputs)

  params = golden.random_params(model, inputs[:, :16], targets)
  return params, golden.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('attention_type', ['transient-global', 'local'])
def test_16k_tokens_are_finite(attention_type, dtype):
  """Forward and backward, by ordinary weights and by large ones."""
  config = dataclasses.replace(CONFIG, encoder_attention_type=attention_type)
  params, gradient = compiled(config, dtype, 16384)
  for weights in (params, with_large_outputs(params)):
    gradients, (logits, _) = gradient(weights)
    assert logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    for path, leaf in golden.flatten(gradients).items():
      assert leaf.dtype == jnp.float32, path
      assert np.isfinite(leaf).all(), path
      assert np.abs(leaf).max() > 0, f'{path}: the gradient vanished'


SHORT = dataclasses.replace(CONFIG, local_radius=7, global_block_size=4)


def relative_error(actual, expected):
  actual, expected = np.asarray(actual), np.asarray(expected)
  return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize('large', [False, True])
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
def test_close_to_float32(dtype, large):
  params, exact = compiled(SHORT, jnp.float32, 96)
  _, narrow = compiled(SHORT, dtype, 96)
  if large:
    params = with_large_outputs(params)
  expected_gradients, (expected, outputs) = exact(params)
  if large:
    for name in ADDED:
      assert np.abs(outputs[name]).max() > FLOAT16_MAX, name
  gradients, (logits, _) = narrow(params)
  rounding = float(jnp.finfo(dtype).eps)
  assert logits.dtype == jnp.float32
  error = relative_error(logits, expected)
  # That it is there shows that the dtype was used.
  assert rounding / 8 < error < 8 * rounding, f'logits: {error:.3g}'
  gradients = golden.flatten(gradients)
  for path, leaf in golden.flatten(expected_gradients).items():
    error = relative_error(gradients[path], leaf)
    assert error < 32 * rounding, f'{path}: {error:.3g}'


def test_encoder_output_is_float32():
  model = LongT5ForConditionalGeneration(SHORT, dtype=jnp.bfloat16)
  tokens = jnp.ones((1, 20), jnp.int32)
  shape = jax.eval_shape(
      functools.partial(model.init, method='encode'), jax.random.key(0), tokens)
  encoded = jax.eval_shape(
      functools.partial(model.apply, method='encode'), shape, tokens)
  assert encoded.dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(shape)} == {
      jnp.dtype('float32')}


@pytest.mark.parametrize('left, right', [
    (120, -120), (-120, 100), (60, 60), (-60, -60),
    (-120, 120)])
def test_float16_products_do_not_depend_on_scale(left, right):
  """Powers of two on the operands come out of the product exactly."""
  generator = np.random.default_rng(0)
  a = generator.integers(1, 9, (1, 3, 5)).astype(np.float32)
  b = generator.integers(-8, 9, (5, 4)).astype(np.float32)
  product = contract('BLD,DF->BLF', jnp.ldexp(a, left), jnp.ldexp(b, right),
                     jnp.float16)
  np.testing.assert_array_equal(
      product, np.ldexp(a.astype(np.float64) @ b, left + right))


def test_float16_product_of_zeros_is_zero():
  zeros = jnp.zeros((1, 3, 5))
  assert not np.any(contract('BLD,DF->BLF', zeros, jnp.ones((5, 4)),
                             jnp.float16))

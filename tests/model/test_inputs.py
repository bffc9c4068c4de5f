"""The pure modules take NumPy arrays, and Hugging Face's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import (
    LongT5Config,
    LongT5EncoderModel,
    LongT5ForConditionalGeneration,
    LongT5Model,
)

CONFIG = LongT5Config(
    vocab_size=40, d_model=8, d_kv=4, num_heads=2, d_ff=12, num_layers=1,
    local_radius=3, tie_word_embeddings=False)
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.integers(2, 40, (2, 9))
MASK = np.arange(9) < np.array([[9], [5]])
TARGETS = GENERATOR.integers(2, 40, (2, 4))
TARGET_MASK = np.array([[1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize('model_class', [
    LongT5Model, LongT5ForConditionalGeneration])
def test_names_and_kinds(model_class):
  model = model_class(CONFIG)
  params = golden.random_params(model, INPUTS, TARGETS)

  def run(*args, **kwargs):
    return model.apply({'params': params}, *args, **kwargs)

  expected = golden.jit(lambda: run(
      jnp.asarray(INPUTS), jnp.asarray(TARGETS), jnp.asarray(MASK, jnp.int32),
      decoder_mask=jnp.asarray(TARGET_MASK, bool)))()
  actual = golden.jit(lambda: run(
      input_ids=INPUTS, attention_mask=MASK, decoder_input_ids=TARGETS,
      decoder_attention_mask=TARGET_MASK))()
  np.testing.assert_array_equal(actual, expected)
  encoded = golden.jit(lambda: run(
      input_ids=INPUTS, attention_mask=MASK, method='encode'))()
  in_parts = golden.jit(lambda: run(
      np.asarray(encoded), decoder_input_ids=TARGETS,
      encoder_attention_mask=MASK, decoder_attention_mask=TARGET_MASK,
      method='decode'))()
  golden.assert_close(in_parts, expected)
  assert np.any(golden.jit(lambda: run(INPUTS, TARGETS))() != expected)


def test_init_by_either_name():
  model = LongT5EncoderModel(CONFIG)
  ours, theirs = (
      jax.eval_shape(lambda kwargs=kwargs: model.init(
          jax.random.key(0), **kwargs)) for kwargs in (
              {'encoder_input_tokens': INPUTS}, {'input_ids': INPUTS}))
  assert ours == theirs


def test_one_argument_under_two_names():
  model = LongT5EncoderModel(CONFIG)
  with pytest.raises(TypeError, match='input_ids and encoder_input_tokens are'):
    model.init(jax.random.key(0), encoder_input_tokens=INPUTS,
               input_ids=INPUTS)

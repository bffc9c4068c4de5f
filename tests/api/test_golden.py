"""The models by Hugging Face's calling conventions, against its numbers, by
parameters that save_pretrained has written and from_pretrained read."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax.api import (
    FlaxLongT5EncoderModel,
    FlaxLongT5ForConditionalGeneration,
    FlaxLongT5Model,
    shift_tokens_right,
)
from longt5_flax.training.losses import cross_entropy

WHOLE = [name for name in golden.names('hf_') if not name.endswith('_model')]
GRADIENTS = [name for name in WHOLE if golden.load(name).gradients]
UNTIED = [name for name in WHOLE if name.endswith('_untied')]
INPUTS = ('input_ids', 'attention_mask', 'decoder_input_ids',
          'decoder_attention_mask')


@functools.cache
def model_of(name, model_class=FlaxLongT5ForConditionalGeneration):
  case = golden.load(name)
  model = model_class(case.config, _do_init=False)
  model.params = case.params
  with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    return model_class.from_pretrained(folder)


@functools.cache
def called(name):
  """The case, and all that a call gives."""
  case = golden.load(name)
  return case, model_of(name)(
      *(case[argument] for argument in INPUTS), output_attentions=True,
      output_hidden_states=True)


def assert_states(actual, expected, mask):
  assert len(actual) == len(expected)
  for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
    golden.assert_close(a, b, mask, f'hidden state {i}')


@pytest.mark.parametrize('name', WHOLE)
def test_hidden_states_and_logits(name):
  case, output = called(name)
  seen, written = case['attention_mask'], case['decoder_attention_mask']
  assert_states(
      output.encoder_hidden_states, case['encoder_hidden_states'], seen)
  golden.assert_close(output.encoder_last_hidden_state,
                      case['encoder_hidden_states'][-1], seen, 'encoder')
  golden.assert_close(output.decoder_hidden_states[-1],
                      case['decoder_last_hidden_state'], written, 'decoder')
  if case.get('decoder_hidden_states') is not None:
    assert_states(
        output.decoder_hidden_states, case['decoder_hidden_states'], written)
  golden.assert_close(output.logits, case['logits'], written, 'logits')


@pytest.mark.parametrize('name', UNTIED)
def test_encode_and_decode_without_decoder_mask(name):
  case, model = golden.load(name), model_of(name)
  mask = case['attention_mask']
  encoded = model.encode(case['input_ids'], mask)
  decoded = model.decode(case['decoder_input_ids'], encoded, mask)
  golden.assert_close(
      decoded.logits, case['logits_no_decoder_mask'], what='logits')


@pytest.mark.parametrize('name', UNTIED)
def test_attentions(name):
  """Rows of real queries, all keys."""
  case, output = called(name)
  block = case.config.local_radius + 1
  mask = case['attention_mask']
  blocks = np.pad(mask, ((0, 0), (0, -mask.shape[1] % block)))
  blocks = blocks.reshape(len(mask), -1, block)
  for i, actual in enumerate(output.encoder_attentions):
    expected = case[f'encoder_attentions_{i}']  # [B, N, H, C, 3C + G]
    assert actual.shape == expected.shape
    golden.assert_close(np.moveaxis(actual, 3, 2), np.moveaxis(expected, 3, 2),
                        blocks, f'encoder layer {i}')
  assert len(output.encoder_attentions) == case.config.num_layers
  for field in ('decoder_attentions', 'cross_attentions'):
    assert len(output[field]) == case.config.num_decoder_layers
    for i, actual in enumerate(output[field]):
      golden.assert_close(
          np.swapaxes(actual, 1, 2), np.swapaxes(case[f'{field}_{i}'], 1, 2),
          case['decoder_attention_mask'], f'{field} {i}')


@pytest.mark.parametrize('name', GRADIENTS)
def test_loss_and_gradients_through_params(name):
  case, model = golden.load(name), model_of(name)
  labels = jnp.asarray(case['labels'])
  inputs = shift_tokens_right(labels, 0, 0)
  weights = (labels != -100).astype(jnp.float32)

  def loss(params):
    logits = model(case['input_ids'], case['attention_mask'], inputs,
                   params=params).logits
    sums = cross_entropy(
        logits, jnp.where(labels == -100, 0, labels), weights, z_loss=0.0)
    return sums.loss_sum / sums.weight_sum

  value, gradients = golden.jit(jax.value_and_grad(loss))(case.params)
  golden.assert_close(value, case['loss'], what='loss')
  golden.assert_trees_close(gradients, case.gradients, 'gradient')


@pytest.mark.parametrize('name', UNTIED)
def test_logits_from_labels(name):
  case = golden.load(name)
  output = model_of(name)(case['input_ids'], case['attention_mask'],
                          shift_tokens_right(case['labels'], 0, 0))
  golden.assert_close(output.logits, case['logits_from_labels'], what='logits')


@pytest.mark.parametrize('name', UNTIED)
def test_without_a_mask_pads_are_attended_to(name):
  case = golden.load(name)
  encoded = model_of(name).encode(case['input_ids'])
  golden.assert_close(encoded.last_hidden_state,
                      case['no_mask_encoder_last_hidden_state'])


@pytest.mark.parametrize('name', UNTIED[-1:])
@pytest.mark.parametrize('length', [3, 5, 8])
def test_short_input(name, length):
  """Shorter than a global block, shorter than a local one, and one block."""
  case = golden.load(name)
  rows = slice(len(case[f'short{length}_logits']))
  mask = case[f'short{length}_attention_mask']
  output = model_of(name)(case[f'short{length}_input_ids'], mask,
                          case['decoder_input_ids'][rows])
  golden.assert_close(output.encoder_last_hidden_state,
                      case[f'short{length}_encoder_last_hidden_state'], mask,
                      'encoder')
  golden.assert_close(output.logits, case[f'short{length}_logits'],
                      case['decoder_attention_mask'][rows], 'logits')


@pytest.mark.parametrize('name', golden.names('hf_local_base_model'))
def test_base_model(name):
  case = golden.load(name)
  output = model_of(name, FlaxLongT5Model)(
      *(case[argument] for argument in INPUTS))
  golden.assert_close(
      output.encoder_last_hidden_state, case['encoder_last_hidden_state'],
      case['attention_mask'], 'encoder')
  golden.assert_close(
      output.last_hidden_state, case['decoder_last_hidden_state'],
      case['decoder_attention_mask'], 'decoder')


@pytest.mark.parametrize('name', golden.names('hf_tglobal_encoder_model'))
def test_encoder_model(name):
  case = golden.load(name)
  output = model_of(name, FlaxLongT5EncoderModel)(
      case['input_ids'], case['attention_mask'])
  golden.assert_close(
      output.last_hidden_state, case['encoder_last_hidden_state'],
      case['attention_mask'])

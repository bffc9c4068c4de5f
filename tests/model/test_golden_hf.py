"""Equal to Hugging Face's implementation, number by number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import (
  LongT5EncoderModel,
  LongT5ForConditionalGeneration,
  LongT5Model,
)
from longt5_flax.training.losses import cross_entropy

WHOLE = [name for name in golden.names('hf_') if not name.endswith('_model')]
GRADIENTS = [name for name in WHOLE if golden.load(name).gradients]
UNTIED = [name for name in WHOLE if name.endswith('_untied')]


@functools.cache
def model_of(name):
  """(params, tokens, mask, targets) -> logits, intermediates; compiled."""
  model = LongT5ForConditionalGeneration(golden.load(name).config)

  def apply(params, tokens, mask, targets):
    logits, state = model.apply(
        {'params': params}, tokens, targets, encoder_segment_ids=mask,
        mutable=['intermediates'])
    return logits, state['intermediates']

  return golden.jit(apply)


@functools.cache
def computed(name):
  case = golden.load(name)
  return case, *model_of(name)(
      case.params, case['input_ids'], case['attention_mask'],
      case['decoder_input_ids'])


def hidden_states(stack, num_layers):
  """In Hugging Face's order: every layer's input, and the normed output."""
  return [stack[f'layers_{i}']['residual'][0] for i in range(num_layers)] + [
      stack['output'][0]]


@pytest.mark.parametrize('name', WHOLE)
def test_encoder_hidden_states(name):
  case, _, state = computed(name)
  actual = hidden_states(state['encoder'], case.config.num_layers)
  expected = case['encoder_hidden_states']
  assert len(actual) == len(expected)
  for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
    golden.assert_close(a, b, case['attention_mask'], f'hidden state {i}')
  if case.get('encoder_last_hidden_state') is not None:
    golden.assert_close(actual[-1], case['encoder_last_hidden_state'],
                        case['attention_mask'], 'last hidden state')


@pytest.mark.parametrize('name', WHOLE)
def test_decoder_hidden_states(name):
  case, _, state = computed(name)
  actual = hidden_states(state['decoder'], case.config.num_decoder_layers)
  mask = case['decoder_attention_mask']
  golden.assert_close(
      actual[-1], case['decoder_last_hidden_state'], mask, 'last')
  expected = case.get('decoder_hidden_states')
  if expected is not None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
      golden.assert_close(a, b, mask, f'hidden state {i}')


@pytest.mark.parametrize('name', WHOLE)
def test_logits(name):
  case, logits, _ = computed(name)
  golden.assert_close(
      logits, case['logits'], case['decoder_attention_mask'], 'logits')
  if case.get('logits_no_decoder_mask') is not None:
    golden.assert_close(logits, case['logits_no_decoder_mask'], what='no mask')


def shifted(labels):
  """Decoder inputs, targets and weights, as Hugging Face makes them."""
  weights = (labels != -100).astype(np.float32)
  targets = np.where(labels == -100, 0, labels)
  return np.pad(targets[:, :-1], ((0, 0), (1, 0))), targets, weights


@pytest.mark.parametrize('name', WHOLE)
def test_loss_from_labels(name):
  case = golden.load(name)
  inputs, targets, weights = shifted(case['labels'])
  logits, _ = model_of(name)(
      case.params, case['input_ids'], case['attention_mask'], inputs)
  if case.get('logits_from_labels') is not None:
    golden.assert_close(logits, case['logits_from_labels'], what='logits')
  sums = golden.jit(functools.partial(cross_entropy, z_loss=0.0))(
      logits, targets, weights)
  golden.assert_close(
      sums.loss_sum / sums.weight_sum, case['loss'], what='loss')


@pytest.mark.parametrize('name', GRADIENTS)
def test_gradients(name):
  case = golden.load(name)
  inputs, targets, weights = map(jnp.asarray, shifted(case['labels']))
  tokens = jnp.asarray(case['input_ids'])
  mask = jnp.asarray(case['attention_mask'])
  model = LongT5ForConditionalGeneration(case.config)

  def loss(params):
    logits = model.apply(
        {'params': params}, tokens, inputs, encoder_segment_ids=mask)
    sums = cross_entropy(logits, targets, weights, z_loss=0.0)
    return sums.loss_sum / sums.weight_sum

  value, gradients = golden.jit(jax.value_and_grad(loss))(case.params)
  golden.assert_close(value, case['loss'], what='loss')
  golden.assert_trees_close(gradients, case.gradients, 'gradient')


@pytest.mark.parametrize('name', UNTIED)
def test_encoder_attentions(name):
  """Rows of real queries, all keys: unused and padded ones have weight 0."""
  case, _, state = computed(name)
  block = case.config.local_radius + 1
  for i in range(case.config.num_layers):
    actual = state['encoder'][f'layers_{i}']['attention']['weights'][0]
    expected = case[f'encoder_attentions_{i}']
    mask = case['attention_mask']
    mask = np.pad(mask, ((0, 0), (0, -mask.shape[1] % block)))
    mask = mask.reshape(len(mask), -1, block)
    golden.assert_close(
        np.moveaxis(actual, 3, 2), np.moveaxis(expected, 3, 2), mask,
        f'layer {i}')


@pytest.mark.parametrize('name', UNTIED)
@pytest.mark.parametrize('ours, theirs', [
    ('self_attention', 'decoder_attentions'),
    ('encoder_decoder_attention', 'cross_attentions')])
def test_decoder_attentions(name, ours, theirs):
  case, _, state = computed(name)
  for i in range(case.config.num_decoder_layers):
    actual = state['decoder'][f'layers_{i}'][ours]['weights'][0]
    golden.assert_close(
        np.swapaxes(actual, 1, 2), np.swapaxes(case[f'{theirs}_{i}'], 1, 2),
        case['decoder_attention_mask'], f'layer {i}')


@pytest.mark.parametrize('name', UNTIED)
def test_without_a_mask_pads_are_attended_to(name):
  case = golden.load(name)
  _, state = model_of(name)(
      case.params, case['input_ids'], np.ones_like(case['attention_mask']),
      case['decoder_input_ids'])
  golden.assert_close(state['encoder']['output'][0],
                      case['no_mask_encoder_last_hidden_state'])


@pytest.mark.parametrize('name', UNTIED)
@pytest.mark.parametrize('length', [3, 5, 8])
def test_short_input(name, length):
  """Shorter than a global block, shorter than a local one, and one block."""
  case = golden.load(name)
  rows = slice(len(case[f'short{length}_logits']))
  logits, state = model_of(name)(
      case.params, case[f'short{length}_input_ids'],
      case[f'short{length}_attention_mask'], case['decoder_input_ids'][rows])
  golden.assert_close(
      state['encoder']['output'][0],
      case[f'short{length}_encoder_last_hidden_state'],
      case[f'short{length}_attention_mask'], 'encoder output')
  golden.assert_close(logits, case[f'short{length}_logits'],
                      case['decoder_attention_mask'][rows], 'logits')


@pytest.mark.parametrize('name', golden.names('hf_local_base_model'))
def test_base_model(name):
  """The model without a head."""
  case = golden.load(name)
  model = LongT5Model(case.config)
  output, state = golden.jit(lambda params, tokens, targets, mask: model.apply(
      {'params': params}, tokens, targets, encoder_segment_ids=mask,
      mutable=['intermediates']))(
          case.params, case['input_ids'], case['decoder_input_ids'],
          case['attention_mask'])
  golden.assert_close(
      state['intermediates']['encoder']['output'][0],
      case['encoder_last_hidden_state'], case['attention_mask'], 'encoder')
  golden.assert_close(output, case['decoder_last_hidden_state'],
                      case['decoder_attention_mask'], 'decoder')


@pytest.mark.parametrize('name', golden.names('hf_tglobal_encoder_model'))
def test_encoder_model(name):
  case = golden.load(name)
  model = LongT5EncoderModel(case.config)
  output = golden.jit(lambda params, tokens, mask: model.apply(
      {'params': params}, tokens, encoder_segment_ids=mask))(
          case.params, case['input_ids'], case['attention_mask'])
  golden.assert_close(output, case['encoder_last_hidden_state'],
                      case['attention_mask'], 'encoder')

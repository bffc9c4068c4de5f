"""Equal to the original implementation, number by number."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import LongT5ForConditionalGeneration
from longt5_flax.interop.layers import stack_layers, unstack_layers
from longt5_flax.model.global_tokens import assign_global_blocks
from longt5_flax.training.losses import cross_entropy

CASES = golden.names('flaxformer_')
BATCH = ('encoder_input_tokens', 'decoder_input_tokens',
         'encoder_segment_ids', 'encoder_positions', 'decoder_segment_ids')


@functools.cache
def computed(name, scan_layers=False):
  """Everything the case has numbers for, from one compilation."""
  case = golden.load(name)
  model = LongT5ForConditionalGeneration(case.config, scan_layers=scan_layers)
  arrays = {key: jnp.asarray(value) for key, value in case.arrays.items()}
  inputs = {key: arrays[key] for key in BATCH if key in arrays}
  labels = arrays['decoder_target_tokens'], arrays['decoder_loss_weights']

  def loss(params):
    logits, state = model.apply(
        {'params': params}, **inputs, mutable=['intermediates'])
    sums = cross_entropy(logits, *labels)
    smooth = cross_entropy(logits, *labels, label_smoothing=0.1)
    encoded = state['intermediates']['encoder']['output'][0]
    return sums.loss_sum, (sums, smooth, logits, encoded)

  params = stack_layers(case.params) if scan_layers else case.params
  if case.gradients is None:
    (_, outputs), gradients = golden.jit(loss)(params), None
  else:
    (_, outputs), gradients = golden.jit(
        jax.value_and_grad(loss, has_aux=True))(params)
  return case, *outputs, gradients


def encoder_mask(case):
  return case.arrays.get(
      'encoder_segment_ids', case['encoder_input_tokens']) > 0


SCANNED = [(name, False) for name in CASES] + [
    (name, True) for name in CASES if name.endswith('l_packed')]


@pytest.mark.parametrize('name, scan_layers', SCANNED)
def test_encoder_output(name, scan_layers):
  case, _, _, _, encoded, _ = computed(name, scan_layers)
  golden.assert_close(
      encoded, case['encoder_output'], encoder_mask(case), 'encoder output')


@pytest.mark.parametrize('name, scan_layers', SCANNED)
def test_logits(name, scan_layers):
  case, _, _, logits, _, _ = computed(name, scan_layers)
  real = case.arrays.get(
      'decoder_segment_ids', case['decoder_target_tokens']) > 0
  golden.assert_close(logits, case['logits'], real, 'logits')


@pytest.mark.parametrize('name, scan_layers', SCANNED)
def test_loss(name, scan_layers):
  case, sums, smooth, _, _, _ = computed(name, scan_layers)
  for field in ('loss_sum', 'z_loss_sum', 'weight_sum'):
    golden.assert_close(getattr(sums, field), case[field], what=field)
  golden.assert_close(smooth.loss_sum, case['loss_sum_label_smoothing_0p1'],
                      what='label smoothing')


@pytest.mark.parametrize('name, scan_layers', [
    pair for pair in SCANNED if golden.load(pair[0]).gradients])
def test_gradients(name, scan_layers):
  case, _, _, _, _, gradients = computed(name, scan_layers)
  if scan_layers:
    gradients = unstack_layers(gradients)
  golden.assert_trees_close(gradients, case.gradients, 'gradient')


@pytest.mark.parametrize('name', [name for name in CASES if 'tglobal' in name])
def test_global_blocks(name):
  case = golden.load(name)
  segment_ids = encoder_mask(case).astype(np.int32)
  segment_ids = case.arrays.get('encoder_segment_ids', segment_ids)
  positions = case.arrays.get(
      'encoder_positions', np.arange(segment_ids.shape[1]) * segment_ids)
  blocks = golden.jit(functools.partial(
      assign_global_blocks, block_size=case.config.global_block_size))(
          segment_ids, positions)
  np.testing.assert_array_equal(blocks.block_ids, case['global_block_ids'])
  np.testing.assert_array_equal(blocks.segment_ids, case['global_segment_ids'])


def test_positions_by_default_are_those_of_the_segments():
  """Leaving `encoder_positions` out changes nothing."""
  case = golden.load('flaxformer_tglobal_packed')
  model = LongT5ForConditionalGeneration(case.config)
  encoded = golden.jit(lambda params, tokens, segments: model.apply(
      {'params': params}, tokens, segments, method='encode'))(
          case.params, case['encoder_input_tokens'],
          case['encoder_segment_ids'])
  golden.assert_close(
      encoded, case['encoder_output'], encoder_mask(case), 'encoder output')

"""Who depends on whom, proved by gradients: zero means exactly zero."""

import dataclasses

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longt5_flax import LongT5Config, LongT5ForConditionalGeneration

CONFIG = LongT5Config(
    vocab_size=96, d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=1,
    local_radius=3, global_block_size=4, feed_forward_proj='gated-gelu',
    tie_word_embeddings=False)


def model_and_params(**fields):
  model = LongT5ForConditionalGeneration(dataclasses.replace(CONFIG, **fields))
  tokens = jnp.ones((1, 8), jnp.int32)
  return model, golden.random_params(model, tokens, tokens)


def reach(outputs, params):
  """Whether output i depends on the embedding of token v: [length, vocabulary].

  Tokens of a row are all different, so v stands for one position.
  """
  def probed(embedding):
    changed = params | {'token_embedder': {'embedding': embedding}}
    output = outputs(changed)[0]
    probe = np.random.default_rng(0).standard_normal(output.shape[1])
    return output @ probe.astype(np.float32)

  jacobian = golden.jit(jax.jacrev(probed))(
      params['token_embedder']['embedding'])
  return np.abs(np.asarray(jacobian)).max(-1) > 0


def encoder_reach(segments, **fields):
  """[L, L]: does output i depend on input j, for one row."""
  model, params = model_and_params(**fields)
  tokens = jnp.arange(10, 10 + len(segments))[None]
  segments = jnp.array([segments])
  found = reach(
      lambda params: model.apply(
          {'params': params}, tokens, segments, method='encode'), params)
  return found[:, 10:10 + tokens.shape[1]]


def test_decoder_is_causal_and_sees_the_inputs():
  """Every target sees itself, those before it, and all inputs but padding."""
  model, params = model_and_params(num_decoder_layers=2)
  inputs, targets = jnp.arange(10, 22)[None], jnp.arange(40, 53)[None]
  segments = (jnp.arange(12)[None] < 9).astype(jnp.int32)
  found = reach(lambda params: model.apply(
      {'params': params}, inputs, targets, segments), params)
  np.testing.assert_array_equal(
      found[:, 40:53], np.tril(np.ones((13, 13), bool)))
  np.testing.assert_array_equal(
      found[:, 10:22], np.broadcast_to(np.arange(12) < 9, (13, 12)))


def test_packed_targets_see_their_own_segment_only():
  model, params = model_and_params()
  inputs, targets = jnp.arange(10, 20)[None], jnp.arange(40, 47)[None]
  source = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 0])
  target = np.array([1, 1, 1, 2, 2, 0, 0])
  found = reach(lambda params: model.apply(
      {'params': params}, inputs, targets, jnp.asarray(source)[None],
      decoder_segment_ids=jnp.asarray(target)[None]), params)[:5]
  same = target[:5, None] == target
  np.testing.assert_array_equal(
      found[:, 40:47], same & np.tril(np.ones((5, 7), bool)))
  np.testing.assert_array_equal(found[:, 10:20], target[:5, None] == source)


@pytest.mark.parametrize('radius, num_layers', [(1, 1), (3, 1), (7, 1), (2, 2)])
def test_local_reach_is_the_radius(radius, num_layers):
  """Exactly `radius` in one layer, twice that in two."""
  found = encoder_reach([1] * 27, local_radius=radius, num_layers=num_layers)
  index = np.arange(27)
  np.testing.assert_array_equal(
      found, np.abs(index[:, None] - index) <= radius * num_layers)


@pytest.mark.parametrize(
    'attention_type', ['local', 'transient-global', 'full'])
def test_reach_in_a_packed_row(attention_type):
  """Nothing of other segments or of padding; through the global tokens all
  of the own segment, unless it is too short to have one."""
  segments = np.array([1] * 13 + [2] * 3 + [3] * 9 + [0] * 2)
  found = encoder_reach(
      segments.tolist(), encoder_attention_type=attention_type, local_radius=1)
  index = np.arange(len(segments))
  same = (segments[:, None] == segments) & (segments > 0)
  near = np.abs(index[:, None] - index) <= 1
  if attention_type == 'transient-global':
    near |= segments != 2
  elif attention_type == 'full':
    near[:] = True
  real = segments > 0
  np.testing.assert_array_equal(found[real], (same & near)[real])


PACKED = {
    'inputs': [[11, 5, 8], [2, 20]],
    'targets': [[4, 2, 5], [6, 3]],
}


@pytest.mark.parametrize('attention_type', ['local', 'transient-global'])
def test_packed_is_padded_separately(attention_type):
  """Examples in one row, unaligned, and each in a row of its own: the same
  logits, and the same gradients of their sum."""
  model, params = model_and_params(encoder_attention_type=attention_type)
  generator = np.random.default_rng(1)
  packed = {key: np.zeros((2, length), np.int32) for key, length in (
      ('x', 25), ('y', 12), ('x_segments', 25), ('y_segments', 12))}
  padded = {key: np.zeros((5, length), np.int32) for key, length in (
      ('x', 22), ('y', 7), ('x_segments', 22), ('y_segments', 7))}
  places, example = [], 0
  for row, lengths in enumerate(PACKED['inputs']):
    starts = {'x': 0, 'y': 0}
    for number, length in enumerate(lengths):
      targets = PACKED['targets'][row][number]
      places.append((row, starts['y'], targets))
      for key, count in (('x', length), ('y', targets)):
        tokens = generator.integers(2, 96, count)
        here = slice(starts[key], starts[key] + count)
        packed[key][row, here] = tokens
        packed[f'{key}_segments'][row, here] = number + 1
        padded[key][example, :count] = tokens
        padded[f'{key}_segments'][example, :count] = 1
        starts[key] += count
      example += 1

  def loss(params, batch):
    logits = model.apply(
        {'params': params}, batch['x'], batch['y'], batch['x_segments'],
        decoder_segment_ids=batch['y_segments'])
    real = (batch['y_segments'] > 0)[..., None]
    # Any function of the logits will do.
    return jnp.sum(jnp.where(real, jnp.sin(logits), 0)), logits

  gradient = golden.jit(jax.grad(loss, has_aux=True))
  packed_gradients, packed_logits = gradient(params, packed)
  padded_gradients, padded_logits = gradient(params, padded)
  for example, (row, start, count) in enumerate(places):
    golden.assert_close(packed_logits[row, start:start + count],
                        padded_logits[example, :count],
                        what=f'example {example}')
  golden.assert_trees_close(packed_gradients, padded_gradients, 'gradient')

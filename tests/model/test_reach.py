"""Who depends on whom, proved by gradients and by changes of one token: zero
means exactly zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration

CONFIG = LongT5Config(
    vocab_size=96, d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=1,
    local_radius=3, global_block_size=4, feed_forward_proj='gated-gelu',
    tie_word_embeddings=False)


def model_and_params(**fields):
  model = LongT5ForConditionalGeneration(dataclasses.replace(CONFIG, **fields))
  tokens = jnp.ones((1, 8), jnp.int32)
  return model, golden.random_params(model, tokens, tokens)


def reach(outputs, params, tokens):
  """Whether output i depends on input j: [outputs, inputs], for one row.

  Found twice, by the gradient and by changing one input at a time, since a
  gradient written by hand may not be that of what is computed. The tokens are
  all different, so each has a row of the embedding to itself.
  """
  embedding = np.asarray(params['token_embedder']['embedding'])

  def output(embedding):
    return outputs(params | {'token_embedder': {'embedding': embedding}})[0]

  def probed(embedding):
    rows = output(embedding)
    probe = np.random.default_rng(0).standard_normal(rows.shape[1])
    return rows @ probe.astype(np.float32)

  run = golden.jit(
      lambda embedding: (jax.jacrev(probed)(embedding), output(embedding)))
  jacobian, expected = map(np.asarray, run(embedding))
  by_gradient = np.abs(jacobian).max(-1)[:, tokens] > 0
  by_change = np.zeros_like(by_gradient)
  for j, token in enumerate(tokens):
    changed = embedding.copy()
    changed[token] = changed[token][::-1] + 1
    by_change[:, j] = (np.asarray(run(changed)[1]) != expected).any(-1)
  np.testing.assert_array_equal(by_change, by_gradient)
  return by_gradient


def encoder_reach(segments, **fields):
  """[L, L]: does output i depend on input j, for one row."""
  model, params = model_and_params(**fields)
  tokens = np.arange(10, 10 + len(segments))
  segments = jnp.array([segments])
  return reach(
      lambda params: model.apply(
          {'params': params}, jnp.asarray(tokens)[None], segments,
          method='encode'), params, tokens)


def test_decoder_is_causal_and_sees_the_inputs():
  """Every target sees itself, those before it, and all inputs but padding."""
  model, params = model_and_params(num_decoder_layers=2)
  inputs, targets = jnp.arange(10, 22)[None], jnp.arange(40, 53)[None]
  segments = (jnp.arange(12)[None] < 9).astype(jnp.int32)
  found = reach(lambda params: model.apply(
      {'params': params}, inputs, targets, segments), params,
                [*range(10, 22), *range(40, 53)])
  np.testing.assert_array_equal(
      found[:, :12], np.broadcast_to(np.arange(12) < 9, (13, 12)))
  np.testing.assert_array_equal(
      found[:, 12:], np.tril(np.ones((13, 13), bool)))


def test_packed_targets_see_their_own_segment_only():
  model, params = model_and_params()
  inputs, targets = jnp.arange(10, 20)[None], jnp.arange(40, 47)[None]
  source = np.array([1, 1, 1, 1, 2, 2, 2, 2, 2, 0])
  target = np.array([1, 1, 1, 2, 2, 0, 0])
  found = reach(lambda params: model.apply(
      {'params': params}, inputs, targets, jnp.asarray(source)[None],
      decoder_segment_ids=jnp.asarray(target)[None]), params,
                [*range(10, 20), *range(40, 47)])[:5]
  same = target[:5, None] == target
  np.testing.assert_array_equal(found[:, :10], target[:5, None] == source)
  np.testing.assert_array_equal(
      found[:, 10:], same & np.tril(np.ones((5, 7), bool)))


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

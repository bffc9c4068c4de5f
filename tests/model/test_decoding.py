"""The decoder's cache: rows that share an input, reordering, masks."""

import functools
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.generation.generate import generate, start_tokens
from longt5_flax.generation.options import GenerationOptions
from longt5_flax.model import decoding

CONFIG = LongT5Config(
    vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=1,
    num_decoder_layers=2, num_heads=4, local_radius=7, global_block_size=4,
    feed_forward_proj='gated-gelu', tie_word_embeddings=False,
    encoder_attention_type='local')
LENGTH, BEAMS = 29, 3
GENERATOR = np.random.default_rng(0)
SEGMENTS = jnp.array(np.arange(LENGTH) < [[29], [11]], jnp.int32)
INPUTS = GENERATOR.integers(2, 40, size=SEGMENTS.shape) * SEGMENTS
TARGETS = jnp.array(GENERATOR.integers(2, 40, size=(2 * BEAMS, 7)))


@functools.cache
def model_of(scan_layers):
  model = LongT5ForConditionalGeneration(CONFIG, scan_layers=scan_layers)
  return model, golden.random_params(model, INPUTS, TARGETS[:2])


@functools.cache
def programs(scan_layers):
  """(encode and start, step, whole targets); the parameters are bound."""
  model, params = model_of(scan_layers)

  def start():
    encoded = model.apply({'params': params}, INPUTS, SEGMENTS,
                          method='encode')
    return encoded, decoding.start(model, params, encoded, SEGMENTS, 9, BEAMS)

  def whole(encoded, targets, segments):
    return model.apply(
        {'params': params}, encoded.repeat(BEAMS, axis=0), targets,
        SEGMENTS.repeat(BEAMS, axis=0), segments, method='decode')

  return (*golden.jit(start)(),
          golden.jit(partial(decoding.step, model, params)),
          golden.jit(whole))


@pytest.mark.parametrize('scan_layers', [False, True])
def test_rows_of_an_input_and_their_reordering(scan_layers):
  """Like rows with inputs of their own; after a change, with other pasts."""
  encoded, cache, step, whole = programs(scan_layers)
  targets = TARGETS
  for length, rows in ((1, [2, 0, 0, 3, 5, 4]), (2, None),
                       (3, [1, 1, 1, 4, 3, 5]), (4, None)):
    logits, cache = step(cache, targets[:, length - 1:length])
    golden.assert_close(
        logits, whole(encoded, targets, None)[:, length - 1],
        what=f'target {length}')
    if rows is not None:
      cache = decoding.reorder(cache, jnp.array(rows))
      targets = targets.at[:, :length].set(targets[jnp.array(rows), :length])


def test_several_targets_at_once():
  encoded, cache, step, whole = programs(False)
  logits, _ = step(cache, TARGETS[:, :4])
  golden.assert_close(logits, whole(encoded, TARGETS, None)[:, 3])


def test_decoder_mask():
  """The first two targets, hidden from the others: as if of another
  segment."""
  model, params = model_of(False)
  encoded, cache, _, whole = programs(False)
  segments = jnp.ones_like(TARGETS).at[:, :2].set(2)
  mask = jnp.ones((len(TARGETS), 9), bool).at[:, :2].set(False)
  logits = golden.jit(lambda: model.apply(
      {'params': params, 'encoded': cache.encoded, 'cache': cache.targets},
      TARGETS, SEGMENTS, mask, method='decode_step', mutable=['cache'])[0])()
  golden.assert_close(
      logits[:, 2:], whole(encoded, TARGETS, segments)[:, 2:])


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_encoded_is_kept_once_for_each_input(dtype):
  model = LongT5ForConditionalGeneration(CONFIG, dtype=dtype)
  cache = jax.eval_shape(lambda: decoding.start(
      model, model_of(False)[1], jnp.zeros((2, LENGTH, 32)), SEGMENTS, 9,
      BEAMS))
  assert {(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(cache.encoded)
          } == {((2, 4, LENGTH, 8), jnp.dtype(dtype))}
  assert {leaf.shape for leaf in jax.tree.leaves(cache.targets)
          } == {(), (2 * BEAMS, 9), (2, 4, BEAMS, 9, 8)}


@pytest.mark.parametrize('scan_layers', [False, True])
def test_no_copy_of_the_encoded_for_each_beam(scan_layers):
  """The loop of a search gets keys and values of the inputs, one row for each
  input, and makes nothing as large."""
  keys = 2 * LENGTH * 4 * 8 * (2 if scan_layers else 1)
  weights = 2 * 4 * BEAMS * LENGTH
  loop, compiled = searching(scan_layers)
  assert largest(variable.aval.shape for variable in loop.invars) == keys
  assert largest(computed(loop)) == weights
  assert largest(shapes_in(compiled)) == keys


def searching(scan_layers):
  """The loop of a search, as traced, and the compiled program."""
  model, params = model_of(scan_layers)
  options = GenerationOptions(max_length=9, num_beams=BEAMS)

  def search(encoded):
    cache = decoding.start(model, params, encoded, SEGMENTS, 8, BEAMS)
    return generate(partial(decoding.step, model, params), decoding.reorder,
                    cache, start_tokens(2, options), options)

  traced = golden.jit(search).trace(jnp.zeros((2, LENGTH, 32)))
  [loop] = [equation for equation in traced.jaxpr.jaxpr.eqns
            if equation.primitive.name == 'while']
  return loop, traced.lower().compile().as_text()


def computed(equation):
  """Shapes of all that is computed inside; axes in another order are not."""
  for value in equation.params.values():
    for inner in value if isinstance(value, tuple | list) else [value]:
      for each in getattr(getattr(inner, 'jaxpr', inner), 'eqns', ()):
        if each.primitive.name != 'transpose':
          yield from (variable.aval.shape for variable in each.outvars)
        yield from computed(each)


def shapes_in(text):
  return (tuple(map(int, dims.split(',')))
          for dims in re.findall(r'f32\[([\d,]+)\]', text))


def largest(shapes):
  """Size of the largest, of those with the length of the inputs."""
  return max(math.prod(shape) for shape in shapes if LENGTH in shape)

"""Every implementation of windowed attention against the reference: values and
all gradients, on random inputs and layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax.model.attention import GlobalTokens, local_attention
from longt5_flax.model.chunked_attention import chunked_attention
from longt5_flax.model.global_tokens import (
    assign_global_blocks,
    segment_positions,
)
from longt5_flax.model.relative_position import bucket_reach

HEADS, HEAD_SIZE = 2, 8
# Row lengths: no multiple of a block; segments that end anywhere, one token
# long, shorter than a block of global tokens, and padding.
LAYOUTS = {
    'padded': [[100], [41], [3]],
    'packed': [[50, 3, 20, 1, 19], [1, 99], [16, 16, 32]],
}


def segments(rows, length):
  ids = np.zeros((len(rows), length), np.int32)
  for row, lengths in zip(ids, rows, strict=True):
    row[:sum(lengths)] = np.repeat(1 + np.arange(len(lengths)), lengths)
  return jnp.asarray(ids)


def random_inputs(segment_ids, radius, block_size, reach, seed=0):
  """Everything that has a gradient, and `with_rest`, which makes the arguments
  of an implementation of them."""
  batch, length = segment_ids.shape
  keys = iter(jax.random.split(jax.random.key(seed), 8))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  arrays = {name: normal(batch, length, HEADS, HEAD_SIZE)
            for name in ('query', 'key', 'value')}
  arrays['bias'] = normal(HEADS, 2 * radius + 1)
  if block_size:
    blocks = assign_global_blocks(
        segment_ids, segment_positions(segment_ids), block_size)
    shape = (*blocks.segment_ids.shape, HEADS, HEAD_SIZE)
    arrays |= {'side_key': normal(*shape), 'side_value': normal(*shape),
               'side_bias': normal(HEADS, 2 * reach + 1)}

  def with_rest(arrays):
    side = None
    if block_size:
      side = GlobalTokens(
          arrays['side_key'], arrays['side_value'], arrays['side_bias'],
          blocks.segment_ids, blocks.block_ids, block_size)
    return (*(arrays[name] for name in ('query', 'key', 'value', 'bias')),
            segment_ids, side, jnp.float32)

  return arrays, with_rest


def reference(*inputs):
  return local_attention(*inputs)[0]


def values_and_gradients(attend, arrays, with_rest, segment_ids):
  """At real positions: what is at padding, implementations differ in."""
  real = (segment_ids > 0)[..., None, None]
  weight = jax.random.normal(jax.random.key(9), arrays['query'].shape)

  def loss(arrays):
    output = jnp.where(real, attend(*with_rest(arrays)), 0)
    return jnp.sum(output * weight), output

  gradient, output = golden.jit(jax.grad(loss, has_aux=True))(arrays)
  return gradient | {'output': output}


@pytest.mark.parametrize('block_size', [0, 4])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_chunked_equals_reference(layout, block_size):
  """In chunks of several blocks, the last one not full; the side bias
  saturates within the row."""
  segment_ids = segments(LAYOUTS[layout], 100)
  arrays, with_rest = random_inputs(segment_ids, 7, block_size, 6)
  batch = len(segment_ids)
  scores = batch * HEADS * 8 * (24 + (25 if block_size else 0))
  chunked = functools.partial(chunked_attention, max_scores=3 * scores)
  golden.assert_trees_close(
      values_and_gradients(chunked, arrays, with_rest, segment_ids),
      values_and_gradients(reference, arrays, with_rest, segment_ids))


def test_reach_of_t5s_buckets():
  """32 buckets to distance 128: the last one begins at 91, says the table of
  the reference implementations."""
  assert bucket_reach(32, 128) == 91
  buckets = golden.read('relative_position_buckets')['bidirectional']
  assert len(set(buckets[:20000 - 90])) == 1
  assert buckets[20000 - 90] != buckets[20000 - 91]


def test_chunked_memory_does_not_grow_with_the_chunks():
  """Twice the length with as many scores at once: the temporary memory of
  forward and backward grows as inputs do, not as scores."""

  def temporary(length):
    segment_ids = jnp.ones((1, length), jnp.int32)
    arrays, with_rest = jax.eval_shape(
        lambda: random_inputs(segment_ids, 7, 4, 6)[0]), None
    _, with_rest = random_inputs(segment_ids, 7, 4, 6)
    step = golden.jit(jax.grad(lambda arrays: jnp.sum(chunked_attention(
        *with_rest(arrays), max_scores=2**14))))
    compiled = step.lower(arrays).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  short, long = temporary(1024), temporary(2048)
  assert long < 2.2 * short, f'{short} bytes for 1024, {long} for 2048'

"""Blockwise attention equals full attention under an explicit mask.

The reference here is written from the description of LongT5, token by token:
who sees whom, in which bucket, which token is in which block. It shares no
code with the package.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import LongT5Config, LongT5EncoderModel

BUCKETS = golden.read('relative_position_buckets')['bidirectional']
CONFIG = LongT5Config(
    vocab_size=50, d_model=16, d_kv=4, num_heads=2, d_ff=24, num_layers=1,
    feed_forward_proj='gated-gelu', tie_word_embeddings=False)


@dataclasses.dataclass
class Layout:
  """Who sees whom in one row; L tokens, then G global tokens.

  Attributes:
    visible: [L, L + G].
    bucket: [L, L + G], of the token table, and after it of the side table.
    members: [G, L], which tokens a global token sums.
  """
  visible: np.ndarray
  bucket: np.ndarray
  members: np.ndarray


def layout_of(segments, radius, block_size):
  """Written out in loops; radius None is unlimited, block_size None: no
  global tokens."""
  length = len(segments)
  num_globals = length // block_size if block_size else 0
  visible = np.zeros((length, length + num_globals), bool)
  bucket = np.zeros((length, length + num_globals), int)
  members = np.zeros((num_globals, length), bool)
  for i in range(length):
    for j in range(length):
      near = radius is None or abs(i - j) <= radius
      visible[i, j] = segments[i] == segments[j] > 0 and near
      bucket[i, j] = BUCKETS[20000 + j - i]
  if not block_size:
    return Layout(visible, bucket, members)
  taken = 0
  for segment in sorted(set(segments) - {0}):
    tokens = [i for i in range(length) if segments[i] == segment]
    blocks = len(tokens) // block_size
    for number, i in enumerate(tokens):
      # Orphans, the tail that fills no block, join the last one.
      own = taken + min(number // block_size, blocks - 1)
      for g in range(taken, taken + blocks):
        visible[i, length + g] = True
        bucket[i, length + g] = BUCKETS[20000 + g - own]
      if blocks:
        members[own, i] = True
    taken += blocks
  return Layout(visible, bucket, members)


def rms_norm(x, scale):
  return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def reference(params, tokens, layouts, config=CONFIG):
  """The encoder's output, by full attention over tokens and global tokens."""
  encoder = params['encoder']
  length = tokens.shape[1]
  visible = jnp.asarray(np.stack([a.visible for a in layouts]))
  bucket = np.stack([a.bucket for a in layouts])
  members = jnp.asarray(
      np.stack([a.members for a in layouts]).astype(np.float32))
  bias = encoder['relpos_bias']['rel_embedding'][:, bucket[:, :, :length]]
  if members.shape[1]:
    side = encoder['side_relpos_bias']['rel_embedding']
    bias = jnp.concatenate([bias, side[:, bucket[:, :, length:]]], -1)
  x = params['token_embedder']['embedding'][tokens]
  for i in range(config.num_layers):
    layer = encoder[f'layers_{i}']
    attention = layer['attention']
    y = rms_norm(x, layer['pre_attention_layer_norm']['scale'])
    sources = y
    if members.shape[1]:
      sums = jnp.einsum('BGL,BLD->BGD', members, y)
      sources = jnp.concatenate(
          [y, rms_norm(sums, attention['T5LayerNorm_0']['scale'])], 1)

    def heads(array, kernel, attention=attention):
      array = array @ attention[kernel]['kernel']
      return array.reshape(*array.shape[:2], config.num_heads, config.d_kv)

    scores = jnp.einsum('BLHK,BSHK->HBLS', heads(y, 'query'),
                        heads(sources, 'key')) + bias
    scores = jnp.where(visible, scores, -1e9)
    y = jnp.einsum('HBLS,BSHK->BLHK', jax.nn.softmax(scores),
                   heads(sources, 'value'))
    x = x + y.reshape(*tokens.shape, -1) @ attention['out']['kernel']
    mlp = layer['mlp']
    y = rms_norm(x, layer['pre_mlp_layer_norm']['scale'])
    y = jax.nn.gelu(y @ mlp['wi_0']['kernel']) * (y @ mlp['wi_1']['kernel'])
    x = x + y @ mlp['wo']['kernel']
  return rms_norm(x, encoder['encoder_norm']['scale'])


def random_segments(generator, length, block_size):
  """Rows of every kind: full, padded, packed with and without alignment,
  segments shorter than a block, segments of one token."""
  full = np.ones(length, int)
  padded = (np.arange(length) < generator.integers(1, length + 1)).astype(int)
  rows = [full, padded]
  for longest, align in ((length, 1), (length, block_size),
                         (3 * block_size, 1), (3 * block_size, block_size),
                         (block_size, 1), (1, 1)):
    row, start, segment = np.zeros(length, int), 0, 1
    while start < length:
      count = int(generator.integers(1, longest + 1))
      row[start:start + count] = segment
      start, segment = -(-(start + count) // align) * align, segment + 1
    if longest < length and length > 3:
      row[-int(generator.integers(1, 3)):] = 0
    rows.append(row)
  return np.stack(rows)


# Length 1, shorter than a block of either kind, exactly one, several, odd.
SHAPES = [
    # length, local_radius, global_block_size
    (1, 3, 2), (2, 7, 4), (8, 7, 8), (13, 4, 3), (16, 3, 4), (31, 20, 16),
    (37, 1, 2), (50, 6, 7),
]


def check(attention_type, length, radius, block_size):
  config = dataclasses.replace(
      CONFIG, encoder_attention_type=attention_type, local_radius=radius,
      global_block_size=block_size)
  generator = np.random.default_rng([length, radius, block_size])
  segments = random_segments(generator, length, block_size)
  tokens = jnp.asarray(generator.integers(2, 50, segments.shape), jnp.int32)
  model = LongT5EncoderModel(config)
  params = golden.random_params(model, tokens)
  layouts = [
      layout_of(row.tolist(), None if attention_type == 'full' else radius,
                block_size if attention_type == 'transient-global' else None)
      for row in segments]
  real = segments > 0
  cotangent = real[..., None] * generator.standard_normal(
      (*segments.shape, config.d_model)).astype(np.float32)

  def ours(params):
    return model.apply({'params': params}, tokens,
                       encoder_segment_ids=jnp.asarray(segments, jnp.int32))

  def theirs(params):
    return reference(params, tokens, layouts)

  def with_gradients(function):
    def loss(params):
      output = function(params)
      return jnp.sum(output * cotangent), output
    return golden.jit(jax.grad(loss, has_aux=True))(params)

  gradients, output = with_gradients(ours)
  expected_gradients, expected = with_gradients(theirs)
  golden.assert_close(output, expected, real, 'output')
  return gradients, expected_gradients


@pytest.mark.parametrize('length, radius, block_size', SHAPES)
def test_transient_global_is_full_attention_under_a_mask(
    length, radius, block_size):
  golden.assert_trees_close(
      *check('transient-global', length, radius, block_size), 'gradient')


@pytest.mark.parametrize('length, radius, block_size', SHAPES[::2])
def test_local_is_full_attention_under_a_mask(length, radius, block_size):
  golden.assert_trees_close(
      *check('local', length, radius, block_size), 'gradient')


def test_full_attention():
  golden.assert_trees_close(*check('full', 37, 1, 2), 'gradient')


def test_a_large_radius_is_full_attention():
  """With nothing out of reach, local attention is plain T5's."""
  generator = np.random.default_rng(0)
  segments = random_segments(generator, 21, 4)
  tokens = jnp.asarray(generator.integers(2, 50, segments.shape), jnp.int32)
  outputs = []
  for attention_type, radius in (('local', 20), ('local', 127), ('full', 127)):
    model = LongT5EncoderModel(dataclasses.replace(
        CONFIG, encoder_attention_type=attention_type, local_radius=radius))
    params = golden.random_params(model, tokens)
    outputs.append(golden.jit(model.apply)(
        {'params': params}, tokens, segments.astype(np.int32)))
  golden.assert_close(outputs[0], outputs[2], segments > 0, 'radius 20')
  golden.assert_close(outputs[1], outputs[2], segments > 0, 'radius 127')


def test_mask_written_out():
  """Three segments and padding, radius 1, blocks of two.

  Seven tokens make three global tokens, of which two are used: tokens 0 and 1
  with the orphan 2, and tokens 4 and 5. Token 3 is too short a segment.
  """
  expected = np.array([
      # tokens             globals
      [1, 1, 0, 0, 0, 0, 0, 1, 0, 0],
      [1, 1, 1, 0, 0, 0, 0, 1, 0, 0],
      [0, 1, 1, 0, 0, 0, 0, 1, 0, 0],
      [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
      [0, 0, 0, 0, 1, 1, 0, 0, 1, 0],
      [0, 0, 0, 0, 1, 1, 0, 0, 1, 0],
  ])
  config = dataclasses.replace(
      CONFIG, encoder_attention_type='transient-global', local_radius=1,
      global_block_size=2)
  segments = jnp.array([[1, 1, 1, 2, 3, 3, 0]])
  tokens = jnp.arange(2, 9)[None]
  model = LongT5EncoderModel(config)
  _, state = golden.jit(functools.partial(
      model.apply, mutable=['intermediates']))(
          {'params': golden.random_params(model, tokens)}, tokens, segments)
  weights, = state['intermediates']['encoder']['layers_0']['attention'][
      'weights']
  dense = dense_weights(np.asarray(weights)[0], length=7)
  for head in dense:
    np.testing.assert_array_equal(head[:6] > 0, expected > 0)
    np.testing.assert_allclose(head[:6].sum(1), 1, rtol=1e-6)


def dense_weights(weights_NHCS, length):
  """[N, H, C, 3C + G] as [H, L, L + G]."""
  _, heads, block, keys = weights_NHCS.shape
  dense = np.zeros((heads, length, length + keys - 3 * block))
  for i in range(length):
    n, c = divmod(i, block)
    for key in range(keys):
      j = (n - 1) * block + key
      if key >= 3 * block:
        j = length + key - 3 * block
      elif not 0 <= j < length:
        # Padding queries are not looked at; no real one sees beyond the row.
        continue
      dense[:, i, j] = weights_NHCS[n, :, c, key]
  return dense


# Memory. Sizes are counted in numbers, over everything that the forward and
# backward pass write.

LONG = dataclasses.replace(
    CONFIG, num_heads=2, d_kv=8, local_radius=1, global_block_size=4)


def largest(attention_type, length):
  """Of all intermediate arrays, the size of the largest."""
  model = LongT5EncoderModel(
      dataclasses.replace(LONG, encoder_attention_type=attention_type))
  tokens = jnp.ones((1, length), jnp.int32)
  params = golden.random_params(model, tokens)
  jaxpr = jax.make_jaxpr(jax.value_and_grad(lambda params: jnp.sum(
      model.apply({'params': params}, tokens))))(params)
  return max(sizes(jaxpr.jaxpr))


def sizes(jaxpr):
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      yield variable.aval.size
    for value in equation.params.values():
      for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, 'eqns')):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from sizes(inner)


def test_local_attention_makes_nothing_quadratic():
  """At most weights [L, H, W], or the keys of all windows, [3L, H, K]."""
  heads, window, head_size = 2, 6, 8
  for length in (256, 512):
    assert largest('local', length) <= length * heads * max(
        window, 3 * head_size)
  # The check sees what it is about.
  assert largest('full', 256) >= heads * 256 * 256


def test_transient_global_attention_copies_no_global_keys():
  """At most twice the weights [L, H, W + G], which the side bias's gradient
  needs; global keys for each block, [N, G, H, K], would be almost four times.
  """
  length, heads, window, head_size = 256, 2, 6, 8
  num_globals, blocks = length // 4, length // 2
  bound = 2 * length * heads * (window + num_globals)
  assert blocks * num_globals * heads * head_size > 1.8 * bound
  assert largest('transient-global', length) <= bound


def test_compiled_memory_of_local_attention_is_linear():
  """Twice the length, twice the memory, forward and backward."""
  model = LongT5EncoderModel(LONG)

  def bytes_used(length):
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    step = golden.jit(jax.grad(
        lambda params, tokens: jnp.sum(model.apply(params, tokens))))
    return step.lower(params, tokens).compile(
        ).memory_analysis().temp_size_in_bytes

  short, long = bytes_used(1024), bytes_used(2048)
  assert long < 2.1 * short, f'{short} bytes for 1024, {long} for 2048'

"""Every implementation of windowed attention against the reference: values and
all gradients, on random inputs and layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.config import ConfigError
from longt5_flax.model import decoder, decoding, encoder
from longt5_flax.model import segment_attention as model_segment_attention
from longt5_flax.model.attention import (
    GlobalTokens,
    full_attention,
    local_attention,
)
from longt5_flax.model.chunked_attention import chunked_attention
from longt5_flax.model.fused_attention import (
    fused_attention,
    fused_causal_attention,
)
from longt5_flax.model.global_tokens import (
    assign_global_blocks,
    segment_positions,
)
from longt5_flax.model.kernels.calls import (
    KernelOptions,
    covering_run,
    gapless_run,
)
from longt5_flax.model.relative_position import bucket_reach
from longt5_flax.model.segment_attention import (
    attend_to_stored,
    segment_attention,
)
from longt5_flax.training import partitioning

HEADS, HEAD_SIZE = 2, 8
# Row lengths: no multiple of a block; segments that end anywhere, one token
# long, shorter than a block of global tokens, and padding.
LAYOUTS = {
    'padded': [[100], [41], [3]],
    'packed': [[50, 3, 20, 1, 19], [1, 99], [16, 16, 32]],
    'long': [[701], [300, 100, 2, 250]],  # Most global tokens are beyond reach.
    'mixed': [[150, 151]],  # And a tile of tokens is of two segments.
    # Tokens whose segment goes on elsewhere, too few for a block of their own.
    'holes': [[3, -2, 290], [2, -1, 1, -5, 150, -60, 3]],
}
# The length of rows, and of a tile of fused attention.
SIZES = {'padded': (100, 16), 'packed': (100, 16), 'long': (701, 64),
         'mixed': (301, 16), 'holes': (301, 16)}
on_gpu = pytest.mark.gpu


def fused(*inputs, tile=64):
  return fused_attention(*inputs, KernelOptions(tile, interpret=True))


def fused_on_a_tpu(*inputs):
  return fused_attention(
      *inputs, KernelOptions(16, interpret=True, platform='tpu'))


def segments(rows, length):
  """A segment for each number; if there are negative ones, one segment with
  holes as long as they say."""
  ids = np.zeros((len(rows), length), np.int32)
  for row, lengths in zip(ids, rows, strict=True):
    of_each = ([n > 0 for n in lengths] if min(lengths) < 0 else
               1 + np.arange(len(lengths)))
    filled = np.repeat(of_each, np.abs(lengths))
    row[:len(filled)] = filled
  return jnp.asarray(ids)


def random_inputs(segment_ids, radius, block_size, reach,
                  shape=(HEADS, HEAD_SIZE)):
  """Everything that has a gradient, and `with_rest`, which makes the arguments
  of an implementation of them."""
  batch, length = segment_ids.shape
  keys = iter(jax.random.split(jax.random.key(0), 8))

  def normal(*shape):
    return jax.random.normal(next(keys), shape)

  arrays = {name: normal(batch, length, *shape)
            for name in ('query', 'key', 'value')}
  arrays['bias'] = normal(shape[0], 2 * radius + 1)
  if block_size:
    blocks = assign_global_blocks(
        segment_ids, segment_positions(segment_ids), block_size)
    side = (*blocks.segment_ids.shape, *shape)
    arrays |= {'side_key': normal(*side), 'side_value': normal(*side),
               'side_bias': normal(shape[0], 2 * reach + 1)}

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


def in_dtype(dtype, with_rest):
  """`with_rest` for matrix products in another dtype."""
  return lambda arrays: (*with_rest(arrays)[:-1], dtype)


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
@pytest.mark.parametrize('layout', ['padded', 'packed'])
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


@pytest.mark.parametrize('layout, radius, block_size, reach', [
    ('padded', 7, 0, 6), ('padded', 30, 4, 6), ('packed', 7, 4, 6),
    ('packed', 15, 16, 2), ('long', 7, 4, 6), ('long', 20, 2, 40),
    ('mixed', 7, 4, 6), ('holes', 7, 4, 6)])
def test_fused_equals_reference(layout, radius, block_size, reach):
  """A radius below and above a tile; reach within a tile and beyond; blocks as
  long as a tile."""
  length, tile = SIZES[layout]
  segment_ids = segments(LAYOUTS[layout], length)
  arrays, with_rest = random_inputs(segment_ids, radius, block_size, reach)
  golden.assert_trees_close(
      values_and_gradients(functools.partial(fused, tile=tile), arrays,
                           with_rest, segment_ids),
      values_and_gradients(reference, arrays, with_rest, segment_ids))


@pytest.mark.parametrize('layout, radius, block_size, reach, shape, dtype', [
    ('padded', 7, 0, 6, (2, 8), 'float32'),
    ('padded', 30, 4, 6, (3, 64), 'float32'),
    ('packed', 7, 16, 2, (2, 8), 'float16'),
    ('long', 7, 4, 6, (2, 8), 'float32'),
    ('holes', 7, 4, 6, (2, 8), 'float32'),
    ('long', 20, 2, 40, (1, 140), 'float32')])
def test_fused_on_a_tpu_equals_reference(
    layout, radius, block_size, reach, shape, dtype):
  """A radius below a block and of several; heads that fill a group, are filled
  up to one and are larger; float16, which is computed in float32."""
  segment_ids = segments(LAYOUTS[layout], SIZES[layout][0])
  arrays, with_rest = random_inputs(
      segment_ids, radius, block_size, reach, shape)
  golden.assert_trees_close(
      values_and_gradients(fused_on_a_tpu, arrays,
                           in_dtype(jnp.dtype(dtype), with_rest), segment_ids),
      values_and_gradients(reference, arrays, with_rest, segment_ids))


def of_targets(rows, length, shape):
  """Random arguments of attention of targets to each other: those that have
  gradients, and segments."""
  segment_ids = segments(rows, length)
  arrays, _ = random_inputs(segment_ids, length, 0, 0, shape)
  return arrays | {'bias': arrays['bias'][:, :length]}, (segment_ids,)


def target_values_and_gradients(attend, arrays, ids, dtype=jnp.float32):
  """Of attention of targets; of `ids`, theirs are the first."""
  return values_and_gradients(
      attend, arrays, lambda arrays: (*in_order(arrays), *ids, dtype), ids[0])


def in_order(arrays):
  """As arguments; JAX gives dictionaries back sorted by name."""
  return [arrays[name] for name in ('query', 'key', 'value', 'bias')
          if name in arrays]


def check_targets(attend, whole, arrays, ids, tile=16, platform=''):
  """That kernels, interpreted, compute what `whole` makes of all scores."""
  attend = functools.partial(
      attend, options=KernelOptions(tile, interpret=True, platform=platform))
  golden.assert_trees_close(
      target_values_and_gradients(attend, arrays, ids),
      target_values_and_gradients(whole, arrays, ids))


def all_before(query, key, value, bias, segment_ids, dtype):
  """What `fused_causal_attention` computes, from all scores."""
  length = query.shape[1]
  offsets = jnp.arange(length) - jnp.arange(length)[:, None]
  sees = (segment_ids[:, :, None] == segment_ids[:, None]) & (offsets <= 0)
  bias = bias[:, jnp.minimum(offsets, 0) + length - 1]
  return full_attention(query, key, value, bias[None], sees[:, None], dtype)[0]


@pytest.mark.parametrize('rows, length', [
    ([[100], [41]], 100), ([[50, 3, 20, 1], [60, 3, 34]], 97),
    ([[9], [4, 5]], 9)])
def test_causal_equals_reference(rows, length):
  check_targets(fused_causal_attention, all_before,
                *of_targets(rows, length, (HEADS, HEAD_SIZE)))


def targets_and_inputs(target_rows, input_rows, lengths, shape):
  """Arrays with a gradient, and the segments of targets and inputs."""
  ids = tuple(segments(rows, length) for rows, length in zip(
      (target_rows, input_rows), lengths, strict=True))
  keys = jax.random.split(jax.random.key(3), 3)
  arrays = {name: jax.random.normal(key, (*of.shape, *shape))
            for name, key, of in zip(
                ('query', 'key', 'value'), keys, (ids[0], *ids[1:] * 2),
                strict=True)}
  return arrays, ids


def whole_segments(query, key, value, query_segments, segment_ids, dtype):
  """What `segment_attention` computes, from all scores."""
  sees = (query_segments[:, :, None] == segment_ids[:, None]) & (
      segment_ids[:, None] > 0)
  output, _ = full_attention(query, key, value, None, sees[:, None], dtype)
  return jnp.where(jnp.any(sees, axis=2)[..., None, None], output, 0)


# Segments that end anywhere, of targets without inputs and the other way
# round; keys of a tile of queries shared by several programs, or not.
@pytest.mark.parametrize('target_rows, input_rows, programs', [
    ([[20], [7]], [[100], [41]], 1),
    ([[10, 3, 1, 20], [5, 16]], [[50, 3, 1, 30], [1, 99]], 512),
    ([[5, 6, 7], [40]], [[50, 30], [20, 1, 60]], 30)])
def test_segment_attention_equals_reference(
    target_rows, input_rows, programs, monkeypatch):
  monkeypatch.setattr(model_segment_attention, '_PROGRAMS', programs)
  check_targets(segment_attention, whole_segments, *targets_and_inputs(
      target_rows, input_rows, (40, 100), (HEADS, HEAD_SIZE)))


def test_runs():
  rows = ['0111010', '0011100', '0000000', '1111111', '0000001']
  flags = jnp.asarray([[int(flag) for flag in row] for row in rows], bool)
  covering = [(1, 6), (2, 5), (0, 0), (0, 7), (6, 7)]
  assert list(zip(*map(np.ravel, covering_run(flags)), strict=True)) == covering
  gapless = [(1, 1), *covering[1:]]
  assert list(zip(*map(np.ravel, gapless_run(flags)), strict=True)) == gapless


def test_few_queries_have_small_tiles():
  check_targets(segment_attention, whole_segments, *targets_and_inputs(
      [[2, 1], [18]], [[50, 30], [150]], (18, 150), (HEADS, HEAD_SIZE)),
                tile=64)


def test_segment_attention_on_a_tpu_equals_reference():
  """Targets of several tiles; some see nothing."""
  check_targets(segment_attention, whole_segments, *targets_and_inputs(
      [[30, 3, 1, 60], [5, 80]], [[50, 3, 1, 40], [100]], (100, 130), (3, 8)),
                platform='tpu')


def stored(arrays, ids, dtype=jnp.float32, **options):
  """What `attend_to_stored` makes of `targets_and_inputs`."""
  query, key, value = in_order(arrays)
  return attend_to_stored(query, key.swapaxes(1, 2), value.swapaxes(1, 2),
                          *ids, dtype, **options)


def check_stored(inputs, options):
  arrays, ids = inputs
  found = golden.jit(functools.partial(stored, options=options))(*inputs)
  golden.assert_close(
      found, whole_segments(*in_order(arrays), *ids, jnp.float32))


# Three rows an input, one input padded, and one nothing else; segments that end
# anywhere, of more queries than a tile has and of fewer; a length of whole
# tiles.
@pytest.mark.parametrize('target_rows, input_rows, lengths, tile, platform', [
    ([[3]] * 3, [[301], [140], [0]], (3, 301), 64, ''),
    ([[2, 1], [18]], [[50, 30], [20, 1, 129]], (18, 150), 16, ''),
    ([[2, 1], [18]], [[50, 30], [20, 1, 129]], (18, 150), 64, ''),
    ([[1], [1]], [[128], [70]], (1, 128), 32, ''),
    ([[3], [3]], [[301], [140]], (3, 301), 64, 'tpu')])
def test_stored_equals_reference(
    target_rows, input_rows, lengths, tile, platform):
  check_stored(
      targets_and_inputs(target_rows, input_rows, lengths, (HEADS, HEAD_SIZE)),
      KernelOptions(tile, interpret=True, platform=platform))


def test_stored_on_a_mesh():
  """Rows and heads on devices of their own."""
  inputs = targets_and_inputs(
      [[3], [2]], [[301], [140]], (3, 301), (HEADS, HEAD_SIZE))
  mesh = partitioning.make_mesh(
      {'data': 2, 'fsdp': 1, 'tensor': 2, 'sequence': 2}, jax.devices())
  with partitioning.active(mesh):
    check_stored(inputs, KernelOptions(interpret=True))


def check_rounding(attend, dtype, arrays, with_rest, segment_ids):
  """As close to float32 as operands in that dtype allow."""
  exact = values_and_gradients(reference, arrays, with_rest, segment_ids)
  check_errors(values_and_gradients(
      attend, arrays, in_dtype(dtype, with_rest), segment_ids), exact, dtype)


def check_errors(narrow, exact, dtype):
  rounding = float(jnp.finfo(dtype).eps)
  for name, value in exact.items():
    error = float(np.linalg.norm(narrow[name] - value) / np.linalg.norm(value))
    # That it is there shows that the dtype was used.
    assert rounding / 8 < error < 8 * rounding, f'{name}: {error:.3g}'


@pytest.mark.parametrize('attend', [
    functools.partial(fused, tile=16), fused_on_a_tpu], ids=['gpu', 'tpu'])
def test_fused_rounds_as_bfloat16_does(attend):
  segment_ids = segments(LAYOUTS['packed'], 100)
  arrays, with_rest = random_inputs(segment_ids, 7, 4, 6)
  check_rounding(attend, jnp.bfloat16, arrays, with_rest, segment_ids)


def test_fused_on_a_mesh():
  """Rows and heads on devices of their own, and a row that is split."""
  segment_ids = segments(LAYOUTS['packed'] + LAYOUTS['padded'][:1], 100)
  arrays, with_rest = random_inputs(segment_ids, 7, 4, 6)
  attend = functools.partial(fused, tile=16)
  expected = values_and_gradients(attend, arrays, with_rest, segment_ids)
  mesh = partitioning.make_mesh(
      {'data': 2, 'fsdp': 1, 'tensor': 2, 'sequence': 2}, jax.devices())
  with partitioning.active(mesh):
    actual = values_and_gradients(attend, arrays, with_rest, segment_ids)
  golden.assert_trees_close(actual, expected)


def test_in_the_model(monkeypatch):
  """Gradients of stacked, recomputed layers with dropout."""
  monkeypatch.setattr(encoder, 'fused_attention', fused)
  for attend in (segment_attention, fused_causal_attention):
    monkeypatch.setattr(decoder, attend.__name__, functools.partial(
        attend, options=KernelOptions(16, interpret=True)))
  config = LongT5Config(
      vocab_size=50, d_model=16, d_kv=8, num_heads=2, d_ff=16, num_layers=2,
      local_radius=7, global_block_size=4, dropout_rate=0.3,
      encoder_attention_type='transient-global',
      feed_forward_proj='gated-gelu')
  segment_ids = segments(LAYOUTS['packed'], 100)
  tokens = jax.random.randint(jax.random.key(0), segment_ids.shape, 2, 50)
  tokens = jnp.where(segment_ids > 0, tokens, 0)

  def model(attention):
    return LongT5ForConditionalGeneration(
        config, scan_layers=True, remat='layer', attention=attention)

  def loss(params, attention):
    logits = model(attention).apply(
        {'params': params}, tokens, tokens[:, :12], segment_ids,
        decoder_segment_ids=segment_ids[:, :12], deterministic=False,
        rngs={'dropout': jax.random.key(1)})
    return jnp.mean(jnp.square(logits))

  params = golden.random_params(
      model('reference'), tokens, tokens[:, :12])
  gradient = golden.jit(jax.grad(loss), static_argnums=1)
  expected = gradient(params, 'reference')
  for attention in ('chunked', 'fused'):
    golden.assert_trees_close(gradient(params, attention), expected)


def test_in_decoding(monkeypatch):
  """Steps of three rows an input, one of them padded."""
  monkeypatch.setattr(decoder, 'attend_to_stored', functools.partial(
      attend_to_stored, options=KernelOptions(16, interpret=True)))
  config = LongT5Config.preset('local-tiny', num_layers=1, vocab_size=50)
  segment_ids = segments(LAYOUTS['padded'][:2], 100)
  encoded = jax.random.normal(jax.random.key(0), (2, 100, config.d_model))
  targets = jax.random.randint(jax.random.key(1), (6, 2), 2, 50)
  models = [LongT5ForConditionalGeneration(config, attention=attention)
            for attention in ('reference', 'fused')]
  params = golden.random_params(models[0], segment_ids, targets[:2])

  @functools.partial(golden.jit, static_argnums=0)
  def logits(model, params):
    cache = decoding.start(model, params, encoded, segment_ids, 2, 3)
    _, cache = decoding.step(model, params, cache, targets[:, :1])
    return decoding.step(model, params, cache, targets[:, 1:])[0]

  golden.assert_close(logits(models[1], params), logits(models[0], params))
  assert 'longt5_segment_attention_forward' in str(
      logits.trace(models[1], params).jaxpr)


def real_size(length=4096, rows=((4096,), (1500, 3, 1000, 700))):
  """Twelve heads as of base, radius and reach as published."""
  segment_ids = segments(rows, length)
  return segment_ids, *random_inputs(
      segment_ids, 127, 16, bucket_reach(32, 128), shape=(12, 64))


def check_compiled_for_cuda(attend, arrays, prefix, *kernels):
  """Forward and backward."""
  lowered = golden.lowered_for_cuda(
      jax.grad(lambda arrays: jnp.sum(attend(arrays))), arrays)
  for kernel in ('forward', 'backward_query', 'backward_key', *kernels):
    assert f'longt5_{prefix}_{kernel}' in lowered


def test_fused_is_compiled_for_cuda():
  _, arrays, with_rest = real_size()
  inputs = in_dtype(jnp.bfloat16, with_rest)
  check_compiled_for_cuda(
      lambda arrays: fused_attention(*inputs(arrays)), arrays, 'attention',
      'backward_side', 'backward_local_bias')


def test_segment_attention_is_compiled_for_cuda():
  arrays, ids = real_targets_and_inputs()
  check_compiled_for_cuda(
      lambda arrays: segment_attention(*in_order(arrays), *ids, jnp.bfloat16),
      arrays, 'segment_attention')


def test_stored_is_compiled_for_cuda():
  """Queries as they are, and what they attend to after one kernel more."""
  lowered = golden.lowered_for_cuda(
      functools.partial(stored, dtype=jnp.bfloat16), *real_steps())
  for kernel in ('forward', 'join'):
    assert f'longt5_segment_attention_{kernel}' in lowered
  assert '2x4x12x64xbf16' in lowered
  assert '2x16x12x64' not in lowered


def test_causal_is_compiled_for_cuda():
  arrays, ids = real_targets()
  check_compiled_for_cuda(
      lambda arrays: fused_causal_attention(
          *in_order(arrays), *ids, jnp.bfloat16),
      arrays, 'attention', 'backward_local_bias')


def real_targets():
  """Base's heads; a row of one document, and a packed one."""
  return of_targets([[910], [100, 3, 800]], 910, (12, 64))


def real_targets_and_inputs():
  """As `real_targets`."""
  return targets_and_inputs(
      [[500], [100, 3, 200]], [[4096], [1500, 3, 1000, 700]], (512, 4096),
      (12, 64))


def real_steps():
  """Base's heads; four rows an input, of no whole tiles."""
  return targets_and_inputs(
      [[4], [4]], [[4001], [3000]], (4, 4001), (12, 64))


def test_fused_needs_a_gpu_or_a_tpu():
  segment_ids = segments([[8]], 8)
  arrays, with_rest = random_inputs(segment_ids, 1, 0, 0)
  with pytest.raises(ConfigError, match="GPU or a TPU, not 'cpu'"):
    fused_attention(*with_rest(arrays))


def test_fused_on_a_tpu_needs_a_radius_that_fits():
  segment_ids = segments([[8]], 8)
  arrays, with_rest = random_inputs(segment_ids, 513, 0, 0)
  with pytest.raises(ConfigError, match='local_radius=513 must be at most 512'):
    fused_on_a_tpu(*with_rest(arrays))


@on_gpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_fused_on_a_gpu(dtype):
  segment_ids, arrays, with_rest = real_size()
  if dtype == jnp.float32:
    golden.assert_trees_close(
        values_and_gradients(fused_attention, arrays, with_rest, segment_ids),
        values_and_gradients(reference, arrays, with_rest, segment_ids))
  else:
    check_rounding(fused_attention, dtype, arrays, with_rest, segment_ids)


@on_gpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('attend, whole, inputs', [
    (segment_attention, whole_segments, real_targets_and_inputs),
    (fused_causal_attention, all_before, real_targets)])
def test_targets_on_a_gpu(attend, whole, inputs, dtype):
  exact = target_values_and_gradients(whole, *inputs())
  found = target_values_and_gradients(attend, *inputs(), dtype)
  if dtype == jnp.float32:
    golden.assert_trees_close(found, exact)
  else:
    check_errors(found, exact, dtype)


@on_gpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_stored_on_a_gpu(dtype):
  arrays, ids = real_steps()
  exact = golden.jit(lambda: whole_segments(
      *in_order(arrays), *ids, jnp.float32))()
  found = golden.jit(functools.partial(stored, dtype=dtype))(arrays, ids)
  if dtype == jnp.float32:
    golden.assert_close(found, exact)
  else:
    check_errors({'output': found}, {'output': exact}, dtype)


@on_gpu
def test_fused_is_deterministic():
  segment_ids, arrays, with_rest = real_size()
  inputs = in_dtype(jnp.bfloat16, with_rest)
  first, second = (values_and_gradients(
      fused_attention, arrays, inputs, segment_ids) for _ in range(2))
  for name, value in first.items():
    np.testing.assert_array_equal(value, second[name], name)


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

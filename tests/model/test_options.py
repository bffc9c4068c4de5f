"""What the modules can be asked for: shapes of every kind, stacked layers,
rematerialisation, dropout, step-by-step decoding, published sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import (
  ConfigError,
  LongT5Config,
  LongT5EncoderModel,
  LongT5ForConditionalGeneration,
  LongT5Model,
)
from longt5_flax.interop.layers import (
    init_params,
    stack_layers,
    unstack_layers,
)

# Depths differ, and heads * d_kv is not d_model.
CONFIG = LongT5Config(
    vocab_size=40, d_model=16, d_kv=3, num_heads=4, d_ff=20, num_layers=2,
    num_decoder_layers=1, local_radius=3, global_block_size=4,
    encoder_attention_type='transient-global', feed_forward_proj='gated-gelu',
    tie_word_embeddings=False, dropout_rate=0.5)
GENERATOR = np.random.default_rng(0)
INPUTS = jnp.asarray(GENERATOR.integers(2, 40, (2, 21)), jnp.int32)
SEGMENTS = jnp.asarray(np.arange(21) < np.array([[21], [14]]), jnp.int32)
TARGETS = jnp.asarray(GENERATOR.integers(2, 40, (2, 7)), jnp.int32)


def model_of(**fields):
  options = {key: fields.pop(key) for key in
             ('scan_layers', 'remat', 'dtype', 'attention', 'scan_unroll')
             if key in fields}
  return LongT5ForConditionalGeneration(
      dataclasses.replace(CONFIG, **fields), **options)


@functools.cache
def params_of(**fields):
  return golden.random_params(model_of(**fields), INPUTS, TARGETS)


def run_with_gradients(model, params):
  def loss(params):
    logits = model.apply({'params': params}, INPUTS, TARGETS, SEGMENTS)
    return jnp.sum(jnp.sin(logits)), logits
  gradients, logits = golden.jit(jax.grad(loss, has_aux=True))(params)
  return logits, gradients


@functools.cache
def plain():
  """Unrolled layers, nothing recomputed."""
  return run_with_gradients(model_of(), params_of())


# Shapes of parameters.


def shapes(model, *inputs):
  params = jax.eval_shape(model.init, jax.random.key(0), *inputs)['params']
  return {path: leaf.shape for path, leaf in golden.flatten(params).items()}


def test_kernels_of_narrow_heads():
  found = shapes(model_of(), INPUTS, TARGETS)
  for path in ('encoder/layers_1/attention', 'decoder/layers_0/self_attention',
               'decoder/layers_0/encoder_decoder_attention'):
    for name in ('query', 'key', 'value'):
      assert found[f'{path}/{name}/kernel'] == (16, 12)
    assert found[f'{path}/out/kernel'] == (12, 16)
  assert found['encoder/relpos_bias/rel_embedding'] == (4, 32)
  assert found['encoder/side_relpos_bias/rel_embedding'] == (4, 32)
  assert 'encoder/layers_2/mlp/wo/kernel' not in found
  assert 'decoder/layers_1/mlp/wo/kernel' not in found


def test_stacked_layers_have_a_leading_axis():
  stacked = shapes(model_of(scan_layers=True), INPUTS, TARGETS)
  assert stacked['encoder/layers/mlp/wi_0/kernel'] == (2, 16, 20)
  assert stacked['decoder/layers/mlp/wi_0/kernel'] == (1, 16, 20)
  assert stacked == {
      path: leaf.shape for path, leaf in golden.flatten(
          stack_layers(params_of())).items()}


def test_relu_has_one_input_kernel_and_tied_no_head():
  found = shapes(model_of(feed_forward_proj='relu', tie_word_embeddings=True),
                 INPUTS, TARGETS)
  assert found['encoder/layers_0/mlp/wi/kernel'] == (16, 20)
  assert 'encoder/layers_0/mlp/wi_0/kernel' not in found
  assert 'decoder/logits_dense/kernel' not in found


def test_models_without_head_and_without_decoder():
  whole = shapes(model_of(), INPUTS, TARGETS)
  assert whole.pop('decoder/logits_dense/kernel') == (16, 40)
  assert shapes(LongT5Model(CONFIG), INPUTS, TARGETS) == whole
  assert shapes(LongT5EncoderModel(CONFIG), INPUTS) == {
      path: shape for path, shape in whole.items()
      if not path.startswith('decoder')}


def test_parameters_do_not_depend_on_the_length():
  """A row too short for a global token makes the same model."""
  assert shapes(model_of(), INPUTS[:, :3], TARGETS) == shapes(
      model_of(), INPUTS, TARGETS)


@pytest.mark.parametrize('fields', [
    {'tie_word_embeddings': False, 'scale_decoder_outputs': True},
    {'tie_word_embeddings': True, 'scale_decoder_outputs': False}])
def test_scaling_is_apart_from_tying(fields):
  """Logits are linear in the decoder's output, so scaling divides by 4."""
  model = model_of(num_layers=1, **fields)
  other = model_of(num_layers=1, **fields | {
      'scale_decoder_outputs': not fields['scale_decoder_outputs']})
  params = golden.random_params(model, INPUTS, TARGETS)
  logits, others = (
      golden.jit(a.apply)({'params': params}, INPUTS, TARGETS)
      for a in (model, other))
  scaled, plain = (logits, others) if fields[
      'scale_decoder_outputs'] else (others, logits)
  golden.assert_close(scaled * 16 ** 0.5, plain)


def test_by_default_pads_are_no_segment():
  inputs = INPUTS * SEGMENTS
  params = params_of()
  apply = golden.jit(lambda *inputs: model_of().apply(
      {'params': params}, *inputs))
  golden.assert_close(
      apply(inputs, TARGETS), apply(inputs, TARGETS, SEGMENTS))


# Stacked layers and rematerialisation.


@pytest.mark.parametrize('remat', ['none', 'dots', 'layer', 'offload'])
@pytest.mark.parametrize('unroll', [0, 1])
def test_stacked_layers_compute_the_same(unroll, remat):
  """In a loop, and without one."""
  logits, gradients = run_with_gradients(
      model_of(scan_layers=True, remat=remat, scan_unroll=unroll),
      stack_layers(params_of()))
  expected_logits, expected = plain()
  golden.assert_close(logits, expected_logits, what='logits')
  golden.assert_trees_close(unstack_layers(gradients), expected, 'gradient')


def test_some_stacked_layers_a_turn():
  """Three layers by two."""
  logits, _ = run_with_gradients(
      model_of(scan_layers=True, scan_unroll=2, num_layers=3),
      stack_layers(params_of(num_layers=3)))
  expected, _ = run_with_gradients(
      model_of(num_layers=3), params_of(num_layers=3))
  golden.assert_close(logits, expected, what='logits')


def test_deep_models_start_with_as_short_a_program():
  """One of a draw for each tensor of each layer takes minutes to compile."""
  def size(depth):
    model = model_of(num_layers=depth, num_decoder_layers=depth,
                     scan_layers=True)
    return len(jax.jit(lambda key: init_params(model, key, 2)).lower(
        jax.random.key(0)).as_text())

  assert size(6) < 1.01 * size(2)


def test_rematerialisation_computes_the_same():
  logits, gradients = run_with_gradients(model_of(remat='layer'), params_of())
  expected_logits, expected = plain()
  golden.assert_close(logits, expected_logits, what='logits')
  golden.assert_trees_close(gradients, expected, 'gradient')


@pytest.mark.parametrize('scan_layers', [False, True])
def test_rematerialisation_keeps_less(scan_layers):
  """Fewer numbers wait for the backward pass, policy by policy."""
  params = stack_layers(params_of()) if scan_layers else params_of()

  def kept(remat):
    model = model_of(scan_layers=scan_layers, remat=remat)
    residuals = jax.eval_shape(lambda params: jax.vjp(
        lambda params: model.apply({'params': params}, INPUTS, TARGETS),
        params)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(residuals))

  none, dots, layer = map(kept, ('none', 'dots', 'layer'))
  assert none > 1.5 * dots
  assert dots > 1.2 * layer


def test_unstacking_undoes_stacking():
  params = params_of()
  back = unstack_layers(stack_layers(params))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  jax.tree.map(np.testing.assert_array_equal, back, params)


# Dropout.


@functools.cache
def with_dropout(**fields):
  """key -> logits and every module's output; no dropout without a key."""
  model = model_of(**fields)
  params = params_of(**fields)

  @golden.jit
  def apply(key):
    logits, state = model.apply(
        {'params': params}, INPUTS, TARGETS, SEGMENTS,
        deterministic=key is None, rngs={} if key is None else {'dropout': key},
        mutable=['intermediates'],
        capture_intermediates=lambda module, method: (
            module.name in ('mlp', 'attention') and method == '__call__'))
    return logits, {
        path: value[0]
        for path, value in golden.flatten(state['intermediates']).items()}

  return apply


def module_outputs(seed=None, **fields):
  key = None if seed is None else jax.random.key(seed)
  return jax.tree.map(np.asarray, with_dropout(**fields)(key)[1])


def test_same_key_same_dropout():
  first, again, other = (
      np.asarray(with_dropout()(jax.random.key(seed))[0])
      for seed in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - other).max() > 0.1


def test_no_dropout_by_default():
  """The rate is 0.5, and yet nothing is random."""
  golden.assert_close(with_dropout()(None)[0], plain()[0])


def test_stacked_layers_drop_apart():
  """Each layer has masks of its own, stacked or not."""
  for scan_layers in (False, True):
    model = model_of(scan_layers=scan_layers)
    params = stack_layers(params_of()) if scan_layers else params_of()
    state = golden.jit(lambda params, key, model=model: model.apply(
        {'params': params}, INPUTS, SEGMENTS, deterministic=False,
        rngs={'dropout': key}, method='encode', mutable=['intermediates'],
        capture_intermediates=lambda module, method: (
            module.name == 'mlp' and method == '__call__'))[1])(
                params, jax.random.key(0))
    encoder = state['intermediates']['encoder']
    outputs = encoder['layers']['mlp']['__call__'][0] if scan_layers else [
        encoder[f'layers_{i}']['mlp']['__call__'][0] for i in range(2)]
    masks = [np.asarray(output)[:, 0] != 0 for output in outputs]
    assert (masks[0] != masks[1]).any(), f'{scan_layers=}'


@pytest.mark.parametrize('stack', ['encoder', 'decoder'])
def test_embedding_dropout_is_the_same_at_every_position(stack):
  """One mask for a row: features are zeroed along the whole length, others
  are doubled (the rate being 0.5)."""
  path = f'{stack}/layers_0/residual'
  actual, full = module_outputs(1)[path], module_outputs()[path]
  kept = actual != 0
  np.testing.assert_array_equal(
      kept, np.broadcast_to(kept[:, :1], kept.shape))
  assert 0.2 < kept[:, 0].mean() < 0.8
  assert (kept[0, 0] != kept[1, 0]).any(), 'rows share one mask'
  golden.assert_close(actual, 2 * full * kept)


def test_mlp_dropout_is_the_same_at_every_position():
  """The MLP drops its output, by one mask for a row..."""
  path = 'encoder/layers_0/mlp/__call__'
  kept = module_outputs(1)[path][0] != 0
  np.testing.assert_array_equal(kept, np.broadcast_to(kept[:1], kept.shape))
  assert 0 < kept[0].sum() < 16
  assert (module_outputs()[path][0] != 0).all()


def test_mlp_output_is_dropped_twice():
  """... and the layer drops it once more: of what the MLP left, half is
  added, doubled."""
  state = module_outputs(1)
  before = state['encoder/layers_0/residual'][0]
  after = state['encoder/layers_1/residual'][0]
  mlp = state['encoder/layers_0/mlp/__call__'][0]
  attention = state['encoder/layers_0/attention/__call__'][0]
  # Each feature of a row adds attention's output twofold or not at all, and
  # the MLP's likewise.
  choices = np.stack([before + 2 * a * attention + 2 * b * mlp
                      for a in (0, 1) for b in (0, 1)])
  close = np.abs(choices - after) <= 1e-5 * np.abs(after).max()
  assert close.all(1).any(0).all()
  dropped_by_layer = close[[0, 2]].all(1).any(0) & (mlp[0] != 0)
  added = close[[1, 3]].all(1).any(0) & (mlp[0] != 0)
  assert dropped_by_layer.any()
  assert added.any()


def test_attention_dropout_is_the_same_for_all_queries():
  """With weights that do not depend on the query, outputs must not either:
  the mask drops keys, not pairs of query and key."""
  fields = {'encoder_attention_type': 'full'}

  def no_scores(path, leaf):
    silent = path[-2].key == 'query' or path[-1].key == 'rel_embedding'
    return leaf * 0 if silent else leaf

  model = model_of(**fields)
  params = jax.tree_util.tree_map_with_path(no_scores, params_of(**fields))
  apply = golden.jit(lambda key: model.apply(
      {'params': params}, INPUTS, SEGMENTS, deterministic=False,
      rngs={'dropout': key}, method='encode', mutable=['intermediates'],
      capture_intermediates=lambda module, method: (
          module.name == 'attention' and method == '__call__'))[1])
  outputs = [
      golden.flatten(apply(jax.random.key(seed)))[
          'intermediates/encoder/layers_0/attention/__call__'][0]
      for seed in (1, 2)]
  for output in outputs:
    golden.assert_close(
        output[0], np.broadcast_to(output[0, :1], output[0].shape))
  assert np.abs(outputs[0][0] - outputs[1][0]).max() > 1e-3


# Decoding step by step.


@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('chunks', [(1,) * 7, (4, 1, 2)])
def test_steps_equal_the_whole_target(scan_layers, chunks):
  """With a cache longer than needed, one target or several at a time."""
  model = model_of(scan_layers=scan_layers)
  params = stack_layers(params_of()) if scan_layers else params_of()

  @golden.jit
  def start(params):
    encoded = model.apply({'params': params}, INPUTS, SEGMENTS,
                          method='encode')
    whole = model.apply({'params': params}, encoded, TARGETS, SEGMENTS,
                        method='decode')
    _, state = model.apply({'params': params}, encoded, 9,
                           method='init_cache',
                           mutable=['encoded', 'cache'])
    return whole, state

  @golden.jit
  def step(state, tokens):
    logits, cache = model.apply(
        {'params': params, **state}, tokens, SEGMENTS,
        method='decode_step', mutable=['cache'])
    return logits, {**state, **cache}

  whole, state = start(params)
  done = 0
  for count in chunks:
    logits, state = step(state, TARGETS[:, done:done + count])
    golden.assert_close(
        logits, whole[:, done:done + count], what=f'target {done}')
    done += count


# What is refused.


@pytest.mark.parametrize('options, message', [
    ({'remat': 'all'}, r"remat='all' must be one of"),
    ({'attention': 'flash'}, r"attention='flash' must be one of"),
    ({'dtype': jnp.int32}, r'dtype=.*int32.* must be one of'),
])
def test_unknown_options_of_modules(options, message):
  with pytest.raises(ConfigError, match=message):
    jax.eval_shape(
        model_of(**options).init, jax.random.key(0), INPUTS, TARGETS)


@pytest.mark.parametrize('fields, message', [
    ({'local_radius': 0}, 'local_radius=0 must be at least 1'),
    ({'global_block_size': 0}, 'global_block_size=0 must be at least 1'),
    ({'num_decoder_layers': 0}, 'num_decoder_layers=0 must be at least 1'),
    ({'d_kv': -1}, 'd_kv=-1 must be at least 1'),
    ({'dropout_rate': 1.0}, r'dropout_rate=1.0 must be in \[0, 1\)'),
    ({'feed_forward_proj': 'gelu'}, "feed_forward_proj='gelu' must be one of"),
    ({'encoder_attention_type': 'sparse'},
     "encoder_attention_type='sparse' must be one of"),
    ({'eos_token_id': 40}, r'eos_token_id=40 must be in \[0, vocab_size=40\)'),
    ({'relative_attention_num_buckets': 7},
     'relative_attention_num_buckets=7 must be even'),
    ({'relative_attention_max_distance': 16},
     'relative_attention_max_distance=16 must be greater than half'),
    ({'num_heads': True}, 'num_heads=True must be of type int'),
])
def test_impossible_architectures(fields, message):
  with pytest.raises(ConfigError, match=message):
    dataclasses.replace(CONFIG, **fields)


# Published sizes.


@pytest.mark.parametrize('preset, count', [
    # T5.1.1's published sizes, whose parameters local attention has too.
    ('full-base', 247_577_856), ('full-large', 783_150_080),
    ('full-xl', 2_849_757_184), ('full-xxl', 11_135_332_352),
    ('local-base', 247_577_856), ('local-large', 783_150_080),
    # One more norm a layer, and the side bias.
    ('tglobal-base', 247_577_856 + 12 * 768 + 32 * 12),
    ('tglobal-large', 783_150_080 + 24 * 1024 + 32 * 16),
    ('tglobal-xl', 2_849_757_184 + 24 * 2048 + 32 * 32),
])
def test_parameter_counts_of_published_sizes(preset, count):
  # Unrolled layers have the same; tracing them takes longer.
  model = LongT5ForConditionalGeneration(
      LongT5Config.preset(preset), scan_layers=True)
  tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
  params = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
  assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count

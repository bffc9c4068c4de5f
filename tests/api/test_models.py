"""What the models hold, take, give and refuse."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax import (
    ConfigError,
    FlaxLongT5EncoderModel,
    FlaxLongT5ForConditionalGeneration,
    FlaxLongT5Model,
    LongT5Config,
    LongT5ForConditionalGeneration,
)
from longt5_flax.api.base import as_config
from longt5_flax.api.outputs import FlaxBaseModelOutput

CONFIG = LongT5Config(
    vocab_size=40, d_model=16, d_kv=3, num_heads=4, d_ff=20, num_layers=2,
    num_decoder_layers=2, local_radius=3, global_block_size=4,
    encoder_attention_type='transient-global', feed_forward_proj='gated-gelu',
    tie_word_embeddings=False, dropout_rate=0.5)
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.integers(2, 40, (2, 21))
MASK = (np.arange(21) < np.array([[21], [14]])).astype(np.int32)
TARGETS = GENERATOR.integers(2, 40, (2, 7))


@functools.cache
def params_of():
  return golden.random_params(
      LongT5ForConditionalGeneration(CONFIG), INPUTS, TARGETS)


@functools.cache
def model_of(**options):
  model = FlaxLongT5ForConditionalGeneration(CONFIG, _do_init=False, **options)
  model.params = params_of()
  return model


@functools.cache
def whole():
  """Encoder outputs, and the decoder's of all targets at once."""
  encoded = model_of().encode(INPUTS, MASK)
  return encoded, model_of().decode(
      TARGETS, encoded, MASK, output_hidden_states=True,
      output_attentions=True)


# Step by step.


def steps(lengths, decoder_mask=None, **options):
  """The outputs of decoding so many targets at a time."""
  model, (encoded, _) = model_of(), whole()
  cache = model.init_cache(2, 9, encoded)
  outputs, start = [], 0
  for length in lengths:
    outputs.append(model.decode(
        TARGETS[:, start:start + length], encoded, MASK, decoder_mask,
        cache, decoder_position_ids=np.broadcast_to(
            np.arange(start, start + length), (2, length)), **options))
    cache, start = outputs[-1].past_key_values, start + length
  return outputs


@pytest.mark.parametrize('decoder_mask', [
    None, np.ones((2, 1), int), np.ones((2, 9), bool)],
    ids=['none', 'row', 'whole'])
def test_steps_equal_the_whole(decoder_mask):
  outputs = steps([1, 3, 1, 1, 1], decoder_mask)
  golden.assert_close(
      np.concatenate([output.logits for output in outputs], axis=1),
      whole()[1].logits)


def test_states_and_attentions_of_a_step():
  outputs = steps([6, 1], output_hidden_states=True, output_attentions=True)
  for field in ('hidden_states', 'attentions', 'cross_attentions'):
    assert len(outputs[1][field]) == len(whole()[1][field])
    for actual, expected in zip(outputs[1][field], whole()[1][field],
                                strict=True):
      if field == 'attentions':  # Room for 9 targets, of which 7 are there.
        assert not np.any(actual[..., 7:])
        actual = actual[..., :7]
      last = np.s_[:, -1:] if field == 'hidden_states' else np.s_[:, :, -1:]
      golden.assert_close(actual, expected[last], what=field)


def test_decoder_mask_hides_targets():
  hidden = np.ones((2, 9), int)
  hidden[:, 2] = 0
  model, (encoded, plain) = model_of(), whole()
  masked = model.decode(TARGETS, encoded, MASK, hidden[:, :7]).logits
  golden.assert_close(masked[:, :2], plain.logits[:, :2])
  assert np.abs(masked[:, 3:] - plain.logits[:, 3:]).min(axis=-1).max() > 1e-2
  outputs = steps([3, 1, 3], hidden)
  golden.assert_close(np.concatenate(
      [output.logits for output in outputs], axis=1), masked)


def test_other_params_than_those_of_the_cache():
  """Keys and values of the inputs are then made anew."""
  model, (encoded, _) = model_of(), whole()
  other = jax.tree.map(lambda x: x * 0.9, params_of())
  expected = model.decode(TARGETS, encoded, MASK, params=other).logits
  for params in (None, other):
    cache = model.init_cache(2, 7, encoded, params=params)
    output = model.decode(
        TARGETS, encoded, MASK, past_key_values=cache, params=other)
    golden.assert_close(output.logits, expected)
    assert jax.tree.structure(output.past_key_values) == jax.tree.structure(
        cache)


def test_a_loop_of_steps_in_jit():
  model, (encoded, plain) = model_of(), whole()

  def write(params, encoded):
    cache = model.init_cache(2, 7, encoded, params)

    def body(i, carry):
      cache, logits = carry
      token = jax.lax.dynamic_slice_in_dim(jnp.asarray(TARGETS), i, 1, axis=1)
      output = model.decode(token, encoded, MASK, params=params,
                            past_key_values=cache)
      return output.past_key_values, jax.lax.dynamic_update_slice_in_dim(
          logits, output.logits, i, axis=1)

    return jax.lax.fori_loop(0, 7, body, (cache, jnp.zeros((2, 7, 40))))[1]

  golden.assert_close(golden.jit(write)(params_of(), encoded), plain.logits)


# Outputs.


def test_output_by_name_key_and_position():
  array = np.zeros((1, 2, 3))
  output = FlaxBaseModelOutput(array, attentions=(array, array))
  assert output.last_hidden_state is array
  assert output['last_hidden_state'] is output[0] is array
  assert output[1] is output.attentions
  assert output[:1] == (array,)
  assert output.hidden_states is None
  assert list(output) == ['last_hidden_state', 'attentions']
  assert len(output) == 2
  assert output.to_tuple() == (array, output.attentions)
  assert 'hidden_states' not in output
  assert dict(**output)['attentions'] is output.attentions
  with pytest.raises(KeyError, match='hidden_states'):
    output['hidden_states']
  with pytest.raises(KeyError, match='logits'):
    output['logits'] = array
  output['hidden_states'] = (array,)
  assert output[1] == (array,)


def test_output_is_a_tree():
  output = FlaxBaseModelOutput(np.ones((1, 2, 3)))
  doubled = jax.tree.map(lambda x: 2 * x, output)
  assert isinstance(doubled, FlaxBaseModelOutput)
  assert doubled.last_hidden_state.sum() == 12
  assert jax.jit(lambda x: x)(output).hidden_states is None


@pytest.mark.parametrize('kind', [
    np.asarray, jnp.asarray, np.uint8, np.ndarray.tolist],
    ids=['numpy', 'jax', 'uint8', 'list'])
def test_inputs_of_any_kind(kind):
  output = model_of()(
      kind(INPUTS), kind(MASK), kind(TARGETS), return_dict=False)
  assert len(output) == 2
  golden.assert_close(output[0], whole()[1].logits)
  golden.assert_close(output[1], whole()[0].last_hidden_state)


def test_fields_of_a_call():
  output = model_of()(INPUTS, MASK, TARGETS, output_attentions=True,
                      output_hidden_states=True)
  assert list(output) == [
      'logits', 'decoder_hidden_states', 'decoder_attentions',
      'cross_attentions', 'encoder_last_hidden_state', 'encoder_hidden_states',
      'encoder_attentions']
  inside = golden.jit(lambda params: model_of()(
      INPUTS, MASK, TARGETS, params=params))(params_of())
  assert list(inside) == ['logits', 'encoder_last_hidden_state']
  golden.assert_close(inside.logits, output.logits)


def test_attentions_whatever_the_implementation():
  one, other = (model.encode(INPUTS, MASK, output_attentions=True).attentions
                for model in (model_of(), model_of(attention='chunked')))
  assert len(one) == 2
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a, b)


# Parameters, dtypes, dropout.


def test_random_parameters_by_seed():
  first, again, other = (FlaxLongT5EncoderModel(CONFIG, seed=seed).params
                         for seed in (1, 1, 2))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  name = ('encoder', 'layers_0', 'mlp', 'wi_0', 'kernel')
  differs = functools.reduce(lambda tree, key: tree[key], name, first)
  assert np.any(differs != functools.reduce(
      lambda tree, key: tree[key], name, other))
  assert set(first) == {'token_embedder', 'encoder'}


def test_without_parameters():
  model = FlaxLongT5EncoderModel(CONFIG, _do_init=False)
  with pytest.raises(ConfigError, match=r'holds no parameters .* pass params='):
    model.encode(INPUTS)
  encoder = {key: params_of()[key] for key in ('token_embedder', 'encoder')}
  golden.assert_close(model(INPUTS, MASK, params=encoder)[0],
                      whole()[0].last_hidden_state)


def test_parameters_must_fit():
  model = FlaxLongT5ForConditionalGeneration(CONFIG, _do_init=False)
  params = jax.tree.map(lambda x: x, params_of())
  params['encoder']['encoder_norm']['scale'] = np.ones(3)
  with pytest.raises(ConfigError, match=(
      r'params: encoder/encoder_norm/scale has shape \(3,\): must be \(16,\)')):
    model.params = params
  del params['encoder']['encoder_norm']
  with pytest.raises(ConfigError, match='encoder_norm/scale has shape None'):
    model.params = params


def test_casts():
  model, params = model_of(), params_of()
  half = model.to_bf16(params)
  assert {x.dtype for x in jax.tree.leaves(half)} == {np.dtype(jnp.bfloat16)}
  assert {x.dtype for x in jax.tree.leaves(model.to_fp32(half))} == {
      np.dtype('float32')}
  mask = jax.tree.map(lambda x: x.ndim > 1, params)
  mixed = model.to_fp16(params, mask)
  assert mixed['encoder']['encoder_norm']['scale'].dtype == jnp.float32
  assert mixed['token_embedder']['embedding'].dtype == jnp.float16
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype('float32')}


@pytest.mark.parametrize('dtype, tolerance', [
    ('bfloat16', 0.1), ('float16', 0.01)])
def test_narrow_dtypes(dtype, tolerance):
  """Computed and stored in few bits; the residual stream stays float32."""
  model = model_of(dtype=dtype)
  assert model.dtype == dtype
  cast = {'bfloat16': model.to_bf16, 'float16': model.to_fp16}[dtype]

  def run(params):
    output = model(INPUTS, MASK, TARGETS, params=params,
                   output_hidden_states=True)
    return jnp.mean(output.logits**2), output

  if dtype == 'bfloat16':  # float16's gradients take long to compile.
    gradients, output = golden.jit(jax.grad(run, has_aux=True))(
        cast(params_of()))
    assert {x.dtype for x in jax.tree.leaves(gradients)} == {np.dtype(dtype)}
  else:
    output = run(cast(params_of()))[1]
  assert {x.dtype for x in jax.tree.leaves(output)} == {np.dtype('float32')}
  expected = whole()[1].logits
  assert np.abs(output.logits - expected).max() < tolerance * np.abs(
      expected).max()


def test_dropout():
  model = model_of()
  call = functools.partial(model, INPUTS, MASK, TARGETS, train=True)
  first, again, other = (call(dropout_rng=jax.random.key(i)).logits
                         for i in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  assert np.any(first != other)
  assert np.any(first != whole()[1].logits)
  with pytest.raises(ConfigError, match='train=True needs dropout_rng='):
    call()
  without = FlaxLongT5ForConditionalGeneration(
      dataclasses.replace(CONFIG, dropout_rate=0.0), _do_init=False)
  golden.assert_close(
      without(INPUTS, MASK, TARGETS, train=True, params=params_of()).logits,
      whole()[1].logits)


def test_gradient_checkpointing_is_remat():
  model = FlaxLongT5Model(CONFIG, gradient_checkpointing=True, _do_init=False)
  assert model.module.remat == 'layer'
  other = FlaxLongT5Model(CONFIG, _do_init=False)
  assert other.module.remat == 'none'
  other.enable_gradient_checkpointing()
  assert other.module.remat == 'layer'


# Mistakes.


def call(**arguments):
  given = {'input_ids': INPUTS, 'attention_mask': MASK,
           'decoder_input_ids': TARGETS} | arguments
  return model_of()(**given)


def decode(**arguments):
  given = {'decoder_input_ids': TARGETS, 'encoder_outputs': whole()[0],
           'encoder_attention_mask': MASK} | arguments
  return model_of().decode(**given)


def decode_step(room=2, **arguments):
  cache = model_of().init_cache(2, room, whole()[0])
  return decode(**{'decoder_input_ids': TARGETS[:, :2],
                   'past_key_values': cache} | arguments)


@pytest.mark.parametrize('method, arguments, message', [
    (call, {'input_ids': INPUTS[0]},
     'input_ids has shape (21,): must be [batch, length], none of them 0.'),
    (call, {'input_ids': INPUTS[:, :0]},
     'input_ids has shape (2, 0): must be [batch, length], none of them 0.'),
    (call, {'input_ids': [[1, 2], [3]]}, 'input_ids is no array ('),
    (call, {'input_ids': 'A text'},
     'input_ids is of dtype <U6: must be integers.'),
    (call, {'input_ids': INPUTS * 1.0},
     'input_ids is of dtype float64: must be integers.'),
    (call, {'input_ids': INPUTS - INPUTS + 71},
     'input_ids holds the id 71: must be in [0, vocab_size=40).'),
    (call, {'decoder_input_ids': jnp.asarray(TARGETS - 100)},
     'decoder_input_ids holds the id -'),
    (call, {'decoder_input_ids': None}, 'decoder_input_ids is missing'),
    (call, {'attention_mask': MASK[:, 1:]},
     'attention_mask has shape (2, 20): must be (2, 21).'),
    (call, {'decoder_attention_mask': MASK},
     'decoder_attention_mask has shape (2, 21): must be (2, 7).'),
    (decode, {'encoder_outputs': None},
     'encoder_outputs must be what encode() returns, or a tuple'),
    (decode, {'encoder_outputs': np.zeros((2, 21, 16))},
     'encoder_outputs must be what encode() returns, or a tuple'),
    (decode, {'encoder_outputs': (np.zeros((1, 21, 16)),)},
     'encoder_outputs[0] has shape (1, 21, 16): must be (2, length, '
     'd_model=16), for 2 rows to decode.'),
    (decode, {'decoder_position_ids': np.zeros((2, 7), int)},
     'decoder_position_ids must count up from 0 in every row'),
    (decode, {'decoder_position_ids': np.zeros((2, 8), int)},
     'decoder_position_ids has shape (2, 8): must be (2, 7).'),
    (decode_step, {'room': 1},
     'past_key_values has room for 1 targets and holds 0: decoder_input_ids '
     'has 2 more.'),
    (decode_step, {'decoder_attention_mask': np.ones((2, 3))},
     'decoder_attention_mask has shape (2, 3): must be (2, 2).'),
    (decode_step, {'encoder_outputs': (np.zeros((2, 20, 16)),),
                   'encoder_attention_mask': None},
     'past_key_values is for inputs of shape (2, 21): encoder_outputs[0] has '
     '(2, 20).'),
    (decode_step, {'decoder_input_ids': TARGETS[:1, :2],
                   'encoder_outputs': (np.zeros((1, 21, 16)),),
                   'encoder_attention_mask': None},
     'past_key_values is for inputs of shape (2, 21): encoder_outputs[0] has '
     '(1, 21).'),
    (decode, {'past_key_values': {'decoder': {}}},
     'past_key_values must be what init_cache() or the last decode()'),
    (decode_step, {'room': 0}, 'max_length=0 must be an integer, at least 1.'),
    (decode_step, {'train': True, 'dropout_rng': jax.random.key(0)},
     'train=True does not go with past_key_values.'),
])
def test_refused(method, arguments, message):
  with pytest.raises(ConfigError) as raised:
    method(**arguments)
  assert str(raised.value).startswith(message)
  assert '\n' not in str(raised.value)


def test_unknown_options():
  with pytest.raises(TypeError, match="no argument 'gradient_checkpoint'"):
    FlaxLongT5Model(CONFIG, gradient_checkpoint=True)
  with pytest.raises(ConfigError, match='config is of type int: must be a'):
    as_config(7)

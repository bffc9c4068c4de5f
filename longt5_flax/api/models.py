"""The encoder, and encoder and decoder, as transformers 4.57 had them."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from longt5_flax.api import checks, outputs, programs
from longt5_flax.api.base import FlaxLongT5PreTrainedModel
from longt5_flax.config import ConfigError
from longt5_flax.model.longt5 import LongT5EncoderModel, LongT5Model


class _FlaxLongT5(FlaxLongT5PreTrainedModel):
  """Encoding, which all three do."""

  def encode(
      self,
      input_ids: checks.Arrays,
      attention_mask: checks.Arrays | None = None,
      output_attentions: bool | None = None,
      output_hidden_states: bool | None = None,
      return_dict: bool | None = None,
      train: bool = False,
      params: Any = None,
      dropout_rng: jax.Array | None = None,
  ) -> Any:
    """The encoder's output.

    Args:
      input_ids: [B, L], integers, of any length.
      attention_mask: [B, L], 1 for tokens that are seen. Without one ALL are,
        padding too.
      output_attentions: give the weights of every layer, in blocks.
      output_hidden_states: give what goes from layer to layer.
      return_dict: False gives a tuple.
      train: with dropout, which needs `dropout_rng`.
      params: used instead of what the model holds.
      dropout_rng: a key.

    Returns:
      FlaxBaseModelOutput.

    Raises:
      ConfigError: an argument has the wrong shape or holds an impossible id.
    """
    ids = checks.token_ids('input_ids', input_ids, self.config.vocab_size)
    mask = checks.attention_mask('attention_mask', attention_mask, ids.shape)
    wants = output_hidden_states, output_attentions
    # Other implementations of attention have no weights to give.
    module = (self.module.clone(attention='reference') if output_attentions
              else self.module)
    hidden, state = programs.apply(
        module, 'encode', _collections(*wants),
        {'params': self._params_or_held(params)}, ids, mask,
        dropout_key=self._dropout_key(train, dropout_rng))
    states, attentions = _intermediates(
        state, 'encoder', ('attention',), *wants)
    return _returned(outputs.FlaxBaseModelOutput(
        hidden, states, *attentions), return_dict)

  def _dropout_key(self, train, key):
    if not train or not self.config.dropout_rate:
      return None
    if key is None:
      raise ConfigError('train=True needs dropout_rng=.')
    return key


class FlaxLongT5EncoderModel(_FlaxLongT5):
  """The encoder alone."""
  module_class = LongT5EncoderModel
  unused_tensors = ('decoder/*',)

  __call__ = _FlaxLongT5.encode


class FlaxLongT5Model(_FlaxLongT5):
  """Encoder and decoder, without an output layer."""
  module_class = LongT5Model
  unused_tensors: ClassVar[tuple[str, ...]] = ('decoder/logits_dense/kernel',)

  _output_class: Any = outputs.FlaxSeq2SeqModelOutput
  _decoder_output_class: Any = (
      outputs.FlaxBaseModelOutputWithPastAndCrossAttentions)

  def __call__(
      self,
      input_ids: checks.Arrays,
      attention_mask: checks.Arrays | None = None,
      decoder_input_ids: checks.Arrays | None = None,
      decoder_attention_mask: checks.Arrays | None = None,
      output_attentions: bool | None = None,
      output_hidden_states: bool | None = None,
      return_dict: bool | None = None,
      train: bool = False,
      params: Any = None,
      dropout_rng: jax.Array | None = None,
  ) -> Any:
    """Encodes the inputs and decodes all targets at once.

    Args:
      input_ids: see `encode`.
      attention_mask: see `encode`.
      decoder_input_ids: [B, T]; see `shift_tokens_right`.
      decoder_attention_mask: [B, T], 1 for targets that later ones see.
      output_attentions, output_hidden_states, return_dict, train, params,
        dropout_rng: see `encode`.

    Returns:
      FlaxSeq2SeqModelOutput; with an output layer FlaxSeq2SeqLMOutput.

    Raises:
      ConfigError: see `encode`.
    """
    if decoder_input_ids is None:
      raise ConfigError('decoder_input_ids is missing: a call takes input_ids '
                        'and decoder_input_ids.')
    keys = (None, None) if dropout_rng is None else jax.random.split(
        dropout_rng)
    chosen: dict[str, Any] = dict(
        output_attentions=output_attentions,
        output_hidden_states=output_hidden_states, train=train, params=params)
    encoded = self.encode(
        input_ids, attention_mask, dropout_rng=keys[0], **chosen)
    decoded = self.decode(
        decoder_input_ids, encoded, attention_mask, decoder_attention_mask,
        dropout_rng=keys[1], **chosen)
    return _returned(self._output_class(
        decoded[0], None, decoded.hidden_states, decoded.attentions,
        decoded.cross_attentions, encoded.last_hidden_state,
        encoded.hidden_states, encoded.attentions), return_dict)

  def decode(
      self,
      decoder_input_ids: checks.Arrays,
      encoder_outputs: Any,
      encoder_attention_mask: checks.Arrays | None = None,
      decoder_attention_mask: checks.Arrays | None = None,
      past_key_values: dict[str, Any] | None = None,
      output_attentions: bool | None = None,
      output_hidden_states: bool | None = None,
      return_dict: bool | None = None,
      train: bool = False,
      params: Any = None,
      dropout_rng: jax.Array | None = None,
      decoder_position_ids: checks.Arrays | None = None,
  ) -> Any:
    """Decodes targets: all at once, or the next ones of a cache.

    Args:
      decoder_input_ids: [B, T].
      encoder_outputs, encoder_attention_mask: what `encode` gave and got.
      decoder_attention_mask: [B, T], 1 for targets that later ones see; with a
        cache [B, max_length], or [B, 1] for all.
      past_key_values: from `init_cache` or the last call's output; the T
        targets come after those that it holds.
      decoder_position_ids: [B, T]; if given, must count up: LongT5 has
        relative positions only.
      The rest: see `encode`; no dropout with a cache.

    Returns:
      FlaxBaseModelOutputWithPastAndCrossAttentions; with an output layer
      FlaxCausalLMOutputWithCrossAttentions.

    Raises:
      ConfigError: see `encode`; also if the cache is full or of other inputs.
    """
    ids = checks.token_ids(
        'decoder_input_ids', decoder_input_ids, self.config.vocab_size)
    encoded = checks.encoder_output(
        encoder_outputs, ids.shape[0], self.config.d_model)
    mask = checks.attention_mask(
        'encoder_attention_mask', encoder_attention_mask, encoded.shape[:2])
    past, wants = past_key_values, (output_hidden_states, output_attentions)
    if past:
      checks.cache(past, self._name_of_encoded(params), encoded.shape)
    checks.decoder_positions(
        decoder_position_ids, ids.shape, _length(past) if past else 0)
    key = self._dropout_key(train, dropout_rng)
    inputs = params, ids, encoded, mask, decoder_attention_mask
    if not past:
      output, state = self._whole(*inputs, key, wants)
    elif key is not None:
      raise ConfigError('train=True does not go with past_key_values.')
    else:
      output, state = self._step(*inputs, past, wants)
      past = past | {'cache': state['cache']}
    states, attentions = _intermediates(
        state, 'decoder', ('self_attention', 'encoder_decoder_attention'),
        *wants)
    return _returned(self._decoder_output_class(
        output, past or None, states, *attentions), return_dict)

  def init_cache(self, batch_size: int, max_length: int, encoder_outputs: Any,
                 params: Any = None) -> dict[str, Any]:
    """An empty cache, for `decode` to fill step by step.

    The keys and values of the encoder's output are computed here, once.

    Args:
      batch_size: rows.
      max_length: the most targets that will be decoded.
      encoder_outputs: what `encode` returned.
      params: those that `decode` will be called with. A cache made without
        them serves calls with `params=`, too, but slower.

    Returns:
      For `past_key_values`.

    Raises:
      ConfigError: there are not `batch_size` rows, or no room for a target.
    """
    encoded = checks.encoder_output(
        encoder_outputs, batch_size, self.config.d_model)
    state = programs.init_cache(
        self.module, checks.cache_length(max_length),
        self._params_or_held(params), encoded)
    return {'cache': state['cache'],
            self._name_of_encoded(params): state['encoded']}

  def _name_of_encoded(self, params):
    """Keys and values made by other parameters must not be found."""
    is_held = params is None or params is self._params
    return 'encoded' if is_held else 'encoded_by_other_params'

  def _whole(self, params, ids, encoded, mask, decoder_mask, key, wants):
    """Output and intermediates of all targets."""
    decoder_mask = checks.attention_mask(
        'decoder_attention_mask', decoder_mask, ids.shape) > 0
    return programs.apply(
        self.module, 'decode', _collections(*wants),
        {'params': self._params_or_held(params)}, encoded, ids, mask, None,
        decoder_mask, dropout_key=key)

  def _step(self, params, ids, encoded, mask, decoder_mask, past, wants):
    """Output, intermediates and new cache of the next targets."""
    cache, name = past['cache'], self._name_of_encoded(params)
    room = cache['decoder']['layers_0']['self_attention']['key'].shape[-2]
    checks.room_for(ids.shape[1], _length(past), room)
    if decoder_mask is not None:
      width = 1 if jnp.shape(decoder_mask)[1:] == (1,) else room
      decoder_mask = jnp.broadcast_to(checks.attention_mask(
          'decoder_attention_mask', decoder_mask, (ids.shape[0], width)),
          (ids.shape[0], room)) > 0
    made = past if name in past else self.init_cache(
        ids.shape[0], room, (encoded,), params)
    return programs.apply(
        self.module, 'decode_step', ('cache', *_collections(*wants)),
        {'params': self._params_or_held(params), 'cache': cache,
         'encoded': made[name]}, ids, mask, decoder_mask)


def _length(past):
  """How many targets a cache holds."""
  return past['cache']['decoder']['length']


def _collections(*wants):
  """What a call must return besides its output; kept only where asked for,
  because it is large."""
  return ('intermediates',) if any(wants) else ()


def _intermediates(state, stack, kinds, wants_states, wants_attentions):
  """Hidden states, and of each kind the attentions, or None, of a stack."""
  if not wants_states and not wants_attentions:
    return None, [None for _ in kinds]
  values = state['intermediates'][stack]
  layers = [values[f'layers_{i}'] for i in range(len(values) - 1)]
  states = None
  if wants_states:
    states = (*(layer['residual'][0] for layer in layers),
              values['output'][0])
  return states, [tuple(layer[kind]['weights'][0] for layer in layers)
                  if wants_attentions else None for kind in kinds]


def _returned(output, return_dict):
  return output.to_tuple() if return_dict is False else output

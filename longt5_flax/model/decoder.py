"""The decoder: T5.1.1's, for whole targets and, with a cache, step by step."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.config import LongT5Config
from longt5_flax.model.attention import full_attention
from longt5_flax.model.attention_choice import choose_attention
from longt5_flax.model.layers import (
    MLP,
    Dense,
    Embed,
    Projections,
    RelativePositionBias,
    T5LayerNorm,
    layer_dropout,
    make_layers,
    run_layers,
)
from longt5_flax.model.relative_position import toeplitz
from longt5_flax.model.segment_attention import segment_attention


class DecoderContext(NamedTuple):
  """What all layers of the decoder see.

  Attributes:
    encoded: the encoder's output [B, L, D]; None once its keys and values are
      cached.
    bias: of self-attention.
    self_mask: which targets a target may see.
    cross_mask: which inputs a target may see: those of its segment.
    segment_ids: of the targets, 0 is padding; None step by step.
    encoder_segment_ids: of the inputs, 0 is padding; None step by step.
    start: with a cache, the position of the first of the new tokens.
  """
  encoded: Any
  bias: Float[Array, '1 H T S']
  self_mask: Bool[Array, '#B 1 T S']
  cross_mask: Bool[Array, 'B 1 #T L']
  segment_ids: Any
  encoder_segment_ids: Any
  start: Int[Array, ''] | None


class DecoderAttention(Projections):
  """Self- or cross-attention of the decoder.

  Step by step, `key` and `value` [B, S, H, K] of the encoder's output are in
  the collection `encoded`, those of the targets so far in `cache`.

  Attributes:
    attention: which implementation attends to whole inputs; see
      `choose_attention`.
  """
  attention: str = 'reference'

  def __call__(self, x: Float[Array, 'B T D'], source: Float[Array, 'B S D'],
               bias: Float[Array, '1 H T S'] | None,
               mask: Bool[Array, '#B 1 #T S'],
               deterministic: bool) -> Float[Array, 'B T D']:
    key, value = self.project_key_value(source, deterministic)
    return self._attend(x, key, value, bias, mask)

  def attend_to_encoded(
      self, x: Float[Array, 'B T D'], context: DecoderContext,
      deterministic: bool) -> Float[Array, 'B T D']:
    """Attends to the encoder's output, for all targets at once."""
    key, value = self.project_key_value(context.encoded, deterministic)
    choice = choose_attention(self.attention, self.config, key.shape[1])
    if choice.cross != 'fused':
      return self._attend(x, key, value, None, context.cross_mask)
    return self.project_out(segment_attention(
        self.project_query(x), key, value, context.segment_ids,
        context.encoder_segment_ids, self.dtype))

  def fill(self, collection: str, source: Float[Array, 'B S D']) -> None:
    """Stores the keys and values of `source`."""
    self._store(collection, *self.project_key_value(source, True))

  def attend_to_targets(
      self, x: Float[Array, 'B T D'], bias: Float[Array, '1 H T S'],
      mask: Bool[Array, '#B 1 T S'], start: Int[Array, '']
  ) -> Float[Array, 'B T D']:
    """Attends to the cache, with x's own keys put at `start` first."""
    key, value = (
        jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=1)
        for old, new in zip(self._stored('cache'),
                            self.project_key_value(x, True), strict=True))
    self._store('cache', key, value)
    return self._attend(x, key, value, bias, mask)

  def attend_to_inputs(
      self, x: Float[Array, 'rows T D'], mask: Bool[Array, 'B 1 1 L']
  ) -> Float[Array, 'rows T D']:
    """Attends to the encoder's output, rows / B rows to each input.

    Rows of one input become queries of one row, so that keys and values are
    read where they are, once for all of them.
    """
    key, value = self._stored('encoded')
    folded = x.reshape(key.shape[0], -1, x.shape[-1])
    return self._attend(folded, key, value, None, mask).reshape(x.shape)

  def _stored(self, collection: str) -> tuple[Array, Array]:
    return (self.get_variable(collection, 'key'),
            self.get_variable(collection, 'value'))

  def _store(self, collection, key, value):
    self.put_variable(collection, 'key', key)
    self.put_variable(collection, 'value', value)

  def _attend(self, x, key, value, bias, mask):
    output, weights = full_attention(
        self.project_query(x), key, value, bias, mask, self.dtype)
    self.sow('intermediates', 'weights', weights)
    return self.project_out(output)


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention and MLP, behind norms, beside residuals."""
  config: LongT5Config
  dtype: DTypeLike
  attention: str

  def setup(self):
    config = self.config
    norm = (config.layer_norm_epsilon, self.dtype)
    self.pre_self_attention_layer_norm = T5LayerNorm(*norm)
    self.self_attention = DecoderAttention(config, self.dtype)
    self.pre_cross_attention_layer_norm = T5LayerNorm(*norm)
    self.encoder_decoder_attention = DecoderAttention(
        config, self.dtype, self.attention)
    self.pre_mlp_layer_norm = T5LayerNorm(*norm)
    self.mlp = MLP(config, self.dtype)
    self.dropout = layer_dropout(config.dropout_rate)

  def __call__(self, x: Float[Array, 'B T D'], context: DecoderContext,
               deterministic: bool) -> Float[Array, 'B T D']:
    """All targets at once."""
    self.sow('intermediates', 'residual', x)
    y = self.pre_self_attention_layer_norm(x)
    y = self.self_attention(
        y, y, context.bias, context.self_mask, deterministic)
    x = x + self.dropout(y, deterministic)
    y = self.pre_cross_attention_layer_norm(x)
    y = self.encoder_decoder_attention.attend_to_encoded(
        y, context, deterministic)
    x = x + self.dropout(y, deterministic)
    return self._add_mlp(x, deterministic)

  def init_cache(self, targets: Float[Array, 'rows T D'],
                 encoded: Float[Array, 'B L D']) -> Float[Array, 'rows T D']:
    """Stores the encoder's keys and values, and makes room for targets."""
    self.self_attention.fill('cache', targets)
    self.encoder_decoder_attention.fill('encoded', encoded)
    return targets

  def step(self, x: Float[Array, 'rows T D'],
           context: DecoderContext) -> Float[Array, 'rows T D']:
    """The next targets, those before them being in the cache."""
    assert context.start is not None
    self.sow('intermediates', 'residual', x)
    y = self.pre_self_attention_layer_norm(x)
    x = x + self.self_attention.attend_to_targets(
        y, context.bias, context.self_mask, context.start)
    y = self.pre_cross_attention_layer_norm(x)
    x = x + self.encoder_decoder_attention.attend_to_inputs(
        y, context.cross_mask)
    return self._add_mlp(x, True)

  def _add_mlp(self, x, deterministic):
    y = self.mlp(self.pre_mlp_layer_norm(x), deterministic)
    x = x + self.dropout(y, deterministic)
    return nn.with_logical_constraint(x, ('batch', 'length', 'activation'))


class Decoder(nn.Module):
  """All layers, between the embedded targets and the final norm."""
  config: LongT5Config
  dtype: DTypeLike
  scan_layers: bool
  remat: str
  attention: str
  scan_unroll: int
  has_head: bool

  def setup(self):
    config = self.config
    self.relpos_bias = RelativePositionBias(config, bidirectional=False)
    self.num_layers = config.num_decoder_layers or config.num_layers
    self.layers = make_layers(
        lambda: DecoderLayer(config, self.dtype, self.attention),
        self.num_layers, self.scan_layers)
    self.decoder_norm = T5LayerNorm(config.layer_norm_epsilon, jnp.float32)
    self.dropout = layer_dropout(config.dropout_rate)
    if self.has_head and not config.tie_word_embeddings:
      self.logits_dense = Dense(config.vocab_size, jnp.float32)

  def __call__(self, embedded: Float[Array, 'B T D'],
               encoded: Float[Array, 'B L D'],
               encoder_segment_ids: Int[Array, 'B L'],
               decoder_segment_ids: Int[Array, 'B T'] | None,
               decoder_mask: Bool[Array, 'B T'] | None,
               deterministic: bool) -> Float[Array, 'B T D']:
    length = embedded.shape[1]
    bias = toeplitz(self.relpos_bias(1 - length, length - 1), length, length)
    self_mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    if decoder_segment_ids is None:
      decoder_segment_ids = jnp.ones(embedded.shape[:2], jnp.int32)
      encoder_segment_ids = (encoder_segment_ids > 0).astype(jnp.int32)
    else:
      self_mask = self_mask & (decoder_segment_ids[:, None, :, None]
                               == decoder_segment_ids[:, None, None])
    cross_mask = (encoder_segment_ids > 0)[:, None, None] & (
        decoder_segment_ids[:, None, :, None]
        == encoder_segment_ids[:, None, None])
    if decoder_mask is not None:
      self_mask = self_mask & decoder_mask[:, None, None]
    context = DecoderContext(
        encoded, bias[None], self_mask, cross_mask, decoder_segment_ids,
        encoder_segment_ids, None)
    x = run_layers(
        self.layers, lambda layer, x, context: layer(x, context, deterministic),
        self.num_layers, self.dropout(embedded, deterministic),
        context, self.remat, self.scan_unroll)
    x = self.decoder_norm(x)
    self.sow('intermediates', 'output', x)
    return self.dropout(x, deterministic)

  def logits(self, x: Float[Array, 'B T D'],
             embedder: Embed) -> Float[Array, 'B T V']:
    """Float32 logits of the decoder's output."""
    if self.config.scale_decoder_outputs:
      x = x * self.config.d_model ** -0.5
    if self.config.tie_word_embeddings:
      return embedder.attend(x)
    return self.logits_dense(x)

  def init_cache(self, encoded: Float[Array, 'B L D'],
                 max_length: int, rows_per_input: int) -> None:
    """Makes the collections for decoding up to `max_length` targets."""
    empty = jnp.zeros((encoded.shape[0] * rows_per_input, max_length,
                       self.config.d_model))
    self.put_variable('cache', 'length', jnp.zeros((), jnp.int32))
    run_layers(self.layers, DecoderLayer.init_cache,
               self.num_layers, empty, encoded)

  def step(self, embedded: Float[Array, 'rows T D'],
           encoder_segment_ids: Int[Array, 'B L'],
           decoder_mask: Bool[Array, 'rows S'] | None,
           ) -> Float[Array, 'rows T D']:
    """The next T targets, which the cache must have room for."""
    start: Array = self.get_variable('cache', 'length')
    name = 'layers' if self.scan_layers else 'layers_0'
    cache = self.variables['cache'][name]['self_attention']
    room = cache['key'].shape[-3]
    offsets = jnp.arange(room) - (
        start + jnp.arange(embedded.shape[1])[:, None])
    by_offset = self.relpos_bias(1 - room, 0)
    bias = by_offset[:, jnp.minimum(offsets, 0) + room - 1]
    self_mask = (offsets <= 0)[None, None]
    if decoder_mask is not None:
      self_mask = self_mask & decoder_mask[:, None, None]
    context = DecoderContext(
        None, bias[None], self_mask,
        (encoder_segment_ids > 0)[:, None, None], None, None, start)
    self.put_variable('cache', 'length', start + embedded.shape[1])
    x = self.decoder_norm(run_layers(
        self.layers, DecoderLayer.step, self.num_layers,
        embedded, context))
    self.sow('intermediates', 'output', x)
    return x

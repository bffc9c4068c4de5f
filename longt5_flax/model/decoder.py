"""The decoder: T5.1.1's, for whole targets and, with a cache, step by step."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.config import LongT5Config
from longt5_flax.model.attention import full_attention
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


class DecoderContext(NamedTuple):
  """What all layers of the decoder see.

  Attributes:
    encoded: the encoder's output [B, L, D]; None once its keys and values are
      cached.
    bias: of self-attention.
    self_mask: which targets a target may see.
    cross_mask: which inputs a target may see.
    start: with a cache, the position of the first of the new tokens.
  """
  encoded: Any
  bias: Float[Array, '1 H T S']
  self_mask: Bool[Array, '#B 1 T S']
  cross_mask: Bool[Array, 'B 1 #T L']
  start: Int[Array, ''] | None


class DecoderAttention(Projections):
  """Self- or cross-attention of the decoder.

  The cache holds `key` and `value`, [B, S, H, K]: of the encoder's output for
  cross-attention, of the targets so far for self-attention.
  """

  def __call__(self, x: Float[Array, 'B T D'], source: Float[Array, 'B S D'],
               bias: Float[Array, '1 H T S'] | None,
               mask: Bool[Array, '#B 1 #T S'],
               deterministic: bool) -> Float[Array, 'B T D']:
    key, value = self.project_key_value(source, deterministic)
    return self._attend(x, key, value, bias, mask)

  def fill_cache(self, source: Float[Array, 'B S D']) -> None:
    """Stores the keys and values of `source`."""
    self._store(*self.project_key_value(source, True))

  def cached(self, x: Float[Array, 'B T D'],
             bias: Float[Array, '1 H T S'] | None,
             mask: Bool[Array, '#B 1 #T S'],
             start: Int[Array, ''] | None = None) -> Float[Array, 'B T D']:
    """Attends to the cache; with `start`, puts x's own keys there first."""
    key: Array = self.get_variable('cache', 'key')
    value: Array = self.get_variable('cache', 'value')
    if start is not None:
      new_key, new_value = self.project_key_value(x, True)
      key = jax.lax.dynamic_update_slice_in_dim(key, new_key, start, axis=1)
      value = jax.lax.dynamic_update_slice_in_dim(
          value, new_value, start, axis=1)
      self._store(key, value)
    return self._attend(x, key, value, bias, mask)

  def _store(self, key, value):
    self.put_variable('cache', 'key', key)
    self.put_variable('cache', 'value', value)

  def _attend(self, x, key, value, bias, mask):
    output, weights = full_attention(
        self.project_query(x), key, value, bias, mask, self.dtype)
    self.sow('intermediates', 'weights', weights)
    return self.project_out(output)


class DecoderLayer(nn.Module):
  """Self-attention, cross-attention and MLP, behind norms, beside residuals."""
  config: LongT5Config
  dtype: DTypeLike

  def setup(self):
    config = self.config
    norm = (config.layer_norm_epsilon, self.dtype)
    self.pre_self_attention_layer_norm = T5LayerNorm(*norm)
    self.self_attention = DecoderAttention(config, self.dtype)
    self.pre_cross_attention_layer_norm = T5LayerNorm(*norm)
    self.encoder_decoder_attention = DecoderAttention(config, self.dtype)
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
    y = self.encoder_decoder_attention(
        y, context.encoded, None, context.cross_mask, deterministic)
    x = x + self.dropout(y, deterministic)
    return self._add_mlp(x, deterministic)

  def init_cache(self, targets: Float[Array, 'B T D'],
                 encoded: Float[Array, 'B L D']) -> Float[Array, 'B T D']:
    """Caches the encoder's keys and values, and makes room for targets."""
    self.self_attention.fill_cache(targets)
    self.encoder_decoder_attention.fill_cache(encoded)
    return targets

  def step(self, x: Float[Array, 'B T D'],
           context: DecoderContext) -> Float[Array, 'B T D']:
    """The next targets, those before them being in the cache."""
    y = self.pre_self_attention_layer_norm(x)
    x = x + self.self_attention.cached(
        y, context.bias, context.self_mask, context.start)
    y = self.pre_cross_attention_layer_norm(x)
    x = x + self.encoder_decoder_attention.cached(y, None, context.cross_mask)
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
  has_head: bool

  def setup(self):
    config = self.config
    self.relpos_bias = RelativePositionBias(config, bidirectional=False)
    self.num_layers = config.num_decoder_layers or config.num_layers
    self.layers = make_layers(
        lambda: DecoderLayer(config, self.dtype), self.num_layers,
        self.scan_layers)
    self.decoder_norm = T5LayerNorm(config.layer_norm_epsilon, jnp.float32)
    self.dropout = layer_dropout(config.dropout_rate)
    if self.has_head and not config.tie_word_embeddings:
      self.logits_dense = Dense(config.vocab_size, jnp.float32)

  def __call__(self, embedded: Float[Array, 'B T D'],
               encoded: Float[Array, 'B L D'],
               encoder_segment_ids: Int[Array, 'B L'],
               decoder_segment_ids: Int[Array, 'B T'] | None,
               deterministic: bool) -> Float[Array, 'B T D']:
    length = embedded.shape[1]
    bias = toeplitz(self.relpos_bias(1 - length, length - 1), length, length)
    self_mask = jnp.tril(jnp.ones((1, 1, length, length), bool))
    cross_mask = (encoder_segment_ids > 0)[:, None, None]
    if decoder_segment_ids is not None:
      targets = decoder_segment_ids[:, None, :, None]
      self_mask = self_mask & (
          targets == decoder_segment_ids[:, None, None])
      cross_mask = cross_mask & (
          targets == encoder_segment_ids[:, None, None])
    context = DecoderContext(encoded, bias[None], self_mask, cross_mask, None)
    x = run_layers(
        self.layers, lambda layer, x, context: layer(x, context, deterministic),
        self.num_layers, self.dropout(embedded, deterministic),
        context, self.remat)
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
                 max_length: int) -> None:
    """Makes the cache for decoding up to `max_length` targets."""
    empty = jnp.zeros((encoded.shape[0], max_length, self.config.d_model))
    self.put_variable('cache', 'length', jnp.zeros((), jnp.int32))
    run_layers(self.layers, DecoderLayer.init_cache,
               self.num_layers, empty, encoded)

  def step(self, embedded: Float[Array, 'B T D'],
           encoder_segment_ids: Int[Array, 'B L']) -> Float[Array, 'B T D']:
    """The next T targets, which the cache must have room for."""
    start: Array = self.get_variable('cache', 'length')
    name = 'layers' if self.scan_layers else 'layers_0'
    cache = self.variables['cache'][name]['self_attention']
    room = cache['key'].shape[-3]
    offsets = jnp.arange(room) - (
        start + jnp.arange(embedded.shape[1])[:, None])
    by_offset = self.relpos_bias(1 - room, 0)
    bias = by_offset[:, jnp.minimum(offsets, 0) + room - 1]
    context = DecoderContext(
        None, bias[None], (offsets <= 0)[None, None],
        (encoder_segment_ids > 0)[:, None, None], start)
    self.put_variable('cache', 'length', start + embedded.shape[1])
    return self.decoder_norm(run_layers(
        self.layers, DecoderLayer.step, self.num_layers,
        embedded, context))

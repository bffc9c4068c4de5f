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
from longt5_flax.model.cached_attention import (
    cached_attention,
    kernel_takes,
    seen_places,
)
from longt5_flax.model.fused_attention import fused_causal_attention
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
from longt5_flax.model.precision import activation_dtype
from longt5_flax.model.relative_position import toeplitz
from longt5_flax.model.segment_attention import (
    attend_to_stored,
    segment_attention,
)


class DecoderContext(NamedTuple):
  """What all layers of the decoder see.

  Attributes:
    encoded: the encoder's output [B, L, D]; None once its keys and values are
      cached.
    bias: of self-attention, [1, H, T, S]; for kernels by offset, [H, T], or
      step by step by position, [H, S].
    self_mask: which targets a target may see, [#B, 1, T, S]; None for kernels.
    held_by: for a kernel, step by step, which row of its group holds what a
      row sees at each position, [groups, n, S]; -1: it sees nothing there.
    seen: of `held_by`; see `seen_places`.
    cross_mask: which inputs a target may see: those of its segment.
    segment_ids: of the targets, 0 is padding; None step by step.
    encoder_segment_ids: of the inputs, 0 is padding; step by step 1 is not.
    start: with a cache, the position of the first of the new tokens.
  """
  encoded: Any
  bias: Any
  self_mask: Any
  held_by: Any
  seen: Any
  cross_mask: Bool[Array, 'B 1 #T L']
  segment_ids: Any
  encoder_segment_ids: Any
  start: Int[Array, ''] | None


class DecoderAttention(Projections):
  """Self- or cross-attention of the decoder.

  Step by step, `key` and `value` of the encoder's output are in the collection
  `encoded`, [B, H, S, K], those of the targets so far in `cache`, [groups, H,
  n, S, K], as a step reads them: the n rows of a group see each other's.

  Attributes:
    attention: which implementation attends to whole inputs; see
      `choose_attention`.
  """
  attention: str = 'reference'

  def __call__(self, x: Float[Array, 'B T D'], context: DecoderContext,
               deterministic: bool) -> Float[Array, 'B T D']:
    """Attends to the targets, all at once."""
    key, value = self.project_key_value(x, deterministic)
    if context.self_mask is not None:
      return self._attend(x, key, value, context.bias, context.self_mask)
    return self.project_out(fused_causal_attention(
        self.project_query(x), key, value, context.bias, context.segment_ids,
        self.dtype))

  def attend_to_encoded(
      self, x: Float[Array, 'B T D'], context: DecoderContext,
      deterministic: bool) -> Float[Array, 'B T D']:
    """Attends to the encoder's output, for all targets at once."""
    key, value = self.project_key_value(context.encoded, deterministic)
    if not self._crosses_in_a_kernel(key.shape[1]):
      return self._attend(x, key, value, None, context.cross_mask)
    return self.project_out(segment_attention(
        self.project_query(x), key, value, context.segment_ids,
        context.encoder_segment_ids, self.dtype))

  def store_encoded(self, source: Float[Array, 'B S D']) -> None:
    """Stores the keys and values of the encoder's output."""
    self._store('encoded', *(
        x.swapaxes(1, 2) for x in self.project_key_value(source, True)))

  def make_room(self, groups: int, n: int, length: int) -> None:
    """Makes a cache for targets."""
    empty = jnp.zeros((groups, self.config.num_heads, n, length,
                       self.config.d_kv), activation_dtype(self.dtype))
    self._store('cache', empty, empty)

  def attend_to_targets(
      self, x: Float[Array, 'rows T D'], context: DecoderContext
  ) -> Float[Array, 'rows T D']:
    """Attends to the cache of a row's group, with x's own keys put at `start`
    first."""
    start: Any = context.start
    cache = self._stored('cache')
    groups, heads, n, _, size = cache[0].shape
    new = self.project_key_value(x, True)
    if context.self_mask is None:
      output, *updated = cached_attention(
          tuple(array.reshape(groups, n, heads, size)
                for array in (self.project_query(x), *new)),
          cache, context.bias, context.held_by, context.seen,
          jnp.broadcast_to(start, (groups, 1)), self.dtype)
      self._store('cache', *updated)
      return self.project_out(output).reshape(x.shape)
    updated = [jax.lax.dynamic_update_slice_in_dim(
        old, array.reshape(groups, n, -1, heads, size).transpose(0, 3, 1, 2, 4),
        start, axis=3) for old, array in zip(cache, new, strict=True)]
    self._store('cache', *updated)
    key, value = (array.reshape(groups, heads, -1, size).swapaxes(1, 2)
                  for array in updated)
    folded = x.reshape(groups, -1, x.shape[-1])
    return self._attend(folded, key, value, context.bias,
                        context.self_mask).reshape(x.shape)

  def attend_to_inputs(
      self, x: Float[Array, 'rows T D'], context: DecoderContext
  ) -> Float[Array, 'rows T D']:
    """Attends to the encoder's output, rows / B rows to each input.

    Rows of one input become queries of one row, so that keys and values are
    read where they are, once for all of them.
    """
    key, value = self._stored('encoded')
    folded = x.reshape(key.shape[0], -1, x.shape[-1])
    if not self._crosses_in_a_kernel(key.shape[2]):
      return self._attend(
          folded, key.swapaxes(1, 2), value.swapaxes(1, 2), None,
          context.cross_mask).reshape(x.shape)
    segment_ids = jnp.ones(folded.shape[:2], jnp.int32)
    return self.project_out(attend_to_stored(
        self.project_query(folded), key, value, segment_ids,
        context.encoder_segment_ids, self.dtype)).reshape(x.shape)

  def _stored(self, collection: str) -> tuple[Array, Array]:
    return (self.get_variable(collection, 'key'),
            self.get_variable(collection, 'value'))

  def _store(self, collection, key, value):
    self.put_variable(collection, 'key', key)
    self.put_variable(collection, 'value', value)

  def _crosses_in_a_kernel(self, length):
    return choose_attention(
        self.attention, self.config, length).cross == 'fused'

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
    y = self.self_attention(y, context, deterministic)
    x = x + self.dropout(y, deterministic)
    y = self.pre_cross_attention_layer_norm(x)
    y = self.encoder_decoder_attention.attend_to_encoded(
        y, context, deterministic)
    x = x + self.dropout(y, deterministic)
    return self._add_mlp(x, deterministic)

  def init_cache(self, room: Float[Array, 'groups n S'],
                 encoded: Float[Array, 'B L D']) -> Float[Array, 'groups n S']:
    """Stores the encoder's keys and values, and makes room for targets."""
    self.self_attention.make_room(*room.shape)
    self.encoder_decoder_attention.store_encoded(encoded)
    return room

  def step(self, x: Float[Array, 'rows T D'],
           context: DecoderContext) -> Float[Array, 'rows T D']:
    """The next targets, those before them being in the cache."""
    assert context.start is not None
    self.sow('intermediates', 'residual', x)
    y = self.pre_self_attention_layer_norm(x)
    x = x + self.self_attention.attend_to_targets(y, context)
    y = self.pre_cross_attention_layer_norm(x)
    x = x + self.encoder_decoder_attention.attend_to_inputs(y, context)
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
    if decoder_segment_ids is None:
      decoder_segment_ids = jnp.ones(embedded.shape[:2], jnp.int32)
      encoder_segment_ids = (encoder_segment_ids > 0).astype(jnp.int32)
    cross_mask = (encoder_segment_ids > 0)[:, None, None] & (
        decoder_segment_ids[:, None, :, None]
        == encoder_segment_ids[:, None, None])
    bias, self_mask = self._bias_and_mask(decoder_segment_ids, decoder_mask)
    context = DecoderContext(
        encoded, bias, self_mask, None, None, cross_mask, decoder_segment_ids,
        encoder_segment_ids, None)
    x = run_layers(
        self.layers, lambda layer, x, context: layer(x, context, deterministic),
        self.num_layers, self.dropout(embedded, deterministic),
        context, self.remat, self.scan_unroll)
    x = self.decoder_norm(x)
    self.sow('intermediates', 'output', x)
    return self.dropout(x, deterministic)

  def _bias_and_mask(self, segment_ids, decoder_mask):
    """See `DecoderContext`. Kernels see segments, and know no other mask."""
    length = segment_ids.shape[1]
    choice = choose_attention(self.attention, self.config, length)
    if choice.causal == 'fused' and decoder_mask is None:
      return self.relpos_bias(1 - length, 0), None
    bias = toeplitz(self.relpos_bias(1 - length, length - 1), length, length)
    mask = jnp.tril(segment_ids[:, None, :, None] == segment_ids[:, None, None])
    if decoder_mask is not None:
      mask = mask & decoder_mask[:, None, None]
    return bias[None], mask

  def logits(self, x: Float[Array, 'B T D'],
             embedder: Embed) -> Float[Array, 'B T V']:
    """Float32 logits of the decoder's output."""
    if self.config.scale_decoder_outputs:
      x = x * self.config.d_model ** -0.5
    if self.config.tie_word_embeddings:
      return embedder.attend(x)
    return self.logits_dense(x)

  def init_cache(self, encoded: Float[Array, 'B L D'], max_length: int,
                 rows_per_input: int, with_ancestors: bool) -> None:
    """Makes the collections for decoding up to `max_length` targets."""
    rows = encoded.shape[0] * rows_per_input
    n = rows_per_input if with_ancestors else 1
    self.put_variable('cache', 'length', jnp.zeros((), jnp.int32))
    if with_ancestors:
      self.put_variable(
          'cache', 'ancestors', jnp.zeros((rows, max_length), jnp.int32))
    run_layers(self.layers, DecoderLayer.init_cache, self.num_layers,
               jnp.zeros((rows // n, n, max_length)), encoded)

  def step(self, embedded: Float[Array, 'rows T D'],
           encoder_segment_ids: Int[Array, 'B L'],
           decoder_mask: Bool[Array, 'rows S'] | None,
           ) -> Float[Array, 'rows T D']:
    """The next T targets, which the cache must have room for."""
    start: Array = self.get_variable('cache', 'length')
    rows, num_targets = embedded.shape[:2]
    # Or every layer looks up the biases once more, in a kernel of its own.
    bias, self_mask, held_by, seen = jax.lax.optimization_barrier(
        self._looking_back(rows, num_targets, start, decoder_mask))
    context = DecoderContext(
        None, bias, self_mask, held_by, seen,
        (encoder_segment_ids > 0)[:, None, None], None,
        (encoder_segment_ids > 0).astype(jnp.int32), start)
    self.put_variable('cache', 'length', start + num_targets)
    x = self.decoder_norm(run_layers(
        self.layers, DecoderLayer.step, self.num_layers,
        embedded, context))
    self.sow('intermediates', 'output', x)
    return x

  def _looking_back(self, rows, num_targets, start, decoder_mask):
    """Of a step, `bias` to `seen` of a `DecoderContext`."""
    name = 'layers' if self.scan_layers else 'layers_0'
    n, room = self.variables['cache'][name]['self_attention'][
        'key'].shape[-3:-1]
    offsets = jnp.arange(room) - (start + jnp.arange(num_targets)[:, None])
    by_offset = self.relpos_bias(1 - room, 0)
    bias = by_offset[:, jnp.minimum(offsets, 0) + room - 1]
    mask = (offsets <= 0)[None, None]
    if decoder_mask is not None:
      mask = mask & decoder_mask[:, None, None]
    holder = self._holder(rows, n, room, start)
    if self._attends_in_a_kernel(num_targets, n, room):
      sees = jnp.broadcast_to(mask[:, 0, 0], holder.shape)
      held_by = jnp.where(sees, holder, -1).reshape(-1, n, room)
      return bias[:, 0], None, held_by, seen_places(
          held_by, jnp.broadcast_to(start, (rows // n, 1)))
    if n > 1:
      bias, mask = _of_holders(bias, mask, holder, n)
    return bias[None], mask, None, None

  def _attends_in_a_kernel(self, num_targets, n, room):
    """Whether the next targets attend to the cache in one. Not in a loop over
    layers, which takes caches out of an array of all and puts them back, and
    where Flax cannot tell that nothing else depends on a kernel."""
    return (num_targets == 1 and not self.scan_layers
            and kernel_takes(n, room, self.config.d_kv) and choose_attention(
                self.attention, self.config, room).causal == 'fused')

  def _holder(self, rows, n, room, start):
    """Which of the n rows of its group holds what a row sees at each position,
    [rows, S]; notes that from `start` on a row's targets are its own."""
    own = jnp.broadcast_to(jnp.arange(rows)[:, None] % n, (rows, room))
    if not self.has_variable('cache', 'ancestors'):
      return own
    held_by = jnp.where(jnp.arange(room) < start,
                        self.get_variable('cache', 'ancestors'), own)
    self.put_variable('cache', 'ancestors', held_by)
    return held_by


def _of_holders(bias, mask, holder, n):
  """Bias [H, n T, n S] and mask [groups, 1, n T, n S] of the n rows of a group,
  where each target sees what the holders hold."""
  rows, room = holder.shape
  num_targets = bias.shape[1]
  is_held = holder[:, None, None] == jnp.arange(n)[:, None]  # rows 1 n S
  mask = is_held & jnp.broadcast_to(
      mask[:, 0, :, None], (rows, num_targets, 1, room))
  return jnp.tile(bias, (1, n, n)), mask.reshape(
      rows // n, 1, n * num_targets, n * room)

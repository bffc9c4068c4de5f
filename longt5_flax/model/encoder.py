"""The encoder: T5.1.1's, its attention local, transient-global or full."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from longt5_flax.config import LongT5Config
from longt5_flax.model.attention import (
    GlobalTokens,
    full_attention,
    local_attention,
)
from longt5_flax.model.attention_choice import choose_attention
from longt5_flax.model.chunked_attention import chunked_attention
from longt5_flax.model.fused_attention import fused_attention
from longt5_flax.model.global_tokens import (
    GlobalBlocks,
    assign_global_blocks,
    segment_positions,
    sum_blocks,
)
from longt5_flax.model.kernels.calls import ATTENDED
from longt5_flax.model.layers import (
    MLP,
    Projections,
    RelativePositionBias,
    T5LayerNorm,
    layer_dropout,
    make_layers,
    run_layers,
    zero_unless,
)
from longt5_flax.model.relative_position import bucket_reach, toeplitz


class EncoderContext(NamedTuple):
  """What all layers of the encoder see.

  Attributes:
    segment_ids: 0 is padding.
    bias: by offset, [H, 2 local_radius + 1], or [H, L, L] for full attention.
    blocks: the global tokens' blocks, None without global tokens.
    side_bias: by offset in blocks; None without global tokens.
  """
  segment_ids: Int[Array, 'B L']
  bias: Float[Array, 'H ...']
  blocks: GlobalBlocks | None
  side_bias: Float[Array, 'H offsets'] | None


class EncoderAttention(Projections):
  """Self-attention of the encoder, of the type that the config names.

  Attributes:
    attention: which implementation; see `choose_attention`.
  """
  attention: str = 'reference'

  def setup(self):
    super().setup()
    if self.config.encoder_attention_type == 'transient-global':
      self.T5LayerNorm_0 = T5LayerNorm(
          self.config.layer_norm_epsilon, self.dtype)

  def __call__(self, x: Float[Array, 'B L D'], context: EncoderContext,
               deterministic: bool) -> Float[Array, 'B L D']:
    query = self.project_query(x)
    key, value = self.project_key_value(x, deterministic)
    segment_ids = context.segment_ids
    if self.config.encoder_attention_type == 'full':
      mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None]) & (
          segment_ids > 0)[:, None, None]
      output, weights = full_attention(
          query, key, value, context.bias[None], mask, self.dtype)
      self.sow('intermediates', 'weights', weights)
      return self.project_out(output)
    inputs = (query, key, value, context.bias, segment_ids,
              self._globals(x, context, deterministic), self.dtype)
    implementation = choose_attention(
        self.attention, self.config, query.shape[1]).encoder
    if implementation == 'reference':
      output, weights = local_attention(*inputs)
      self.sow('intermediates', 'weights', weights)
    elif implementation == 'chunked':
      output = chunked_attention(*inputs)
    else:
      output = fused_attention(*inputs)
    return self.project_out(output)

  def _globals(self, x, context, deterministic):
    if self.config.encoder_attention_type == 'local':
      return None
    # Made even where the row is too short to have any, so that the parameters
    # do not depend on the length.
    sums = checkpoint_name(
        sum_blocks(x, context.blocks, self.config.global_block_size), ATTENDED)
    key, value = self.project_key_value(
        self.T5LayerNorm_0(sums), deterministic)
    if key.shape[1] == 0:
      return None
    return GlobalTokens(
        key, value, context.side_bias, context.blocks.segment_ids,
        context.blocks.block_ids, self.config.global_block_size)


class EncoderLayer(nn.Module):
  """Attention and MLP, each behind a norm and beside a residual."""
  config: LongT5Config
  dtype: DTypeLike
  attention: str

  @nn.compact
  def __call__(self, x: Float[Array, 'B L D'], context: EncoderContext,
               deterministic: bool) -> Float[Array, 'B L D']:
    config = self.config
    real = (context.segment_ids > 0)[..., None]
    self.sow('intermediates', 'residual', x)
    y = T5LayerNorm(config.layer_norm_epsilon, self.dtype,
                    name='pre_attention_layer_norm')(x)
    # Padding is zeroed before attention and MLP, as in the original.
    y = EncoderAttention(config, self.dtype, self.attention, name='attention')(
        zero_unless(real, y), context, deterministic)
    x = x + layer_dropout(config.dropout_rate)(y, deterministic)
    y = T5LayerNorm(config.layer_norm_epsilon, self.dtype,
                    name='pre_mlp_layer_norm')(x)
    y = MLP(config, self.dtype, name='mlp')(
        zero_unless(real, y), deterministic)
    x = x + layer_dropout(config.dropout_rate)(y, deterministic)
    return nn.with_logical_constraint(x, ('batch', 'length', 'activation'))


class Encoder(nn.Module):
  """All layers, between the embedded tokens and the final norm."""
  config: LongT5Config
  dtype: DTypeLike
  scan_layers: bool
  remat: str
  attention: str
  scan_unroll: int

  def setup(self):
    config = self.config
    self.relpos_bias = RelativePositionBias(config, bidirectional=True)
    if config.encoder_attention_type == 'transient-global':
      self.side_relpos_bias = RelativePositionBias(config, bidirectional=True)
    self.layers = make_layers(
        lambda: EncoderLayer(config, self.dtype, self.attention),
        config.num_layers, self.scan_layers)
    # Float32 also where the layers compute in less: what follows is logits.
    self.encoder_norm = T5LayerNorm(config.layer_norm_epsilon, jnp.float32)
    self.dropout = layer_dropout(config.dropout_rate)

  def __call__(self, embedded: Float[Array, 'B L D'],
               segment_ids: Int[Array, 'B L'],
               positions: Int[Array, 'B L'] | None,
               deterministic: bool) -> Float[Array, 'B L D']:
    if positions is None:
      positions = segment_positions(segment_ids)
    x = self.dropout(embedded, deterministic)
    x = nn.with_logical_constraint(x, ('batch', 'length', 'activation'))
    x = run_layers(
        self.layers, lambda layer, x, context: layer(x, context, deterministic),
        self.config.num_layers, x, self._context(segment_ids, positions),
        self.remat, self.scan_unroll)
    x = self.encoder_norm(x)
    self.sow('intermediates', 'output', x)
    return self.dropout(x, deterministic)

  def _context(self, segment_ids, positions):
    config, length = self.config, segment_ids.shape[1]
    if config.encoder_attention_type == 'full':
      bias = toeplitz(
          self.relpos_bias(1 - length, length - 1), length, length)
      return EncoderContext(segment_ids, bias, None, None)
    bias = self.relpos_bias(-config.local_radius, config.local_radius)
    if config.encoder_attention_type == 'local':
      return EncoderContext(segment_ids, bias, None, None)
    blocks = assign_global_blocks(
        segment_ids, positions, config.global_block_size)
    reach = bucket_reach(config.relative_attention_num_buckets,
                         config.relative_attention_max_distance)
    # Also where the row is too short for global tokens: the table is a
    # parameter at every length.
    return EncoderContext(segment_ids, bias, blocks,
                          self.side_relpos_bias(-reach, reach))

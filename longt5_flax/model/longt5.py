"""The three LongT5 modules: encoder, encoder-decoder, and with logits.

They own parameters and hold none: `module.init(key, ...)` makes them,
`module.apply({'params': params}, ...)` uses them. Intermediate values (every
layer's input as `residual`, attention `weights`, each stack's `output`) come
with `mutable=['intermediates']`.

Arrays may be NumPy's, and `input_ids`, `attention_mask`, `decoder_input_ids`
and `decoder_attention_mask` are other names of `encoder_input_tokens`,
`encoder_segment_ids`, `decoder_input_tokens` and `decoder_mask`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from longt5_flax.config import ConfigError, LongT5Config
from longt5_flax.model.attention_choice import ATTENTION_IMPLEMENTATIONS
from longt5_flax.model.decoder import Decoder
from longt5_flax.model.encoder import Encoder
from longt5_flax.model.inputs import flexible_inputs
from longt5_flax.model.layers import REMAT_POLICIES, Embed

DTYPES = ('float32', 'bfloat16', 'float16')


class _LongT5(nn.Module):
  """What the three modules share.

  Attributes:
    config: the architecture.
    dtype: of the matrix products; parameters are float32.
    scan_layers: whether layers are stacked in one `layers` subtree.
    remat: what the backward pass recomputes: 'none', 'dots' (all but matrix
      products and attention), 'layer' (all inside a layer) or 'offload' (that
      too, and layers' inputs wait in the host's memory).
    attention: the implementation of attention to the inputs; see
      `choose_attention`. Only 'reference' has weights to give.
    scan_unroll: so many stacked layers make one turn of the loop over them; 0:
      all, and there is no loop.
  """
  config: LongT5Config
  dtype: DTypeLike = jnp.float32
  scan_layers: bool = False
  remat: str = 'none'
  attention: str = 'auto'
  scan_unroll: int = 0

  def setup(self):
    for name, known in (('remat', REMAT_POLICIES),
                        ('attention', ATTENTION_IMPLEMENTATIONS)):
      if getattr(self, name) not in known:
        raise ConfigError(
            f'{name}={getattr(self, name)!r} must be one of {known}.')
    if jnp.dtype(self.dtype).name not in DTYPES:
      raise ConfigError(f'dtype={self.dtype} must be one of {DTYPES}.')
    self.token_embedder = Embed(self.config)
    self.encoder = Encoder(*self._stack_options())

  def _stack_options(
      self) -> tuple[LongT5Config, DTypeLike, bool, str, str, int]:
    return (self.config, self.dtype, self.scan_layers, self.remat,
            self.attention, self.scan_unroll)

  @flexible_inputs
  def encode(
      self,
      encoder_input_tokens: Int[Array, 'B L'],
      encoder_segment_ids: Int[Array, 'B L'] | None = None,
      encoder_positions: Int[Array, 'B L'] | None = None,
      deterministic: bool = True,
  ) -> Float[Array, 'B L D']:
    """The encoder's output, float32.

    Args:
      encoder_input_tokens: ids, of any length L.
      encoder_segment_ids: which tokens belong together; 0 is padding. By
        default one segment, of the tokens that are not `pad_token_id`.
      encoder_positions: positions within segments; by default counted from
        the segment ids.
      deterministic: no dropout; else the rng `dropout` is needed.
    """
    segment_ids = self._segments(encoder_input_tokens, encoder_segment_ids)
    return self.encoder(self.token_embedder(encoder_input_tokens), segment_ids,
                        encoder_positions, deterministic)

  def _segments(self, tokens, segment_ids):
    if segment_ids is None:
      return (tokens != self.config.pad_token_id).astype(jnp.int32)
    return segment_ids


class LongT5EncoderModel(_LongT5):
  """The encoder alone; `__call__` is `encode`."""

  @flexible_inputs
  def __call__(
      self,
      encoder_input_tokens: Int[Array, 'B L'],
      encoder_segment_ids: Int[Array, 'B L'] | None = None,
      encoder_positions: Int[Array, 'B L'] | None = None,
      deterministic: bool = True,
  ) -> Float[Array, 'B L D']:
    """See `encode`."""
    return self.encode(encoder_input_tokens, encoder_segment_ids,
                       encoder_positions, deterministic)


class LongT5Model(_LongT5):
  """Encoder and decoder; gives the decoder's output [B, T, D], float32."""

  has_head = False

  def setup(self):
    super().setup()
    self.decoder = Decoder(*self._stack_options(), self.has_head)

  @flexible_inputs
  def __call__(
      self,
      encoder_input_tokens: Int[Array, 'B L'],
      decoder_input_tokens: Int[Array, 'B T'],
      encoder_segment_ids: Int[Array, 'B L'] | None = None,
      encoder_positions: Int[Array, 'B L'] | None = None,
      decoder_segment_ids: Int[Array, 'B T'] | None = None,
      decoder_mask: Bool[Array, 'B T'] | None = None,
      deterministic: bool = True,
      with_head: bool = True,
  ) -> Float[Array, 'B T features']:
    """Encodes the inputs and decodes all targets at once.

    Args:
      encoder_input_tokens: ids.
      decoder_input_tokens: the targets shifted right, the first of each
        segment being `decoder_start_token_id`.
      encoder_segment_ids: see `encode`.
      encoder_positions: see `encode`.
      decoder_segment_ids: for packed rows; a target sees the inputs of its own
        segment. By default a row is one segment.
      decoder_mask: which targets later ones may see; by default all.
      deterministic: no dropout; else the rng `dropout` is needed.
      with_head: False gives what the output layer would get.
    """
    segment_ids = self._segments(encoder_input_tokens, encoder_segment_ids)
    encoded = self.encode(encoder_input_tokens, segment_ids, encoder_positions,
                          deterministic)
    return self.decode(encoded, decoder_input_tokens, segment_ids,
                       decoder_segment_ids, decoder_mask, deterministic,
                       with_head)

  @flexible_inputs
  def decode(
      self,
      encoder_output: Float[Array, 'B L D'],
      decoder_input_tokens: Int[Array, 'B T'],
      encoder_segment_ids: Int[Array, 'B L'],
      decoder_segment_ids: Int[Array, 'B T'] | None = None,
      decoder_mask: Bool[Array, 'B T'] | None = None,
      deterministic: bool = True,
      with_head: bool = True,
  ) -> Float[Array, 'B T features']:
    """The output at every target; arguments as in `__call__`."""
    x = self.decoder(
        self.token_embedder(decoder_input_tokens), encoder_output,
        encoder_segment_ids, decoder_segment_ids, decoder_mask, deterministic)
    return self._head(x) if with_head else x

  def init_cache(self, encoder_output: Float[Array, 'B L D'],
                 max_decode_length: int, rows_per_input: int = 1,
                 with_ancestors: bool = False) -> None:
    """Makes what decoding step by step needs: two collections.

    Call with `mutable=['encoded', 'cache']`. `encoded` holds the keys and
    values of the encoder's output, computed here, once; `cache` is empty.

    Args:
      encoder_output: from `encode`.
      max_decode_length: the most targets to decode.
      rows_per_input: how many rows of targets share one input; an input's rows
        stand together.
      with_ancestors: adds `ancestors` [rows, max_decode_length] to the
        decoder's part of `cache`: which of its input's rows, the first being
        0, holds what a row sees at each target. It may be changed between
        steps.
    """
    self.decoder.init_cache(encoder_output, max_decode_length, rows_per_input,
                            with_ancestors)

  @flexible_inputs
  def decode_step(
      self,
      decoder_input_tokens: Int[Array, 'rows T'],
      encoder_segment_ids: Int[Array, 'B L'],
      decoder_mask: Bool[Array, 'rows S'] | None = None,
  ) -> Float[Array, 'rows T features']:
    """The output at the next T targets, given those in the cache.

    Call with `mutable=['cache']`; the cache moves on by T.

    Args:
      decoder_input_tokens: the next targets; rows = B * rows_per_input.
      encoder_segment_ids: see `encode`.
      decoder_mask: which of the S = max_decode_length targets may be seen, as
        far as they have been decoded; by default all.
    """
    return self._head(self.decoder.step(
        self.token_embedder(decoder_input_tokens), encoder_segment_ids,
        decoder_mask))

  def _head(self, x):
    return x


class LongT5ForConditionalGeneration(LongT5Model):
  """LongT5 with its output layer: gives logits [B, T, V], float32."""

  has_head = True

  def logits(self, x: Float[Array, 'B T D']) -> Float[Array, 'B T V']:
    """The output layer alone, on what `with_head=False` gave."""
    return self._head(x)

  def _head(self, x):
    return self.decoder.logits(x, self.token_embedder)

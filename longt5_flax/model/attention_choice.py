"""Which implementation of attention: asked for, or chosen by platform and
length."""

from typing import NamedTuple

from longt5_flax.config import ConfigError, LongT5Config
from longt5_flax.model.fused_attention_tpu import MAX_RADIUS
from longt5_flax.model.kernels.calls import target_platform, why_no_kernels

ATTENTION_IMPLEMENTATIONS = ('auto', 'reference', 'chunked', 'fused')

# On a CPU the reference takes less time than chunks. Up to here it takes no
# more memory: for a row and layer of base, forward and backward, 1.5 GiB at
# 8,192 tokens, chunks 1.4; at 16,384 it is 4.6 against 1.5.
_CPU_REFERENCE_LENGTH = 8192


class AttentionChoice(NamedTuple):
  """What attends.

  Attributes:
    encoder: inputs to inputs, 'reference', 'chunked' or 'fused'.
    cross: targets to inputs, 'reference' or 'fused'.
    causal: targets to those before them, 'reference' or 'fused'.
    reason: why these.
  """
  encoder: str
  cross: str
  causal: str
  reason: str

  def __str__(self) -> str:
    decoder = ''
    if self.cross != self.causal:
      decoder = (f', from targets to inputs {self.cross}, to targets '
                 f'{self.causal}')
    elif self.cross != self.encoder:
      decoder = f', in the decoder {self.cross}'
    return f'attention: {self.encoder}{decoder} ({self.reason})'


def choose_attention(
    attention: str, config: LongT5Config, length: int,
    platform: str | None = None,
) -> AttentionChoice:
  """The implementation that `attention` stands for.

  It need not be all that is asked for: full attention has one implementation in
  the encoder, targets attend in no chunks, and to each other in kernels on GPUs
  only.

  Args:
    attention: one of ATTENTION_IMPLEMENTATIONS.
    config: the architecture.
    length: of the inputs.
    platform: 'cpu', 'gpu', ...; by default that of the program at hand.
  """
  platform = platform or target_platform()
  reason = f'asked for {attention}'
  if attention == 'auto':
    attention, reason = _automatic(config, length, platform)
  encoder = attention
  cross = causal = 'fused' if attention == 'fused' else 'reference'
  if platform == 'tpu':
    causal = 'reference'
  if config.encoder_attention_type == 'full':
    encoder = 'reference'
    reason += '; full attention has one implementation'
  return AttentionChoice(encoder, cross, causal, reason)


def _automatic(config, length, platform):
  refusal = why_not_fused(config, platform)
  if not refusal:
    return 'fused', f'kernels for {platform.upper()}s'
  if platform != 'cpu':
    return 'chunked', f'fused {refusal}'
  limit = f'{_CPU_REFERENCE_LENGTH} tokens on a CPU'
  if length <= _CPU_REFERENCE_LENGTH:
    return 'reference', f'up to {limit}'
  return 'chunked', f'beyond {limit}'


def check_attention(attention: str, config: LongT5Config,
                    platform: str | None = None) -> None:
  """Refuses kernels where there are none.

  Raises:
    ConfigError: saying why they cannot run.
  """
  refusal = attention == 'fused' and why_not_fused(
      config, platform or target_platform())
  if refusal:
    raise ConfigError(f"attention='fused' {refusal}.")


def why_not_fused(config: LongT5Config, platform: str) -> str:
  """What 'fused' needs and has not got; empty if it has all."""
  refusal = why_no_kernels(platform)
  if (not refusal and platform == 'tpu' and config.local_radius > MAX_RADIUS
      and config.encoder_attention_type != 'full'):
    refusal = (f'needs a local_radius of at most {MAX_RADIUS} on a TPU, not '
               f'{config.local_radius}')
  return refusal

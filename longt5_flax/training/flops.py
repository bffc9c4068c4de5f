"""How much arithmetic a training step needs, and the share of the device's
peak that it reaches (MFU).

Only matrix products count, two operations a multiply-add; backward costs twice
the forward pass; what remat recomputes is not counted. Attention counts the
keys that a query may see, not the ones a kernel happens to compute:

  local              2 r + 1
  transient-global   2 r + 1 + floor(L / k)
  full               L
  decoder self       (T + 1) / 2
  decoder cross      L

Per token and layer: projections 4 D H K (one more pair of D H K for every
global token's key and value), attention 2 H K keys, MLP 3 D F (2 D F without a
gate); logits D V per target. Rows count whole, padding included.
"""

from longt5_flax.config import LongT5Config

# Dense bfloat16 peak of one device, operations a second, as the vendors state.
PEAK_FLOPS = {
    'NVIDIA A100-SXM4-40GB': 312e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
    'TPU v3': 61.5e12,
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5': 459e12,
    'TPU v6 lite': 918e12,
}


def train_flops(
    config: LongT5Config, inputs_length: int, targets_length: int
) -> float:
  """Operations of one training step on one row."""
  return 6.0 * (_encoder_multiplies(config, inputs_length)
                + _decoder_multiplies(config, inputs_length, targets_length))


def mfu(flops_per_second: float, device_kind: str,
        num_devices: int) -> float | None:
  """The share of the devices' peak, or None where that is not known."""
  peak = PEAK_FLOPS.get(device_kind)
  return flops_per_second / (peak * num_devices) if peak else None


def _encoder_multiplies(config, length):
  joined = config.num_heads * config.d_kv
  globals_, keys = 0, length
  if config.encoder_attention_type != 'full':
    keys = min(2 * config.local_radius + 1, length)
  if config.encoder_attention_type == 'transient-global':
    globals_ = length // config.global_block_size
    keys += globals_
  layer = length * (4 * config.d_model * joined + 2 * joined * keys)
  layer += globals_ * 2 * config.d_model * joined
  return config.num_layers * (layer + length * _mlp_multiplies(config))


def _decoder_multiplies(config, inputs_length, targets_length):
  joined = config.num_heads * config.d_kv
  # Self-attention's four projections, and cross-attention's query and output.
  target = 6 * config.d_model * joined + _mlp_multiplies(config)
  target += 2 * joined * ((targets_length + 1) / 2 + inputs_length)
  cross_keys = inputs_length * 2 * config.d_model * joined
  layers = config.num_decoder_layers * (targets_length * target + cross_keys)
  return layers + targets_length * config.d_model * config.vocab_size


def _mlp_multiplies(config):
  return (3 if config.gated else 2) * config.d_model * config.d_ff

"""LongT5Config: the architecture, frozen, typed and checked.

Field names and defaults are Hugging Face's, so that a `config.json` of any
LongT5 on disk reads as it is. Sizes are those of the paper (Guo et al. 2021,
arXiv 2112.07916) and of mLongT5 (Uthus et al. 2023, arXiv 2305.11129).
"""

import dataclasses
import json
import os
from typing import Any

ATTENTION_TYPES = ('local', 'transient-global', 'full')
FEED_FORWARDS = ('relu', 'gated-gelu')

# layers, d_model, d_ff, heads, d_kv.
_SIZES = {
    'tiny': (2, 64, 128, 4, 16),
    'small': (8, 512, 1024, 6, 64),
    'base': (12, 768, 2048, 12, 64),
    'large': (24, 1024, 2816, 16, 64),
    'xl': (24, 2048, 5120, 32, 64),
    'xxl': (24, 4096, 10240, 64, 64),
}
_FAMILIES = {
    'local': ('local', 32128),
    'tglobal': ('transient-global', 32128),
    'full': ('full', 32128),
    'mlongt5': ('transient-global', 256384),
}
PRESETS = tuple(f'{family}-{size}' for family in _FAMILIES for size in _SIZES)


class ConfigError(ValueError):
  """A setting that cannot work; the message names its value and the rule."""


@dataclasses.dataclass(frozen=True)
class LongT5Config:
  """The shape of a LongT5 and what its layers compute.

  `encoder_attention_type` is 'local', 'transient-global' or 'full' (plain
  T5.1.1, the baseline of every ablation). `scale_decoder_outputs` multiplies
  the decoder's output by d_model ** -0.5 before the logits; None stands for
  the value of `tie_word_embeddings`, and `num_decoder_layers` None for
  `num_layers`, as in Hugging Face's files.

  Raises:
    ConfigError: a field has a value that no model can have.
  """
  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_decoder_layers: int | None = None
  num_heads: int = 8
  local_radius: int = 127
  global_block_size: int = 16
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  dropout_rate: float = 0.1
  layer_norm_epsilon: float = 1e-6
  initializer_factor: float = 1.0
  feed_forward_proj: str = 'relu'
  encoder_attention_type: str = 'local'
  tie_word_embeddings: bool = True
  scale_decoder_outputs: bool | None = None
  pad_token_id: int = 0
  eos_token_id: int = 1
  decoder_start_token_id: int = 0

  def __post_init__(self):
    if self.num_decoder_layers is None:
      object.__setattr__(self, 'num_decoder_layers', self.num_layers)
    if self.scale_decoder_outputs is None:
      object.__setattr__(self, 'scale_decoder_outputs',
                         self.tie_word_embeddings)
    self._check_types()
    for name in ('vocab_size', 'd_model', 'd_kv', 'd_ff', 'num_layers',
                 'num_decoder_layers', 'num_heads', 'local_radius',
                 'global_block_size'):
      value = getattr(self, name)
      if value < 1:
        raise ConfigError(f'{name}={value} must be at least 1.')
    self._check_buckets()
    if not 0 <= self.dropout_rate < 1:
      raise ConfigError(f'dropout_rate={self.dropout_rate} must be in [0, 1).')
    for name, known in (('feed_forward_proj', FEED_FORWARDS),
                        ('encoder_attention_type', ATTENTION_TYPES)):
      value = getattr(self, name)
      if value not in known:
        raise ConfigError(f'{name}={value!r} must be one of {known}.')
    for name in ('pad_token_id', 'eos_token_id', 'decoder_start_token_id'):
      value = getattr(self, name)
      if not 0 <= value < self.vocab_size:
        raise ConfigError(
            f'{name}={value} must be in [0, vocab_size={self.vocab_size}).')

  def _check_types(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      kind: Any = {'num_decoder_layers': int, 'scale_decoder_outputs': bool
                   }.get(field.name, field.type)
      allowed = (int, float) if kind is float else kind
      if (not isinstance(value, allowed)
          or kind is not bool and isinstance(value, bool)):
        raise ConfigError(
            f'{field.name}={value!r} must be of type {kind.__name__}.')

  def _check_buckets(self):
    # A quarter of the buckets count exactly in each direction; a distance
    # beyond them must be left for the logarithmic ones.
    buckets = self.relative_attention_num_buckets
    if buckets < 4 or buckets % 2:
      raise ConfigError(f'relative_attention_num_buckets={buckets} must be '
                        'even and at least 4.')
    distance = self.relative_attention_max_distance
    if distance <= buckets // 2:
      raise ConfigError(
          f'relative_attention_max_distance={distance} must be greater than '
          f'half of relative_attention_num_buckets={buckets}.')

  @property
  def gated(self) -> bool:
    """Whether the MLP has a gate (T5.1.1) or is a plain one (T5.0)."""
    return self.feed_forward_proj == 'gated-gelu'

  @classmethod
  def preset(cls, name: str, **overrides: Any) -> 'LongT5Config':
    """The config of a published size, such as 'tglobal-large'.

    Args:
      name: {local, tglobal, full, mlongt5}-{tiny, small, base, large, xl,
        xxl}.
      **overrides: fields that replace the preset's.

    Raises:
      ConfigError: the name is unknown.
    """
    if name not in PRESETS:
      raise ConfigError(f'preset={name!r} must be one of {", ".join(PRESETS)}.')
    family, size = name.split('-')
    attention_type, vocab_size = _FAMILIES[family]
    layers, d_model, d_ff, heads, d_kv = _SIZES[size]
    fields: dict[str, Any] = dict(
        vocab_size=vocab_size, d_model=d_model, d_kv=d_kv, d_ff=d_ff,
        num_layers=layers, num_heads=heads, feed_forward_proj='gated-gelu',
        encoder_attention_type=attention_type, tie_word_embeddings=False)
    return cls(**(fields | overrides))

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> 'LongT5Config':
    """Reads the fields that this class has; others are left alone.

    Hugging Face's files hold dozens of keys that are not the architecture's
    (`task_specific_params`, `transformers_version`), so unknown ones are no
    error here. A null stands for the default. What Hugging Face derives from
    `feed_forward_proj` and stores again (`dense_act_fn`, `is_gated_act`) must
    agree with it; there it would win.

    Raises:
      ConfigError: a value that no model can have.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    config = cls(**{name: value for name, value in values.items()
                    if name in names and value is not None})
    for name, derived in config.derived().items():
      value = values.get(name)
      if value is not None and value != derived:
        raise ConfigError(
            f'{name}={value!r} must be {derived!r}, as feed_forward_proj='
            f'{config.feed_forward_proj!r} says.')
    return config

  def derived(self) -> dict[str, Any]:
    """What Hugging Face stores beside `feed_forward_proj`."""
    return {'dense_act_fn': 'gelu_new' if self.gated else 'relu',
            'is_gated_act': self.gated}

  def to_dict(self) -> dict[str, Any]:
    """All fields, and the keys by which Hugging Face knows a LongT5."""
    return dataclasses.asdict(self) | {
        'model_type': 'longt5', 'is_encoder_decoder': True}

  @classmethod
  def from_pretrained(cls, directory: str) -> 'LongT5Config':
    """Reads `directory/config.json`.

    Raises:
      ConfigError: the file is missing, is no JSON object, is another model's,
        or holds a value that no LongT5 can have.
    """
    path = os.path.join(directory, 'config.json')
    values = read_json_object(path)
    kind = values.get('model_type', 'longt5')
    if kind != 'longt5':
      raise ConfigError(
          f'{path}: model_type={kind!r} is not a LongT5\'s, which is '
          f"'longt5'.")
    return cls.from_dict(values)


def read_json_object(path: str) -> dict[str, Any]:
  """A JSON file's object.

  Raises:
    ConfigError: the file is missing, or holds something else.
  """
  try:
    with open(path, encoding='utf-8') as file:
      values = json.load(file)
  except OSError as error:
    raise ConfigError(f'{path}: cannot be read ({error.strerror}).') from None
  except ValueError as error:
    raise ConfigError(f'{path}: is not JSON ({error}).') from None
  if not isinstance(values, dict):
    raise ConfigError(f'{path}: must hold a JSON object.')
  return values

"""Whether weights compute, in another model, what they were trained for."""

import dataclasses
from collections.abc import Collection

from longt5_flax.config import LongT5Config
from longt5_flax.interop.tensors import WeightsError

# They change training, or the ids that stand for nothing, not what is computed.
_FREE = frozenset({'dropout_rate', 'initializer_factor', 'pad_token_id',
                   'eos_token_id', 'decoder_start_token_id'})


def check_same_model(origin: str, stored: LongT5Config, wanted: LongT5Config,
                     free: Collection[str] = ()) -> None:
  """Refuses weights for a model that would compute something else with them.

  Most fields of a config decide shapes; some, such as `local_radius`, decide
  results alone, and nothing else would notice.

  Args:
    origin: what the message calls the weights.
    stored: the architecture that they are of.
    wanted: the one they are to be used in.
    free: further fields that may differ.

  Raises:
    WeightsError: naming the first field that differs.
  """
  may_differ = {*_FREE, *free}
  kind = stored.encoder_attention_type
  if kind == wanted.encoder_attention_type != 'transient-global':
    may_differ.add('global_block_size')
    if kind == 'full':
      may_differ.add('local_radius')
  for field in dataclasses.fields(LongT5Config):
    old, new = getattr(stored, field.name), getattr(wanted, field.name)
    if old != new and field.name not in may_differ:
      raise WeightsError(f'{origin}: the weights are of a model with '
                         f'{field.name}={old!r}, and this one has {new!r}.')

"""T5.1.1 as a start for LongT5.

A LongT5 with local attention has T5's parameters and no others. Transient-
global attention adds a table of biases for the global tokens and, in every
encoder layer, a norm of their sums; these begin as the model's initialiser
leaves them.
"""

import dataclasses
import os

import jax
import numpy as np

from longt5_flax.config import LongT5Config
from longt5_flax.interop.huggingface import open_huggingface
from longt5_flax.interop.same_model import check_same_model
from longt5_flax.interop.t5x import open_t5x
from longt5_flax.interop.tensors import Index, Tensors, WeightsError

_SIDE_BIAS = 'encoder/side_relpos_bias/rel_embedding'
_LONG = ('encoder_attention_type', 'local_radius', 'global_block_size')


def open_t5(path: str, config: LongT5Config | None = None) -> Tensors:
  """A T5's parameters as those of a LongT5 that has not been trained yet.

  Args:
    path: of a Hugging Face folder of a T5, or of a T5X checkpoint.
    config: the LongT5's; by default T5's sizes, with transient-global
      attention as published.

  Raises:
    WeightsError: the checkpoint cannot be read, is a LongT5's already, or is
      of a model that differs in more than the encoder's attention.
  """
  if os.path.isfile(os.path.join(path, 'config.json')):
    tensors = open_huggingface(path, model_types=('t5', 'mt5'))
  else:
    tensors = open_t5x(path, config)
  stored = tensors.config
  assert stored  # For mypy: both know theirs, or were told.
  if _SIDE_BIAS in tensors.shapes:
    raise WeightsError(f'{path}: is no T5 but a LongT5 already, for it holds '
                       f'{_SIDE_BIAS}.')
  if config is None:
    config = dataclasses.replace(
        stored, encoder_attention_type='transient-global')
  check_same_model(path, stored, config, free=_LONG)
  return _T5AsLongT5(tensors, config)


class _T5AsLongT5(Tensors):
  """See `open_t5`."""

  def __init__(self, tensors: Tensors, config: LongT5Config):
    self._tensors, self._new = tensors, _new_parameters(config)
    self.origin, self.config = tensors.origin, config
    self.shapes = dict(tensors.shapes) | {
        name: array.shape for name, array in self._new.items()}
    self.dtypes = dict(tensors.dtypes) | {
        name: array.dtype for name, array in self._new.items()}
    self.report = [*tensors.report, (
        "T5's parameters, encoder attention and its bias included, are used "
        f'with {config.encoder_attention_type} attention.')]
    if self._new:
      self.report.append(
          f'not in T5, so initialised: {_SIDE_BIAS} at random (seed 0), '
          f'T5LayerNorm_0/scale of {config.num_layers} encoder layers as ones.')

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `Tensors.read`."""
    if name not in self._new:
      return self._tensors.read(name, index)
    return self._new[name][index] if index else self._new[name]

  def stored_name(self, name: str) -> str:
    """See `Tensors.stored_name`."""
    return self._tensors.stored_name(name)


def _new_parameters(config: LongT5Config) -> dict[str, np.ndarray]:
  """What transient-global attention adds, by the initialisers of
  flaxformer's LongT5."""
  if config.encoder_attention_type != 'transient-global':
    return {}
  initializer = jax.nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform')
  table = initializer(jax.random.key(0), (
      config.num_heads, config.relative_attention_num_buckets), np.float32)
  ones = np.ones(config.d_model, np.float32)
  return {_SIDE_BIAS: np.asarray(table)} | {
      f'encoder/layers_{i}/attention/T5LayerNorm_0/scale': ones
      for i in range(config.num_layers)}

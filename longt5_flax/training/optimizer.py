"""Optimizers: T5's Adafactor to the letter, and AdamW.

Stacked layers are optimised as the separate matrices that they are: factored
moments, clipping and parameter scale of one layer never see another, so that
`precision.scan_layers` does not change training.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from longt5_flax.config import ConfigError

OPTIMIZERS = ('adafactor', 'adamw')


def make_optimizer(
    settings: Any, schedule: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
  """The optimizer that `config.optimizer` describes.

  Args:
    settings: with `name`, `clip_global_norm` (0: no clipping) and, for
      Adafactor, `decay_rate`, `clipping_threshold`, `min_dim_size_to_factor`,
      `multiply_by_parameter_scale`; for AdamW `b1`, `b2`, `eps`,
      `weight_decay` (of matrices only).
    schedule: the learning rate at a step.

  Raises:
    ConfigError: an unknown name.
  """
  if settings.name == 'adafactor':
    optimizer = _layer_by_layer(optax.adafactor(
        learning_rate=schedule, decay_rate=settings.decay_rate,
        min_dim_size_to_factor=settings.min_dim_size_to_factor,
        multiply_by_parameter_scale=settings.multiply_by_parameter_scale,
        clipping_threshold=settings.clipping_threshold))
  elif settings.name == 'adamw':
    optimizer = optax.adamw(
        schedule, b1=settings.b1, b2=settings.b2, eps=settings.eps,
        weight_decay=settings.weight_decay, mask=_is_matrix)
  else:
    raise ConfigError(
        f'optimizer.name={settings.name!r} must be one of {OPTIMIZERS}.')
  if settings.clip_global_norm:
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.clip_global_norm), optimizer)
  return optimizer


def _is_matrix(params):
  # Norm scales and bias tables are small and meant to move freely.
  return jax.tree_util.tree_map_with_path(
      lambda path, _: path[-1].key in ('kernel', 'embedding'), params)


def _layer_by_layer(
    optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Applies `optimizer` to each layer of a stacked leaf by itself."""

  def init(params):
    return _vmap_if_any(optimizer.init, params)

  def update(updates, state, params=None):
    return _vmap_if_any(optimizer.update, updates, state, params)

  stacked = optax.GradientTransformation(init, update)

  # Encoder and decoder apart, because they may differ in depth and all leaves
  # under one vmap must have the same leading axis.
  def labels(params):
    return jax.tree_util.tree_map_with_path(_stack_of, params)

  return optax.partition(
      {'unstacked': optimizer, 'encoder': stacked, 'decoder': stacked}, labels)


def _vmap_if_any(function, *trees):
  # Unstacked models have no such leaves, and vmap refuses empty trees.
  return (jax.vmap(function) if jax.tree.leaves(trees[0]) else function)(*trees)


def _stack_of(path, leaf):
  del leaf
  names = [key.key for key in path]
  return names[0] if names[1] == 'layers' else 'unstacked'


def num_parameters(params: Any) -> int:
  """How many numbers the tree holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))

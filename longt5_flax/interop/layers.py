"""Layers stacked on axis 0 of one `layers` subtree, or unrolled."""

import re
from typing import Any

import jax
import jax.numpy as jnp

_LAYER = re.compile(r'layers_(\d+)')


def stack_layers(params: dict[str, Any]) -> dict[str, Any]:
  """`layers_0`, `layers_1`, ... of encoder and decoder as one `layers` each.

  Leaves gain a leading axis of layers. Subtrees without such layers are
  returned as they are.
  """
  stacked = {}
  for name, subtree in params.items():
    if isinstance(subtree, dict):
      numbers = sorted(
          int(match[1]) for match in map(_LAYER.fullmatch, subtree) if match)
      if numbers:
        layers = [subtree[f'layers_{i}'] for i in numbers]
        subtree = {key: value for key, value in subtree.items()
                   if not _LAYER.fullmatch(key)}
        subtree['layers'] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    stacked[name] = subtree
  return stacked


def unstack_layers(params: dict[str, Any]) -> dict[str, Any]:
  """The inverse of `stack_layers`."""
  unstacked = {}
  for name, subtree in params.items():
    if isinstance(subtree, dict) and 'layers' in subtree:
      subtree = dict(subtree)
      layers = subtree.pop('layers')
      for i in range(len(jax.tree.leaves(layers)[0])):
        subtree[f'layers_{i}'] = jax.tree.map(lambda x, i=i: x[i], layers)
    unstacked[name] = subtree
  return unstacked

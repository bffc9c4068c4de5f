"""Layers stacked on axis 0 of one `layers` subtree, or unrolled."""

import re
from typing import Any

import flax.linen as nn
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


def init_params(model: nn.Module, key: jax.Array, inputs: int) -> Any:
  """Random parameters; the same for stacked and for unrolled layers.

  Args:
    model: with attributes `scan_layers` and `scan_unroll`.
    key: from jax.random.
    inputs: how many arrays of ids the model takes.
  """
  ids = jnp.ones((1, 1), jnp.int32)
  # A loop: XLA takes longer to compile a random draw for each tensor of each
  # layer than a train step, and would also make one of slices of one draw.
  params = model.clone(scan_layers=True, scan_unroll=1).init(
      key, *inputs * [ids])['params']
  if model.scan_layers:
    return params
  return unstack_layers(jax.lax.optimization_barrier(params))

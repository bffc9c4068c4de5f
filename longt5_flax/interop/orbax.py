"""Parameters out of a run's Orbax checkpoints."""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from longt5_flax.config import ConfigError
from longt5_flax.interop.layers import stack_layers, unstack_layers


def checkpoint_steps(workdir: str) -> list[int]:
  """The steps of a run's whole checkpoints; unlike Orbax's manager, makes no
  folder where there is none."""
  directory = _directory(workdir)
  return ocp.utils.checkpoint_steps(directory) if os.path.isdir(
      directory) else []


def _directory(workdir):
  return os.path.join(os.path.abspath(workdir), 'checkpoints')


def restore_run_params(workdir: str, params: Any) -> Any:
  """The parameters of a run's newest checkpoint.

  Layers are stacked or unstacked as `params` has them, whatever the run had.

  Args:
    workdir: the run's folder.
    params: shapes, dtypes and shardings of the parameters wanted.

  Raises:
    ConfigError: there is no checkpoint, or its parameters are not the ones
      wanted; the message names the first that differs.
  """
  directory, steps = _directory(workdir), checkpoint_steps(workdir)
  if not steps:
    raise ConfigError(f'init_from=run:{workdir}: no checkpoint in {directory}.')
  path = os.path.join(directory, str(max(steps)), 'state')
  stored = ocp.StandardCheckpointer().metadata(path).item_metadata.tree
  is_stacked = 'layers' in stored['params']['encoder']
  wanted = _convert(params, is_stacked)
  _check_same(stored['params'], wanted, workdir)
  # The optimizer's part of the checkpoint is not read.
  restored = ocp.PyTreeCheckpointer().restore(
      path, args=ocp.args.PyTreeRestore(
          item={'params': wanted}, partial_restore=True,
          restore_args=ocp.checkpoint_utils.construct_restore_args(
              {'params': wanted})))['params']
  restored = jax.jit(
      lambda x: _convert(x, 'layers' in params['encoder']),
      out_shardings=jax.tree.map(lambda x: x.sharding, params))(restored)
  return restored


def _convert(params, stacked):
  if stacked == ('layers' in params['encoder']):
    return params
  convert = stack_layers if stacked else unstack_layers
  if not isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
    return convert(params)
  return jax.eval_shape(convert, params)


def _check_same(stored, wanted, workdir):
  def shapes(tree):
    return {jax.tree_util.keystr(path, simple=True, separator='/'):
            tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

  old, new = shapes(stored), shapes(wanted)
  for name in sorted(old.keys() | new.keys()):
    if old.get(name) != new.get(name):
      raise ConfigError(
          f'init_from=run:{workdir}: parameter {name} has shape '
          f'{old.get(name)} there and {new.get(name)} here.')

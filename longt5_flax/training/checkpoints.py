"""Checkpoints of a run: state, row streams and config in one step folder.

Orbax writes them in the background and renames a folder only when all of it is
on disk, so that a killed run leaves whole checkpoints or none.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from longt5_flax.config import ConfigError

# Values of a run that may change when it goes on: they decide neither shapes
# nor the order of data.
_FREE_SECTIONS = frozenset({
    'checkpoint', 'eval', 'init_from', 'log_every_steps', 'mesh', 'profile',
    'schedule', 'steps'})
_FREE_KEYS = frozenset({
    'data.task_dir', 'data.tfds_dir', 'data.validation_path',
    'data.validation_split', 'data.workers', 'loss.chunk_mib',
    'optimizer.microbatches', 'precision.attention', 'precision.dtype',
    'precision.remat'})


class Checkpoints:
  """The folder `checkpoints` of a run.

  Args:
    directory: of the checkpoints, created by the first save.
    settings: `keep` and `keep_every_steps`.
    best: gives the step of the best one so far, which is kept too.
  """

  def __init__(self, directory: str, settings: Any,
               best: Callable[[], int | None] = lambda: None):
    self._directory = os.path.abspath(directory)
    policies: list[Any] = [
        checkpoint_managers.LatestN(settings.keep), _Best(best)]
    if settings.keep_every_steps:
      policies.append(
          checkpoint_managers.EveryNSteps(settings.keep_every_steps))
    self._manager = ocp.CheckpointManager(
        self._directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                policies),
            enable_async_checkpointing=True),
        item_names=('state', 'streams', 'config'))

  @property
  def latest_step(self) -> int | None:
    """The newest step with a whole checkpoint."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, streams: dict[str, Any],
           config: dict[str, Any]) -> None:
    """Starts to write a checkpoint; does nothing if the step has one."""
    if step == self.latest_step:
      return
    self._manager.save(step, args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        streams=ocp.args.JsonSave(streams),
        config=ocp.args.JsonSave(config)))

  def restore(
      self, step: int, abstract_state: Any
  ) -> tuple[Any, dict[str, Any]]:
    """State and streams of a step.

    Args:
      step: of the checkpoint.
      abstract_state: shapes, dtypes and shardings of the state.
    """
    restored = self._manager.restore(step, args=ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract_state),
        streams=ocp.args.JsonRestore()))
    return restored['state'], restored['streams']

  def config(self, step: int) -> dict[str, Any]:
    """The config that a checkpoint was written under."""
    return self._manager.restore(step, args=ocp.args.Composite(
        config=ocp.args.JsonRestore()))['config']

  def close(self) -> None:
    """Waits for the last checkpoint to be whole."""
    self._manager.wait_until_finished()
    self._manager.close()


class _Best(checkpoint_managers.PreservationPolicy):
  """Keeps one step, which changes."""

  def __init__(self, step):
    self._step = step

  def should_preserve(self, checkpoints, *, context):
    """Of each checkpoint, whether it is to stay."""
    del context
    return [checkpoint.step == self._step() for checkpoint in checkpoints]


def check_same_run(saved: dict[str, Any], config: dict[str, Any],
                   workdir: str) -> None:
  """Refuses to go on with a run under settings that would change it.

  Args:
    saved: the checkpoint's config, nested dicts.
    config: the one asked for.
    workdir: for the message.

  Raises:
    ConfigError: a value differs that decides shapes or the order of data.
  """
  old, new = flatten(saved), flatten(config)
  for name in sorted(old.keys() | new.keys()):
    section = name.split('.')[0]
    if section in _FREE_SECTIONS or name in _FREE_KEYS:
      continue
    if old.get(name) != new.get(name):
      raise ConfigError(
          f'{workdir} holds a run with {name}={old.get(name)!r}, not '
          f'{new.get(name)!r}: keep the value, or choose another --workdir.')


def flatten(config: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """The values of a config by the names that the command line has for them."""
  values: dict[str, Any] = {}
  for name, value in config.items():
    if isinstance(value, dict):
      values |= flatten(value, f'{prefix}{name}.')
    else:
      values[prefix + name] = list(value) if isinstance(value, tuple) else value
  return values


def abstract_state(state: Any, shardings: Any) -> Any:
  """Shapes and dtypes of a state, with the shardings to restore it to."""
  return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
          leaf.shape, leaf.dtype, sharding=sharding), state, shardings)

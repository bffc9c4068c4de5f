"""Orbax checkpoints: those of a run, and folders of parameters alone.

A folder of parameters holds `config.json` and `params`, an Orbax checkpoint of
unrolled layers, as any program with Orbax reads it.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import orbax.checkpoint as ocp
import tensorstore as ts

from longt5_flax.config import LongT5Config, read_json_object
from longt5_flax.interop.atomic import written_whole
from longt5_flax.interop.stores import (
    Place,
    StoredTensors,
    open_folder,
    reason,
)
from longt5_flax.interop.tensors import (
    ParamTensors,
    Tensors,
    WeightsError,
    tensor_names,
)

# Of a run's folder: what `read_scores` reads.
BEST_FILE = 'best.json'


def checkpoint_steps(workdir: str) -> list[int]:
  """The steps of a run's whole checkpoints; unlike Orbax's manager, makes no
  folder where there is none."""
  directory = _checkpoints(workdir)
  return ocp.utils.checkpoint_steps(directory) if os.path.isdir(
      directory) else []


def read_scores(workdir: str) -> tuple[str, dict[int, float]]:
  """What a run knows of its evaluations: the name of the score whose best
  checkpoint it keeps, '' for none, and a score for each step.

  Raises:
    ConfigError: its file is damaged.
  """
  path = os.path.join(workdir, BEST_FILE)
  if not os.path.exists(path):
    return '', {}
  record = read_json_object(path)
  try:
    return record['keep_best'], {
        int(step): float(score) for step, score in record['scores'].items()}
  except (KeyError, AttributeError, TypeError, ValueError):
    raise WeightsError(f'{path}: must hold keep_best and scores.') from None


def best_step(scores: Mapping[int, float]) -> int | None:
  """The step of the highest score, the first of several; None of none."""
  return max(sorted(scores), key=scores.__getitem__, default=None)


def run_checkpoint(path: str) -> tuple[str, str]:
  """The folder of a run's checkpoint, and a line that says which it is.

  Args:
    path: the run's folder: its best checkpoint, where it keeps one
      (`eval.keep_best`), else the newest. Or a folder WORKDIR/checkpoints/STEP.

  Raises:
    ConfigError: there is no whole checkpoint.
  """
  parent, name = os.path.split(os.path.abspath(path))
  if os.path.basename(parent) == 'checkpoints' and name.isdigit():
    if int(name) not in checkpoint_steps(os.path.dirname(parent)):
      raise WeightsError(f'{path}: no whole checkpoint.')
    return path.rstrip('/'), f'{path}: a checkpoint of a run.'
  steps = checkpoint_steps(path)
  if not steps:
    raise WeightsError(f'{path}: no checkpoint in {_checkpoints(path)}.')
  chosen, what = max(steps), 'newest checkpoint'
  score, scores = read_scores(path)
  best = best_step({step: scores[step] for step in scores if step in steps})
  if score and best is not None:
    chosen, what = best, f'best checkpoint, by {score},'
  directory = os.path.join(path, 'checkpoints', str(chosen))
  return directory, f'{directory}: the {what} of the run.'


def run_values(path: str) -> dict[str, Any]:
  """The config of a run's checkpoint, and the fingerprint of its `vocabulary`.

  Args:
    path: see `run_checkpoint`.

  Raises:
    ConfigError: there is no checkpoint, or it is damaged.
  """
  directory = os.path.abspath(run_checkpoint(path)[0])
  return read_json_object(os.path.join(directory, 'config', 'metadata'))


def open_run(path: str) -> StoredTensors:
  """The parameters of a run's checkpoint, without optimizer state.

  Args:
    path: see `run_checkpoint`.

  Raises:
    ConfigError: there is none, or it cannot be read.
  """
  directory, line = run_checkpoint(path)
  directory = os.path.abspath(directory)
  values = run_values(path)
  return _open(path, os.path.join(directory, 'state'), 'params',
               LongT5Config.from_dict(values['model']), line)


def open_orbax(directory: str) -> StoredTensors:
  """A folder of parameters, as `save_orbax` writes it.

  Raises:
    ConfigError: config.json is missing or no LongT5's.
    WeightsError: there are no parameters, or they cannot be read.
  """
  config = LongT5Config.from_pretrained(directory)
  path = os.path.join(os.path.abspath(directory), 'params')
  tensors = _open(
      directory, path, None, config, f'{path}: an Orbax checkpoint.')
  values = read_json_object(os.path.join(directory, 'config.json'))
  tensors.architecture = (values.get('architectures') or [None])[0]
  return tensors


def save_orbax(directory: str, params: Any, config: LongT5Config) -> None:
  """Writes a folder of parameters, one tensor at a time.

  The folder appears when all of it is written.

  Args:
    directory: that is not there yet.
    params: a parameter tree, layers stacked or not, or `Tensors`.
    config: the architecture.

  Raises:
    WeightsError: the folder is there already, or cannot be written.
  """
  tensors = (params if isinstance(params, Tensors)
             else ParamTensors(params, config))
  values = config.to_dict()
  if tensors.architecture:
    values['architectures'] = [tensors.architecture]
  tree = flax.traverse_util.unflatten_dict(
      {name: _Later(tensors, name) for name in tensors.shapes}, sep='/')
  handler = ocp.PyTreeCheckpointHandler(
      type_handler_registry=ocp.type_handlers.create_type_handler_registry(
          (jax.Array, ocp.type_handlers.ArrayHandler()),
          (_Later, _LaterHandler())))
  with written_whole(directory) as new:
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(os.path.join(new, 'params'),
                        args=ocp.args.PyTreeSave(tree))
    with open(os.path.join(new, 'config.json'), 'w', encoding='utf-8') as file:
      json.dump(values, file, indent=2)
      file.write('\n')


@dataclasses.dataclass(frozen=True)
class _Later:
  """A tensor that is read when its turn to be written comes."""
  tensors: Tensors
  name: str


class _LaterHandler(ocp.type_handlers.NumpyHandler):
  """Has one tensor in memory, where Orbax's own would have copies of all."""

  async def serialize(self, values, infos, args=None):
    """See NumpyHandler; when it returns, all is written."""
    for value, info, arg in zip(values, infos, args, strict=True):
      for written in await super().serialize(
          [value.tensors.read(value.name)], [info], [arg]):
        written.result()
    return []


def _checkpoints(workdir):
  return os.path.join(os.path.abspath(workdir), 'checkpoints')


def _open(origin, path, part, config, line):
  """The tensors of an Orbax checkpoint, or those below `part` of its tree.

  Orbax names an array by its path in the tree, joined with dots.
  """
  prefix = f'{part}.' if part else ''
  store = {'driver': 'ocdbt', 'base': open_folder(path).spec().to_json()}
  try:
    arrays = ts.KvStore.open(store).result()
    keys = [key.decode() for key in arrays.list().result()]
    headers = {key.removesuffix('/.zarray'): json.loads(
        arrays.read(key).result().value) for key in keys
               if key.startswith(prefix) and key.endswith('/.zarray')}
  except ValueError as error:
    raise WeightsError(
        f'{origin}: cannot read {path}: {reason(error)}.') from None
  if not headers:
    raise WeightsError(f'{origin}: no Orbax checkpoint at {path}.')
  places = {}
  for name, header in headers.items():
    spec = {'driver': 'zarr', 'kvstore': store | {'path': f'{name}/'}}
    shape = tuple(header['shape'])
    where = tensor_names(name.removeprefix(prefix).split('.'), shape)
    for i, tensor in enumerate(where.names):
      places[tensor] = Place(
          name, spec, shape, 0 if where.stacked else None, i)
  return StoredTensors(origin, config, places, report=[line])

"""Held-out losses of a sweep's runs, all on the same rows."""

import functools
import json
import math
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from longt5_flax.config import ConfigError
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.inputs import held_out_batches, pipeline_options
from longt5_flax.interop.atomic import replace_file
from longt5_flax.interop.layers import init_params
from longt5_flax.sweep_plan import Plan, Run
from longt5_flax.training import partitioning, run_config
from longt5_flax.training.checkpoints import abstract_state
from longt5_flax.training.init_from import initial_params
from longt5_flax.training.losses import LossSums
from longt5_flax.training.train_step import batch_loss, mean_metrics

Losses = dict[str, float]  # name of an objective -> loss per target token


def check_held_out(plan: Plan) -> None:
  """Makes a batch of each objective: better refused now than after all runs.

  Raises:
    ConfigError: it cannot be made, or a run cannot read it.
  """
  for objective in plan.held_out:
    config = objective.config.copy_and_resolve_references()
    config.eval.max_batches = 1
    try:
      _batches(config, 1)
      vocabulary = _vocabulary(config.data)
      for run in plan.runs:
        _check_reads(run, config.data.vocabulary, vocabulary)
    except (ConfigError, DataError) as error:
      raise ConfigError(f'held_out {objective.name!r}: {error}') from None


def _check_reads(run: Run, path: str, vocabulary: Vocabulary) -> None:
  """Refuses ids that mean something else to a run, or nothing."""
  own = run.config.data.vocabulary
  if own != path:
    raise ConfigError(
        f'data.vocabulary={path}, but run {run.name!r} has {own}: losses per '
        'token of different vocabularies cannot be compared.')
  run_config.check_vocabulary(
      vocabulary, run_config.model_config(run.config.model),
      f'for run {run.name!r} data.vocabulary')


def _vocabulary(data: ConfigDict) -> Vocabulary:
  return Vocabulary(data.vocabulary, data.extra_ids)


def held_out_losses(
    plan: Plan, workdirs: Mapping[str, str]) -> dict[str, Losses]:
  """The loss of runs' last parameters by each of the sweep's objectives.

  Rows and loss are those of the objective's config, whatever the run's are. The
  examples of a row start at multiples of every run's global block size. What a
  run's `held_out.json` says already is not computed again.

  Args:
    plan: the sweep.
    workdirs: name of a run -> its folder; those that are finished.

  Returns:
    name of a run -> its losses.

  Raises:
    ConfigError, DataError: the held-out documents cannot be read.
  """
  configs = {run.name: run.config for run in plan.runs}
  block = math.lcm(*(run_config.model_config(config.model).global_block_size
                     for config in configs.values()))
  losses: dict[str, Losses] = {name: {} for name in workdirs}
  for objective in plan.held_out:
    settings = _settings(objective.config, block)
    batches = None
    for name, workdir in workdirs.items():
      known = _read(workdir)
      key = settings | {'steps': configs[name].steps}
      if known.get(objective.name, {}).get('settings') != key:
        batches = batches or _batches(objective.config, block)
        known[objective.name] = {'settings': key, 'loss': _loss(
            configs[name], workdir, objective.config.loss, batches)}
        _write(workdir, known)
      losses[name][objective.name] = known[objective.name]['loss']
  return losses


def _settings(config, block):
  """All that decides rows and loss."""
  values = json.loads(config.to_json())
  for name in ('path', 'workers'):
    del values['data'][name]
  return {'global_block_size': block,
          'max_batches': config.eval.max_batches} | {
      name: values[name] for name in values
      if name in ('seed', 'data', 'gap_sentences', 'span_corruption', 'loss')}


def _read(workdir):
  path = os.path.join(workdir, 'held_out.json')
  if not os.path.exists(path):
    return {}
  with open(path, encoding='utf-8') as file:
    return json.load(file)


def _write(workdir, known):
  replace_file(os.path.join(workdir, 'held_out.json'),
               json.dumps(known, indent=2))


def _batches(config, block):
  return held_out_batches(
      config, _vocabulary(config.data), pipeline_options(config, block))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(model: nn.Module, loss: FrozenConfigDict, params: Any,
          batch: Any) -> LossSums:
  return batch_loss(model, loss, params, batch)


def _loss(config: ConfigDict, workdir: str, loss: ConfigDict,
          batches: Any) -> float:
  """Loss per target token of a finished run."""
  model = run_config.make_model(config)
  mesh = partitioning.make_mesh(dict(config.mesh), jax.devices())
  params = jax.eval_shape(lambda: init_params(
      model, jax.random.key(0), inputs=2))
  shardings = partitioning.state_shardings(params, params, mesh)
  params, _ = initial_params(
      f'run:{workdir}', model.config, abstract_state(params, shardings))
  totals: Any = None
  with partitioning.active(mesh):
    for batch in batches:
      batch_size = len(batch['encoder_input_tokens'])
      sums = _sums(model, FrozenConfigDict(loss), params,
                   partitioning.global_batch(
                       mesh, range(batch_size), batch, batch_size))
      totals = sums if totals is None else jax.tree.map(
          jnp.add, totals, sums)
  return float(mean_metrics(totals)['loss'])

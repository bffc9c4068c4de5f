"""From the config tree of a run to what its parts take, checked before
anything is compiled or written."""

import dataclasses
import json
import math
import os
import subprocess
from typing import Any

import jax
import jax.numpy as jnp

from longt5_flax.config import ConfigError, LongT5Config
from longt5_flax.interop.atomic import replace_file
from longt5_flax.model.attention_choice import (
    ATTENTION_IMPLEMENTATIONS,
    AttentionChoice,
    check_attention,
    choose_attention,
)
from longt5_flax.model.layers import REMAT_POLICIES
from longt5_flax.model.longt5 import DTYPES, LongT5ForConditionalGeneration
from longt5_flax.training.init_from import check_spec
from longt5_flax.training.optimizer import make_optimizer
from longt5_flax.training.schedules import make_schedule

_AT_LEAST_ONE = (
    'steps', 'log_every_steps', 'data.inputs_length', 'data.targets_length',
    'data.batch_size', 'optimizer.microbatches',
    'optimizer.min_dim_size_to_factor', 'checkpoint.every_steps',
    'checkpoint.keep', 'eval.every_steps', 'eval.sample_length',
    'eval.batch_size', 'profile.first_step')
_AT_LEAST_ZERO = (
    'data.workers', 'data.extra_ids', 'checkpoint.keep_every_steps',
    'eval.max_batches', 'eval.samples', 'eval.decode_every_steps',
    'eval.max_examples', 'eval.max_decode_length', 'eval.patience',
    'profile.num_steps', 'loss.z_loss', 'loss.chunk_mib',
    'precision.scan_unroll',
    'optimizer.clip_global_norm', 'optimizer.weight_decay')
_ABOVE_ZERO = ('optimizer.eps', 'optimizer.clipping_threshold')
_BELOW_ONE = (
    'loss.label_smoothing', 'optimizer.decay_rate', 'optimizer.b1',
    'optimizer.b2')
_CHOICES = {
    'precision.dtype': DTYPES,
    'precision.remat': REMAT_POLICIES,
    'precision.attention': ATTENTION_IMPLEMENTATIONS,
    'loss.normalization': ('tokens', 'sum'),
}


def model_config(settings: Any) -> LongT5Config:
  """The architecture of `config.model`: its preset, with the fields set.

  Raises:
    ConfigError: an unknown preset, or a value that no model can have.
  """
  fields = {name: value for name, value in settings.items()
            if name != 'preset' and value is not None}
  return LongT5Config.preset(settings.preset, **fields)


def make_model(config: Any, architecture: LongT5Config | None = None
               ) -> LongT5ForConditionalGeneration:
  """The model of a run, or another one with its `precision`."""
  precision = config.precision
  return LongT5ForConditionalGeneration(
      architecture or model_config(config.model), jnp.dtype(precision.dtype),
      precision.scan_layers, precision.remat, precision.attention,
      precision.scan_unroll)


def check_config(config: Any) -> None:
  """Refuses values that no run can have.

  Raises:
    ConfigError: naming the key, its value and the rule.
  """
  for names, least in ((_AT_LEAST_ONE, 1), (_AT_LEAST_ZERO, 0)):
    for name in names:
      value = _value(config, name)
      if not value >= least:  # Nor NaN.
        raise ConfigError(f'{name}={value} must be at least {least}.')
      if value == math.inf:
        raise ConfigError(f'{name}={value} must be finite.')
  for name, known in _CHOICES.items():
    value = _value(config, name)
    if value not in known:
      raise ConfigError(f'{name}={value!r} must be one of {known}.')
  for name in _ABOVE_ZERO:
    value = _value(config, name)
    if not value > 0:
      raise ConfigError(f'{name}={value} must be > 0.')
  for name in _BELOW_ONE:
    value = _value(config, name)
    if not 0 <= value < 1:
      raise ConfigError(f'{name}={value} must be in [0, 1).')
  if config.init_from:
    check_spec(config.init_from)
  model_config(config.model)
  make_optimizer(
      config.optimizer, make_schedule(**config.schedule, steps=config.steps))


def check_paths(config: Any) -> None:
  """Refuses a run that was not told what to read."""
  needed = {'data.path': 'the files to train on',
            'data.vocabulary': 'a SentencePiece model'}
  if config.data.source == 'seqio':
    needed = {'data.task': 'a task or mixture of seqio'}
    for name in ('data.path', 'data.validation_path'):
      if _value(config, name):
        raise ConfigError(
            f'{name}={_value(config, name)!r} must be empty for data.source='
            "'seqio', which reads data.task; files are read by "
            '--config.data.source=jsonl.')
  for name, what in needed.items():
    if not _value(config, name):
      raise ConfigError(f'{name} is empty: it must name {what}.')


def check_batch(config: Any, row_parts: int) -> None:
  """Refuses a batch that mesh and microbatches do not divide.

  Args:
    config: the run's.
    row_parts: how many parts the mesh splits rows into.
  """
  rows, microbatches = config.data.batch_size, config.optimizer.microbatches
  if rows % (row_parts * microbatches):
    raise ConfigError(
        f'data.batch_size={rows} must be a multiple of mesh.data * mesh.fsdp '
        f'= {row_parts} times optimizer.microbatches={microbatches}.')


def attention_choice(config: Any, platform: str) -> AttentionChoice:
  """What attends to the inputs of a run.

  Args:
    config: the run's.
    platform: of its devices.

  Raises:
    ConfigError: the platform has no kernels, and they are asked for.
  """
  asked, model = config.precision.attention, model_config(config.model)
  check_attention(asked, model, platform)
  return choose_attention(asked, model, config.data.inputs_length, platform)


def offload_note(config: Any, platform: str) -> str:
  """What a run is told of `precision.remat='offload'` where it changes nothing;
  else empty."""
  if config.precision.remat == 'offload' and platform == 'cpu':
    return ("precision.remat='offload': a CPU's memory is the host's, so "
            "inputs of layers stay where they are, as with 'layer'")
  return ''


def check_vocabulary(
    vocabulary: Any, model: LongT5Config, name: str = 'data.vocabulary',
    remedy: str = 'raise that, or lower data.extra_ids.') -> None:
  """Refuses a vocabulary of other special ids, or one that the embedding has
  no rows for.

  Args:
    vocabulary: with `size`, `pad_id` and `eos_id`.
    model: the architecture.
    name: of the vocabulary, for messages.
    remedy: what to do about one that is too large, for messages.
  """
  for theirs, ours in (('pad_id', 'pad_token_id'), ('eos_id', 'eos_token_id')):
    if getattr(vocabulary, theirs) != getattr(model, ours):
      raise ConfigError(
          f'{name} has {theirs}={getattr(vocabulary, theirs)}, which '
          f'must equal model.{ours}={getattr(model, ours)}.')
  if vocabulary.size > model.vocab_size:
    raise ConfigError(
        f'{name} has {vocabulary.size} ids with its sentinels, more '
        f'than model.vocab_size={model.vocab_size}: {remedy}')


def _value(config, name):
  for part in name.split('.'):
    config = config[part]
  return config


def resolved(config: Any) -> dict[str, Any]:
  """The config as nested dicts, `model` with every field that was used."""
  values = json.loads(config.to_json())
  values['model'] = dataclasses.asdict(model_config(config.model)) | {
      'preset': config.model.preset}
  return values


def write_config(workdir: str, values: dict[str, Any], version: str) -> None:
  """Writes `config.json`: what runs, by which code, on what."""
  device = jax.devices()[0]
  record = values | {'run': {
      'version': version,
      'commit': _commit(),
      'jax': jax.__version__,
      'devices': f'{jax.device_count()} x {device.device_kind}',
      'processes': jax.process_count()}}
  os.makedirs(workdir, exist_ok=True)
  replace_file(os.path.join(workdir, 'config.json'),
               json.dumps(record, indent=2) + '\n')


def _commit():
  """The git commit of the code, or None where it is no checkout."""
  here = os.path.dirname(os.path.abspath(__file__))
  try:
    result = subprocess.run(
        ['git', '-C', here, 'rev-parse', 'HEAD'], capture_output=True,
        text=True, check=True)
  except (OSError, subprocess.CalledProcessError):
    return None
  return result.stdout.strip()

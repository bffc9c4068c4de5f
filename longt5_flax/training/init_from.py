"""Parameters that a run starts from: `config.init_from`."""

from collections.abc import Sequence
from typing import Any

from longt5_flax.config import ConfigError, LongT5Config
from longt5_flax.interop.open import KINDS, open_tensors
from longt5_flax.interop.orbax import run_values
from longt5_flax.interop.same_model import check_same_model
from longt5_flax.interop.tensors import load_params

# Kinds that are opened as of the run's model.
_WITHOUT_CONFIG = ('t5x', 't5')


def check_spec(spec: str) -> None:
  """Refuses an init_from that names no known kind of checkpoint.

  Raises:
    ConfigError: saying which there are.
  """
  kind, _, path = spec.partition(':')
  if kind not in KINDS or not path:
    known = ', '.join(f'{kind}:{what}' for kind, what in KINDS.items())
    raise ConfigError(f'init_from={spec!r} must be one of {known}.')


def check_readable(spec: str) -> None:
  """Refuses an init_from that is not there or damaged; no tensor is read.

  Of T5X and T5, which say not of which model they are, nothing is looked at.

  Raises:
    ConfigError: saying what is wrong.
  """
  kind, _, path = spec.partition(':')
  if kind in _WITHOUT_CONFIG:
    return
  try:
    open_tensors(spec)
  except ConfigError as error:
    raise _init_error(spec, path, error) from None


def initial_params(spec: str, config: LongT5Config, wanted: Any,
                   vocabulary: str = '') -> tuple[Any, Sequence[str]]:
  """Reads parameters, each process those that live on its devices.

  Args:
    spec: KIND:PATH.
    config: the run's architecture. A T5X checkpoint, which holds none, is
      taken to be of it.
    wanted: shapes, dtypes and shardings; layers stacked or not.
    vocabulary: the fingerprint of the data's; '' if it is not known.

  Returns:
    The parameters, and lines that say what was read.

  Raises:
    ConfigError: they cannot be read, do not fit the model, would compute
      something else in it, or learned other token ids.
  """
  kind, _, path = spec.partition(':')
  try:
    if kind == 'run':
      _check_same_vocabulary(run_values(path), vocabulary)
    tensors = open_tensors(spec, config if kind in _WITHOUT_CONFIG else None)
    if tensors.config:
      check_same_model(tensors.origin, tensors.config, config)
    params = load_params(tensors, wanted)
  except ConfigError as error:
    raise _init_error(spec, path, error) from None
  return params, tensors.report


def _init_error(spec, path, error):
  message = str(error).removeprefix(f'{path}: ')
  return ConfigError(f'init_from={spec}: {message}')


def _check_same_vocabulary(run, vocabulary):
  learned = run.get('vocabulary') or vocabulary
  if vocabulary not in ('', learned):
    raise ConfigError(
        'the run was trained with another vocabulary, data.vocabulary='
        f'{run["data"]["vocabulary"]} with data.extra_ids='
        f'{run["data"]["extra_ids"]}.')

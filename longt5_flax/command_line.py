"""What commands share: from a config file and overrides to a config, and a
mistake of a command line as one line."""

from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from longt5_flax.config import ConfigError

# What reading a command line raises.
MISTAKES = (flags.Error, KeyError, AttributeError, OSError)
_REFUSED = f'{ConfigError.__module__}.{ConfigError.__qualname__}: '


def one_line(error: Exception) -> str:
  """Says one of MISTAKES as a person would.

  Raises:
    Exception: `error` itself, where a config file, which is a program, went
      wrong.
  """
  text = str(error)
  if _REFUSED in text:  # By a config file, which ml_collections quotes whole.
    text = text.rpartition(_REFUSED)[2]
  elif isinstance(error, OSError):  # The last line says what could not be read.
    text = text.rpartition('\n')[2]
  elif isinstance(error, KeyError | AttributeError):  # From ml_collections.
    if 'Error whilst parsing config file' in text:
      raise error
    key: object = error
    while isinstance(key, Exception):
      key = key.args[0]
    text = f'no key {key}'.replace('\n', '. ')
  return ' '.join(text.split())


def read_config(path: str, overrides: Sequence[str]) -> ConfigDict:
  """The config of a file, locked, as `train.py --config=path` would have it.

  Args:
    path: of the file.
    overrides: arguments `--config.KEY=VALUE`; the last of a key counts.

  Raises:
    ConfigError: the file cannot be read, or an override is wrong.
  """
  argv = ['', f'--config={path}', *overrides]
  return _read(argv, lambda values: config_flags.DEFINE_config_file(
      'config', lock_config=True, flag_values=values, sys_argv=argv))


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
  """A config, locked, with overrides as `read_config` takes them.

  Raises:
    ConfigError: an override is wrong.
  """
  argv = ['', *overrides]
  return _read(argv, lambda values: config_flags.DEFINE_config_dict(
      'config', config, lock_config=True, flag_values=values, sys_argv=argv))


def _read(argv, define):
  values = flags.FlagValues()
  try:
    holder = define(values)
    _, *rest = values(argv)
    if rest:
      raise flags.Error(f'unexpected argument {rest[0]!r}.')
    holder.value.lock()  # Raises what went wrong when the file was read.
    return holder.value
  except MISTAKES as error:
    raise ConfigError(one_line(error)) from None


def recorded_config(base: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
  """The config that a run recorded.

  Args:
    base: with all keys and their defaults, which keys that the run did not
      know yet keep.
    values: of the record, nested; what has no place in a config is left out.
  """
  config = base.copy_and_resolve_references()
  for name, value in values.items():
    if name in config:
      known = config[name]
      if isinstance(known, ConfigDict):
        config[name] = recorded_config(known, value)
      else:
        config[name] = tuple(value) if isinstance(value, list) else value
  return config

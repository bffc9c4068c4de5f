"""The settings of `generate`: of a file, of a call, and resolved."""

import dataclasses
import json
import os
from typing import Any

import numpy as np

from longt5_flax.config import ConfigError, LongT5Config, read_json_object
from longt5_flax.generation.options import GenerationOptions

FILE = 'generation_config.json'
# Settings of methods that are not implemented, with the values that ask for
# nothing; None does so everywhere.
_NOT_IMPLEMENTED: dict[str, Any] = {
    'assistant_model': None, 'bad_words_ids': None,
    'begin_suppress_tokens': None, 'constraints': None,
    'diversity_penalty': 0.0, 'dola_layers': None,
    'encoder_no_repeat_ngram_size': 0,
    'encoder_repetition_penalty': 1.0, 'epsilon_cutoff': 0.0,
    'eta_cutoff': 0.0, 'exponential_decay_length_penalty': None,
    'force_words_ids': None, 'forced_decoder_ids': None,
    'guidance_scale': None, 'logits_processor': None, 'max_time': None,
    'min_p': None, 'num_beam_groups': 1, 'output_attentions': False,
    'output_hidden_states': False, 'output_logits': False,
    'output_scores': False, 'penalty_alpha': None,
    'prefix_allowed_tokens_fn': None, 'remove_invalid_values': False,
    'renormalize_logits': False, 'sequence_bias': None,
    'stop_strings': None, 'stopping_criteria': None, 'suppress_tokens': None,
    'top_h': None, 'typical_p': 1.0, 'watermarking_config': None,
}
# Those that say how, not what.
_WITHOUT_INFLUENCE = ('return_dict_in_generate', 'synced_gpus', 'trace',
                      'use_cache')


@dataclasses.dataclass(slots=True)
class GenerationConfig:
  """What `generate` does where its caller says nothing; None is the default.

  Names, meanings and defaults are those of transformers 4.57; see
  GenerationOptions. `max_new_tokens` and `min_new_tokens` do not count the
  prompt, and win over `max_length` and `min_length`. `not_implemented` holds
  settings of a file that `generate` refuses.
  """
  max_length: int | None = None
  max_new_tokens: int | None = None
  min_length: int | None = None
  min_new_tokens: int | None = None
  num_beams: int | None = None
  do_sample: bool | None = None
  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  length_penalty: float | None = None
  early_stopping: bool | str | None = None
  num_return_sequences: int | None = None
  no_repeat_ngram_size: int | None = None
  repetition_penalty: float | None = None
  eos_token_id: int | list[int] | None = None
  pad_token_id: int | None = None
  decoder_start_token_id: int | None = None
  forced_bos_token_id: int | None = None
  forced_eos_token_id: int | list[int] | None = None
  not_implemented: dict[str, Any] = dataclasses.field(default_factory=dict)

  @classmethod
  def from_dict(cls, values: dict[str, Any]) -> 'GenerationConfig':
    """Reads the settings among `values`; other keys are left alone, as files
    hold many that have nothing to do with generation."""
    return cls(**{name: value for name, value in values.items()
                  if name in SETTINGS and value is not None},
               not_implemented=_asked(values))

  @classmethod
  def from_pretrained(cls, directory: str | os.PathLike) -> 'GenerationConfig':
    """Reads `generation_config.json`, or `config.json` as old folders have it;
    the defaults where there is neither. `directory` may be a file in it.

    Raises:
      ConfigError: the file is no JSON object.
    """
    directory = os.fspath(directory)
    if os.path.isfile(directory):
      directory = os.path.dirname(directory)
    for name in (FILE, 'config.json'):
      path = os.path.join(directory, name)
      if os.path.isfile(path):
        return cls.from_dict(read_json_object(path))
    return cls()

  @classmethod
  def of_checkpoint(cls, kind: str, path: str) -> 'GenerationConfig':
    """Reads the settings beside weights, of which only the kinds 'hf' and
    'orbax' have any.

    Raises:
      ConfigError: see `from_pretrained`.
    """
    return cls.from_pretrained(path) if kind in ('hf', 'orbax') else cls()

  def save_pretrained(self, directory: str | os.PathLike) -> None:
    """Adds the settings to `generation_config.json`."""
    path = os.path.join(directory, FILE)
    values = read_json_object(path) if os.path.isfile(path) else {}
    with open(f'{path}.incomplete', 'w', encoding='utf-8') as file:
      json.dump(values | self.to_dict(), file, indent=2, sort_keys=True)
      file.write('\n')
    os.replace(f'{path}.incomplete', path)

  def to_dict(self) -> dict[str, Any]:
    """The settings that are not None, under the names in files."""
    settings = {name: getattr(self, name) for name in SETTINGS
                if getattr(self, name) is not None}
    return settings | self.not_implemented


SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationConfig)
                 if field.name != 'not_implemented')


def check_names(settings: dict[str, Any]) -> None:
  """Raises TypeError if one of the settings that a caller names is unknown."""
  for name in settings:
    if name not in (*SETTINGS, *_NOT_IMPLEMENTED, *_WITHOUT_INFLUENCE):
      raise TypeError(f'generate() has no argument {name!r}.')


def merge_settings(
    config: LongT5Config, defaults: GenerationConfig, given: dict[str, Any],
) -> dict[str, Any]:
  """What is set for one call: settings by their names in GenerationConfig.

  Args:
    config: of the model; its ids are used where none are set.
    defaults: used where `given` has nothing, or None.
    given: keywords of the call.

  Raises:
    TypeError: a keyword is unknown.
    ConfigError: a method is asked for that is not implemented.
  """
  check_names(given)
  values = {name: getattr(config, name) for name in (
      'eos_token_id', 'pad_token_id', 'decoder_start_token_id')}
  values |= defaults.to_dict()
  values |= {name: value for name, value in given.items() if value is not None}
  for name, value in _asked(values).items():
    shown = ' '.join(repr(value).split())  # Arrays take several lines.
    raise ConfigError(f'generate: {name}={shown} is not implemented.')
  return {name: values[name] for name in SETTINGS if name in values}


def resolve_options(settings: dict[str, Any], is_length_given: bool,
                    prompt_length: int) -> GenerationOptions:
  """The options that settings come to.

  Args:
    settings: from `merge_settings`.
    is_length_given: whether the caller named `max_length`.
    prompt_length: tokens that decoding starts from.

  Raises:
    ConfigError: several ids are to be forced at the end.
    GenerationError: a value breaks its rule.
  """
  for name, least in (('max_new_tokens', 1), ('min_new_tokens', 0)):
    value = settings.get(name, least)
    if not isinstance(value, int | np.integer) or value < least:
      raise ConfigError(f'generate: {name}={value!r} must be an integer, at '
                        f'least {least}.')
  values = dict(settings)
  default = GenerationOptions.max_length
  max_new = values.pop('max_new_tokens', None)
  if max_new is None and not is_length_given and values.get(
      'max_length', default) == default:
    max_new = default  # 20 by default are 20 new tokens.
  if max_new is not None:
    values['max_length'] = max_new + prompt_length
  min_new = values.pop('min_new_tokens', None)
  if min_new is not None:
    values['min_length'] = min_new + prompt_length
  values['eos_token_ids'] = _tuple(values.pop('eos_token_id'))
  if 'forced_eos_token_id' in values:
    forced = _tuple(values['forced_eos_token_id'])
    if len(forced) != 1:
      raise ConfigError(
          f'generate: forced_eos_token_id={list(forced)} must be one id.')
    values['forced_eos_token_id'] = forced[0]
  return GenerationOptions(**values)


def _asked(values):
  """What asks for a method that is not implemented."""
  return {name: value for name, value in values.items()
          if name in _NOT_IMPLEMENTED and value is not None
          and not _asks_for_nothing(value, _NOT_IMPLEMENTED[name])}


def _asks_for_nothing(value, default):
  # Not by ==, as it may be an array; no processors at all are none.
  return (not len(value) if hasattr(value, '__len__') else value == default)


def _tuple(ids):
  return tuple(np.ravel(ids).tolist()) if np.ndim(ids) else (ids,)

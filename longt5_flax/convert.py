"""Converts weights between formats.

  python -m longt5_flax.convert --from hf:DIR --to orbax:DIR
  python -m longt5_flax.convert --from t5x:gs://BUCKET/checkpoint_1000000 \
    --architecture tglobal-base --to hf:DIR --dtype bfloat16

docs/weights.md has every source and target. The target is there whole or not at
all, and is never overwritten.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TimeRemainingColumn,
)

from longt5_flax.api import GenerationConfig
from longt5_flax.config import PRESETS, ConfigError, LongT5Config
from longt5_flax.data.sources import DataError
from longt5_flax.data.tokenizer import Tokenizer
from longt5_flax.interop.atomic import check_free, written_whole
from longt5_flax.interop.open import KINDS, open_tensors, split_spec
from longt5_flax.interop.orbax import run_values
from longt5_flax.interop.tensors import (
    Index,
    Tensors,
    WeightsError,
    check_tensors,
)
from longt5_flax.model.longt5 import (
    LongT5EncoderModel,
    LongT5ForConditionalGeneration,
    LongT5Model,
)

_DTYPES = ('float32', 'bfloat16', 'float16')
_TARGETS = 'hf:DIR, orbax:DIR, safetensors:FILE'
# Carried over from folder to folder.
_TOKENIZER = ('spiece.model', 'tokenizer_config.json')


def convert(source: str, target: str, architecture: str | None = None,
            dtype: str | None = None) -> list[str]:
  """Reads a checkpoint and writes another.

  Args:
    source: what to read, KIND:PATH; see `open_tensors`.
    target: what to write: hf:DIR, orbax:DIR or safetensors:FILE.
    architecture: where the source holds none, or in place of its own: the
      folder of a config.json, or the name of a preset.
    dtype: of the numbers written; by default as they are.

  Returns:
    Lines that say what was read and written.

  Raises:
    ConfigError: the source cannot be read or is no whole LongT5, or the target
      cannot be written; nothing has been.
  """
  kind, path = _split_target(target)
  check_free(path)
  tensors = open_tensors(source, _config(architecture))
  check_tensors(tensors, _wanted(tensors))
  report = list(tensors.report)
  console = Console(stderr=True)
  with Progress('{task.description}', BarColumn(), DownloadColumn(),
                TimeRemainingColumn(), console=console) as progress:
    view = _View(tensors, dtype)
    task = progress.add_task('Converting', total=view.num_bytes)
    view.on_read = lambda size: progress.advance(task, size)
    with written_whole(path) as place:
      report += _WRITERS[kind](place, view)
      report += _carry_files(*split_spec(source), place, tensors.config)
    progress.update(task, completed=view.num_bytes)
  return [*report, f'{target}: written.']


def _split_target(target):
  kind, colon, path = target.partition(':')
  if not colon or not path or kind not in _WRITERS:
    raise WeightsError(f'--to {target!r} must be one of {_TARGETS}.')
  return kind, path


def _config(name):
  if name is None:
    return None
  if os.path.isdir(name):
    return LongT5Config.from_pretrained(name)
  if name in PRESETS:
    return LongT5Config.preset(name)
  raise ConfigError(
      f'--architecture {name!r} must be the folder of a config.json, or one of '
      f'{", ".join(PRESETS)}.')


def _wanted(tensors: Tensors) -> Any:
  """The shapes that a model of the checkpoint's config has."""
  if tensors.config is None:
    raise WeightsError(f'{tensors.origin}: holds no config; name it with '
                       '--architecture.')
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  inputs: tuple[Any, ...] = (ids, ids)
  model: Any = LongT5ForConditionalGeneration
  if not any(name.startswith('decoder/') for name in tensors.shapes):
    inputs, model = (ids,), LongT5EncoderModel
  elif (tensors.architecture == 'LongT5Model'
        and 'decoder/logits_dense/kernel' not in tensors.shapes):
    model = LongT5Model
  module = model(tensors.config)
  return jax.eval_shape(lambda *ids: module.init(jax.random.key(0), *ids),
                        *inputs)['params']


class _View(Tensors):
  """A checkpoint in another dtype, that says how much was read.

  Attributes:
    num_bytes: of all tensors.
    on_read: called with the bytes of each tensor read.
  """

  def __init__(self, tensors: Tensors, dtype: str | None):
    self._tensors = tensors
    self.origin, self.config = tensors.origin, tensors.config
    self.architecture, self.shapes = tensors.architecture, tensors.shapes
    self.report = tensors.report
    self.dtypes = {name: np.dtype(jnp.dtype(dtype) if dtype else stored)
                   for name, stored in tensors.dtypes.items()}
    self.num_bytes = sum(self._size(name) for name in self.shapes)
    self.on_read: Callable[[int], None] = lambda size: None

  def _size(self, name):
    return int(np.prod(self.shapes[name])) * self.dtypes[name].itemsize

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `Tensors.read`.

    Raises:
      WeightsError: a number is too large for the dtype.
    """
    array = self._tensors.read(name, index)
    with np.errstate(over='ignore'):
      cast = array.astype(self.dtypes[name], copy=False)
    if cast.dtype == np.float16 and np.isinf(cast).any():
      raise WeightsError(f'{self.origin}: tensor {name} has numbers too large '
                         'for float16.')
    self.on_read(self._size(name))
    return cast


def _carry_files(kind, source, place, config):
  """Copies what is beside weights, and not in them, from folder to folder."""
  if not os.path.isdir(source) or not os.path.isdir(place):
    return []
  report = _write_vocabulary(source, place) if kind == 'run' else []
  for name in _TOKENIZER:
    if os.path.isfile(os.path.join(source, name)):
      shutil.copy(os.path.join(source, name), place)
      report.append(f'{name}: copied.')
  settings = GenerationConfig.of_checkpoint(kind, source).to_dict()
  own = {name: value for name, value in settings.items()
         if value != getattr(config, name, None)}
  if own:
    GenerationConfig.from_dict(own).save_pretrained(place)
    report.append('Settings of generation copied: ' + ', '.join(
        f'{name}={value!r}' for name, value in own.items()) + '.')
  return report


def _write_vocabulary(workdir, place):
  """Writes what a run was trained with beside its weights, where it is known
  and still there."""
  values = run_values(workdir)
  path = values['data']['vocabulary']
  if not path:
    return []  # A seqio task's own.
  try:
    tokenizer = Tokenizer(path, values['data']['extra_ids'])
  except DataError as error:
    return [f'The vocabulary is not copied: {error}.']
  fingerprint = tokenizer.vocabulary.fingerprint
  if fingerprint != (values.get('vocabulary') or fingerprint):
    return [f'The vocabulary is not copied: {path} is not the one that the run '
            'was trained with.']
  tokenizer.save_pretrained(place)
  return [f'{path}: copied as spiece.model.']


def _write_huggingface(place, view):
  from longt5_flax.interop.huggingface import save_pretrained
  return save_pretrained(place, view.config, view)


def _write_orbax(place, view):
  from longt5_flax.interop.orbax import save_orbax
  save_orbax(place, view, view.config)
  return []


def _write_safetensors(place, view):
  from longt5_flax.interop.single_file import save_single_file
  save_single_file(place, view.config, view)
  return []


_WRITERS = {'hf': _write_huggingface, 'orbax': _write_orbax,
            'safetensors': _write_safetensors}


def make_parser() -> argparse.ArgumentParser:
  """Of the command line."""
  parser = argparse.ArgumentParser(
      prog='python -m longt5_flax.convert', allow_abbrev=False,
      description='Converts weights between formats.')
  known = ', '.join(f'{kind}:{what}' for kind, what in KINDS.items())
  parser.add_argument('--from', dest='source', required=True,
                      metavar='KIND:PATH', help=f'one of {known}')
  parser.add_argument('--to', dest='target', required=True, metavar='KIND:PATH',
                      help=f'one of {_TARGETS}')
  parser.add_argument('--architecture', metavar='DIR_OR_PRESET',
                      help='where the source holds none')
  parser.add_argument('--dtype', choices=_DTYPES,
                      help='of the numbers written; by default as they are')
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; a user's mistake is one line and exit code 2."""
  options = make_parser().parse_args(argv)
  try:
    report = convert(options.source, options.target, options.architecture,
                     options.dtype)
  except ConfigError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  print('\n'.join(report))
  return 0


if __name__ == '__main__':
  jax.config.update('jax_platforms', 'cpu')  # Files to files.
  sys.exit(main())

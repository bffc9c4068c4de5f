"""Parameters out of Hugging Face's LongT5 folders.

A folder holds config.json and model.safetensors, flax_model.msgpack or
pytorch_model.bin, or an index of several such files.
"""

import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from longt5_flax.config import ConfigError, LongT5Config, read_json_object
from longt5_flax.interop import huggingface_names as names
from longt5_flax.interop.array_files import (
    ArrayFile,
    open_array_file,
    row_chunks,
)
from longt5_flax.interop.huggingface_folder import save_pretrained
from longt5_flax.interop.tensors import Index, Tensors, WeightsError

__all__ = ['open_huggingface', 'save_pretrained']

_ARCHITECTURES = (
    'LongT5ForConditionalGeneration', 'LongT5Model', 'LongT5EncoderModel')
# In order of preference.
_WEIGHTS = tuple(
    name + end for name in (
        'model.safetensors', 'flax_model.msgpack', 'pytorch_model.bin')
    for end in ('', '.index.json'))
_T5 = ('t5', 'mt5')


def open_huggingface(path: str, config: LongT5Config | None = None,
                     model_types: Sequence[str] = ('longt5',)) -> Tensors:
  """Opens a folder, or one of its files of weights.

  Args:
    path: of the folder or file.
    config: the architecture; by default that of the config.json in the folder.
    model_types: the values of `model_type` in config.json that are taken. With
      't5' a T5's encoder is that of `encoder_attention_type='full'`.

  Returns:
    Tensors whose config says what the files say: whether the head is tied,
    and how many rows the vocabulary has.

  Raises:
    WeightsError: no weights are there, or a file is damaged.
    ConfigError: config.json is missing, or another model's.
  """
  folder, weights, ignored = _locate(path)
  values = {} if config else _config_values(folder, model_types)
  config = config or LongT5Config.from_dict(values)
  architectures = values.get('architectures')
  return _HuggingFaceTensors(
      open_array_file(weights), config,
      architectures if isinstance(architectures, list) else [],
      [f'{file}: ignored, for {os.path.basename(weights)} is there.'
       for file in ignored])


def _locate(path):
  """(folder, file of weights, others that are there too)."""
  if not os.path.exists(path):
    raise WeightsError(f'{path}: there is no such folder or file on disk; '
                       'nothing is downloaded.')
  if not os.path.isdir(path):
    return os.path.dirname(path), path, []
  found = [name for name in _WEIGHTS if os.path.exists(os.path.join(path, name))
           ]
  if not found:
    if os.path.isdir(os.path.join(path, 'checkpoints')):
      raise WeightsError(f'{path}: is the folder of a run: say run:{path}.')
    raise WeightsError(f'{path}: holds none of {", ".join(_WEIGHTS)}.')
  return path, os.path.join(path, found[0]), found[1:]


def _config_values(folder, model_types):
  path = os.path.join(folder, 'config.json')
  values = read_json_object(path)
  kind = values.get('model_type', 'longt5')
  if kind not in model_types:
    hint = (f'; t5:{folder} starts a LongT5 from it' if kind in _T5 else '')
    raise ConfigError(
        f'{path}: model_type={kind!r} must be one of {tuple(model_types)}'
        f'{hint}.')
  return values | ({'encoder_attention_type': 'full'} if kind in _T5 else {})


class _HuggingFaceTensors(Tensors):
  """See `open_huggingface`."""

  def __init__(self, file: ArrayFile, config: LongT5Config,
               architectures: Sequence[str], report: Sequence[str]):
    self.origin, self._file = file.path, file
    self.architecture = next(
        (name for name in architectures if name in _ARCHITECTURES), None)
    self._report = list(report)
    self.report = self._report
    size = sum(entry.num_bytes for entry in file.entries.values())
    self._report.insert(0, f'{file.path}: {len(file.entries)} tensors, '
                           f'{size / 1e9:.3g} GB.')
    # PyTorch's name of every tensor that is used, to the file's own name.
    self._stored = {names.from_flax_name(name) if '/' in name else name: name
                    for name in file.entries}
    for name in names.UNUSED:
      if self._stored.pop(name, None):
        self._report.append(f'{name}: ignored, nothing uses it.')
    self.config = self._resolve_vocabulary(self._resolve_head(
        config, self._resolve_embedding(config)))
    self._set_names()

  def _resolve_embedding(self, config):
    """Leaves one embedding; whether there is one."""
    stored = self._stored
    # A tied head may be the only copy that was kept.
    candidates = (names.EMBEDDING, *names.EMBEDDING_COPIES,
                  *((names.HEAD,) if config.tie_word_embeddings else ()))
    found = [name for name in candidates if name in stored]
    if not found:
      return False
    shape = self._file.entries[stored[found[0]]].shape
    if len(shape) != 2:
      raise WeightsError(f'{self.origin}: {found[0]} has shape {shape}, not '
                         '(vocab_size, d_model).')
    if found[0] != names.EMBEDDING:
      stored[names.EMBEDDING] = stored.pop(found[0])
      self._report.append(
          f'{names.EMBEDDING}: absent, {found[0]} read in its place.')
    for name in found[1:]:
      if name == names.HEAD:
        continue
      if not self._equals_embedding(name):
        raise WeightsError(
            f'{self.origin}: {name} differs from {found[0]}; a LongT5 has one '
            'embedding.')
      del stored[name]
      self._report.append(f'{name}: ignored, equal to {found[0]}.')
    return True

  def _resolve_head(self, config, has_embedding):
    """The head is untied if and only if one is stored that differs from the
    embedding; whether the output is scaled is for config.json to say."""
    if names.HEAD not in self._stored:
      if names.DECODER_NORM in self._stored:
        self._report.append(
            f'{names.HEAD}: absent, ' + (
                'the head is tied.' if config.tie_word_embeddings else
                'and the config has tie_word_embeddings=False: no head.'))
      return config
    tied = has_embedding and self._equals_embedding(names.HEAD)
    if tied:
      del self._stored[names.HEAD]
    self._report.append(
        f'{names.HEAD}: {"equals" if tied else "differs from"} '
        f'{names.EMBEDDING}, the head is {"tied" if tied else "untied"} '
        f'(config: tie_word_embeddings={config.tie_word_embeddings}, '
        f'scale_decoder_outputs={config.scale_decoder_outputs}).')
    # The scale stays what it was with the config's own tie.
    return dataclasses.replace(config, tie_word_embeddings=tied)

  def _resolve_vocabulary(self, config):
    stored = self._stored.get(names.EMBEDDING)
    rows = self._rows_shape(stored)[0] if stored else config.vocab_size
    if rows == config.vocab_size:
      return config
    self._report.append(f'vocab_size: {rows}, the rows of {names.EMBEDDING}, '
                       f'not {config.vocab_size} of the config.')
    return dataclasses.replace(config, vocab_size=rows)

  def _equals_embedding(self, name):
    first, second = self._stored[names.EMBEDDING], self._stored[name]
    shape = self._rows_shape(first)
    if self._rows_shape(second) != shape:
      return False
    return all(np.array_equal(self._rows(first, part), self._rows(second, part))
               for part in row_chunks(shape, 4))

  def _rows_shape(self, stored):
    shape = self._file.entries[stored].shape
    return shape[::-1] if stored.endswith('/kernel') else shape

  def _rows(self, stored, part):
    """Rows of a matrix as PyTorch has it."""
    if stored.endswith('/kernel'):
      return self._file.read(stored, (slice(None), part)).T
    return self._file.read(stored, (part, slice(None)))

  def _set_names(self):
    assert self.config is not None
    self._names = names.huggingface_names(self.config)
    ours = {theirs: name for name, theirs in self._names.items()}
    # What has no name of ours keeps its own, for the error that will name it.
    self._places = {ours.get(theirs, theirs): stored
                    for theirs, stored in self._stored.items()}
    entries = self._file.entries
    self.shapes = {
        name: (entries[stored].shape[::-1]
               if names.is_transposed(name, stored) else entries[stored].shape)
        for name, stored in self._places.items()}
    self.dtypes = {name: entries[stored].dtype
                   for name, stored in self._places.items()}
    transposed = sum(names.is_transposed(*item)
                     for item in self._places.items())
    self._report.append(f'{len(self._places)} tensors by T5X\'s names, '
                       f'{transposed} of them transposed.')

  def read(self, name: str, index: Index | None = None) -> np.ndarray:
    """See `Tensors.read`."""
    stored = self._places[name]
    if names.is_transposed(name, stored):
      return np.ascontiguousarray(
          self._file.read(stored, index[::-1] if index else None).T)
    return self._file.read(stored, index)

  def stored_name(self, name: str) -> str:
    """See `Tensors.stored_name`."""
    return self._places.get(name) or self._names.get(name, name)

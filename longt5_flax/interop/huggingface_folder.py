"""Parameters into a folder that transformers 4.57 and 5 read alike."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from longt5_flax.config import LongT5Config
from longt5_flax.interop import huggingface_names as names
from longt5_flax.interop.array_files import Entry, write_safetensors
from longt5_flax.interop.atomic import written_whole
from longt5_flax.interop.tensors import ParamTensors, Tensors, WeightsError

_WEIGHTS, _INDEX = 'model.safetensors', 'model.safetensors.index.json'


def save_pretrained(directory: str, config: LongT5Config, params: Any,
                    dtype: DTypeLike | None = None,
                    max_shard_bytes: int = 5_000_000_000) -> list[str]:
  """Writes config.json, generation_config.json and model.safetensors.

  A new folder is there whole or not at all. Of one that is there already,
  files of the same names are replaced, each when it is whole, and others left.

  Args:
    directory: the folder.
    config: the architecture.
    params: nested dicts of arrays, layers stacked or not, or `Tensors`.
    dtype: of the stored numbers; by default that of each array.
    max_shard_bytes: above it, several files and an index are written.

  Returns:
    Lines that say what was written, and what differs from `params` where
    transformers 4.57 cannot express the model otherwise.

  Raises:
    WeightsError: the folder cannot be written, the encoder's attention is not
      Hugging Face's, or `params` lacks a tensor.
  """
  tensors = (params if isinstance(params, Tensors)
             else ParamTensors(params, config))
  plan = _Plan(tensors, config, dtype)
  if not (os.path.isdir(directory) and os.listdir(directory)):
    with written_whole(directory) as place:
      os.mkdir(place)
      plan.write(place, max_shard_bytes)
    return plan.report
  try:
    with tempfile.TemporaryDirectory(
        prefix='.incomplete.', dir=directory) as place:
      plan.write(place, max_shard_bytes)
      _move_files(place, directory)
  except OSError as error:
    raise WeightsError(
        f'{directory}: cannot be written ({error.strerror}).') from None
  return plan.report


def _move_files(place, directory):
  """The index and config last, so that they never name a file that is not
  there."""
  new = sorted(os.listdir(place), key=lambda name: name.endswith('.json'))
  stale = [name for name in os.listdir(directory) if name not in new
           and name.startswith('model') and (
               name.endswith('.safetensors') or name == _INDEX)]
  for name in new:
    os.replace(os.path.join(place, name), os.path.join(directory, name))
  for name in stale:
    os.remove(os.path.join(directory, name))


class _Plan:
  """What goes where: PyTorch's name of each tensor, our name, its entry."""

  def __init__(self, tensors: Tensors, config: LongT5Config,
               dtype: DTypeLike | None):
    if config.encoder_attention_type == 'full':
      raise WeightsError("encoder_attention_type='full' must be 'local' or "
                         "'transient-global': Hugging Face's LongT5 has no "
                         'other.')
    self._tensors, self._dtype = tensors, dtype
    self.report: list[str] = []
    self._head_scale = 1.0
    self._ours = self._names(config)
    self._config = self._expressible(config)
    self._entries = {theirs: self._entry(theirs) for theirs in self._ours}

  def _names(self, config):
    """PyTorch's names to ours, of the tensors that there are."""
    table, stored = names.huggingface_names(config), self._tensors.shapes
    unknown = sorted(stored.keys() - table.keys())
    if unknown:
      raise WeightsError(f'{self._tensors.origin}: tensor {unknown[0]} has no '
                         'place in a LongT5 of this config.')
    has_decoder = any(name.startswith('decoder/') for name in stored)
    for name in table:
      wanted = (name != names.OUR_HEAD
                and (has_decoder or not name.startswith('decoder/')))
      if wanted and name not in stored:
        raise WeightsError(f'{self._tensors.origin}: tensor {name} is missing.')
    self._architecture = (
        'LongT5EncoderModel' if not has_decoder else
        'LongT5ForConditionalGeneration' if names.OUR_HEAD in stored
        or config.tie_word_embeddings else 'LongT5Model')
    return {theirs: name for name, theirs in table.items() if name in stored}

  def _expressible(self, config):
    """transformers 4.57 scales the decoder's output if and only if the head
    is tied, so the other two models are written as their equals."""
    tied, scaled = config.tie_word_embeddings, config.scale_decoder_outputs
    if self._architecture != 'LongT5ForConditionalGeneration' or tied == scaled:
      return config
    if tied:
      self._ours[names.HEAD] = names.OUR_EMBEDDING
      self.report.append(f'{names.HEAD}: a copy of {names.EMBEDDING}, so that '
                         'the output is not scaled.')
    else:
      self._head_scale = config.d_model ** -0.5
      self.report.append(f'{names.HEAD}: multiplied by d_model**-0.5, in place '
                         'of scale_decoder_outputs=True.')
    return dataclasses.replace(
        config, tie_word_embeddings=False, scale_decoder_outputs=False)

  def _entry(self, theirs):
    name = self._ours[theirs]
    shape = self._tensors.shapes[name]
    dtype = np.dtype(self._dtype or self._tensors.dtypes[name])
    return Entry(tuple(shape[::-1] if names.is_transposed(name, theirs)
                       else shape), dtype)

  def _array(self, theirs):
    name = self._ours[theirs]
    array = self._tensors.read(name)
    if theirs == names.HEAD and self._head_scale != 1:
      array = array.astype(np.float32) * np.float32(self._head_scale)
    array = array.T if names.is_transposed(name, theirs) else array
    return array.astype(self._entries[theirs].dtype, copy=False)

  def write(self, place: str, max_shard_bytes: int) -> None:
    """Writes all files into the folder `place`."""
    shards = list(_shards(self._entries, max_shard_bytes))
    total = sum(entry.num_bytes for entry in self._entries.values())
    files: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
      file = (_WEIGHTS if len(shards) == 1 else
              f'model-{i:05}-of-{len(shards):05}.safetensors')
      # transformers reads no file that does not name its framework.
      write_safetensors(os.path.join(place, file), map(self._array, shard),
                        shard, {'format': 'pt'})
      files |= dict.fromkeys(shard, file)
    if len(shards) > 1:
      _write_json(os.path.join(place, _INDEX), {
          'metadata': {'total_size': total}, 'weight_map': files})
    dtype = self._entries[names.EMBEDDING].dtype
    _write_json(os.path.join(place, 'config.json'), {
        'architectures': [self._architecture], 'dtype': dtype.name,
        **self._config.to_dict(), **self._config.derived()})
    _write_json(os.path.join(place, 'generation_config.json'), {
        name: getattr(self._config, name) for name in (
            'decoder_start_token_id', 'eos_token_id', 'pad_token_id')})
    self.report.append(
        f'{len(self._entries)} tensors, {total / 1e9:.3g} GB, in '
        f'{len(shards)} file{"s" * (len(shards) > 1)}.')


def _shards(entries: dict[str, Entry],
            max_bytes: int) -> Iterator[dict[str, Entry]]:
  shard: dict[str, Entry] = {}
  size = 0
  for name, entry in entries.items():
    if shard and size + entry.num_bytes > max_bytes:
      yield shard
      shard, size = {}, 0
    shard[name] = entry
    size += entry.num_bytes
  yield shard


def _write_json(path, values):
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(values, file, indent=2, sort_keys=True)
    file.write('\n')

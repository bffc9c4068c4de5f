"""T5X checkpoints, the form in which LongT5 and mLongT5 were released.

A checkpoint is a folder with one msgpack file, `checkpoint`: a tree whose
leaves are arrays, or tensorstore specs of zarr arrays beside it. Format and
names: google-research/t5x, checkpoints.py; google/flaxformer, longt5.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.serialization
import numpy as np
import tensorstore as ts

from longt5_flax.config import LongT5Config
from longt5_flax.interop.stores import (
    Place,
    StoredTensors,
    open_folder,
    reason,
)
from longt5_flax.interop.tensors import WeightsError

_SPEC_KEYS = {'driver', 'kvstore', 'metadata'}
# 3 writes bfloat16 as such; 2 differs in nothing else.
_VERSIONS = (2, 3)
# Where scanned layers lie: in flaxformer, and in T5X's own scalable_t5. Both
# stack them along axis 1.
_SCANNED = re.compile(r'(encoder|decoder)/(?:\1|layers)/(.+)')
_SCAN_AXIS = 1
_LAYER_BIAS = re.compile(r'(encoder|decoder)/layers_\d+/'
                         r'((?:side_)?relpos_bias/rel_embedding)')
_ATTENTION = re.compile(r'.*attention/(query|key|value|out)/kernel')


def open_t5x(path: str, config: LongT5Config | None = None) -> StoredTensors:
  """The parameters of a T5X checkpoint; optimizer state is left alone.

  Args:
    path: the folder of one step, or a local folder of such folders, of which
      the newest is taken; a local path, or a URL that tensorstore reads.
    config: the architecture. T5X keeps none beside the weights: without it,
      what shapes tell is taken from them and the rest from the published
      models, and the report says which.

  Raises:
    WeightsError: there is no checkpoint, or it cannot be read.
  """
  report: list[str] = []
  path = _step_folder(path, report)
  folder = open_folder(path)
  target = _read_index(path, folder)
  places: dict[str, Place] = {}
  for name, leaf in _leaves(target):
    places |= _unstack(name, _place(path, folder, name, leaf))
  _join_biases(path, places)
  if any(place.axis is not None for place in places.values()):
    report.append(f'layers: stacked along axis {_SCAN_AXIS} there.')
  report.append('optimizer state: not read.')
  if config is None:
    config = _derive_config(path, places, report)
  shapes = {name: _matrix_shape(name, place.layer_shape)
            for name, place in places.items()}
  return StoredTensors(path, config, places, shapes, report)


def _step_folder(path, report):
  """The folder of a step; of several below a local folder, the newest."""
  if '://' in path or os.path.isfile(os.path.join(path, 'checkpoint')):
    return path
  if not os.path.isdir(path):
    raise WeightsError(f'{path}: no such folder.')
  steps = [int(match[1]) for match in (
      re.fullmatch(r'checkpoint_(\d+)', name) for name in os.listdir(path))
           if match]
  if not steps:
    raise WeightsError(f'{path}: no T5X checkpoint: it holds neither a file '
                       'checkpoint nor a folder checkpoint_STEP.')
  newest = os.path.join(path, f'checkpoint_{max(steps)}')
  report.append(f'{newest}, the newest of {len(steps)}.')
  return newest


def _read_index(path, folder):
  """The tree of parameters: arrays and specs."""
  file = f'{path.rstrip("/")}/checkpoint'
  try:
    found = folder.read('checkpoint').result()
  except ValueError as error:
    raise WeightsError(f'{file}: {reason(error)}.') from None
  if found.state == 'missing':
    raise WeightsError(f'{path}: no T5X checkpoint: it has no file checkpoint.')
  try:
    index = flax.serialization.msgpack_restore(found.value)
  # Whatever bytes are there, msgpack and NumPy have their own errors.
  except Exception as error:
    raise WeightsError(f'{file}: cut short, or no msgpack file '
                       f'({type(error).__name__}).') from None
  version = index.get('version') if isinstance(index, dict) else None
  if version not in _VERSIONS:
    raise WeightsError(f'{file}: version={version!r} must be one of '
                       f'{_VERSIONS}.')
  try:
    return index['optimizer']['target']
  except (KeyError, TypeError):
    raise WeightsError(f'{file}: it holds no optimizer/target.') from None


def _leaves(tree: dict[str, Any], prefix: str = '') -> Iterator[
    tuple[str, Any]]:
  """(path, leaf); a spec is a dict too, and known by its keys."""
  for name, node in tree.items():
    if isinstance(node, dict) and not node.keys() >= _SPEC_KEYS:
      yield from _leaves(node, f'{prefix}{name}/')
    else:
      yield prefix + name, node


def _place(path: str, folder: ts.KvStore, name: str, leaf: Any) -> Place:
  if isinstance(leaf, np.ndarray):
    return Place(name, leaf, leaf.shape)
  if not isinstance(leaf, dict):
    raise WeightsError(f'{path}: {name} is of type {type(leaf).__name__}, '
                       'neither an array nor a tensorstore spec.')
  # Older versions of tensorstore wrote the path outside of the kvstore. It is
  # relative; where the checkpoint was when it was written does not matter.
  relative = leaf['kvstore'].get('path', leaf.get('path'))
  if leaf['driver'] != 'zarr' or not relative:
    raise WeightsError(f'{path}: {name} has a spec of driver='
                       f'{leaf["driver"]!r}, path={relative!r}; a zarr array '
                       'is needed.')
  array = folder / (os.path.basename(relative.rstrip('/')) + '/')
  spec = {'driver': 'zarr', 'kvstore': array.spec().to_json()}
  if 'dtype' in leaf:
    spec['dtype'] = leaf['dtype']
  return Place(name, spec, tuple(leaf['metadata']['shape']))


def _unstack(name: str, place: Place) -> dict[str, Place]:
  """The places of every layer, if `place` holds several."""
  name = name.replace('/relative_posemb/', '/relpos_bias/')
  scanned = _SCANNED.fullmatch(name)
  if not scanned:
    return {name: place}
  place = place._replace(axis=_SCAN_AXIS)
  return {f'{scanned[1]}/layers_{layer}/{scanned[2]}':
          place._replace(layer=layer)
          for layer in range(place.shape[_SCAN_AXIS])}


def _join_biases(path: str, places: dict[str, Place]) -> None:
  """Makes one table of those that a scan gives to every layer."""
  tables: dict[str, list[str]] = {}
  for name in places:
    if match := _LAYER_BIAS.fullmatch(name):
      tables.setdefault(f'{match[1]}/{match[2]}', []).append(name)
  for name, layers in tables.items():
    stored = StoredTensors(path, None, {x: places.pop(x) for x in layers})
    first = stored.read(layers[0])
    for layer in layers[1:]:
      if not np.array_equal(stored.read(layer), first):
        raise WeightsError(
            f'{path}: {layer} differs from {layers[0]}: LongT5 has one table '
            f'for all layers ({name}).')
    places[name] = Place(name, first, first.shape)


def _matrix_shape(name, shape):
  """[in, out] of a kernel that may keep heads apart: [in, heads, d_kv], or
  [heads, d_kv, out]."""
  match = _ATTENTION.fullmatch(name)
  if not match or len(shape) != 3:
    return shape
  first, second, third = shape
  if match[1] == 'out':
    return first * second, third
  return first, second * third


def _derive_config(path: str, places: Mapping[str, Place],
                   report: list[str]) -> LongT5Config:
  """The architecture, as far as shapes tell it."""

  def shape(name):
    if name not in places:
      raise WeightsError(f'{path}: no T5: it holds no {name}.')
    found = _matrix_shape(name, places[name].layer_shape)
    if len(found) != 2:
      raise WeightsError(f'{path}: no T5: {name} has shape {found}.')
    return found

  def layers(stack):
    numbers = [int(match[1]) for match in (
        re.match(rf'{stack}/layers_(\d+)/', name) for name in places) if match]
    return max(numbers, default=-1) + 1

  vocab_size, d_model = shape('token_embedder/embedding')
  num_heads, buckets = shape('encoder/relpos_bias/rel_embedding')
  gated = 'encoder/layers_0/mlp/wi_0/kernel' in places
  d_ff = shape(f'encoder/layers_0/mlp/{"wi_0" if gated else "wi"}/kernel')[1]
  joined = shape('encoder/layers_0/attention/query/kernel')[1]
  has_side = 'encoder/side_relpos_bias/rel_embedding' in places
  config = LongT5Config(
      vocab_size=vocab_size, d_model=d_model, d_kv=joined // num_heads,
      d_ff=d_ff, num_layers=layers('encoder'),
      num_decoder_layers=layers('decoder'), num_heads=num_heads,
      relative_attention_num_buckets=buckets,
      feed_forward_proj='gated-gelu' if gated else 'relu',
      encoder_attention_type='transient-global' if has_side else 'local',
      tie_word_embeddings='decoder/logits_dense/kernel' not in places)
  report.append(
      'config: T5X keeps none; from the shapes '
      + _fields(config, 'num_layers', 'num_decoder_layers', 'd_model', 'd_ff',
                'num_heads', 'd_kv', 'vocab_size', 'feed_forward_proj',
                'tie_word_embeddings', 'encoder_attention_type') + '.')
  report.append(
      'config: shapes do not tell, so as published: '
      + _fields(config, 'local_radius', 'global_block_size',
                'relative_attention_max_distance', 'layer_norm_epsilon',
                'dropout_rate') + '.')
  if not has_side:
    report.append('no side bias: taken for a LongT5 with local attention, from '
                  'which T5.1.1 does not differ in shapes.')
  return config


def _fields(config, *names):
  return ', '.join(f'{name}={getattr(config, name)!r}' for name in names)

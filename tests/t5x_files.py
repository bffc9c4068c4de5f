"""T5X checkpoints of tiny random models, in every layout that T5X has."""

import functools
import re
from pathlib import Path

import flax.serialization
import flax.traverse_util
import numpy as np
import tensorstore as ts

from longt5_flax.interop.tensors import Tensors

SIZES = dict(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2,
             num_heads=4, feed_forward_proj='gated-gelu',
             tie_word_embeddings=False)


@functools.cache
def random_tensors(side: bool = True) -> dict[str, np.ndarray]:
  """name -> array; with `side` those of transient-global attention too."""
  generator = np.random.default_rng(0)

  def normal(*shape):
    return generator.standard_normal(shape).astype(np.float32)

  tensors = {'token_embedder/embedding': normal(96, 32),
             'decoder/logits_dense/kernel': normal(32, 96)}
  for stack, parts in (
      ('encoder', ('attention',)),
      ('decoder', ('self_attention', 'encoder_decoder_attention'))):
    tensors[f'{stack}/{stack}_norm/scale'] = normal(32)
    tensors[f'{stack}/relpos_bias/rel_embedding'] = normal(4, 32)
    for layer in (f'{stack}/layers_0', f'{stack}/layers_1'):
      for part in parts:
        for name in ('query', 'key', 'value', 'out'):
          tensors[f'{layer}/{part}/{name}/kernel'] = normal(32, 32)
        norm = part.removeprefix('encoder_decoder_')
        norm = 'cross_attention' if norm != part else norm
        tensors[f'{layer}/pre_{norm}_layer_norm/scale'] = normal(32)
      tensors[f'{layer}/pre_mlp_layer_norm/scale'] = normal(32)
      tensors[f'{layer}/mlp/wi_0/kernel'] = normal(32, 64)
      tensors[f'{layer}/mlp/wi_1/kernel'] = normal(32, 64)
      tensors[f'{layer}/mlp/wo/kernel'] = normal(64, 32)
  if side:
    tensors['encoder/side_relpos_bias/rel_embedding'] = normal(4, 32)
    for layer in range(2):
      tensors[f'encoder/layers_{layer}/attention/T5LayerNorm_0/scale'] = (
          normal(32))
  return tensors


def write_t5x(folder: Path, arrays: dict[str, np.ndarray],
              inline: int = 2_000, version: int = 3) -> Path:
  """A checkpoint of `arrays`; those of more than `inline` bytes in zarr."""

  def leaf(name, array):
    if array.nbytes <= inline:
      return array
    spec = {
        'driver': 'zarr', 'dtype': array.dtype.name,
        'kvstore': {'driver': 'gfile',
                    'path': f'target.{name.replace("/", ".")}/'},
        'metadata': {'shape': [*array.shape],
                     'chunks': [max(1, n // 2) for n in array.shape],
                     'compressor': {'id': 'gzip', 'level': 1}}}
    ts.open(spec | {'kvstore': {
        'driver': 'file', 'path': f'{folder}/{spec["kvstore"]["path"]}'}},
            create=True).result().write(array).result()
    return spec

  target = flax.traverse_util.unflatten_dict(
      {name: leaf(name, array) for name, array in arrays.items()}, sep='/')
  folder.mkdir(exist_ok=True)
  (folder / 'checkpoint').write_bytes(flax.serialization.msgpack_serialize(
      {'version': version, 'optimizer': {
          'target': target, 'state': {'step': np.array(7)}}}))
  return folder


def scanned(tensors: dict[str, np.ndarray], inside: str | None,
            table: str = 'relpos_bias') -> dict[str, np.ndarray]:
  """As T5X has it when it scans: layers along axis 1, below `inside`; every
  layer with a table of biases."""
  stacked = {}
  for name, array in tensors.items():
    stack, _, rest = name.partition('/')
    name = f'{stack}/{inside or stack}/{rest}'
    if match := re.match(r'layers_(\d)/', rest):
      if match[1] == '0':
        second = tensors[f'{stack}/layers_1/{rest.removeprefix(match[0])}']
        stacked[name.replace(match[0], '')] = np.stack([array, second], 1)
    elif 'relpos_bias' in rest:
      name = name.replace('relpos_bias', table)
      stacked[name] = np.stack([array, array], 1)
    else:
      stacked[f'{stack}/{rest}'] = array
  return stacked


def read_all(tensors: Tensors) -> dict[str, np.ndarray]:
  """Every tensor of a checkpoint."""
  return {name: tensors.read(name) for name in tensors.shapes}


def assert_same(tensors: Tensors, expected: dict[str, np.ndarray]) -> None:
  """A checkpoint reads as `expected`, name by name and bit by bit."""
  assert tensors.shapes == {
      name: array.shape for name, array in expected.items()}
  for name, array in read_all(tensors).items():
    np.testing.assert_array_equal(array, expected[name], err_msg=name)
    assert array.dtype == tensors.dtypes[name] == expected[name].dtype, name

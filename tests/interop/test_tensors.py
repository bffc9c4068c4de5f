"""Parameter trees from tensors: layouts, shardings, and what is read."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import golden
import hf_folder
from longt5_flax.interop.huggingface import open_huggingface
from longt5_flax.interop.layers import stack_layers
from longt5_flax.interop.tensors import (
    ParamTensors,
    Tensors,
    WeightsError,
    load_params,
)

CASE = 'hf_tglobal_untied'


class Watched(Tensors):
  """Notes the largest part that is read at once, and all of them."""

  def __init__(self, tensors):
    self._tensors, self.parts = tensors, []
    self.origin, self.config = tensors.origin, tensors.config
    self.shapes, self.dtypes = tensors.shapes, tensors.dtypes
    self.report = tensors.report

  def read(self, name, index=None):
    part = self._tensors.read(name, index)
    self.parts.append((name, part.nbytes))
    return part


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
  folder = tmp_path_factory.mktemp('folder')
  return open_huggingface(str(hf_folder.write(folder, CASE)))


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_stacked(stored):
  expected = stack_layers(golden.load(CASE).params)
  assert_same(load_params(stored, hf_folder.shapes_of(expected)), expected)


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('spec, parts', [
    (('x', 'y'), 8), (('y', None), 4), ((None, 'x'), 2), ((None, None), 1)])
def test_each_device_reads_its_part(stored, stacked, spec, parts):
  """And once, though several devices may hold the same."""
  mesh = jax.make_mesh((2, 4), ('x', 'y'), axis_types=(AxisType.Auto,) * 2)
  expected = golden.load(CASE).params
  expected = stack_layers(expected) if stacked else expected

  def shape(path, x):
    axes = (None,) * (x.ndim - 2) + spec if path[-1].key == 'kernel' else ()
    return jax.ShapeDtypeStruct(x.shape, np.float32, sharding=NamedSharding(
        mesh, PartitionSpec(*axes)))

  wanted = jax.tree_util.tree_map_with_path(shape, expected)
  watched = Watched(stored)
  params = load_params(watched, wanted)
  assert_same(params, expected)
  jax.tree.map(lambda leaf, want: leaf.sharding == want.sharding or
               pytest.fail(str(leaf.sharding)), params, wanted)
  # 2 layers of 3 attentions.
  read = [size for name, size in watched.parts if 'query/kernel' in name]
  assert set(read) == {32 * 32 * 4 // parts}
  assert len(read) == 6 * parts


def test_one_tensor_at_a_time(stored):
  watched = Watched(stored)
  load_params(watched, hf_folder.shapes_of(golden.load(CASE).params))
  names = [name for name, _ in watched.parts]
  assert sorted(names) == sorted(stored.shapes)
  # What reading takes beside is least felt at the beginning.
  sizes = [size for _, size in watched.parts]
  assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize('stacked', [False, True])
def test_params_as_tensors(stacked):
  params = golden.load(CASE).params
  tree = stack_layers(params) if stacked else params
  tensors = ParamTensors(tree, None)
  flat = golden.flatten(params)
  assert tensors.shapes == {name: x.shape for name, x in flat.items()}
  for name, value in flat.items():
    np.testing.assert_array_equal(tensors.read(name), value)
  name = 'encoder/layers_1/mlp/wo/kernel'
  np.testing.assert_array_equal(
      tensors.read(name, (slice(1, 3), slice(4, 9))), flat[name][1:3, 4:9])


def test_missing_layers_of_a_stack(stored):
  wanted = hf_folder.shapes_of(stack_layers(golden.load(CASE).params))
  name = 'encoder/layers_1/mlp/wo/kernel'
  watched = Watched(stored)
  watched.shapes = {key: shape for key, shape in stored.shapes.items()
                    if key != name}
  with pytest.raises(WeightsError) as caught:
    load_params(watched, wanted, allow_missing=[name])
  assert str(caught.value) == (
      f'{stored.origin}: tensor {name} is missing, but not those of all layers.'
  )
  watched.shapes = {key: shape for key, shape in stored.shapes.items()
                    if 'encoder' not in key or '/mlp/wo/' not in key}
  params = load_params(watched, wanted, ['encoder/layers_*/mlp/wo/kernel'])
  assert params['encoder']['layers']['mlp']['wo']['kernel'] == wanted[
      'encoder']['layers']['mlp']['wo']['kernel']

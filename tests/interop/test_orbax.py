"""Orbax: folders of parameters, and the checkpoints of a run."""

import json
import re
import weakref
from types import SimpleNamespace

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from longt5_flax import LongT5Config
from longt5_flax.config import ConfigError
from longt5_flax.interop.layers import stack_layers
from longt5_flax.interop.orbax import open_orbax, open_run, save_orbax
from longt5_flax.interop.tensors import Tensors, WeightsError, load_params
from longt5_flax.training.checkpoints import Checkpoints
from longt5_flax.training.train_step import TrainState
from t5x_files import SIZES, assert_same, random_tensors, read_all

CONFIG = LongT5Config(encoder_attention_type='transient-global',
                      global_block_size=4, **SIZES)
KERNEL = 'encoder/layers_1/mlp/wi_0/kernel'


def random_params(stacked=False):
  params = flax.traverse_util.unflatten_dict(random_tensors(), sep='/')
  return stack_layers(params) if stacked else params


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('orbax') / 'parameters'
  save_orbax(str(folder), random_params(), CONFIG)
  return folder


@pytest.mark.parametrize('stacked', [False, True])
def test_round_trip(stacked, folder, tmp_path):
  if stacked:
    folder = tmp_path / 'parameters'
    save_orbax(str(folder), random_params(stacked), CONFIG)
  tensors = open_orbax(str(folder))
  assert_same(tensors, random_tensors())
  assert tensors.config == CONFIG
  assert tensors.origin == str(folder)


def test_bfloat16_and_architecture(tmp_path):
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params())
  save_orbax(str(tmp_path / 'a'), params, CONFIG)
  tensors = open_orbax(str(tmp_path / 'a'))
  assert_same(tensors, flax.traverse_util.flatten_dict(params, sep='/'))
  assert tensors.architecture is None
  tensors.architecture = 'LongT5EncoderModel'
  save_orbax(str(tmp_path / 'b'), tensors, CONFIG)
  assert open_orbax(str(tmp_path / 'b')).architecture == 'LongT5EncoderModel'


def test_orbax_alone_restores_it_in_parts(folder):
  """By its own names, onto a mesh."""
  mesh = jax.make_mesh((4,), ('x',), devices=jax.devices()[:4],
                       axis_types=(jax.sharding.AxisType.Auto,))

  def wanted(leaf):
    spec = jax.P('x') if leaf.ndim == 2 else jax.P()
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                sharding=jax.NamedSharding(mesh, spec))

  params = random_params()
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(
        folder / 'params', jax.tree.map(wanted, params))
  jax.tree.map(np.testing.assert_array_equal, restored, params)
  kernel = restored['encoder']['layers_1']['mlp']['wi_0']['kernel']
  assert kernel.addressable_shards[0].data.shape == (8, 64)


@pytest.mark.parametrize('stored', [False, True])
@pytest.mark.parametrize('wanted', [False, True])
def test_layers_stacked_or_not(stored, wanted, tmp_path):
  save_run(tmp_path, stored)
  expected = random_params(wanted)
  shapes = jax.eval_shape(lambda: expected)
  params = load_params(open_run(str(tmp_path)), shapes)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


class Watched(Tensors):
  """Counts how many of the arrays that it gave are still in use."""

  def __init__(self, fail_at=''):
    self.origin, self.config, self.report = 'watched', CONFIG, []
    self.shapes = {f'layer/{i}': (64, 64) for i in range(40)}
    self.dtypes = dict.fromkeys(self.shapes, np.dtype(np.float32))
    self.alive, self.most, self._fail_at = 0, 0, fail_at

  def read(self, name, index=None):
    if name == self._fail_at:
      raise WeightsError(f'watched: cannot read {name}.')
    array = np.full((64, 64), int(name.split('/')[1]), np.float32)
    self.alive += 1
    self.most = max(self.most, self.alive)
    weakref.finalize(array, self._gone)
    return array

  def _gone(self):
    self.alive -= 1


def test_tensors_are_written_one_at_a_time(tmp_path):
  watched = Watched()
  save_orbax(str(tmp_path / 'a'), watched, CONFIG)
  assert watched.most <= 2
  tensors = open_orbax(str(tmp_path / 'a'))
  for i in range(40):
    assert np.all(tensors.read(f'layer/{i}') == i)


def test_nothing_is_left_of_what_failed(tmp_path):
  with pytest.raises(WeightsError, match=r'watched: cannot read layer/30\.'):
    save_orbax(str(tmp_path / 'a'), Watched('layer/30'), CONFIG)
  assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(folder):
  before = {path: path.stat().st_mtime for path in folder.rglob('*')}
  with pytest.raises(WeightsError, match=re.escape(
      f'{folder}: is there already')):
    save_orbax(str(folder), random_params(), CONFIG)
  assert {path: path.stat().st_mtime for path in folder.rglob('*')} == before


def save_run(workdir, stacked, steps=(2, 10)):
  """Checkpoints as a run writes them; the parameters are those of the last
  step, in others step - 10 more."""
  checkpoints = Checkpoints(str(workdir / 'checkpoints'), SimpleNamespace(
      keep=3, keep_every_steps=0))
  for step in steps:
    params = jax.tree.map(lambda x, step=step: jnp.asarray(x) + (step - 10),
                          random_params(stacked))
    checkpoints.save(
        step, TrainState(jnp.int32(step), params, {'nu': params}), {},
        {'model': {'preset': 'x'} | CONFIG.to_dict(), 'steps': 10})
  checkpoints.close()


def test_newest_checkpoint_of_a_run(tmp_path, monkeypatch):
  save_run(tmp_path, stacked=True)
  opened, ts_open = [], ts.open

  def recorded(spec, **options):
    if isinstance(spec, dict) and spec['driver'] == 'zarr':
      opened.append(spec['kvstore']['path'])
    return ts_open(spec, **options)

  monkeypatch.setattr(ts, 'open', recorded)
  tensors = open_run(str(tmp_path))
  assert_same(tensors, random_tensors())
  assert tensors.config == CONFIG
  assert tensors.report == [
      f'{tmp_path}/checkpoints/10: the newest checkpoint of the run.']
  # Nothing of the optimizer's, and a stacked array once.
  assert len({*opened}) == len(opened)
  assert all(path.startswith('params.') for path in opened)
  assert 'params.encoder.layers.mlp.wi_0.kernel/' in opened


@pytest.mark.parametrize('name', [KERNEL, 'encoder/encoder_norm/scale'])
def test_parts_are_read(name, tmp_path):
  save_run(tmp_path, stacked=True, steps=(10,))
  array = random_tensors()[name]
  index = tuple(slice(1, n - 1, None) for n in array.shape)
  np.testing.assert_array_equal(
      open_run(str(tmp_path)).read(name, index), array[index])


def refuses(opening, path, message):
  with pytest.raises(ConfigError) as caught:
    read_all(opening(str(path)))
  assert re.fullmatch(message, str(caught.value)), caught.value


def test_a_run_without_a_checkpoint(tmp_path):
  refuses(open_run, tmp_path,
          f'{tmp_path}: no checkpoint in {tmp_path}/checkpoints\\.')
  assert not list(tmp_path.iterdir())


def test_folders_that_are_none(folder, tmp_path):
  refuses(open_orbax, tmp_path, r'.*/config\.json: cannot be read .*')
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG.to_dict()))
  refuses(open_orbax, tmp_path,
          f'{tmp_path}: no Orbax checkpoint at {tmp_path}/params\\.')
  (tmp_path / 'params').mkdir()
  (tmp_path / 'params' / 'x').write_text('x')
  refuses(open_orbax, tmp_path,
          f'{tmp_path}: no Orbax checkpoint at {tmp_path}/params\\.')


@pytest.mark.parametrize('damage', ['cut', 'gone'])
def test_damaged_data(damage, tmp_path):
  save_orbax(str(tmp_path / 'a'), random_params(), CONFIG)
  for path in (tmp_path / 'a').rglob('d/*'):
    if path.stat().st_size > 2000:
      if damage == 'gone':
        path.unlink()
      else:
        path.write_bytes(path.read_bytes()[:100])
  refuses(open_orbax, tmp_path / 'a',
          f'{tmp_path}/a: cannot read .*: [A-Z_]+: Error reading .*/params/.*')

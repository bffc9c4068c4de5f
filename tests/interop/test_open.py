"""KIND:PATH, and a config beside it."""

import dataclasses

import pytest

import golden
import hf_folder
from longt5_flax.interop.open import open_tensors, split_spec
from longt5_flax.interop.single_file import save_single_file
from longt5_flax.interop.tensors import WeightsError

CASE = 'hf_tglobal_untied'


@pytest.mark.parametrize('spec, expected', [
    ('hf:x', ('hf', 'x')), ('t5x:gs://b/c', ('t5x', 'gs://b/c')),
    ('run:a:b', ('run', 'a:b'))])
def test_kinds(spec, expected):
  assert split_spec(spec) == expected


def test_path_alone(tmp_path):
  """Of a folder or of a file; it may have a colon."""
  folder = hf_folder.write(tmp_path / 'hf:x', CASE)
  for path in (folder, folder / 'model.safetensors'):
    assert open_tensors(str(path)).config == golden.load(CASE).config


def test_run_alone(tmp_path):
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(WeightsError) as caught:
    open_tensors(str(tmp_path))
  assert str(caught.value) == (
      f'{tmp_path}: is the folder of a run: say run:{tmp_path}.')


@pytest.mark.parametrize('spec', ['', 'x', 'hf:', 'hg:x', 'google/long-t5'])
def test_neither(spec):
  with pytest.raises(WeightsError) as caught:
    open_tensors(spec)
  assert str(caught.value) == (
      f'{spec!r} must be one of hf:DIR_OR_FILE, t5x:DIR_OR_URL, '
      't5:DIR_OR_URL, orbax:DIR, run:WORKDIR, safetensors:FILE, or the path of '
      'a Hugging Face folder on disk.')


def test_config_of_the_same_model(tmp_path):
  case, path = golden.load(CASE), tmp_path / 'x'
  save_single_file(str(path), case.config, case.params)
  config = dataclasses.replace(case.config, dropout_rate=0.3)
  assert open_tensors(f'safetensors:{path}', config).config == config
  other = dataclasses.replace(case.config, local_radius=9)
  with pytest.raises(WeightsError) as caught:
    open_tensors(f'safetensors:{path}', other)
  assert str(caught.value) == (
      f'{path}: the weights are of a model with local_radius=7, and this one '
      'has 9.')


def test_files_of_other_programs_and_damaged_ones(tmp_path):
  folder = hf_folder.write(tmp_path, CASE)
  path = folder / 'model.safetensors'
  with pytest.raises(WeightsError, match='holds no config of this package'):
    open_tensors(f'safetensors:{path}')
  case = golden.load(CASE)
  save_single_file(str(tmp_path / 'x'), case.config, case.params)
  (tmp_path / 'x').write_bytes((tmp_path / 'x').read_bytes()[:-1])
  with pytest.raises(WeightsError, match='is no whole safetensors file'):
    open_tensors(f'safetensors:{tmp_path}/x')

"""Which implementation attends, on machines that are not here too."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from longt5_flax import LongT5Config, LongT5EncoderModel
from longt5_flax.config import ConfigError
from longt5_flax.model import encoder
from longt5_flax.model.attention_choice import (
    check_attention,
    choose_attention,
)

CONFIG = LongT5Config(encoder_attention_type='transient-global')
FULL = LongT5Config(encoder_attention_type='full')
WIDE = LongT5Config(local_radius=600)


@pytest.mark.parametrize('asked, config, length, platform, says', [
    ('auto', CONFIG, 8192, 'cpu', 'reference (up to 8192 tokens on a CPU)'),
    ('auto', CONFIG, 8193, 'cpu', 'chunked, in the decoder reference '
     '(beyond 8192 tokens on a CPU)'),
    ('auto', CONFIG, 100, 'gpu', 'fused (kernels for GPUs)'),
    ('auto', CONFIG, 100, 'tpu', 'fused, from targets to inputs fused, to '
     'targets reference (kernels for TPUs)'),
    ('auto', WIDE, 100, 'gpu', 'fused (kernels for GPUs)'),
    ('auto', WIDE, 100, 'tpu', 'chunked, in the decoder reference '
     '(fused needs a local_radius of at most 512 on a TPU, not 600)'),
    ('auto', CONFIG, 100, 'other', 'chunked, in the decoder reference '
     "(fused needs an NVIDIA GPU or a TPU, not 'other')"),
    ('auto', FULL, 10**5, 'cpu', 'reference (beyond 8192 tokens on a CPU; '
     'full attention has one implementation)'),
    ('fused', FULL, 100, 'gpu', 'reference, in the decoder fused '
     '(asked for fused; full attention has one implementation)'),
    ('chunked', CONFIG, 100, 'gpu',
     'chunked, in the decoder reference (asked for chunked)'),
    ('reference', CONFIG, 10**6, 'tpu', 'reference (asked for reference)')])
def test_choice(asked, config, length, platform, says):
  choice = choose_attention(asked, config, length, platform)
  assert str(choice) == f'attention: {says}'


@pytest.mark.parametrize('config, platform, why', [
    (CONFIG, 'cpu', "an NVIDIA GPU or a TPU, not 'cpu'"),
    (WIDE, 'tpu', 'a local_radius of at most 512 on a TPU, not 600')])
def test_kernels_that_are_not_there(config, platform, why):
  with pytest.raises(ConfigError) as error:
    check_attention('fused', config, platform)
  assert str(error.value) == f"attention='fused' needs {why}."
  for asked in ('auto', 'reference', 'chunked'):
    check_attention(asked, config, platform)


def gpu(capability):
  device = SimpleNamespace(compute_capability=capability)
  return mock.patch.object(jax, 'local_devices', return_value=[device])


@pytest.mark.parametrize('capability', ['7.5', 'gfx942'])
def test_gpus_without_kernels(capability):
  """A Turing and one of AMD's."""
  with gpu(capability):
    assert choose_attention('auto', CONFIG, 100, 'gpu').encoder == 'chunked'
    with pytest.raises(ConfigError, match='of compute capability 8 or more, '
                       f'not {capability}'):
      check_attention('fused', CONFIG, 'gpu')


@pytest.mark.parametrize('capability', ['8.0', '9.0', '10.0'])
def test_gpus_with_kernels(capability):
  with gpu(capability):
    assert choose_attention('auto', CONFIG, 100, 'gpu').encoder == 'fused'
    check_attention('fused', CONFIG, 'gpu')


@pytest.mark.parametrize('length, implementation', [
    (4096, 'local_attention'), (8200, 'chunked_attention')])
def test_model_attends_as_chosen(length, implementation, monkeypatch):
  """That the encoder calls it, by the length it is given."""
  called = mock.Mock(wraps=getattr(encoder, implementation))
  monkeypatch.setattr(encoder, implementation, called)
  model = LongT5EncoderModel(dataclasses.replace(
      CONFIG, vocab_size=50, d_model=16, d_kv=8, num_heads=2, d_ff=16,
      num_layers=1))
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  jax.eval_shape(model.init, jax.random.key(0), tokens)
  assert called.called

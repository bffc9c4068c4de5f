"""Decoding over devices writes what the model's own `generate` writes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import tiny_runs
from longt5_flax import (
    FlaxLongT5ForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
)
from longt5_flax.predictions import (
    DecodingBatch,
    Predictor,
    plan_batches,
    writing_options,
)
from longt5_flax.training import partitioning

CONFIG = LongT5Config(
    vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
    local_radius=7, encoder_attention_type='transient-global',
    global_block_size=4, feed_forward_proj='gated-gelu',
    tie_word_embeddings=False)
WORDS = 7
LENGTHS = (40, 3, 17, 40, 9, 1, 25, 33, 12, 5)


@pytest.fixture(autouse=True, scope='module')
def cheap_compilation(cache):
  with tiny_runs.cheap_compilation(cache):
    yield


@pytest.fixture(scope='module')
def model():
  return LongT5ForConditionalGeneration(CONFIG)


@pytest.fixture(scope='module')
def params(model):
  tokens = jnp.ones((1, 1), jnp.int32)
  return golden.random_params(model, tokens, tokens)


@pytest.fixture(scope='module')
def inputs():
  random = np.random.default_rng(0)
  return [random.integers(3, 64, size) for size in LENGTHS]


def own_words(params, inputs, **settings):
  """What `generate` writes for them."""
  model = FlaxLongT5ForConditionalGeneration(CONFIG, _do_init=False)
  model.params = params
  ids = np.zeros((len(inputs), 48), int)
  for row, tokens in zip(ids, inputs, strict=True):
    row[:len(tokens)] = tokens
  return np.asarray(model.generate(
      ids, max_new_tokens=WORDS, **settings).sequences)[:, 1:]


def mesh_of(**sizes):
  sizes = dict.fromkeys(partitioning.MESH_AXES, 1) | sizes
  count = int(np.prod(list(sizes.values())))
  return partitioning.make_mesh(sizes, jax.devices()[:count])


@pytest.mark.parametrize('settings, meshes', [
    ({'num_beams': 1}, [{}, {'data': 8}]),
    ({'num_beams': 3, 'length_penalty': 0.6},
     [{'data': 8}, {'data': 2, 'fsdp': 2, 'tensor': 2}])],
                         ids=['greedy', 'beams'])
def test_devices_write_what_generate_writes(
    model, params, inputs, settings, meshes):
  """10 inputs on rows for 12, of which 8 devices make 16."""
  expected = own_words(params, inputs, **settings)
  options = writing_options(CONFIG, WORDS, **settings)
  for sizes in meshes:
    mesh = mesh_of(**sizes)
    shardings = partitioning.state_shardings(params, params, mesh)
    written = Predictor(model, mesh, options, 12)(
        jax.device_put(params, shardings), inputs, 48)
    np.testing.assert_array_equal(written, expected, err_msg=str(sizes))


def test_batches_are_of_like_lengths():
  """The longest first, padded to the limit or its halves; all are there."""
  lengths = [70, 1000, 300, 4000, 250, 4096, 2048, 128, 2049]
  assert plan_batches(lengths, 2, 4096) == [
      DecodingBatch([5, 3], 4096), DecodingBatch([8, 6], 4096),
      DecodingBatch([1, 2], 1024), DecodingBatch([4, 7], 256),
      DecodingBatch([0], 128)]


def test_no_beam_leaves_its_device(model, params):
  """XLA would gather keys and values of all rows at every step."""
  mesh = mesh_of(data=8)
  options = writing_options(CONFIG, WORDS, num_beams=3)
  predictor = Predictor(model, mesh, options, 8)
  rows = jax.ShapeDtypeStruct(
      (8, 48), jnp.int32, sharding=partitioning.batch_sharding(mesh))
  with partitioning.active(mesh):
    program = predictor._program.lower(params, rows, rows).compile().as_text()
  loops = program.split('ENTRY')[0]
  assert 'while' in program
  assert not any(word in loops for word in ('all-gather', 'all-reduce'))

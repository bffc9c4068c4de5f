"""Folders of this package in transformers, and its folders here.

  python -m venv /tmp/parity
  /tmp/parity/bin/pip install -r tests/transformers_parity/requirements-4.txt
  /tmp/parity/bin/python tests/transformers_parity/check.py

and again with requirements-5.txt, from the root of the repository. Every model,
tied or not, scaled or not, is written by `save_pretrained`, computed by
transformers, saved by it, and computed here again; largest differences of the
logits are printed. Also PyTorch's own files: a pickle of weights is read, and
one that would run code is refused.
"""

import itertools
import os
import pickle
import sys
import tempfile
from pathlib import Path

os.environ['JAX_PLATFORMS'] = 'cpu'
ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import golden  # noqa: E402
import hf_folder  # noqa: E402
import longt5_flax as ours  # noqa: E402
from longt5_flax.interop.huggingface import (  # noqa: E402
    open_huggingface,
    save_pretrained,
)
from longt5_flax.interop.tensors import WeightsError, load_params  # noqa: E402

ATTENTIONS = ('local', 'transient-global')
SIZES = dict(
    vocab_size=96, d_model=40, d_kv=8, d_ff=64, num_layers=3,
    num_decoder_layers=2, num_heads=4, local_radius=7, global_block_size=4,
    dropout_rate=0.0)
GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.integers(2, 96, (3, 37)).astype(np.int32)
MASK = (np.arange(37) < np.array([[37], [20], [3]])).astype(np.int32)
TARGETS = GENERATOR.integers(2, 96, (3, 9)).astype(np.int32)


def our_output(name, config, params):
  """What a model of this package gives."""
  module = getattr(ours, name)(config)
  arguments = () if name == 'LongT5EncoderModel' else (TARGETS,)
  return golden.jit(lambda params: module.apply(
      {'params': params}, INPUTS, *arguments, encoder_segment_ids=MASK))(params)


def random_params(name, config):
  ids = jnp.ones((1, 1), jnp.int32)
  arguments = (ids,) if name == 'LongT5EncoderModel' else (ids, ids)
  return golden.random_params(getattr(ours, name)(config), *arguments)


def their_output(model):
  inputs = dict(input_ids=torch.tensor(INPUTS.astype(np.int64)),
                attention_mask=torch.tensor(MASK.astype(np.int64)))
  if hasattr(model, 'decoder'):
    inputs['decoder_input_ids'] = torch.tensor(TARGETS.astype(np.int64))
  with torch.no_grad():
    return model(**inputs)[0].numpy()


def load_theirs(name, folder):
  """The model, and no parameter left to chance: 4.57 counts the aliases of
  the embedding as missing, as it does in its own files."""
  model, info = getattr(transformers, name).from_pretrained(
      folder, output_loading_info=True, dtype=torch.float32)
  assert all(key.endswith('embed_tokens.weight')
             for key in info['missing_keys']), info
  assert not info['mismatched_keys'], info
  return model.eval()


def load_ours(name, path, config=None):
  tensors = open_huggingface(str(path), config)
  return tensors.config, load_params(
      tensors, hf_folder.shapes_of(random_params(name, tensors.config)))


def difference(actual, expected, mask=None):
  golden.assert_close(np.asarray(actual), np.asarray(expected), mask)
  mask = slice(None) if mask is None else mask.astype(bool)
  return np.abs(np.asarray(actual) - np.asarray(expected))[mask].max()


def check(name, folder, config, **options):
  """Largest differences: theirs of our folder, ours of their folder."""
  params = random_params(name, config)
  expected = our_output(name, config, params)
  mask = MASK if name == 'LongT5EncoderModel' else None
  save_pretrained(str(folder / 'ours'), config, params, **options)
  model = load_theirs(name, folder / 'ours')
  if name == 'LongT5ForConditionalGeneration':
    assert model.generation_config.decoder_start_token_id == 0
    model.generate(torch.tensor(INPUTS[:1].astype(np.int64)), max_new_tokens=2)
  there = difference(their_output(model), expected, mask)
  model.save_pretrained(folder / 'theirs')
  read, again = load_ours(name, folder / 'theirs')
  return there, difference(our_output(name, read, again), expected, mask)


def check_pickles(folder):
  """PyTorch's own files."""
  name, config = 'LongT5ForConditionalGeneration', ours.LongT5Config(**SIZES)
  expected = random_params(name, config)
  save_pretrained(str(folder), config, expected)
  weights = load_theirs(name, folder).state_dict()
  os.remove(folder / 'model.safetensors')
  path = folder / 'pytorch_model.bin'
  for dtype in ('float32', 'bfloat16', 'float16'):
    torch.save({key: value.to(getattr(torch, dtype))
                for key, value in weights.items()}, path)
    _, params = load_ours(name, folder)
    for actual, value in zip(jax.tree.leaves(params), jax.tree.leaves(expected),
                             strict=True):
      np.testing.assert_array_equal(actual, value.astype(dtype).astype(float))
  executed = folder / 'executed'
  for content in (pickle.dumps(Malicious(str(executed))), b'', b'PK\x03\x04'):
    path.write_bytes(content)
    assert_refused(name, folder)
  torch.save({'shared.weight': Malicious(str(executed))}, path)
  assert_refused(name, folder)
  assert not executed.exists()


def check_flax(folder):
  """The file that the removed Flax class writes."""
  # Its argument a_max is gone from JAX 0.10.
  clip = jnp.clip
  jnp.clip = lambda x, a_min=None, a_max=None: clip(x, a_min, a_max)
  name = 'LongT5ForConditionalGeneration'
  config = ours.LongT5Config(**SIZES, tie_word_embeddings=False,
                             encoder_attention_type='transient-global')
  params = random_params(name, config)
  save_pretrained(str(folder / 'ours'), config, params)
  load_theirs(name, folder / 'ours').save_pretrained(folder / 'torch')
  model = transformers.FlaxLongT5ForConditionalGeneration.from_pretrained(
      folder / 'torch')
  jnp.clip = clip
  for size in ('5GB', '30KB'):
    model.save_pretrained(folder / size, max_shard_size=size)
    _, again = load_ours(name, folder / size)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    files = list((folder / size).glob('*.msgpack'))
    print(f'read what Flax wrote: {len(files)} msgpack files')


class Malicious:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (self.path, 'w')


def assert_refused(name, folder):
  with pytest.raises(WeightsError) as caught:
    load_ours(name, folder)
  message = str(caught.value)
  assert '\n' not in message
  print(f'refused: {message.partition("pytorch_model.bin: ")[2]}')


def main():
  jax.config.update('jax_default_matmul_precision', 'highest')
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  print(f'transformers {transformers.__version__}, torch {torch.__version__}, '
        f'jax {jax.__version__}')
  print('largest difference of logits: in transformers, and read back')
  with tempfile.TemporaryDirectory() as parent:
    for i, (kind, tied, scaled) in enumerate(itertools.product(
        ATTENTIONS, (False, True), (False, True))):
      config = ours.LongT5Config(
          **SIZES, encoder_attention_type=kind, tie_word_embeddings=tied,
          scale_decoder_outputs=scaled,
          feed_forward_proj='relu' if tied else 'gated-gelu')
      there, back = check('LongT5ForConditionalGeneration',
                          Path(parent, str(i)), config)
      print(f'{kind:16} {"tied" if tied else "untied":6} '
            f'{"scaled" if scaled else "not scaled":10} {there:.1e} {back:.1e}')
    for name in ('LongT5ForConditionalGeneration', 'LongT5Model',
                 'LongT5EncoderModel'):
      there, back = check(
          name, Path(parent, name), ours.LongT5Config(
              **SIZES, encoder_attention_type='transient-global',
              tie_word_embeddings=False), max_shard_bytes=20_000)
      print(f'{name}, sharded: {there:.1e} {back:.1e}')
    check_pickles(Path(parent, 'pickles'))
    if transformers.__version__.startswith('4.'):
      check_flax(Path(parent, 'flax'))
  print('all equal')


if __name__ == '__main__':
  main()

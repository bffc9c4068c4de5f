"""One program with the Flax class that transformers 5 removed, and with ours.

  /tmp/parity/bin/python tests/transformers_parity/flax_class.py

in the environment of requirements-4.txt; see check.py. The program is written
for `transformers.FlaxLongT5ForConditionalGeneration`; names, shapes, types and
values of all that it gets must be the same. Beams are left out: the removed
class searched by rules of its own.
"""

import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'
ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import transformers  # noqa: E402

import golden  # noqa: E402
import longt5_flax as ours  # noqa: E402

LENGTH, TARGETS_LENGTH, RADIUS = 37, 9, 7
GENERATOR = np.random.default_rng(0)
MASK = (np.arange(LENGTH) < np.array([[LENGTH], [20], [9]])).astype(np.int32)
INPUTS = GENERATOR.integers(2, 96, MASK.shape).astype(np.int32) * MASK
TARGETS = GENERATOR.integers(2, 96, (3, TARGETS_LENGTH)).astype(np.int32)
TARGETS[:, 0] = 0
TARGETS_MASK = np.ones_like(TARGETS)
TARGETS_MASK[1, 6:] = 0
# Rows of queries that are padding hold other numbers here and there.
BLOCKS = np.pad(MASK, ((0, 0), (0, -LENGTH % (RADIUS + 1)))).reshape(
    3, -1, RADIUS + 1)


def program(model: Any) -> dict[str, Any]:
  """What a user of the removed class might compute."""
  everything = dict(output_attentions=True, output_hidden_states=True)
  encoded = model.encode(
      input_ids=INPUTS, attention_mask=MASK, **everything)

  def loss(params):
    logits = model(INPUTS, MASK, TARGETS, TARGETS_MASK, params=params).logits
    return jnp.mean(logits**2, where=TARGETS_MASK[..., None] > 0)

  value, gradients = jax.value_and_grad(loss)(model.params)
  return {
      'call': model(INPUTS, MASK, TARGETS, TARGETS_MASK, **everything),
      'call, a tuple': model(
          input_ids=INPUTS, attention_mask=MASK, decoder_input_ids=TARGETS,
          decoder_attention_mask=TARGETS_MASK, return_dict=False),
      'encode': encoded,
      'encode, a tuple': model.encode(INPUTS, MASK, return_dict=False),
      'decode': model.decode(
          TARGETS, encoded, MASK, TARGETS_MASK, **everything),
      'decode, a tuple': model.decode(
          TARGETS, encoded, MASK, return_dict=False),
      'steps': steps(model, encoded),
      'train': model(INPUTS, MASK, TARGETS, TARGETS_MASK, train=True,
                     dropout_rng=jax.random.PRNGKey(0)),
      'in jit': jax.jit(lambda params, ids: model(
          ids, MASK, TARGETS, params=params).logits)(model.params, INPUTS),
      'loss': value,
      'gradients': sorted(np.linalg.norm(leaf)
                          for leaf in jax.tree.leaves(gradients)),
      'written': model.generate(INPUTS, attention_mask=MASK, max_length=12,
                                do_sample=False, num_beams=1).sequences,
      'types': sorted({leaf.dtype.name for cast in (
          model.to_bf16, model.to_fp16, model.to_fp32)
                       for leaf in jax.tree.leaves(cast(model.params))}),
  }


def steps(model, encoded):
  """Logits of targets that are decoded one by one."""
  cache = model.init_cache(len(TARGETS), TARGETS_LENGTH, encoded)
  logits = []
  for i in range(TARGETS_LENGTH):
    outputs = model.decode(
        TARGETS[:, i:i + 1], encoded, encoder_attention_mask=MASK,
        decoder_attention_mask=np.ones_like(TARGETS), past_key_values=cache)
    cache = outputs.past_key_values
    logits.append(outputs.logits)
  return jnp.concatenate(logits, axis=1)


def compare(name, theirs, mine):
  """Largest difference over largest number, of all arrays in an output."""
  if hasattr(theirs, 'keys'):
    assert list(theirs.keys()) == list(mine.keys()), (name, mine.keys())
    theirs, mine = theirs.to_tuple(), mine.to_tuple()
  if isinstance(theirs, tuple | list):
    assert len(theirs) == len(mine), name
    return max(compare(f'{name} {i}', *pair)
               for i, pair in enumerate(zip(theirs, mine, strict=True)))
  theirs, mine = np.asarray(theirs), np.asarray(mine)
  assert (theirs.shape, theirs.dtype) == (mine.shape, mine.dtype), name
  if theirs.dtype != np.float32:
    np.testing.assert_array_equal(mine, theirs, name)
    return 0.0
  theirs, mine = real(theirs), real(mine)
  golden.assert_close(mine, theirs, what=name)
  return np.abs(mine - theirs).max() / np.abs(theirs).max()


def real(array):
  """The rows of real tokens, of an array over inputs or targets."""
  if array.ndim == 5:  # [batch, blocks, heads, queries, keys]
    return np.moveaxis(array, 3, 2)[BLOCKS > 0]
  if array.ndim == 4:  # [batch, heads, queries, keys]
    return np.swapaxes(array, 1, 2)[TARGETS_MASK > 0]
  if array.ndim == 3:
    return array[(MASK if array.shape[1] == LENGTH else TARGETS_MASK) > 0]
  return array


def check(folder, kind, tied):
  """Largest relative difference of each thing that the program gets."""
  config = ours.LongT5Config(
      vocab_size=96, d_model=40, d_kv=8, d_ff=64, num_layers=3,
      num_decoder_layers=2, num_heads=4, local_radius=RADIUS,
      global_block_size=4, dropout_rate=0.0, encoder_attention_type=kind,
      tie_word_embeddings=tied,
      feed_forward_proj='relu' if tied else 'gated-gelu')
  ids = jnp.ones((1, 1), jnp.int32)
  model = ours.FlaxLongT5ForConditionalGeneration(config, _do_init=False)
  model.params = golden.random_params(
      ours.LongT5ForConditionalGeneration(config), ids, ids)
  model.save_pretrained(folder)
  theirs, mine = (program(package.FlaxLongT5ForConditionalGeneration
                          .from_pretrained(folder))
                  for package in (transformers, ours))
  return {name: compare(name, theirs[name], mine[name]) for name in theirs}


def main():
  # Its argument a_max, which the removed class uses, is gone from JAX 0.10.
  clip = jnp.clip
  jnp.clip = lambda x, a_min=None, a_max=None, **bounds: clip(
      x, a_min, a_max, **bounds)
  jax.config.update('jax_default_matmul_precision', 'highest')
  transformers.logging.set_verbosity_error()
  print(f'transformers {transformers.__version__}, jax {jax.__version__}')
  print('largest difference over largest number')
  with tempfile.TemporaryDirectory() as parent:
    for i, (kind, tied) in enumerate(itertools.product(
        ('local', 'transient-global'), (False, True))):
      found = check(Path(parent, str(i)), kind, tied)
      print(f'{kind}, {"tied" if tied else "untied"}: ' + ', '.join(
          f'{name} {value:.1e}' for name, value in found.items()))
  print('all equal')


if __name__ == '__main__':
  main()

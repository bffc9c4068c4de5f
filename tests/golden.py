"""Golden numbers of two reference implementations, the equality rule, and
small random models.

tests/testdata/golden/README.md says what the numbers are and which cases the
repository holds. With LONGT5_GOLDEN=<folder> the complete set is read from
there instead, in the layout in which it was made.
"""

import dataclasses
import functools
import io
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from longt5_flax import LongT5Config

FOLDER = Path(__file__).parent / 'testdata' / 'golden'
COMPLETE = os.environ.get('LONGT5_GOLDEN')
TOLERANCE = 2e-5

# A case whose parameters are another's, but for the head: stored once.
_PARAMETERS_OF = {'hf_local_base_model': 'hf_local_enc3_dec1'}

_HF_NAMES = (
    (r'shared\.weight', 'token_embedder/embedding'),
    (r'lm_head\.weight', 'decoder/logits_dense/kernel'),
    (r'(encoder|decoder)\.final_layer_norm\.weight', r'\1/\1_norm/scale'),
    (r'(encoder|decoder)\..*\.global_relative_attention_bias\.weight',
     r'\1/side_relpos_bias/rel_embedding'),
    (r'(encoder|decoder)\..*\.relative_attention_bias\.weight',
     r'\1/relpos_bias/rel_embedding'),
    (r'encoder\.block\.(\d+)\..*\.global_input_layer_norm\.weight',
     r'encoder/layers_\1/attention/T5LayerNorm_0/scale'),
    (r'encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight',
     r'encoder/layers_\1/pre_attention_layer_norm/scale'),
    (r'encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight',
     r'encoder/layers_\1/pre_mlp_layer_norm/scale'),
    (r'decoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight',
     r'decoder/layers_\1/pre_self_attention_layer_norm/scale'),
    (r'decoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight',
     r'decoder/layers_\1/pre_cross_attention_layer_norm/scale'),
    (r'decoder\.block\.(\d+)\.layer\.2\.layer_norm\.weight',
     r'decoder/layers_\1/pre_mlp_layer_norm/scale'),
    (r'(encoder|decoder)\.block\.(\d+)\..*\.DenseReluDense\.(\w+)\.weight',
     r'\1/layers_\2/mlp/\3/kernel'),
    (r'encoder\.block\.(\d+)\..*SelfAttention\.([qkvo])\.weight',
     r'encoder/layers_\1/attention/\2/kernel'),
    (r'decoder\.block\.(\d+)\..*\.SelfAttention\.([qkvo])\.weight',
     r'decoder/layers_\1/self_attention/\2/kernel'),
    (r'decoder\.block\.(\d+)\..*\.EncDecAttention\.([qkvo])\.weight',
     r'decoder/layers_\1/encoder_decoder_attention/\2/kernel'),
)
_LETTERS = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}


def jit(function: Callable, **options: Any) -> Callable:
  """`jax.jit` for small programs that run once or twice.

  Tests spend their time compiling, and three quarters of that is LLVM making
  loops fast. XLA's own passes run as ever.
  """
  return jax.jit(function, compiler_options=_quick_options(), **options)


@functools.cache
def _quick_options():
  """Those of the options that this version of XLA knows."""
  known = {}
  for option in ({'xla_backend_optimization_level': 0},
                 {'xla_cpu_use_fusion_emitters': False}):
    try:
      jax.jit(lambda x: x + 1, compiler_options=option).lower(1.0).compile()
    except jax.errors.JaxRuntimeError:
      continue
    known |= option
  return known


@dataclasses.dataclass(frozen=True)
class Case:
  """One golden case.

  Attributes:
    name: of the file or folder.
    config: the architecture.
    params: the parameter tree, by T5X's names, layers unrolled.
    gradients: of the case's loss, like params; None if it has none.
    arrays: inputs and expected outputs, by the README's names.
  """
  name: str
  config: LongT5Config
  params: dict[str, Any]
  gradients: dict[str, Any] | None
  arrays: dict[str, np.ndarray]

  def __getitem__(self, name: str) -> np.ndarray:
    return self.arrays[name]

  def get(self, name: str) -> np.ndarray | None:
    return self.arrays.get(name)


def lowered_for_cuda(function: Callable, *arguments: Any) -> str:
  """A function for a GPU, as far as that goes without one: Triton's language,
  with the names of kernels."""
  compiled = jax.jit(function)
  with mock.patch.object(jax, 'default_backend', return_value='gpu'):
    return compiled.trace(*arguments).lower(
        lowering_platforms=('cuda',)).as_text()


def names(prefix: str) -> list[str]:
  """The cases at hand whose name starts with `prefix`."""
  if COMPLETE:
    found = {path.stem if path.suffix == '.npz' else path.name
             for path in Path(COMPLETE).iterdir()}
  else:
    found = {path.name.removesuffix('.npz.xz')
             for path in FOLDER.glob('*.npz.xz')}
  found = sorted(name for name in found if name.startswith(prefix))
  assert found, f'no golden case {prefix}* in {COMPLETE or FOLDER}'
  return found


@functools.cache
def load(name: str) -> Case:
  """Reads a case of either reference implementation."""
  arrays = dict(read(name))
  if name.startswith('hf_'):
    config = LongT5Config.from_dict(json.loads(str(arrays.pop('config_json'))))
    params, to_tree = _pop(arrays, 'param/'), tree_from_hf
    if not params:
      params = _pop(dict(read(_PARAMETERS_OF[name])), 'param/')
      del params['lm_head.weight']
  else:
    config = _flaxformer_config(name, _pop(arrays, 'config/'))
    params, to_tree = _pop(arrays, 'param/'), tree_from_paths
  gradients = _pop(arrays, 'grad/')
  return Case(name, config, to_tree(params),
              to_tree(gradients) if gradients else None, arrays)


@functools.cache
def read(name: str) -> dict[str, np.ndarray]:
  """All arrays of a case, in the names of its implementation."""
  if not COMPLETE:
    with lzma.open(FOLDER / f'{name}.npz.xz') as file:
      return dict(np.load(io.BytesIO(file.read())))
  folder = Path(COMPLETE) / name
  if not folder.is_dir():
    return dict(np.load(folder.with_name(f'{name}.npz')))
  params = load_file(folder / 'model.safetensors')
  return dict(np.load(folder / 'golden.npz')) | {
      f'param/{key}': value for key, value in params.items()
  } | {'config_json': np.array((folder / 'config.json').read_text())}


def tree_from_paths(flat: dict[str, np.ndarray]) -> dict[str, Any]:
  """{'a/b': x} to {'a': {'b': x}}."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, leaf = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def tree_from_hf(flat: dict[str, np.ndarray]) -> dict[str, Any]:
  """Hugging Face's names to T5X's, kernels and bias tables transposed."""
  renamed = {}
  for name, value in flat.items():
    path = hf_path(name)
    transposed = path.endswith(('/kernel', '/rel_embedding'))
    renamed[path] = value.T if transposed else value
  assert len(renamed) == len(flat)
  return tree_from_paths(renamed)


def hf_path(name: str) -> str:
  """T5X's path of Hugging Face's parameter `name`."""
  for pattern, replacement in _HF_NAMES:
    if match := re.fullmatch(pattern, name):
      path = match.expand(replacement)
      return re.sub(r'/([qkvo])/', lambda m: f'/{_LETTERS[m[1]]}/', path)
  raise KeyError(name)


def assert_close(actual: Any, expected: Any, mask: Any = None,
                 what: str = '') -> None:
  """The one rule of equality: float32, max|a - b| <= 2e-5 * max|b|.

  Args:
    actual: float32 array.
    expected: of the same shape.
    mask: boolean, over the leading axes; what is False is not compared.
    what: named in the error.
  """
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.dtype == np.float32, f'{what}: {actual.dtype} is not float32'
  assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
  if mask is not None:
    mask = np.asarray(mask, bool)
    assert mask.any(), f'{what}: nothing to compare'
    actual, expected = actual[mask], expected[mask]
  if not expected.size:
    return
  allowed = TOLERANCE * np.abs(expected).max()
  difference = np.abs(actual.astype(np.float64) - expected).max()
  # Written so that a NaN fails.
  assert difference <= allowed, (
      f'{what}: differs by {difference:.3g}, allowed are {allowed:.3g}')


def assert_trees_close(actual: Any, expected: Any, what: str = '') -> None:
  """`assert_close` leaf by leaf, the trees having the same leaves."""
  actual, expected = flatten(actual), flatten(expected)
  assert sorted(actual) == sorted(expected)
  for path, value in expected.items():
    assert_close(actual[path], value, what=f'{what} {path}')


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """{'a': {'b': x}} to {'a/b': x}."""
  flat = {}
  for name, value in tree.items():
    path = f'{prefix}/{name}' if prefix else name
    flat |= flatten(value, path) if isinstance(value, dict) else {path: value}
  return flat


def random_params(module: Any, *inputs: Any, seed: int = 0,
                  **options: Any) -> dict[str, Any]:
  """Parameters in which every leaf matters, unlike an initialiser's.

  Args:
    module: whose parameters.
    *inputs: of `module.init`.
    seed: same seed and shapes, same parameters.
    **options: of `module.init`.
  """
  shapes = jax.eval_shape(
      lambda: module.init(jax.random.key(0), *inputs, **options))['params']
  generator = np.random.default_rng(seed)

  def fill(path, leaf):
    noise = generator.standard_normal(leaf.shape).astype(np.float32)
    match path[-1].key:
      case 'scale':
        values = 1 + 0.2 * noise
      case 'rel_embedding':
        values = 0.3 * noise
      case 'kernel':
        gain = 0.6 if path[-2].key == 'query' else 1.0
        values = gain * noise / np.float32(leaf.shape[-2] ** 0.5)
      case _:
        values = noise
    return jnp.asarray(values)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def _pop(arrays, prefix):
  return {key.removeprefix(prefix): arrays.pop(key)
          for key in list(arrays) if key.startswith(prefix)}


def _flaxformer_config(name, sizes):
  sizes = {key: int(value) for key, value in sizes.items()}
  return LongT5Config(
      num_layers=sizes.pop('num_encoder_layers'), **sizes,
      feed_forward_proj='gated-gelu', tie_word_embeddings=False,
      dropout_rate=0.0, encoder_attention_type=(
          'transient-global' if '_tglobal_' in name else 'local'))

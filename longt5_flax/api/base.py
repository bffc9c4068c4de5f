"""What the three models share: parameters held, made, read, written, cast."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.core import unfreeze
from jax.typing import DTypeLike

from longt5_flax.api import programs
from longt5_flax.api.generation import GenerationConfig
from longt5_flax.config import ConfigError, LongT5Config

# Keywords of Hugging Face's from_pretrained and save_pretrained that have to
# do with its hub or with torch files, and change nothing about a local folder.
_HUB = ('cache_dir', 'commit_message', 'force_download', 'from_pt',
        'local_files_only', 'proxies', 'repo_id', 'resume_download',
        'revision', 'safe_serialization', 'token', 'trust_remote_code',
        'use_auth_token')
_LOGGER = logging.getLogger(__name__)
_FIELDS = tuple(field.name for field in dataclasses.fields(LongT5Config))


class FlaxLongT5PreTrainedModel:
  """A LongT5 that holds its parameters; made by one of its three subclasses.

  `params` is a tree of nested dicts under the names of the released T5X
  checkpoints, kernels [in, out]: `params['encoder']['layers_0']['attention']
  ['query']['kernel']`. Every method that computes takes another such tree as
  `params=`, and is then a pure function, for jax.jit and jax.grad.

  Args:
    config: the architecture: LongT5Config (transformers' too), a dict of its
      fields, or the folder of a config.json.
    input_shape: accepted for code written for transformers; parameters do not
      depend on it.
    seed: of the random parameters.
    dtype: of the matrix products: float32, bfloat16 or float16. Parameters,
      and what layers add to, stay float32.
    _do_init: False makes no parameters: every call then needs `params=`.
    **options: `remat`, `attention`: see LongT5Model;
      `gradient_checkpointing=True` is `remat='layer'`.

  Attributes:
    generation_config: what `generate` does where its caller says nothing.

  Raises:
    TypeError: an option is unknown.
    ConfigError: config or an option has a value that cannot work.
  """

  module_class: ClassVar[type[nn.Module]]
  # Tensors of a whole LongT5 that this class leaves in the file.
  unused_tensors: ClassVar[tuple[str, ...]] = ()

  def __init__(
      self, config: Any, input_shape: tuple[int, ...] = (1, 1),
      seed: int = 0, dtype: DTypeLike = jnp.float32, _do_init: bool = True,
      **options: Any,
  ):
    del input_shape
    self.config = as_config(config)
    self.dtype = jnp.dtype(dtype)
    self.generation_config = GenerationConfig()
    checkpointing = options.pop('gradient_checkpointing', False)
    for name in options:
      if name not in ('remat', 'attention'):
        raise TypeError(f'{type(self).__name__} has no argument {name!r}.')
    if checkpointing:
      options['remat'] = 'layer'
    self.module = self.module_class(
        config=self.config, dtype=self.dtype, **options)
    self.seed = seed
    self.params_shape_tree = jax.eval_shape(
        self._random_params, jax.random.key(0))
    self._params: Any = None
    if _do_init:
      self._params = self.init_weights(jax.random.key(seed))

  @property
  def params(self) -> Any:
    """The parameters that the model holds.

    Raises:
      ConfigError: it holds none.
    """
    if self._params is None:
      raise ConfigError(
          f'This {type(self).__name__} holds no parameters (_do_init=False): '
          'pass params=.')
    return self._params

  @params.setter
  def params(self, params: Any) -> None:
    self._params = jax.tree.map(jnp.asarray, self._check_params(params))

  def init_weights(self, rng: jax.Array, input_shape: Any = None,
                   params: Any = None) -> Any:
    """Random parameters, by T5's initialisers.

    Args:
      rng: a key.
      input_shape: not used.
      params: a tree whose leaves are taken instead of random ones.
    """
    del input_shape
    random = self._random_params(rng)
    if params is None:
      return random
    return traverse_util.unflatten_dict(
        traverse_util.flatten_dict(random)
        | traverse_util.flatten_dict(unfreeze(params)))

  def enable_gradient_checkpointing(self) -> None:
    """Makes gradients recompute each layer, which costs a third more time and
    takes memory for one layer."""
    self.module = self.module.clone(remat='layer')

  def to_bf16(self, params: Any, mask: Any = None) -> Any:
    """`params` in bfloat16; with `mask`, a tree of booleans, only where True.
    The model's own parameters stay as they are until they are set."""
    return _cast(params, jnp.bfloat16, mask)

  def to_fp16(self, params: Any, mask: Any = None) -> Any:
    """`to_bf16`, for float16."""
    return _cast(params, jnp.float16, mask)

  def to_fp32(self, params: Any, mask: Any = None) -> Any:
    """`to_bf16`, for float32."""
    return _cast(params, jnp.float32, mask)

  @classmethod
  def can_generate(cls) -> bool:
    """Whether there is an output layer to write with."""
    return cls.unused_tensors == ()

  @classmethod
  def from_pretrained(
      cls, pretrained_model_name_or_path: str | os.PathLike,
      dtype: DTypeLike = jnp.float32, *, config: Any = None,
      allow_missing: Sequence[str] = (), _do_init: bool = True,
      **options: Any,
  ) -> Any:
    """The model with the parameters of a checkpoint, as float32.

    Args:
      pretrained_model_name_or_path: a Hugging Face folder or file of weights
        on disk, 't5x:DIR', 'orbax:DIR', 'run:WORKDIR' or 'hf:DIR'. Nothing is
        ever downloaded.
      dtype: of the matrix products.
      config: the architecture, where the checkpoint holds none.
      allow_missing: names, or patterns with `*`, of tensors that the
        checkpoint may lack; they are initialised from `seed`.
      _do_init: False returns (model without parameters, parameters).
      **options: `seed` and options of the constructor; fields of LongT5Config,
        which replace the checkpoint's (`dropout_rate=0.0`); `subfolder`.

    Raises:
      TypeError: an option is unknown.
      ConfigError: no checkpoint, one that does not fit, or none of LongT5; the
        message names file and tensor.
    """
    # Here, so that `import longt5_flax` does without Orbax.
    from longt5_flax.interop.open import open_tensors, split_spec
    from longt5_flax.interop.tensors import load_params
    _check_hub_options('from_pretrained', options)
    path = os.path.join(os.fspath(pretrained_model_name_or_path),
                        options.pop('subfolder', ''))
    path = path.removesuffix(os.sep)
    fields = {name: options.pop(name) for name in _FIELDS if name in options}
    tensors = open_tensors(path, None if config is None else as_config(config))
    if tensors.config is None:
      raise ConfigError(f'{path} holds no config: pass config=.')
    model = cls(dataclasses.replace(tensors.config, **fields), dtype=dtype,
                _do_init=False, **options)
    params = load_params(
        tensors, model._wanted(tensors.shapes, allow_missing), allow_missing,
        allow_extra=cls.unused_tensors)
    for line in tensors.report:
      _LOGGER.info(line)
    model.generation_config = GenerationConfig.of_checkpoint(*split_spec(path))
    if not _do_init:
      return model, params
    model._params = params
    return model

  def save_pretrained(
      self, save_directory: str | os.PathLike, params: Any = None,
      push_to_hub: bool = False, max_shard_size: int | str = '5GB',
      **options: Any,
  ) -> None:
    """Writes a folder that `from_pretrained` and transformers read.

    Args:
      save_directory: made if needed.
      params: what to write; by default what the model holds.
      push_to_hub: must be False.
      max_shard_size: of one file of weights, in bytes or like '5GB'.
      **options: transformers' other options, which change nothing here.

    Raises:
      ConfigError: nothing can be written there, or an argument cannot work.
    """
    from longt5_flax.interop import huggingface
    if push_to_hub:
      raise ConfigError('push_to_hub=True: this package writes to disk only.')
    _check_hub_options('save_pretrained', options)
    if options:
      raise TypeError(
          f'save_pretrained() has no argument {next(iter(options))!r}.')
    params = self.params if params is None else self._check_params(params)
    directory = os.fspath(save_directory)
    for line in huggingface.save_pretrained(
        directory, self.config, params,
        max_shard_bytes=_bytes(max_shard_size)):
      _LOGGER.info(line)
    if self.generation_config != GenerationConfig():
      self.generation_config.save_pretrained(directory)

  def _params_or_held(self, params):
    if params is None:
      return self.params
    return jax.tree.map(jnp.asarray, unfreeze(params))

  def _random_params(self, key):
    inputs = 1 if 'decoder/*' in self.unused_tensors else 2
    return programs.init(self.module, inputs, key)

  def _wanted(self, stored, allow_missing):
    """What to load: shapes, and values of what may be missing and is."""
    if not allow_missing:
      return self.params_shape_tree
    flat = traverse_util.flatten_dict(self.params_shape_tree, sep='/')
    missing = [name for name in flat if name not in stored]
    made = jax.jit(lambda key: {
        name: value for name, value in traverse_util.flatten_dict(
            self._random_params(key), sep='/').items() if name in missing})
    return traverse_util.unflatten_dict(
        flat | made(jax.random.key(self.seed)), sep='/')

  def _check_params(self, params):
    params = unfreeze(params)
    given = traverse_util.flatten_dict(params, sep='/')
    for name, leaf in traverse_util.flatten_dict(
        self.params_shape_tree, sep='/').items():
      shape = jnp.shape(given[name]) if name in given else None
      if shape != leaf.shape:
        raise ConfigError(
            f'params: {name} has shape {shape}: must be {leaf.shape}.')
    return params


def as_config(config: Any) -> LongT5Config:
  """LongT5Config of one (or transformers'), of a dict of its fields, or of the
  folder of a config.json.

  Raises:
    ConfigError: it is nothing of that kind.
  """
  if isinstance(config, LongT5Config):
    return config
  if isinstance(config, dict):
    return LongT5Config.from_dict(config)
  if isinstance(config, str | os.PathLike):
    return LongT5Config.from_pretrained(os.fspath(config))
  if hasattr(config, 'to_dict'):
    return LongT5Config.from_dict(config.to_dict())
  raise ConfigError(f'config is of type {type(config).__name__}: must be a '
                    'LongT5Config, a dict or a folder.')


def _check_hub_options(method, options):
  for name in _HUB:
    options.pop(name, None)
  if options.pop('ignore_mismatched_sizes', False):
    raise ConfigError(f'{method}: ignore_mismatched_sizes=True would put '
                      'random numbers in; a checkpoint must fit.')


def _cast(params, dtype, mask):
  def cast(leaf, is_chosen=True):
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return leaf.astype(dtype) if is_chosen and is_float else leaf

  params = unfreeze(params)
  if mask is None:
    return jax.tree.map(cast, params)
  return jax.tree.map(cast, params, unfreeze(mask))


def _bytes(size):
  if isinstance(size, int) and size > 0:
    return size
  text = str(size).upper()
  for suffix, factor in (('KB', 10**3), ('MB', 10**6), ('GB', 10**9),
                         ('KIB', 2**10), ('MIB', 2**20), ('GIB', 2**30)):
    number = text.removesuffix(suffix)
    if number != text and number.strip().isdigit() and int(number):
      return int(number) * factor
  raise ConfigError(f'max_shard_size={size!r} must be bytes or like "5GB".')

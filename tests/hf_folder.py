"""Hugging Face folders on disk, made of golden cases by other code than the
package's: arrays under transformers' own names, written by the formats' own
libraries."""

import json
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
from safetensors.numpy import save_file

import golden


def arrays_of(name: str) -> dict[str, np.ndarray]:
  """The parameters of a golden case, by PyTorch's names."""
  return {key.removeprefix('param/'): value
          for key, value in golden.read(name).items()
          if key.startswith('param/')}


def config_of(name: str, **changes: Any) -> dict[str, Any]:
  """The config.json of a golden case; a change to None removes a key."""
  values = json.loads(str(golden.read(name)['config_json'])) | changes
  return {key: value for key, value in values.items() if value is not None}


def write(folder: Path, name: str, arrays: dict[str, np.ndarray] | None = None,
          **changes: Any) -> Path:
  """A folder of config.json and model.safetensors, and returns it."""
  write_config(folder, name, **changes)
  write_safetensors(folder / 'model.safetensors',
                    arrays_of(name) if arrays is None else arrays)
  return folder


def write_config(folder: Path, name: str, **changes: Any) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config_of(name, **changes)))


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
  save_file({key: np.ascontiguousarray(value)
             for key, value in arrays.items()}, path, {'format': 'pt'})


def write_msgpack(path: Path, arrays: dict[str, np.ndarray]) -> None:
  path.write_bytes(flax.serialization.to_bytes(
      flax.traverse_util.unflatten_dict(arrays, sep='/')))


def flax_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """PyTorch's names and layout to those of Hugging Face's Flax models."""
  converted = {}
  for name, value in arrays.items():
    *parts, _ = name.split('.')
    if parts[-1] == 'shared' or parts[-1].endswith(('_bias', 'embed_tokens')):
      parts.append('embedding')
    elif parts[-1].endswith('norm'):
      parts.append('weight')
    else:
      parts.append('kernel')
      value = value.T
    converted['/'.join(parts)] = value
  return converted


def shapes_of(params: Any, dtype: Any = np.float32) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)

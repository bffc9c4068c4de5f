"""Any checkpoint of parameters, by KIND:PATH."""

import os

from longt5_flax.config import LongT5Config
from longt5_flax.interop.same_model import check_same_model
from longt5_flax.interop.tensors import Tensors, WeightsError

# What may stand before the colon, and what stands after it.
KINDS = {
    'hf': 'DIR_OR_FILE', 't5x': 'DIR_OR_URL', 't5': 'DIR_OR_URL',
    'orbax': 'DIR', 'run': 'WORKDIR', 'safetensors': 'FILE',
}


def open_tensors(spec: str, config: LongT5Config | None = None) -> Tensors:
  """Opens a checkpoint; no tensor is read yet.

  Args:
    spec: 'hf:DIR_OR_FILE' (Hugging Face), 't5x:DIR_OR_URL', 't5:DIR_OR_URL' (a
      T5.1.1 of either kind as a start), 'orbax:DIR', 'run:WORKDIR' or
      'safetensors:FILE'. A path alone is Hugging Face's. Nothing is downloaded
      but from a URL.
    config: the architecture, where the checkpoint holds none. It takes the
      place of a Hugging Face folder's; that of other checkpoints must be of
      the same model.

  Raises:
    WeightsError: the kind is unknown, nothing is there, it is damaged, or of
      another model than `config`.
    ConfigError: its config is missing, or no LongT5's.
  """
  kind, path = split_spec(spec)
  # Each format's libraries are imported when one is opened.
  match kind:
    case 't5x':
      from longt5_flax.interop.t5x import open_t5x
      return open_t5x(path, config)
    case 't5':
      from longt5_flax.interop.t5 import open_t5
      return open_t5(path, config)
    case 'orbax':
      from longt5_flax.interop.orbax import open_orbax
      return _with_config(open_orbax(path), config)
    case 'run':
      from longt5_flax.interop.orbax import open_run
      return _with_config(open_run(path), config)
    case 'safetensors':
      from longt5_flax.interop.single_file import open_single_file
      return _with_config(open_single_file(path), config)
    case _:
      from longt5_flax.interop.huggingface import open_huggingface
      return open_huggingface(path, config)


def _with_config(tensors, config):
  if config is not None:
    check_same_model(tensors.origin, tensors.config, config)
    tensors.config = config
  return tensors


def split_spec(spec: str) -> tuple[str, str]:
  """(kind, path) of KIND:PATH, or of the path of something there.

  Raises:
    WeightsError: it is neither.
  """
  kind, colon, path = spec.partition(':')
  if colon and path and kind in KINDS:
    return kind, path
  if os.path.exists(spec):
    return 'hf', spec
  known = ', '.join(f'{kind}:{what}' for kind, what in KINDS.items())
  raise WeightsError(f'{spec!r} must be one of {known}, or the path of a '
                     'Hugging Face folder on disk.')

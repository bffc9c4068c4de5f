"""Folders and files that are there whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator

from longt5_flax.interop.tensors import WeightsError


@contextlib.contextmanager
def written_whole(target: str) -> Iterator[str]:
  """Gives a path beside `target` to write to, a folder or a file.

  It takes the target's place at the end of the block, by renaming. After an
  error nothing is left; after a kill a hidden `.NAME.*.incomplete` may be.

  Args:
    target: what to make; its parents are made too.

  Raises:
    WeightsError: the target is there, and no empty folder.
  """
  target = os.path.abspath(target)
  check_free(target)
  parent, name = os.path.split(target)
  try:
    os.makedirs(parent, exist_ok=True)
    place = tempfile.mkdtemp(
        prefix=f'.{name}.', suffix='.incomplete', dir=parent)
  except OSError as error:
    raise WeightsError(
        f'{target}: cannot be written ({error.strerror}: {error.filename}).'
    ) from None
  try:
    new = os.path.join(place, name)
    yield new
    os.rename(new, target)  # Replaces an empty folder, and nothing else.
  except OSError as error:
    raise WeightsError(
        f'{target}: cannot be written ({error.strerror or error}).') from None
  finally:
    shutil.rmtree(place, ignore_errors=True)


def replace_file(path: str, text: str) -> None:
  """Writes a file in the place of one that may be there: after a kill or a
  power cut the path has all of the old text or all of the new one."""
  with open(path + '.part', 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(path + '.part', path)


def check_free(target: str) -> None:
  """Refuses a target that is there, unless it is an empty folder.

  Raises:
    WeightsError: it is there.
  """
  empty = (os.path.isdir(target) and not os.path.islink(target)
           and not os.listdir(target))
  if os.path.lexists(target) and not empty:
    raise WeightsError(f'{target}: is there already; nothing is overwritten.')

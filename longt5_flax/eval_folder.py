"""The folder of an evaluation: predictions.jsonl, scores.json, and until they
are whole what is decoded so far.

A kill costs no more than the batch in hand: partial.jsonl grows by one line a
batch, and goes when the other two are written.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from longt5_flax.compare import read_predictions
from longt5_flax.config import ConfigError
from longt5_flax.interop.atomic import replace_file

_PREDICTIONS, _SCORES, _PARTIAL = (
    'predictions.jsonl', 'scores.json', 'partial.jsonl')


class Found(NamedTuple):
  """What a folder holds of an evaluation.

  Attributes:
    predictions: all of them, in the order of the data, if they are whole.
    batches: else those of the first batches.
    note: for the user to read; '' if nothing was there.
  """
  predictions: list[str] | None = None
  batches: Sequence[list[str]] = ()
  note: str = ''


class EvalFolder:
  """Reads and writes the files of one evaluation.

  Args:
    path: of the folder, which is made when there is something to write.
    identity: what predictions follow from: fingerprints of the `weights` and
      of the `data`, and `decoding`, settings by name.
  """

  def __init__(self, path: str, identity: Mapping[str, Any]):
    self._path = path
    self._identity = json.loads(json.dumps(identity))  # As it is read back.

  def find(self, replace: bool) -> Found:
    """What is there to go on from; what is of other settings goes.

    Args:
      replace: predictions of other weights or data may go, too.

    Raises:
      ConfigError: they are there, and may not.
    """
    scores, partial = self._scores(), self._partial()
    stored = scores or (partial[0] if partial else None)
    if stored is None:
      if os.path.exists(self._file(_PREDICTIONS)) and not replace:
        raise ConfigError(
            f'{self._file(_PREDICTIONS)} has no {_SCORES} that says what it is '
            'of: move it away, or choose another --workdir.')
      return Found()
    differences = [
        f'{name}={stored["decoding"].get(name)!r}, not {value!r}'
        for name, value in self._identity['decoding'].items()
        if stored['decoding'].get(name) != value]
    for name in ('weights', 'data'):
      if stored[name] != self._identity[name]:
        differences.insert(0, f'other {name}')
        if not replace:
          raise ConfigError(
              f'{self._path} holds predictions of other {name}: choose another '
              '--workdir, or move it away.')
    if differences:
      for name in (_PREDICTIONS, _SCORES, _PARTIAL):
        self._remove(name)
      return Found(note=f'{self._path} held predictions of {differences[0]}: '
                   'starting anew.')
    if scores and os.path.exists(self._file(_PREDICTIONS)):
      examples = read_predictions(self._file(_PREDICTIONS))
      return Found([example['prediction'] for example in examples.values()],
                   note=f'{self._file(_PREDICTIONS)} is there already.')
    return Found(batches=partial[1:])

  def append(self, number: int, texts: Sequence[str]) -> None:
    """Adds a batch; when it returns, the batch is on disk.

    Args:
      number: of the batch; they come in order.
      texts: its predictions.
    """
    path = self._file(_PARTIAL)
    os.makedirs(self._path, exist_ok=True)
    with open(path, 'a', encoding='utf-8') as file:
      if not file.tell():
        file.write(_line(self._identity))
      file.write(_line({'batch': number, 'predictions': texts}))
      file.flush()
      os.fsync(file.fileno())

  def finish(self, predictions: Iterable[Mapping[str, Any]],
             scores: Mapping[str, Any]) -> None:
    """Writes both files, and removes what was there of batches.

    Args:
      predictions: a line for each.
      scores: what is known besides the identity.
    """
    os.makedirs(self._path, exist_ok=True)
    replace_file(self._file(_PREDICTIONS), ''.join(map(_line, predictions)))
    replace_file(self._file(_SCORES), json.dumps(
        {**scores, **self._identity}, indent=2, ensure_ascii=False) + '\n')
    self._remove(_PARTIAL)

  def _file(self, name):
    return os.path.join(self._path, name)

  def _scores(self):
    """The identity that scores.json is of."""
    try:
      with open(self._file(_SCORES), encoding='utf-8') as file:
        record = json.load(file)
      return {name: record[name] for name in self._identity}
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError):
      raise self._foreign(_SCORES) from None

  def _partial(self):
    """The identity of partial.jsonl and its batches; what comes after the last
    whole line is cut off."""
    path = self._file(_PARTIAL)
    try:
      with open(path, 'rb') as file:
        content = file.read()
    except FileNotFoundError:
      return []
    end = content.rfind(b'\n') + 1
    os.truncate(path, end)
    if not end:
      return []
    try:
      first, *lines = map(json.loads, content[:end].splitlines())
      # Two evaluations at once may have written lines twice.
      batches = {line['batch']: line['predictions'] for line in lines}
      return [{name: first[name] for name in self._identity},
              *(batches[i] for i in range(len(batches)))]
    except (ValueError, KeyError, TypeError):
      raise self._foreign(_PARTIAL) from None

  def _foreign(self, name):
    return ConfigError(f'{self._file(name)} was not written by eval.py: move '
                       'it away, or choose another --workdir.')

  def _remove(self, name):
    if os.path.exists(self._file(name)):
      os.remove(self._file(name))


def digest(parts: Iterable[bytes]) -> str:
  """A fingerprint of weights or data."""
  found = hashlib.sha256()
  for part in parts:
    found.update(part)
  return found.hexdigest()[:16]


def _line(value):
  return json.dumps(value, ensure_ascii=False) + '\n'

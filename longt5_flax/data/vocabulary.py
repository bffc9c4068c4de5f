"""The vocabulary: a SentencePiece model and T5's sentinels.

Equal, id for id, to seqio.SentencePieceVocabulary, which needs TensorFlow.
"""

import hashlib
import itertools
from collections.abc import Iterable

import numpy as np
import sentencepiece

from longt5_flax.data.sources import DataError


class Vocabulary:
  """Text to token ids and back.

  Sentinels are the pieces <extra_id_n>. As in seqio, those that are added come
  after the model's own pieces, <extra_id_0> last, and are found in text only
  where a word starts. Those that the model holds already are not added again:
  seqio would have to be told so by extra_ids=0.

  Args:
    path: a SentencePiece model with padding as id 0.
    extra_ids: how many sentinels there are to be.

  Attributes:
    fingerprint: of all pieces, sentinels included.

  Raises:
    DataError: `path` is not such a model.
  """

  pad_id = 0

  def __init__(self, path: str, extra_ids: int = 100):
    try:
      with open(path, 'rb') as file:
        model = file.read()
    except OSError as error:
      raise DataError(f'cannot read vocabulary {path}: {error.strerror}'
                      ) from None
    self._load(model, extra_ids, path)

  @classmethod
  def from_model(cls, model: bytes, extra_ids: int, path: str) -> 'Vocabulary':
    """The vocabulary of a file's content; `path` is for messages."""
    vocabulary = cls.__new__(cls)
    vocabulary._load(model, extra_ids, path)
    return vocabulary

  def _load(self, model: bytes, extra_ids: int, path: str) -> None:
    if extra_ids < 0:
      raise DataError(f'extra_ids={extra_ids} must be at least 0')
    self._processor = sentencepiece.SentencePieceProcessor()
    try:
      self._processor.LoadFromSerializedProto(model)
      held = {self._processor.IdToPiece(i).removeprefix('▁')
              for i in range(self._processor.GetPieceSize())}
      sentinels = [f'<extra_id_{n}>' for n in reversed(range(extra_ids))]
      model += b''.join(
          _piece('▁' + name) for name in sentinels if name not in held)
      self._processor.LoadFromSerializedProto(model)
    except RuntimeError:
      raise DataError(f'vocabulary {path} is no SentencePiece model') from None
    self.fingerprint = hashlib.sha256(model).hexdigest()
    if self._processor.pad_id() != self.pad_id:
      raise DataError(f'vocabulary {path} has padding as id '
                      f'{self._processor.pad_id()}: it must be 0')
    if self.eos_id < 0:
      raise DataError(f'vocabulary {path} has no piece for the end of a '
                      'sequence')

  @property
  def size(self) -> int:
    """Number of ids, sentinels included."""
    return self._processor.GetPieceSize()

  @property
  def eos_id(self) -> int:
    """Ends a sequence."""
    return self._processor.eos_id()

  @property
  def unk_id(self) -> int:
    """Stands for text without a piece."""
    return self._processor.unk_id()

  def sentinel_ids(self, count: int) -> np.ndarray:
    """[count] int32: ids that stand for spans of text, in order of use.

    <extra_id_0>, <extra_id_1>, ... and, where they do not suffice, the highest
    other ids, descending. So it is with T5, which counts down from the highest
    id of all: its inputs of 4096 tokens have 227 spans, and 100 sentinels.

    Raises:
      DataError: there are no sentinels, or not so many ids.
    """
    find = self._processor.PieceToId
    names = (f'<extra_id_{n}>' for n in itertools.count())
    held = (max(find('▁' + name), find(name)) for name in names)
    sentinels = list(itertools.takewhile(lambda i: i != self.unk_id, held))
    if not sentinels:
      raise DataError('the vocabulary has no sentinels <extra_id_n>, which '
                      'span corruption needs: set data.extra_ids=100')
    special = {self.pad_id, self.eos_id, self.unk_id, *sentinels}
    others = [i for i in reversed(range(self.size)) if i not in special]
    if count > len(sentinels + others):
      raise DataError(f'span corruption needs {count} sentinels: more than the '
                      f'{self.size} ids of the vocabulary')
    return np.array((sentinels + others)[:count], np.int32)

  def encode(self, text: str) -> list[int]:
    """Token ids of a text, without end of sequence."""
    return self._processor.EncodeAsIds(text)

  def decode(self, ids: Iterable[int]) -> str:
    """Text of token ids up to the first end of sequence.

    Ids beyond the vocabulary (the embedding may be larger) are unknown pieces.
    """
    known = [int(i) if i < self.size else self.unk_id for i in ids]
    if self.eos_id in known:
      known = known[:known.index(self.eos_id)]
    return self._processor.DecodeIds(known)


def _piece(text: str) -> bytes:
  """A user-defined piece as SentencePiece's ModelProto stores it.

  Serialised messages are joined by appending, so this needs no protobuf, whose
  versions quarrel: field 1 of the model holds the piece (1), its score (2,
  left at 0) and its type (3: 4, user-defined). Lengths fit one byte.
  """
  name = text.encode('utf-8')
  fields = b'\x0a' + bytes([len(name)]) + name + b'\x18\x04'
  return b'\x0a' + bytes([len(fields)]) + fields

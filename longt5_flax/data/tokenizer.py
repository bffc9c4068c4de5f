"""Texts to batches of ids and back, by the SentencePiece model beside weights.

Called as T5's tokenizer of transformers is, without needing transformers.
"""

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

_MODEL, _CONFIG = 'spiece.model', 'tokenizer_config.json'


class Encoded(dict[str, Any]):
  """`input_ids` and `attention_mask`, by key or as attributes."""

  def __getattr__(self, name: str) -> Any:
    try:
      return self[name]
    except KeyError:
      raise AttributeError(name) from None


class Tokenizer:
  """T5's tokenizer: pieces, sentinels <extra_id_n>, </s> after each text.

  Sentinels are found in text where a word starts.

  Args:
    vocab_file: the SentencePiece model.
    extra_ids: how many sentinels there are.

  Raises:
    DataError: the file is no such model.
  """

  def __init__(self, vocab_file: str | os.PathLike, extra_ids: int = 100):
    self.vocab_file = os.fspath(vocab_file)
    self.extra_ids = extra_ids
    self.vocabulary = Vocabulary(self.vocab_file, extra_ids)
    self.pad_token_id = self.vocabulary.pad_id
    self.eos_token_id = self.vocabulary.eos_id
    self.unk_token_id = self.vocabulary.unk_id
    sentinels = (self.vocabulary.sentinel_ids(extra_ids).tolist()
                 if extra_ids else [])
    self._special = {self.pad_token_id: '<pad>', self.eos_token_id: '</s>',
                     self.unk_token_id: '<unk>'}
    self._special |= {i: f'<extra_id_{n}>' for n, i in enumerate(sentinels)}

  @classmethod
  def from_pretrained(cls, path: str | os.PathLike) -> 'Tokenizer':
    """Reads a folder's `spiece.model`, and from `tokenizer_config.json`, if it
    is there, the number of sentinels; or a SentencePiece model by itself.

    Raises:
      DataError: there is none, or one of them is damaged.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
      return cls(path)
    extra_ids: Any = 100
    config = os.path.join(path, _CONFIG)
    if os.path.exists(config):
      try:
        with open(config, encoding='utf-8') as file:
          extra_ids = dict(json.load(file)).get('extra_ids', 100)
      except (OSError, ValueError, TypeError):
        raise DataError(f'{config} must hold a JSON object') from None
      if not isinstance(extra_ids, int) or extra_ids < 0:
        raise DataError(
            f'{config}: extra_ids={extra_ids!r} must be an integer, at least 0')
    return cls(os.path.join(path, _MODEL), extra_ids)

  def save_pretrained(self, directory: str | os.PathLike) -> None:
    """Writes both files into a folder, which is made if needed."""
    os.makedirs(directory, exist_ok=True)
    target = os.path.join(directory, _MODEL)
    if os.path.abspath(target) != os.path.abspath(self.vocab_file):
      shutil.copyfile(self.vocab_file, target)
    with open(os.path.join(directory, _CONFIG), 'w', encoding='utf-8') as file:
      json.dump({'extra_ids': self.extra_ids, 'tokenizer_class': 'T5Tokenizer'},
                file, indent=2)
      file.write('\n')

  def __len__(self) -> int:
    return self.vocabulary.size

  def __call__(
      self,
      text: str | Sequence[str],
      padding: bool | str = False,
      truncation: bool = False,
      max_length: int | None = None,
      pad_to_multiple_of: int | None = None,
      add_special_tokens: bool = True,
      return_tensors: str | None = None,
  ) -> Encoded:
    """Ids of a text or of a batch of texts.

    Args:
      text: one or several.
      padding: True or 'longest' pads to the longest text of the batch,
        'max_length' to `max_length`.
      truncation: cut to `max_length`, </s> staying last.
      max_length: tokens.
      pad_to_multiple_of: the padded length is a multiple of it.
      add_special_tokens: end each text with </s>.
      return_tensors: 'np' or 'jax' gives int32 arrays [B, L], of one text
        [1, L]; None gives lists.

    Returns:
      `input_ids` and `attention_mask`.

    Raises:
      DataError: an option has an unknown value or lacks another, or texts of
        different lengths are to be one array.
    """
    if padding not in (False, True, 'longest', 'max_length', 'do_not_pad'):
      raise DataError(f'padding={padding!r} must be False, True, "longest" or '
                      '"max_length"')
    if return_tensors not in (None, 'np', 'jax'):
      raise DataError(f'return_tensors={return_tensors!r} must be None, "np" '
                      'or "jax"')
    if max_length is None and (truncation or padding == 'max_length'):
      raise DataError('truncation and padding="max_length" need max_length=')
    cut = max_length if truncation else None
    texts = [text] if isinstance(text, str) else list(text)
    rows = [self.encode(text, add_special_tokens, cut) for text in texts]
    masks = [[1] * len(row) for row in rows]
    if padding not in (False, 'do_not_pad'):
      length = max_length if padding == 'max_length' else max(
          map(len, rows), default=0)
      assert length is not None
      length += -length % (pad_to_multiple_of or 1)
      rows = [row + [self.pad_token_id] * (length - len(row)) for row in rows]
      masks = [mask + [0] * (length - len(mask)) for mask in masks]
    if return_tensors:
      return Encoded(input_ids=_tensor(rows, return_tensors),
                     attention_mask=_tensor(masks, return_tensors))
    if isinstance(text, str):
      rows, masks = rows[0], masks[0]  # type: ignore[assignment]
    return Encoded(input_ids=rows, attention_mask=masks)

  def encode(self, text: str, add_special_tokens: bool = True,
             max_length: int | None = None) -> list[int]:
    """Ids of a text; with `max_length`, of as much of it as that has room
    for."""
    ids = self.vocabulary.encode(text)
    end = [self.eos_token_id] if add_special_tokens else []
    if max_length is not None:
      ids = ids[:max(0, max_length - len(end))]
    return ids + end

  def decode(self, token_ids: Any, skip_special_tokens: bool = False,
             clean_up_tokenization_spaces: bool = False) -> str:
    """The text of ids.

    Args:
      token_ids: array or list [T], padding and </s> included.
      skip_special_tokens: leave out <pad>, </s>, <unk> and sentinels, which
        else stand in the text, a space on either side.
      clean_up_tokenization_spaces: drop spaces before punctuation.
    """
    ids = np.asarray(token_ids).tolist()
    if skip_special_tokens:
      text = self.vocabulary.decode(filter(self._is_piece, ids))
    else:
      text = ' '.join(
          self.vocabulary.decode(run) if is_text else
          ' '.join(self._special.get(token, '<unk>') for token in run)
          for is_text, run in itertools.groupby(ids, self._is_piece))
    if clean_up_tokenization_spaces:
      text = re.sub(r" (?=[.?!,]|n't\b|'(?:m|s|ve|re)\b)", '', text)
    return text

  def batch_decode(
      self, sequences: Iterable[Any],
      skip_special_tokens: bool = False,
      clean_up_tokenization_spaces: bool = False) -> list[str]:
    """`decode` of each row."""
    return [self.decode(row, skip_special_tokens, clean_up_tokenization_spaces)
            for row in sequences]

  def _is_piece(self, token):
    return token not in self._special and 0 <= token < len(self)


def _tensor(rows, kind):
  if len({len(row) for row in rows}) > 1:
    raise DataError('texts of different lengths are no array: use padding=True')
  array = np.array(rows, np.int32).reshape(len(rows), -1)
  if kind == 'np':
    return array
  import jax.numpy as jnp  # Not needed by what reads data.
  return jnp.asarray(array)

"""What a user may ask of decoding."""

import dataclasses
from typing import Any

import numpy as np

_TOKENS = ('pad_token_id', 'decoder_start_token_id', 'forced_bos_token_id',
           'forced_eos_token_id')


class GenerationError(ValueError):
  """A request, in one line, that decoding cannot follow."""


@dataclasses.dataclass(frozen=True)
class GenerationOptions:
  """How to decode; meanings and defaults are those of transformers 4.57.

  Hashable, so that a compiled function may take it as a static argument: one
  set of options, one program.

  Attributes:
    max_length: tokens of a sequence at most; the prompt (so the start token,
      too) and EOS count.
    min_length: a sequence cannot end before it has so many, counted likewise.
    num_beams: hypotheses that are extended at a time; 1 is no beam search.
    do_sample: draw tokens instead of taking the likeliest.
    temperature: divides the scores before drawing.
    top_k: draw among the k likeliest; 0 is all.
    top_p: draw among the likeliest that hold this share of probability.
    length_penalty: a hypothesis' score is its log-probability divided by its
      number of new tokens to this power.
    early_stopping: when a beam search ends. True: as soon as `num_beams`
      hypotheses have ended. False: when, moreover, the best one that goes on
      scores no better than the worst that has ended. 'never': when it could
      score no better at any length.
    num_return_sequences: results for each input: the best hypotheses, or so
      many draws.
    no_repeat_ngram_size: no n-gram of this size occurs twice; 0 is no rule.
    repetition_penalty: above 1, tokens that have occurred become less likely.
    eos_token_ids: each of them ends a sequence; () is none.
    pad_token_id: fills a row after its end.
    decoder_start_token_id: what decoding starts from where there is no prompt.
    forced_bos_token_id: the first token after a prompt of one token.
    forced_eos_token_id: the last token of a sequence of `max_length`.
  """
  max_length: int = 20
  min_length: int = 0
  num_beams: int = 1
  do_sample: bool = False
  temperature: float = 1.0
  top_k: int = 50
  top_p: float = 1.0
  length_penalty: float = 1.0
  early_stopping: bool | str = False
  num_return_sequences: int = 1
  no_repeat_ngram_size: int = 0
  repetition_penalty: float = 1.0
  eos_token_ids: tuple[int, ...] = (1,)
  pad_token_id: int = 0
  decoder_start_token_id: int = 0
  forced_bos_token_id: int | None = None
  forced_eos_token_id: int | None = None

  def __post_init__(self) -> None:
    """Checks each value, and what they must be together.

    Raises:
      GenerationError: naming the value and the rule.
    """
    for name, least in (
        ('max_length', 1), ('min_length', 0), ('num_beams', 1), ('top_k', 0),
        ('num_return_sequences', 1), ('no_repeat_ngram_size', 0)):
      self._check(name, _is_int(getattr(self, name), least),
                  f'an integer, at least {least}')
    for name in ('temperature', 'top_p', 'length_penalty',
                 'repetition_penalty'):
      self._check(name, _is_finite(getattr(self, name)), 'a finite number')
    self._check('top_p', 0 <= self.top_p <= 1, 'from 0 to 1')
    self._check('repetition_penalty', self.repetition_penalty > 0,
                'greater than 0')
    self._check('temperature', self.temperature > 0 or not self.do_sample,
                'greater than 0; for the likeliest token, do_sample=False')
    self._check('early_stopping', isinstance(self.early_stopping, bool)
                or self.early_stopping == 'never', "True, False or 'never'")
    self._check('eos_token_ids', isinstance(self.eos_token_ids, tuple)
                and all(_is_int(token, 0) for token in self.eos_token_ids),
                'a tuple of token ids')
    for name in _TOKENS:
      value = getattr(self, name)
      may_be_none = name.startswith('forced')
      self._check(name, _is_int(value, 0) or may_be_none and value is None,
                  'a token id')
    if self.num_beams > 1:
      self._check('num_return_sequences',
                  self.num_return_sequences <= self.num_beams,
                  f'at most num_beams={self.num_beams}')
    elif not self.do_sample:
      self._check('num_return_sequences', self.num_return_sequences == 1,
                  '1 without beams and without sampling')

  def check_tokens(self, vocab_size: int) -> None:
    """Raises GenerationError if a token is outside the vocabulary."""
    for name in ('eos_token_ids', *_TOKENS):
      tokens = getattr(self, name)
      is_inside = tokens is None or bool(np.all(np.less(tokens, vocab_size)))
      self._check(name, is_inside, f'below the vocabulary size, {vocab_size}')

  def _check(self, name: str, is_right: bool, rule: str) -> None:
    if not is_right:
      raise GenerationError(f'{name}={getattr(self, name)!r} must be {rule}.')

  @property
  def rows_per_input(self) -> int:
    """Rows that are decoded for each input."""
    return max(self.num_beams, self.num_return_sequences)


def _is_finite(value: Any) -> bool:
  return isinstance(value, int | float | np.number) and bool(
      np.isfinite(value))


def _is_int(value: Any, least: int) -> bool:
  return (isinstance(value, int | np.integer) and not isinstance(value, bool)
          and bool(value >= least))

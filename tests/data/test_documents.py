"""Documents: tokenised as far as needed, words by number."""

from pathlib import Path

import numpy as np
import pytest

from longt5_flax.data.documents import (
    TextDocument,
    TokenizedDocument,
    count_words,
    cut_long_sentences,
    ends_of,
    split_sentences,
)
from longt5_flax.data.gap_sentences import (
    GapSentenceOptions,
    mask_gap_sentences,
    sentence_scores,
)

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
TEXT = (FOLDER / 'owl_creek.txt').read_text('utf-8')
SENTENCES = split_sentences(TEXT)


def encode(sentence):
  """One token a character, never 0 or 1."""
  return [2 + ord(character) for character in sentence]


class Counting:
  """`encode`, and how many tokens it gave."""

  def __init__(self):
    self.tokens = 0

  def __call__(self, sentence):
    ids = encode(sentence)
    self.tokens += len(ids)
    return ids


def tokenized(sentences):
  rows = list(map(encode, sentences))
  return TokenizedDocument(
      np.concatenate(rows).astype(np.int32), ends_of(rows),
      count_words(sentences))


def test_words():
  words = count_words(['The cat. ', '', '?! ', "The DOG's cat"])
  assert words.ids.tolist() == [0, 1, 0, 2, 3, 1]
  assert words.ends.tolist() == [0, 2, 2, 2, 6]
  assert words.size == 4
  assert len(words) == 4
  assert count_words(['The cat'], ['the', 'CAT']).ids.tolist() == [0]
  assert len(count_words([])) == 0


@pytest.mark.parametrize('ngram', [1, 2])
@pytest.mark.parametrize('start, end', [(0, 12), (10, 40), (40, None), (7, 7)])
def test_part_scores_as_its_sentences_alone(start, end, ngram):
  options = GapSentenceOptions(ngram=ngram, option='log')
  part = SENTENCES[start:end]
  words = count_words(SENTENCES).part(start, start + len(part))
  assert len(words) == len(part)
  scores = sentence_scores(words, options)
  assert np.array_equal(scores, sentence_scores(part, options))
  assert not len(scores) or scores.any()


def test_part_costs_as_much_as_its_words():
  """Not as much as the words of the whole document."""
  words = count_words([*SENTENCES, ' '.join(map(str, range(100_000)))])
  part = words.part(3, 9)
  assert part.size == len(part.ids) < 300


def test_text_is_tokenised_once_and_as_far_as_needed():
  encode = Counting()
  document = TextDocument(SENTENCES, encode)
  whole = tokenized(SENTENCES)
  assert len(document) == len(whole) == len(SENTENCES)
  for start, end, most in ((0, len(SENTENCES), 100), (5, 6, None), (3, 7, 300),
                           (4, 4, None), (2, 4, 0)):
    assert np.array_equal(document.tokens(start, end, most),
                          whole.tokens(start, end, most))
  assert encode.tokens < 1500 < len(TEXT)
  assert np.array_equal(document.ends, whole.ends)
  assert np.array_equal(document.ids, whole.ids)
  assert np.array_equal(document.tokens(3, 7, 300), whole.tokens(3, 7, 300))
  assert encode.tokens == len(TEXT)


def test_gap_sentences_of_text_tokenise_what_they_use():
  """What the inputs have room for, and what is selected."""
  encode = Counting()
  options = GapSentenceOptions(min_ratio=0.1, ratio=0.1)
  examples = [
      mask_gap_sentences(document, range(len(SENTENCES)), options,
                         np.random.default_rng(0), (512, 128))
      for document in (TextDocument(SENTENCES, encode), tokenized(SENTENCES))]
  for text, arrays in zip(*examples, strict=True):
    assert np.array_equal(text, arrays)
  assert examples[0][2] > 0
  assert encode.tokens < 0.3 * len(TEXT)


def test_stored_scores_are_of_the_whole_document_only():
  options = GapSentenceOptions(strategy='rouge', ratio=0.1)
  document = tokenized(SENTENCES[:40])
  scores = sentence_scores(document.words, options)
  turned = TokenizedDocument(
      document.ids, document.ends, document.words, -scores)

  def targets(document, part):
    return mask_gap_sentences(document, part, options,
                              np.random.default_rng(0), (4096, 4096))[1]

  assert not np.array_equal(targets(turned, range(40)),
                            targets(document, range(40)))
  for part in (range(39), range(1, 40)):
    assert np.array_equal(targets(turned, part), targets(document, part))


def test_long_sentences_are_cut():
  document = tokenized(['ab cd. ', 'one two three four five', '', 'x' * 9])
  assert cut_long_sentences(document, 23, 5) is document
  cut = cut_long_sentences(document, 8, 5)
  assert cut.ids is document.ids
  assert np.diff(cut.ends).tolist() == [7, 5, 5, 5, 5, 3, 0, 5, 4]
  # Words go with the tokens, as far as whole ones can.
  assert np.diff(cut.words.ends).tolist() == [2, 1, 1, 1, 1, 1, 0, 0, 1]
  assert cut.words.ids is document.words.ids

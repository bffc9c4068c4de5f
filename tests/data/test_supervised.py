"""Supervised examples: what becomes of them in rows, and that these are the
same whoever makes them."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from longt5_flax.data.examples import Example, Examples
from longt5_flax.data.objectives import make_objective
from longt5_flax.data.options import PipelineOptions
from longt5_flax.data.pipeline import BatchIterator, Delivered, fixed_batches
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
VOCABULARY = Vocabulary(str(FOLDER / 'tiny.model'))
PARAGRAPHS = [part for part in (FOLDER / 'owl_creek.txt').read_text(
    'utf-8').split('\n\n') if part.strip()]
EXAMPLES = Examples(
    Example(f'{i}', text, text[:40], (text[:40],))
    for i, text in enumerate(PARAGRAPHS))
ROWS = range(5)
POLICIES = ('cut_end', 'cut_middle', 'leave_out')
LONG = Example('q7', 'one two three four five six seven', 'eight nine ten', ())


def make_options(lengths=(160, 24), **changes):
  return PipelineOptions(*lengths, **{
      'objective': 'supervised', 'global_block_size': 8, 'seed': 3} | changes)


def made(example, **changes):
  objective = make_objective(VOCABULARY, make_options(**changes))
  result, end = objective.example(objective.read(example), 0, (), (0, 0))
  assert end is None
  return result


def test_inputs_and_targets_end():
  found = made(LONG)
  assert found.inputs.tolist() == [*VOCABULARY.encode(LONG.inputs), 1]
  assert found.targets.tolist() == [*VOCABULARY.encode(LONG.targets), 1]
  assert found[2:] == (0, 0, 0)


def test_prefix():
  found = made(LONG, prefix='summarize: ')
  assert found.inputs.tolist() == [
      *VOCABULARY.encode('summarize: ' + LONG.inputs), 1]
  assert found.targets.tolist() == made(LONG).targets.tolist()


def test_long_inputs_are_cut_where_the_policy_says():
  """The end of sequence stays; so many tokens are lost as are missing."""
  ids = VOCABULARY.encode(LONG.inputs)
  for policy, kept in (('cut_end', ids[:7]),
                       ('cut_middle', ids[:4] + ids[-3:])):
    found = made(LONG, lengths=(8, 24), long_inputs=policy)
    assert found.inputs.tolist() == [*kept, 1]
    assert (found.lost_inputs, found.left_out) == (len(ids) - 7, 0)
  # At the limit nothing is lost.
  found = made(LONG, lengths=(len(ids) + 1, 24), long_inputs='refuse')
  assert found.inputs.tolist() == [*ids, 1]
  ids = VOCABULARY.encode('e ' + LONG.inputs)
  found = made(LONG, lengths=(8, 24), prefix='e ')
  assert found.inputs.tolist() == [*ids[:7], 1]
  assert found.lost_inputs == len(ids) - 7


def test_long_inputs_are_left_out_or_refused():
  found = made(LONG, lengths=(8, 24), long_inputs='leave_out')
  assert (len(found.inputs), len(found.targets), found.left_out) == (0, 0, 1)
  count = len(VOCABULARY.encode(LONG.inputs)) + 1
  with pytest.raises(DataError) as error:
    made(LONG, lengths=(count - 1, 24), long_inputs='refuse')
  assert str(error.value) == (
      f"example 'q7': {count} input tokens are more than inputs_length="
      f"{count - 1}, and long_inputs='refuse'")


def test_long_targets_are_cut_at_the_end():
  ids = VOCABULARY.encode(LONG.targets)
  found = made(LONG, lengths=(64, 4))
  assert found.targets.tolist() == [*ids[:3], 1]
  assert found.lost == len(ids) - 3


def test_targets_that_are_no_tokens():
  with pytest.raises(DataError) as error:
    made(LONG._replace(targets=' '))
  assert str(error.value) == "example 'q7': targets=' ' has no tokens"


def iterator(workers=0, rows=ROWS, **changes):
  return BatchIterator(EXAMPLES, VOCABULARY, make_options(**changes), len(ROWS),
                       rows, workers)


def check_equal(batches, expected):
  for batch, other in zip(batches, expected, strict=True):
    assert list(batch) == list(other)
    for name in batch:
      assert np.array_equal(batch[name], other[name]), name


def take(batches, count):
  return list(itertools.islice(batches, count))


@pytest.mark.parametrize('workers', [1, 3])
@pytest.mark.parametrize('packing', [True, False])
def test_any_number_of_workers_makes_the_same_batches(packing, workers):
  with (iterator(packing=packing) as one,
        iterator(workers, packing=packing) as other):
    check_equal(take(other, 12), take(one, 12))
    assert one.stats() == other.stats()
    assert one.get_state() == other.get_state()


def test_two_hosts_make_the_batches_of_one():
  with iterator() as whole, iterator(rows=(4, 1)) as some:
    check_equal(take(some, 12), [
        {name: array[[4, 1]] for name, array in batch.items()}
        for batch in take(whole, 12)])


@pytest.mark.parametrize('long_inputs', POLICIES)
@pytest.mark.parametrize('packing', [True, False])
def test_resumes_after_any_batch(packing, long_inputs):
  changes = {'packing': packing, 'long_inputs': long_inputs}
  whole = take(iterator(**changes), 10)
  one, resumed = iterator(**changes), iterator(**changes)
  for done in range(9):
    resumed.set_state(json.loads(json.dumps(one.get_state())))
    check_equal(take(resumed, 2), whole[done:done + 2])
    next(one)


def test_short_examples_share_rows_and_long_ones_do_not():
  """All of an epoch is there, whole, in rows of several or of one."""
  fit = [each.inputs for each in EXAMPLES
         if len(VOCABULARY.encode(each.inputs)) < 160]
  assert 0 < len(fit) < len(EXAMPLES)
  counts = {}
  for packing in (True, False):
    batches = fixed_batches(EXAMPLES, VOCABULARY, make_options(
        packing=packing, long_inputs='leave_out'), 3)
    rows = [row for batch in batches for row in zip(
        batch['encoder_input_tokens'], batch['encoder_segment_ids'],
        strict=True)]
    found = [tokens[segments == segment].tolist() for tokens, segments in rows
             for segment in range(1, segments.max() + 1)]
    assert sorted(found) == sorted(
        [*VOCABULARY.encode(text), 1] for text in fit)
    counts[packing] = len(batches)
  assert counts[True] < counts[False]


@pytest.mark.parametrize('long_inputs', POLICIES)
def test_what_is_cut_is_counted(long_inputs):
  """Over one epoch of all rows without packing, against a count of its own."""
  options = make_options((160, 9), packing=False, long_inputs=long_inputs)
  inputs = [len(VOCABULARY.encode(each.inputs)) - 159 for each in EXAMPLES]
  targets = [len(VOCABULARY.encode(each.targets)) - 8 for each in EXAMPLES]
  used = [i for i, over in enumerate(inputs)
          if over <= 0 or long_inputs != 'leave_out']
  examples = Examples([*EXAMPLES, EXAMPLES[used[0]]])  # Ends with a used one.
  delivered = Delivered(options)
  fixed_batches(examples, VOCABULARY, options, 1, delivered=delivered)
  used.append(used[0])
  stats = delivered.stats()
  assert stats['examples'] == len(used)
  assert stats['left_out_examples'] == len(examples) - len(used)
  assert stats['cut_inputs'] == sum(inputs[i] > 0 for i in used)
  assert stats['lost_input_tokens'] == sum(max(0, inputs[i]) for i in used)
  assert stats['cut_targets'] == sum(targets[i] > 0 for i in used) > 0
  assert stats['lost_target_tokens'] == sum(max(0, targets[i]) for i in used)


def test_stats_of_documents_count_no_cut_inputs():
  """There nobody knows."""
  assert 'cut_inputs' not in Delivered(PipelineOptions(64, 32)).stats()


@pytest.mark.parametrize('changes, message', [
    ({'long_inputs': 'cut'}, "long_inputs='cut' must be one of ('cut_end', "
     "'cut_middle', 'leave_out', 'refuse')"),
    ({'lengths': (1, 9)}, 'inputs_length=1 must be at least 2'),
    ({'lengths': (9, 1)}, 'targets_length=1 must be at least 2'),
    ({'objective': 'supervised:1,gap_sentences:1'}, "objective='supervised:1,"
     "gap_sentences:1': supervised mixes with no other"),
], ids=str)
def test_options_that_cannot_be(changes, message):
  with pytest.raises(DataError) as error:
    make_options(**changes)
  assert str(error.value) == message

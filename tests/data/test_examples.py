"""longt5_flax.data.examples: inputs, targets and references from files."""

import gzip
import json
import lzma
import pickle

import pytest
import zstandard

from longt5_flax.data.examples import (
    Example,
    Examples,
    Fields,
    load_examples,
)
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary

LINES = [{'inputs': f'Who is {name}?\tSay.\n', 'targets': f'{name} ☃'}
         for name in ('Ann', 'Bo', 'Cy')]


def write(path, lines, pack=bytes):
  path.write_bytes(pack('\n'.join(
      line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)
      for line in lines).encode('utf-8')))
  return str(path)


def refuses(message, *args, **kwargs):
  with pytest.raises(DataError) as error:
    load_examples(*args, **kwargs)
  assert str(error.value) == message


@pytest.mark.parametrize('name, pack', [
    ('a.jsonl', bytes), ('a.jsonl.gz', gzip.compress),
    ('a.jsonl.xz', lzma.compress), ('a.jsonl.zst', zstandard.compress)])
def test_json_lines(name, pack, tmp_path):
  """An id is the number of a line, blank ones counted; the only reference is
  what stands in the targets."""
  path = write(tmp_path / name, [*LINES[:2], '', LINES[2]], pack)
  assert list(load_examples(path)) == [
      Example(number, line['inputs'], line['targets'], (line['targets'],))
      for number, line in zip('124', LINES, strict=True)]


def test_references_and_ids(tmp_path):
  lines = [LINES[0] | {'id': 'one', 'references': ['a', 'b']},
           LINES[1] | {'id': 2}, LINES[2]]
  found = load_examples(write(tmp_path / 'a.jsonl', lines))
  assert [(each.id, each.references) for each in found] == [
      ('one', ('a', 'b')), ('2', ('Bo ☃',)), ('3', ('Cy ☃',))]


def test_fields_of_other_names(tmp_path):
  lines = [{'article': 'x y', 'highlights': 'x', 'answers': ['x', 'y'],
            'pid': 'p', 'id': 3, 'references': []}]
  fields = Fields('article', 'highlights', 'answers', 'pid')
  path = write(tmp_path / 'a.jsonl', lines)
  assert list(load_examples(path, fields=fields)) == [
      Example('p', 'x y', 'x', ('x', 'y'))]
  # Unlike those of the usual names, they must be there.
  refuses(f"{path}:1: no field 'answer', only ['answers', 'article', "
          "'highlights', 'id', 'pid', 'references']", path,
          fields=fields._replace(references='answer'))


def test_tsv(tmp_path):
  """Quotes are characters; a file has a header of its own."""
  one = write(tmp_path / 'a.tsv', [
      'targets\tid\tinputs\treferences', '"x\tq1\t"a" b"\t["x", "y\\t"]'])
  two = write(tmp_path / 'b.tsv', ['inputs\ttargets\r', 'c\td\r', ''])
  found = load_examples(f'{one},{two}', 'tsv')
  assert list(found) == [Example('q1', '"a" b"', '"x', ('x', 'y\t')),
                         Example(f'{two}:2', 'c', 'd', ('d',))]


def test_ids_of_several_files_are_places(tmp_path):
  for name in 'ab':
    write(tmp_path / f'{name}.jsonl', LINES[:2])
  found = load_examples(f'{tmp_path}/*.jsonl')
  assert [each.id for each in found] == [
      f'{tmp_path}/{place}' for place in (
          'a.jsonl:1', 'a.jsonl:2', 'b.jsonl:1', 'b.jsonl:2')]


def test_examples_are_a_sequence_that_processes_share(tmp_path):
  found = load_examples(write(tmp_path / 'a.jsonl', LINES))
  assert len(found) == 3
  assert found[-1] == found[2] == list(found)[2]
  assert found[:2] == list(found)[:2]
  pickled = pickle.dumps(found)
  assert len(pickled) < 300
  assert list(pickle.loads(pickled)) == list(found)
  with pytest.raises(IndexError):
    found[3]


def test_field_missing_in_line_17(tmp_path):
  lines = LINES[:1] * 16 + [{'inputs': 'x', 'target': 'y'}]
  path = write(tmp_path / 'a.jsonl', lines)
  refuses(f"{path}:17: no field 'targets', only ['inputs', 'target']", path)


@pytest.mark.parametrize('change, message', [
    ({'targets': ' \n'}, "field 'targets' is empty"),
    ({'inputs': ''}, "field 'inputs' is empty"),
    ({'targets': None}, "field 'targets' is NoneType, not a string"),
    ({'references': []}, "field 'references' is an empty list"),
    ({'references': 'Ann'}, "field 'references' is str, not a list of strings"),
    ({'references': ['Ann', 3]}, "field 'references' is int, not a string"),
    ({'id': True}, "field 'id' is bool, not a string"),
    ({'id': ''}, "field 'id' is empty"),
    ({'targets': '\ud800'}, "field 'targets' holds half a surrogate pair"),
], ids=str)
def test_bad_examples(change, message, tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(f'{json.dumps(LINES[0] | change)}\n{json.dumps(LINES[1])}\n')
  refuses(f'{path}:1: {message}', str(path))
  found = load_examples(str(path), on_bad_record='skip')
  assert [each.id for each in found] == ['2']
  assert found.skipped == 1


@pytest.mark.parametrize('lines, message', [
    (['inputs\ttargets', 'a'], ":2: 1 columns, not the 2 of the first line: "
     "['inputs', 'targets']"),
    (['inputs\ttargets', '\t'], ":2: field 'inputs' is empty"),
    (['input\ttargets', 'a\tb'],
     ":2: no field 'inputs', only ['input', 'targets']"),
    (['inputs\ttargets\treferences', 'a\tb\tc'],
     ":2: field 'references' must be a JSON list of texts, as [\"one\", "
     "\"two\"]"),
    (['inputs\ttargets\treferences', 'a\tb\t[]'],
     ":2: field 'references' is an empty list"),
], ids=str)
def test_bad_tsv(lines, message, tmp_path):
  path = write(tmp_path / 'a.tsv', lines)
  refuses(path + message, path, 'tsv')


def test_names_that_are_documents_are_cut(tmp_path):
  path = write(tmp_path / 'a.jsonl', [{'inputs': 1000 * 'a '}, LINES[1]])
  with pytest.raises(DataError) as error:
    load_examples(path, 'tsv')
  assert str(error.value).startswith(f"{path}:2: no field 'inputs', only ['{{")
  assert len(str(error.value)) < 120 + len(path)


@pytest.mark.parametrize('targets, kept', [
    ('\u200b', False), ('\u200b\x01', False), ('\u200b!', True),
    ('\u4e00', True)])
def test_targets_without_tokens(targets, kept, tmp_path):
  """The quickstart's vocabulary drops what has no width."""
  vocabulary = Vocabulary('corpus/vocabulary.model')
  assert bool(vocabulary.encode(targets)) == kept
  lines = [LINES[0] | {'targets': targets}, LINES[1]]
  path = write(tmp_path / 'a.jsonl', lines)
  found = load_examples(
      path, on_bad_record='skip', encode=vocabulary.encode)
  assert (len(found), found.skipped) == (1 + kept, 1 - kept)
  if not kept:
    refuses(f"{path}:1: field 'targets' has no tokens: {targets!r}", path,
            encode=vocabulary.encode)


def test_id_that_was_there_before(tmp_path):
  lines = [LINES[0] | {'id': 'a'}, LINES[1] | {'id': 'a'}]
  path = write(tmp_path / 'a.jsonl', lines)
  refuses(f"{path}:2: id 'a' was there before, in {path}:1", path)
  assert len(load_examples(path, unique_ids=False)) == 2


@pytest.mark.parametrize('source, text', [
    ('jsonl', ''), ('jsonl', '\n \n'), ('tsv', ''), ('tsv', 'inputs\ttargets')])
def test_empty_file(source, text, tmp_path):
  path = write(tmp_path / 'a', [text])
  refuses(f'no examples in {path}', path, source)


def test_nothing_but_bad_records(tmp_path):
  path = write(tmp_path / 'a', ['{', '[]'])
  refuses(f'no examples in {path}; skipped 2 bad records, the first {path}:1: '
          'not JSON: Expecting property name enclosed in double quotes at '
          'column 2', path, on_bad_record='skip')


def test_settings_that_cannot_be():
  refuses("source='csv' must be one of ('jsonl', 'tsv')", 'x', 'csv')
  refuses("no file 'x'", 'x')
  refuses("on_bad_record='stop' must be one of ('raise', 'skip')",
          __file__, on_bad_record='stop')


def test_no_examples_are_a_sequence():
  assert list(Examples([])) == []

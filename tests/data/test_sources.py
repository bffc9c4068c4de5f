"""longt5_flax.data.sources: every kind of file, every kind of mistake."""

import gzip
import json
import lzma
import os
import pickle
import subprocess
import sys

import pytest
import zstandard

from longt5_flax.data.sources import DataError, Documents, load_documents

TEXTS = ['One. Two.', '', 'naïve 日本語 ☃', 'line\nbreak']
COMPRESS = {'': bytes, '.gz': gzip.compress, '.xz': lzma.compress,
            '.zst': zstandard.compress}


def lines(texts, field='text'):
  return ''.join(json.dumps({field: text, 'id': 1}) + '\n'
                 for text in texts).encode()


def message(*args, **kwargs):
  with pytest.raises(DataError) as error:
    load_documents(*map(str, args), **kwargs)
  assert '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize('suffix', COMPRESS)
def test_json_lines(tmp_path, suffix):
  path = tmp_path / f'a.jsonl{suffix}'
  path.write_bytes(COMPRESS[suffix](lines(TEXTS)))
  documents = load_documents(str(path))
  assert list(documents) == TEXTS
  assert len(documents) == 4
  assert documents[-1] == documents[3] == 'line\nbreak'
  assert documents.num_bytes == len(''.join(TEXTS).encode())
  with pytest.raises(IndexError):
    documents[4]


@pytest.mark.parametrize('suffix', COMPRESS)
def test_text_is_one_document_a_file(tmp_path, suffix):
  for name, text in (('b', 'Two.\nLines.\n'), ('a', 'First.')):
    (tmp_path / f'{name}.txt{suffix}').write_bytes(
        COMPRESS[suffix](text.encode()))
  documents = load_documents(f'{tmp_path}/*.txt{suffix}', 'text')
  assert list(documents) == ['First.', 'Two.\nLines.\n']


@pytest.mark.parametrize('suffix', ['.gz', '.xz', '.zst'])
def test_compressed_files_may_be_joined(tmp_path, suffix):
  """`cat a.gz b.gz`; blocks larger than what is read at a time."""
  texts = [os.urandom(300_000).hex(), 'end', os.urandom(10).hex()]
  path = tmp_path / f'a.jsonl{suffix}'
  path.write_bytes(b''.join(COMPRESS[suffix](lines([text])) for text in texts))
  assert list(load_documents(str(path))) == texts


def test_several_files_are_read_sorted_and_once(tmp_path):
  for name in ('c', 'a', 'b'):
    (tmp_path / f'{name}.jsonl').write_bytes(lines([name]))
  (tmp_path / 'deep' / 'er').mkdir(parents=True)
  (tmp_path / 'deep' / 'er' / 'd.jsonl').write_bytes(lines(['d']))
  for path, texts in (('[ab].jsonl', 'ab'), ('c.jsonl, {}/a.jsonl', 'ac'),
                      ('*.jsonl,{}/b.jsonl', 'abc'), ('**/*.jsonl', 'abcd')):
    documents = load_documents(f'{tmp_path}/{path.format(tmp_path)}')
    assert ''.join(documents) == texts


def test_file_whose_name_looks_like_a_glob(tmp_path):
  (tmp_path / 'a[1].jsonl').write_bytes(lines(['a']))
  assert list(load_documents(f'{tmp_path}/a[1].jsonl')) == ['a']


def test_field_blank_lines_line_ends_and_byte_order_mark(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(b'\xef\xbb\xbf' + lines(['a', 'b'], 'body').replace(
      b'\n', b'\r\n\r\n') + b'{"body": "no newline"}')
  assert list(load_documents(str(path), field='body')) == [
      'a', 'b', 'no newline']
  path.write_bytes(b'\xef\xbb\xbfText.')
  assert list(load_documents(str(path), 'text')) == ['Text.']


BAD = [
    (b'{"text": "a"', "not JSON: Expecting ',' delimiter at column 13"),
    (b'[1, 2]', "a JSON list, not an object with field 'text'"),
    (b'"a"', "a JSON str, not an object with field 'text'"),
    (b'{"id": 1, "body": "a"}', "no field 'text', only ['body', 'id']"),
    (b'{"text": 5}', "field 'text' is int, not a string"),
    (b'{"text": null}', "field 'text' is NoneType, not a string"),
    (b'{"text": "a\xff"}', 'not UTF-8: byte 0xff at offset 11'),
    (b'{"text": "\\ud83d"}', "field 'text' holds half a surrogate pair"),
    (b'[' * 100_000, 'not JSON that can be read: maximum recursion depth '
     'exceeded while decoding a JSON array from a unicode string'),
]


@pytest.mark.parametrize('line, problem', BAD, ids=range(len(BAD)))
def test_bad_record(tmp_path, line, problem):
  good = tmp_path / 'a.jsonl'
  good.write_bytes(lines(['a']))
  path = tmp_path / 'b.jsonl'
  path.write_bytes(lines(['b']) + b'\n' + line + b'\n' + lines(['c']))
  both = f'{good},{path}'
  assert message(both) == f'{path}:3: {problem}'
  documents = load_documents(both, on_bad_record='skip')
  assert list(documents) == ['a', 'b', 'c']
  assert documents.skipped == 1


def test_bad_text_file(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'fine')
  (tmp_path / 'b.txt').write_bytes(b'caf\xe9')
  assert message(f'{tmp_path}/*.txt', 'text') == (
      f'{tmp_path}/b.txt: not UTF-8: byte 0xe9 at offset 3')
  documents = load_documents(f'{tmp_path}/*.txt', 'text', on_bad_record='skip')
  assert (list(documents), documents.skipped) == (['fine'], 1)


def test_nothing_to_read(tmp_path):
  path = tmp_path / 'a.jsonl'
  for content in (b'', b'\n\n', lines(['', ''])):
    path.write_bytes(content)
    assert message(path) == f'no text in {path}'
  path.write_bytes(b'x\ny\n')
  assert message(path, on_bad_record='skip') == (
      f'no text in {path}; skipped 2 bad records, the first {path}:1: '
      'not JSON: Expecting value at column 1')


def test_no_such_file(tmp_path):
  assert message(tmp_path / 'a.jsonl') == f"no file '{tmp_path}/a.jsonl'"
  assert message(tmp_path / '*.jsonl') == (
      f"no file matches '{tmp_path}/*.jsonl'")
  assert message('') == "no file ''"
  assert message(tmp_path) == (
      f'{tmp_path} is a folder: name files in it, such as {tmp_path}/*.jsonl')
  assert message(__file__, source='csv') == (
      "source='csv' must be one of ('jsonl', 'text')")
  assert message(__file__, on_bad_record='ignore') == (
      "on_bad_record='ignore' must be one of ('raise', 'skip')")


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_file_that_may_not_be_read(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.touch(mode=0)
  assert message(path) == f'cannot read {path}: Permission denied'


@pytest.mark.parametrize('suffix', ['.gz', '.xz', '.zst'])
def test_archive_that_is_cut_short(tmp_path, suffix):
  whole = COMPRESS[suffix](lines([os.urandom(2000).hex()]))
  path = tmp_path / f'a.jsonl{suffix}'
  for size in (len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:size])
    assert message(path) == (
        f'{path} is cut short: its compressed data has no end')


@pytest.mark.parametrize('suffix, problem', [
    ('.gz', "Not a gzipped file (b'{\"')"),
    ('.xz', 'Input format not supported by decoder'),
    ('.zst', 'zstd decompressor error: Unknown frame descriptor')])
def test_archive_that_is_none(tmp_path, suffix, problem):
  path = tmp_path / f'a.jsonl{suffix}'
  path.write_bytes(lines(['a']))
  assert message(path) == f'cannot decompress {path}: {problem}'


def test_another_process_shares_the_documents():
  """The texts are in a file without a name, inherited and not copied."""
  documents = Documents(TEXTS)
  pickled = pickle.dumps(documents)
  assert len(pickled) < 200
  assert 'deleted' in os.readlink(f'/proc/self/fd/{documents.fileno()}')
  code = ('import pickle, sys; '
          'print(ascii(list(pickle.loads(sys.stdin.buffer.read()))))')
  done = subprocess.run(
      [sys.executable, '-c', code], input=pickled, capture_output=True,
      pass_fds=(documents.fileno(),), check=True,
      env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
  assert done.stdout.decode().strip() == ascii(TEXTS)


def test_no_room_for_the_documents(monkeypatch):
  class Full:
    def write(self, _):
      raise OSError(28, 'No space left on device')

  monkeypatch.setattr('tempfile.TemporaryFile', lambda **_: Full())
  monkeypatch.setattr('tempfile.gettempdir', lambda: '/small')
  with pytest.raises(DataError, match=r'^no room for the documents in /small: '
                     'set TMPDIR to a larger folder$'):
    Documents(['a'])

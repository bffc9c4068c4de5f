"""Documents from files: JSON lines, or plain text with one document a file.

Files are plain or compressed (.gz, .xz, .zst). Also what `examples` reads files
by.
"""

import array
import codecs
import errno
import glob
import gzip
import io
import json
import lzma
import mmap
import os
import reprlib
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np

SOURCES = ('jsonl', 'text')
ON_BAD_RECORD = ('raise', 'skip')
# For messages: what is taken for a name may be a document.
_short = reprlib.Repr()
_short.maxlist, _short.maxstring = 20, 60


class DataError(ValueError):
  """A mistake in the data or its settings; one line, for the user to read."""


class Documents(Sequence[str]):
  """Texts in one memory-mapped file that has no name.

  Every process that maps the file shares one copy of it, and the operating
  system frees it when the last of them is gone, however it ended.

  Args:
    texts: the documents.

  Attributes:
    skipped: bad records left out; see `load_documents`.

  Raises:
    DataError: no room for them.
  """

  def __init__(self, texts: Iterable[str]):
    self.skipped = 0
    self._file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115
        prefix='longt5_documents_')
    starts = array.array('q', [0])
    try:
      for text in texts:
        starts.append(starts[-1] + self._file.write(text.encode('utf-8')))
      # The table goes behind the texts, its length last.
      self._file.write(starts.tobytes() + len(starts).to_bytes(8, 'little'))
      self._file.flush()
    except OSError as error:
      if error.errno != errno.ENOSPC:
        raise
      raise DataError(f'no room for the documents in {tempfile.gettempdir()}: '
                      'set TMPDIR to a larger folder') from None
    self._map()

  def _map(self) -> None:
    self._memory = mmap.mmap(
        self._file.fileno(), 0, access=mmap.ACCESS_READ)
    count = int.from_bytes(self._memory[-8:], 'little')
    self._starts = np.frombuffer(
        self._memory, np.int64, count, len(self._memory) - 8 * (count + 1))

  @property
  def num_bytes(self) -> int:
    """Of all texts, in UTF-8."""
    return int(self._starts[-1])

  def fileno(self) -> int:
    """The file, for a process to inherit: see `__reduce__`."""
    return self._file.fileno()

  @classmethod
  def inherited(cls, fileno: int, skipped: int) -> 'Documents':
    """The documents of a file that this process inherited as `fileno`."""
    documents = cls.__new__(cls)
    documents.skipped = skipped
    documents._file = open(fileno, 'rb', closefd=False)  # noqa: SIM115
    documents._map()
    return documents

  def __reduce__(self) -> Any:
    # The texts stay where they are: this can be unpickled by processes that
    # inherited the open file, and by no others.
    return Documents.inherited, (self.fileno(), self.skipped)

  def __len__(self) -> int:
    return len(self._starts) - 1

  def __getitem__(self, index: Any) -> Any:
    start, end = self._starts[range(len(self))[index]:][:2]
    return self._memory[start:end].decode('utf-8')


def load_documents(
    path: str, source: str = 'jsonl', field: str = 'text',
    on_bad_record: str = 'raise') -> Documents:
  """Reads all documents of some files.

  Args:
    path: files or globs, separated by commas; read in sorted order.
    source: 'jsonl', an object a line (blank lines do not count), or 'text', a
      document a file.
    field: of the objects, holding the text.
    on_bad_record: 'raise', or 'skip' to leave out and count lines that are no
      JSON object with text in the field, or are not UTF-8.

  Raises:
    DataError: a setting or file that cannot be, a bad record, no documents.
  """
  check_choice('source', source, SOURCES)
  parse = _json_text(field) if source == 'jsonl' else utf8
  problems = Problems(on_bad_record)

  def texts() -> Iterator[str]:
    for file in expand_paths(path):
      for place, record in read_records(file, source):
        try:
          yield parse(record)
        except BadRecordError as bad:
          problems.add(place, bad)

  documents = Documents(texts())
  documents.skipped = problems.count
  if not documents.num_bytes:
    raise DataError(f'no text in {path}{problems}')
  return documents


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
  """Refuses a setting that is not one of those known."""
  if value not in known:
    raise DataError(f'{name}={value!r} must be one of {known}')


def expand_paths(path: str) -> list[str]:
  """The files that a comma-separated list of files and globs names, sorted.

  Raises:
    DataError: one of them names no file.
  """
  files: set[str] = set()
  for part in path.split(','):
    pattern = os.path.expanduser(part.strip())
    if os.path.isdir(pattern):
      raise DataError(f'{part.strip()} is a folder: name files in it, such as '
                      f'{os.path.join(part.strip(), "*.jsonl")}')
    found = [pattern] if os.path.exists(pattern) else [
        file for file in glob.glob(pattern, recursive=True)
        if os.path.isfile(file)]
    if not found:
      raise DataError(f'no file {part.strip()!r}' if glob.escape(pattern)
                      == pattern else f'no file matches {part.strip()!r}')
    files.update(found)
  return sorted(files)


class BadRecordError(Exception):
  """What is wrong with a record, without its place."""


class Problems:
  """Bad records of files; `str` says how many were left out.

  Args:
    on_bad_record: 'raise', or 'skip' to count them.

  Attributes:
    count: of them so far.

  Raises:
    DataError: another `on_bad_record`.
  """

  def __init__(self, on_bad_record: str):
    check_choice('on_bad_record', on_bad_record, ON_BAD_RECORD)
    self._raises = on_bad_record == 'raise'
    self._first = ''
    self.count = 0

  def add(self, place: str, bad: BadRecordError) -> None:
    """One more.

    Raises:
      DataError: they are not to be skipped.
    """
    self._first = self._first or f'{place}: {bad}'
    self.count += 1
    if self._raises:
      raise DataError(self._first) from None

  def __str__(self) -> str:
    if not self.count:
      return ''
    return f'; skipped {self.count} bad records, the first {self._first}'


def read_records(file: str, source: str) -> Iterator[tuple[str, bytes]]:
  """(place, bytes) of the records of a file: lines that are not blank, or for
  source 'text' all of it.

  Raises:
    DataError: it cannot be read.
  """
  try:
    with _open(file) as stream:
      if source == 'text':
        yield file, stream.read().removeprefix(codecs.BOM_UTF8)
        return
      for number, line in enumerate(stream, 1):
        if number == 1:
          line = line.removeprefix(codecs.BOM_UTF8)
        # A TSV line of nothing but tabs is a record, though an empty one.
        if line.strip(b'\r\n' if source == 'tsv' else None):
          yield f'{file}:{number}', line
  except EOFError:
    raise DataError(f'{file} is cut short: its compressed data has no end'
                    ) from None
  except (OSError, lzma.LZMAError, zlib.error) as error:
    if isinstance(error, OSError) and error.errno:
      raise DataError(f'cannot read {file}: {error.strerror}') from None
    raise DataError(f'cannot decompress {file}: {error}') from None


def _open(file: str) -> Any:
  if file.endswith('.gz'):
    return gzip.open(file)
  if file.endswith('.xz'):
    return lzma.open(file)
  if file.endswith('.zst'):
    return io.BufferedReader(_ZstandardFile(file))
  return open(file, 'rb')


class _ZstandardFile(io.RawIOBase):
  """Reads all frames of a .zst file; zstandard's own reader takes a file that
  is cut short for whole."""

  def __init__(self, file: str):
    # Here, because only readers of .zst need it to be installed.
    import zstandard
    self._file = open(file, 'rb')  # noqa: SIM115
    self._error = zstandard.ZstdError
    # As large a window as `zstd --long=31` writes.
    self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    self._frame = self._decompressor.decompressobj()
    self._compressed, self._ready = b'', b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    while not self._ready:
      data = self._compressed or self._file.read(1 << 17)
      if self._frame.eof and data:
        self._frame = self._decompressor.decompressobj()
      elif not data:
        if self._frame.eof:
          return 0
        raise EOFError
      try:
        self._ready = self._frame.decompress(data)
      except self._error as error:
        raise OSError(str(error)) from None
      self._compressed = self._frame.unused_data if self._frame.eof else b''
    size = min(len(buffer), len(self._ready))
    buffer[:size], self._ready = self._ready[:size], self._ready[size:]
    return size

  def close(self) -> None:
    self._file.close()
    super().close()


def utf8(record: bytes) -> str:
  """The text of a record.

  Raises:
    BadRecordError: it is not UTF-8.
  """
  try:
    return record.decode('utf-8')
  except UnicodeDecodeError as error:
    raise BadRecordError(f'not UTF-8: byte {error.object[error.start]:#04x} '
                         f'at offset {error.start}') from None


def json_object(record: bytes, field: str) -> dict[str, Any]:
  """The JSON object of a line.

  Args:
    record: the line.
    field: that it should have, for messages.

  Raises:
    BadRecordError: it is none.
  """
  try:
    value = json.loads(utf8(record.rstrip()))
  except json.JSONDecodeError as error:
    raise BadRecordError(
        f'not JSON: {error.msg} at column {error.colno}') from None
  except (ValueError, RecursionError) as error:
    raise BadRecordError(f'not JSON that can be read: {error}') from None
  if not isinstance(value, dict):
    raise BadRecordError(
        f'a JSON {type(value).__name__}, not an object with field {field!r}')
  return value


def no_field(record: Mapping[str, Any], field: str) -> BadRecordError:
  """The error of a record without a field."""
  return BadRecordError(f'no field {field!r}, only {short(sorted(record))}')


def short(value: Any) -> str:
  """What `repr` says of text or a list of texts, if they are short."""
  return _short.repr(value)


def text_field(record: Mapping[str, Any], field: str) -> str:
  """The text in a field.

  Raises:
    BadRecordError: there is none.
  """
  if field not in record:
    raise no_field(record, field)
  return check_text(record[field], field)


def check_text(text: Any, field: str) -> str:
  """The value of a field, if it is text.

  Raises:
    BadRecordError: it is none, or none that UTF-8 can hold.
  """
  if not isinstance(text, str):
    raise BadRecordError(
        f'field {field!r} is {type(text).__name__}, not a string')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError:
    raise BadRecordError(
        f'field {field!r} holds half a surrogate pair') from None
  return text


def _json_text(field: str) -> Callable[[bytes], str]:
  return lambda record: text_field(json_object(record, field), field)

"""Examples as text: inputs, the targets to be written, and references to score
what was written against.

From JSON lines or TSV. Files are read as those of documents are.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from longt5_flax.data.sources import (
    BadRecordError,
    DataError,
    Documents,
    Problems,
    check_choice,
    check_text,
    expand_paths,
    json_object,
    no_field,
    read_records,
    short,
    text_field,
    utf8,
)

SOURCES = ('jsonl', 'tsv')

Encode = Callable[[str], Sequence[int]]  # Text to token ids.


class Example(NamedTuple):
  """One example.

  Attributes:
    id: names it in predictions.
    inputs: what the model reads, without a prefix.
    targets: what it learns to write.
    references: what its writing is scored against, one text or more.
  """
  id: str
  inputs: str
  targets: str
  references: tuple[str, ...]


class Fields(NamedTuple):
  """Of JSON objects, or columns of TSV, by what they hold.

  `references` and `id` need not be there under these names: an example's only
  reference is then its targets, its id the number of its line.
  """
  inputs: str = 'inputs'
  targets: str = 'targets'
  references: str = 'references'
  id: str = 'id'


class Examples(Sequence[Example]):
  """Examples in one memory-mapped file, shared by processes as `Documents` are.

  Args:
    examples: in order.

  Attributes:
    skipped: bad records left out; see `load_examples`.

  Raises:
    DataError: no room for them.
  """

  def __init__(self, examples: Iterable[Example]):
    self.skipped = 0
    self._records = Documents(
        json.dumps(example, ensure_ascii=False) for example in examples)

  def fileno(self) -> int:
    """The file, for a process to inherit."""
    return self._records.fileno()

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return [self[i] for i in range(len(self))[index]]
    name, inputs, targets, references = json.loads(self._records[index])
    return Example(name, inputs, targets, tuple(references))


def load_examples(
    path: str, source: str = 'jsonl', fields: Fields = Fields(),  # noqa: B008
    on_bad_record: str = 'raise', unique_ids: bool = True,
    encode: Encode | None = None) -> Examples:
  """Reads all examples of some files.

  Args:
    path: files or globs, separated by commas; read in sorted order.
    source: 'jsonl', an object a line; or 'tsv', whose first line names columns
      and in which quotes are characters as others are: text with tabs or line
      breaks cannot be in it.
    fields: where to find what. References are a list of texts; in TSV, written
      as in JSON.
    on_bad_record: 'raise', or 'skip' to leave out and count lines that are no
      examples.
    unique_ids: refuse an id that was there before, by which predictions could
      not be told apart.
    encode: refuse targets without tokens, as this finds them.

  Raises:
    DataError: a setting or file that cannot be, a bad record, no examples.
  """
  check_choice('source', source, SOURCES)
  files = expand_paths(path)
  problems = Problems(on_bad_record)
  places: dict[str, str] = {}

  def examples() -> Iterator[Example]:
    for file in files:
      for place, record in _read(file, source, fields.inputs, problems):
        number = place.rpartition(':')[2]
        try:
          example = _parse(record, fields, source,
                           number if len(files) == 1 else place)
          if encode and not has_tokens(example.targets, encode):
            raise BadRecordError(f'field {fields.targets!r} has no tokens: '
                                 f'{short(example.targets)}')
          if unique_ids and example.id in places:
            raise BadRecordError(f'id {example.id!r} was there before, in '
                                 f'{places[example.id]}')
        except BadRecordError as bad:
          problems.add(place, bad)
          continue
        if unique_ids:
          places[example.id] = place
        yield example

  found = Examples(examples())
  found.skipped = problems.count
  if not found:
    raise DataError(f'no examples in {path}{problems}')
  return found


def _read(file: str, source: str, field: str, problems: Problems
          ) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """(place, fields) of the lines of a file."""
  columns: list[str] = []
  for place, line in read_records(file, source):
    try:
      if source == 'jsonl':
        yield place, json_object(line, field)
        continue
      cells = utf8(line).rstrip('\r\n').split('\t')
      if not columns:
        columns = cells
      elif len(cells) != len(columns):
        raise BadRecordError(f'{len(cells)} columns, not the {len(columns)} of '
                             f'the first line: {short(columns)}')
      else:
        yield place, dict(zip(columns, cells, strict=True))
    except BadRecordError as bad:
      problems.add(place, bad)


def _parse(record: Mapping[str, Any], fields: Fields, source: str, number: str
           ) -> Example:
  inputs, targets = (_filled(text_field(record, field), field)
                     for field in (fields.inputs, fields.targets))
  references: tuple[str, ...] = (targets,)
  if _has(record, fields, 'references'):
    references = _references(record[fields.references], fields, source)
  name = number
  if _has(record, fields, 'id'):
    value = record[fields.id]
    # Numbers are ids as well; True is none, though an int.
    name = str(value) if type(value) is int else check_text(value, fields.id)
    _filled(name, fields.id)
  return Example(name, inputs, targets, references)


def _has(record: Mapping[str, Any], fields: Fields, name: str) -> bool:
  """Whether there is an optional field; one that was asked for must be."""
  field = getattr(fields, name)
  if field in record:
    return True
  if field == Fields._field_defaults[name]:
    return False
  raise no_field(record, field)


def _references(value: Any, fields: Fields, source: str) -> tuple[str, ...]:
  field = fields.references
  if source == 'tsv':
    try:
      value = json.loads(value)
    except (ValueError, RecursionError):
      raise BadRecordError(f'field {field!r} must be a JSON list of texts, as '
                           '["one", "two"]') from None
  if not isinstance(value, list):
    raise BadRecordError(
        f'field {field!r} is {type(value).__name__}, not a list of strings')
  if not value:
    raise BadRecordError(f'field {field!r} is an empty list')
  return tuple(check_text(text, field) for text in value)


def has_tokens(text: str, encode: Encode) -> bool:
  """Whether a vocabulary leaves something of a text.

  It drops zero-width spaces, say. Letters and digits it keeps, so that few
  texts need to be encoded to know.
  """
  return bool(re.search(r'\w', text) or encode(text))


def _filled(text: str, field: str) -> str:
  if not text.strip():
    raise BadRecordError(f'field {field!r} is empty')
  return text

"""Rebuilds the quickstart's corpus and vocabulary.

    python corpus/build.py books.jsonl.xz [output folder]

The argument is the collection named in README.md as JSON lines (plain or .xz)
with the fields `id`, "Author/Title.md", and `text`. What comes out is the same
to the byte with the versions in requirements.txt.
"""

import io
import json
import lzma
import pathlib
import re
import sys
from typing import Any

import sentencepiece

# id in the collection: (title, author, year of first publication).
TRAIN = {
    'Alice Ilgenfritz Jones & Ella Merchant/Unveiling a Parallel.md':
        ('Unveiling a Parallel',
         'Alice Ilgenfritz Jones and Ella Merchant', 1893),
    'Ann Radcliffe/The Romance of the Forest.md':
        ('The Romance of the Forest', 'Ann Radcliffe', 1791),
    'Anna Sewell/Black Beauty.md': ('Black Beauty', 'Anna Sewell', 1877),
    'Anne Bronte/Agnes Grey.md': ('Agnes Grey', 'Anne Brontë', 1847),
    'Anthony Trollope/The Warden.md':
        ('The Warden', 'Anthony Trollope', 1855),
    'Anthony Trollope/Barchester Towers.md':
        ('Barchester Towers', 'Anthony Trollope', 1857),
    'Anthony Trollope/Doctor Thorne.md':
        ('Doctor Thorne', 'Anthony Trollope', 1858),
}
VALIDATION = {
    'Ambrose Bierce/An Occurrence at Owl Creek Bridge.md':
        ('An Occurrence at Owl Creek Bridge', 'Ambrose Bierce', 1890),
    'Ambrose Bierce/The Damned Thing.md':
        ('The Damned Thing', 'Ambrose Bierce', 1893),
    'Ambrose Bierce/The Death of Halpin Frayser.md':
        ('The Death of Halpin Frayser', 'Ambrose Bierce', 1891),
}
CHAPTER = re.compile(r'chapter (?:[IVXL]+|\d+)\b', re.IGNORECASE)
# Volumes, parts of a book, numbered parts of a story.
OTHER_HEADING = re.compile(r'(?:part |volume )?[IVXL]+\.?', re.IGNORECASE)


def chapters(text: str) -> list[str]:
  """Splits a book at its chapter headings; keeps paragraphs of prose only.

  Headings go, and so does every paragraph of several lines: in this
  collection a line break inside a paragraph is verse, a letterhead or a table.
  """
  found: list[list[str]] = [[]]
  for paragraph in text.split('\n\n'):
    paragraph = paragraph.strip()
    if CHAPTER.match(paragraph) and len(paragraph) < 160:
      found.append([])
    elif '\n' not in paragraph and not OTHER_HEADING.fullmatch(paragraph):
      paragraph = paragraph.replace('\\', '')  # Markdown's escapes
      found[-1].append(' '.join(paragraph.split()))
  joined = ['\n\n'.join(filter(None, chapter)) for chapter in found]
  return [chapter for chapter in joined if chapter]


def rows(texts: dict[str, str], books: dict[str, tuple[str, str, int]]
         ) -> list[dict[str, Any]]:
  return [
      {'title': title, 'author': author, 'year': year, 'chapter': number,
       'text': chapter}
      for key, (title, author, year) in books.items()
      for number, chapter in enumerate(chapters(texts[key]), start=1)]


def main() -> None:
  source = pathlib.Path(sys.argv[1])
  folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else 'corpus')
  opened = lzma.open if source.suffix == '.xz' else open
  with opened(source, 'rt', encoding='utf-8') as lines:
    texts = {row['id']: row['text'] for row in map(json.loads, lines)}
  splits = {'train': rows(texts, TRAIN), 'validation': rows(texts, VALIDATION)}
  for split, split_rows in splits.items():
    text = ''.join(
        json.dumps(row, ensure_ascii=False) + '\n' for row in split_rows)
    (folder / f'{split}.jsonl.xz').write_bytes(
        lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
  model = io.BytesIO()  # a writer, not a path: no path ends up in the model
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter([paragraph for row in splits['train']
                              for paragraph in row['text'].split('\n\n')]),
      model_writer=model, model_type='unigram', vocab_size=4000,
      character_coverage=1.0, normalization_rule_name='nmt_nfkc',
      pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1,
      minloglevel=1)
  (folder / 'vocabulary.model').write_bytes(model.getvalue())


if __name__ == '__main__':
  main()

"""The corpora that LongT5's paper evaluates on, and examples of their records.

Splits and formats are the paper's (Guo et al. 2021, arXiv 2112.07916; its
repository google-research/longt5, longt5/tasks.py), SCROLLS' those of its
release (Shaham et al. 2022, arXiv 2201.03533). Unlike there nothing stands
before the inputs: `data.prefix` adds it.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from longt5_flax.data.examples import Example
from longt5_flax.data.sources import BadRecordError, json_object, text_field

# Before the names of the seqio tasks.
PREFIX = 'longt5_'
# What stands for a record of a text file.
LINE = 'line'


class Corpus(NamedTuple):
  """Where records come from and what they mean.

  Attributes:
    read: from the values of `fields`, bytes or arrays of them, to an example
      with its id, '' where records have none. BadRecordError: it is none.
    fields: that `read` takes; 'a/b' is b in a.
    tfds: a dataset of TensorFlow Datasets; or
    files: split -> file or pattern in the folder `data.task_dir`: TFRecord, or
      lines if `fields` is LINE.
    splits: split -> that of TFDS; None for its own.
    origin: where `files` come from.
    grouped: records of one id are one example with several references.
  """
  read: Callable[..., Example]
  fields: tuple[str, ...]
  tfds: str = ''
  files: Mapping[str, str] | None = None
  splits: Mapping[str, str] | None = None
  origin: str = ''
  grouped: bool = False


def summary(document: bytes, target: bytes) -> Example:
  """A document and its summary."""
  target_text = target.decode('utf-8')
  return Example('', document.decode('utf-8'), target_text, (target_text,))


def natural_question(name: bytes, question: bytes, context: bytes,
                     answer: bytes) -> Example:
  """A question about a page, and the first answer that is one, or NULL."""
  target = answer.decode('utf-8')
  return Example(
      name.decode('utf-8'), _question(question, context), target, (target,))


def trivia(name: bytes, question: bytes, answer: bytes, aliases: np.ndarray,
           titles: np.ndarray, contexts: np.ndarray) -> Example:
  """A question about Wikipedia's pages, each behind its title; web pages are
  left out. Text is in lower case, without the outer single quotes of a line."""
  pages = [_unquoted(text) for pair in zip(titles, contexts, strict=True)
           for text in pair]
  references = [alias.decode('utf-8') for alias in aliases]
  target = _unquoted(answer).decode('utf-8')
  return Example(
      name.decode('utf-8'), _question(_unquoted(question), b' '.join(pages)),
      target, tuple(references) or (target,))


def scrolls(line: bytes) -> Example:
  """A line of SCROLLS: `input` begins with the question, if there is one."""
  record = json_object(line, 'input')
  name, inputs, target = (
      text_field(record, field) for field in ('id', 'input', 'output'))
  if not target.strip():
    raise BadRecordError("field 'output' is empty")
  return Example(name, inputs, target, (target,))


def _question(question: bytes, context: bytes) -> str:
  text = b'question: ' + question + b' context: ' + context
  return re.sub(rb'[\t\n\f\r ]+', b' ', text).decode('utf-8')


def _unquoted(text: bytes) -> bytes:
  return re.sub(rb"'(.*)'", rb'\1', text.lower())


_summaries = functools.partial(Corpus, summary)
_TRIVIA = ('question_id', 'question', 'answer/value', 'answer/aliases',
           'entity_pages/title', 'entity_pages/wiki_context')
# TFDS no longer prepares the paper's versions of MultiNews, 1.0.0, and of
# CNN/DailyMail, 3.1.0.
CORPORA = {
    'arxiv': _summaries(
        ('article', 'abstract'), 'scientific_papers/arxiv:1.1.1'),
    'pubmed': _summaries(
        ('article', 'abstract'), 'scientific_papers/pubmed:1.1.1'),
    'big_patent': _summaries(
        ('description', 'abstract'), 'big_patent/all:2.1.2'),
    'multi_news': _summaries(('document', 'summary'), 'multi_news:2.1.0'),
    'media_sum': _summaries(
        ('interview', 'summary'), files={
            'train': 'media_sum/train.tfrecords',
            'validation': 'media_sum/val.tfrecords',
            'test': 'media_sum/test.tfrecords'},
        origin='MediaSum by mediasum_preprocess.py of google-research/longt5'),
    'cnn_dailymail': _summaries(
        ('article', 'highlights'), 'cnn_dailymail:3.4.0'),
    'natural_questions': Corpus(
        natural_question, ('id_', 'question', 'context', 'answer'), files={
            'train': 'natural_questions/nq-train-????[0-8]-of-?????',
            'validation': 'natural_questions/nq-train-????9-of-?????',
            'test': 'natural_questions/nq-dev-?????-of-?????'},
        origin='NaturalQuestions by nq_preprocess.py of google-research/'
               'longt5'),
    'trivia_qa': Corpus(trivia, _TRIVIA, 'trivia_qa/rc:1.1.0', splits={
        'train': 'train[:78785]', 'validation': 'train[78785:]',
        'test': 'validation'}),
    **{name: Corpus(
        scrolls, (LINE,), files={
            split: f'scrolls/{name}/{split}.jsonl'
            for split in ('train', 'validation')},
        origin=f'{name}.zip of SCROLLS, scrolls-benchmark.com', grouped=True)
       for name in ('gov_report', 'summ_screen_fd', 'qmsum', 'narrative_qa',
                    'qasper', 'quality', 'contract_nli')},
}


def corpus_of(task: str) -> Corpus | None:
  """The corpus of a seqio task; None if it is none of these."""
  return CORPORA.get(task.removeprefix(PREFIX)) if task.startswith(
      PREFIX) else None


def how_to_get(task: str) -> str:
  """What to do where the data of a task is not there; '' if that is not
  known."""
  corpus = corpus_of(task)
  if corpus is None:
    return ''
  if corpus.files:
    return (f': it is made by hand, from {corpus.origin}, and '
            '--config.data.task_dir=DIR names the folder that it is put in')
  return (f': `tfds build {corpus.tfds.partition(":")[0]}` downloads and '
          'prepares it, and --config.data.tfds_dir=DIR names its folder')

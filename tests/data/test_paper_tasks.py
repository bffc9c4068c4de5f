"""longt5_flax.data.paper_tasks: corpora in the formats of TensorFlow Datasets,
TFRecord and SCROLLS, read by seqio's own get_dataset and as text."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from longt5_flax.data import paper_tasks, task_formats, tasks
from longt5_flax.data.examples import Example
from longt5_flax.data.seqio_source import load_task_examples
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary
from tfds_corpus import write_tfds

FOLDER = Path(__file__).parent.parent / 'testdata' / 'vocabulary'
TINY = str(FOLDER / 'tiny.model')
VOCABULARY = Vocabulary(TINY)
LENGTHS = {'inputs': 64, 'targets': 32}
TEXT = tfds.features.Text()
SUMMARIES = {  # task -> dataset of TFDS, and its two fields
    'arxiv': ('scientific_papers/arxiv:1.1.1', 'article', 'abstract'),
    'pubmed': ('scientific_papers/pubmed:1.1.1', 'article', 'abstract'),
    'big_patent': ('big_patent/all:2.1.2', 'description', 'abstract'),
    'multi_news': ('multi_news:2.1.0', 'document', 'summary'),
    'cnn_dailymail': ('cnn_dailymail:3.4.0', 'article', 'highlights'),
}
SCROLLS = ('gov_report', 'summ_screen_fd', 'qmsum', 'narrative_qa', 'qasper',
           'quality', 'contract_nli')


@pytest.fixture
def register():
  """Registers the tasks to read a test's corpora; at the end as published."""
  def register_tasks(vocabulary=TINY, **changes):
    paper_tasks.register_paper_tasks(vocabulary, 100, **changes)

  yield register_tasks
  paper_tasks.register_paper_tasks()


def ids_of(task, split='train', **changes):
  """(inputs, targets) as seqio gives them to its users, in order."""
  data = seqio.get_mixture_or_task(f'longt5_{task}').get_dataset(
      **{'sequence_length': LENGTHS, 'split': split, 'shuffle': False}
      | changes)
  return [tuple(example[side].tolist() for side in LENGTHS)
          for example in data.as_numpy_iterator()]


def tokens(*texts):
  return tuple([*VOCABULARY.encode(text), 1] for text in texts)


def texts_of(task, split='train'):
  return list(load_task_examples(f'longt5_{task}', split))


def write_summaries(folder, task, pairs, split='train'):
  name, document, summary = SUMMARIES[task]
  return write_tfds(
      folder, name, {document: TEXT, summary: TEXT, 'more': TEXT},
      {split: [{document: one, summary: two, 'more': ''}
               for one, two in pairs]})


PAIRS = [('A long article.\n Of lines.', 'An abstract \n here.'),
         ('Another ☃.', 'Short.')]


@pytest.mark.parametrize('task', SUMMARIES)
def test_summaries_of_tfds(task, register, tmp_path):
  register(tfds_dir=write_summaries(tmp_path, task, PAIRS))
  assert ids_of(task) == [tokens(*pair) for pair in PAIRS]
  assert texts_of(task) == [
      Example(str(number), *pair, pair[1:])
      for number, pair in enumerate(PAIRS, 1)]


def test_published_corpora():
  """As importing the module registers them; nothing is read."""
  paper_tasks.register_paper_tasks()
  names = {name.removeprefix('longt5_') for name in seqio.TaskRegistry.names()
           if name.startswith('longt5_') and '_c4_' not in name}
  assert names == {*SUMMARIES, 'media_sum', 'natural_questions', 'trivia_qa',
                   *SCROLLS}
  for name in names:
    task = seqio.get_mixture_or_task(f'longt5_{name}')
    assert {feature.vocabulary.sentencepiece_model_file
            for feature in task.output_features.values()} == {tasks.VOCABULARY}
  for name, (dataset, *_) in SUMMARIES.items():
    source = seqio.get_mixture_or_task(f'longt5_{name}').source
    assert source.tfds_dataset.name == dataset
  trivia = seqio.get_mixture_or_task('longt5_trivia_qa').source
  assert trivia.tfds_dataset.name == 'trivia_qa/rc:1.1.0'
  assert trivia.tfds_dataset._split_map == {
      'train': 'train[:78785]',
      'validation': 'train[78785:]', 'test': 'validation'}


def test_prefix_and_long_inputs(register, tmp_path):
  pairs = [('one two three four five six seven', 'One.'), ('two', 'Two.')]
  folder = write_summaries(tmp_path, 'arxiv', pairs)
  ids = VOCABULARY.encode('e ' + pairs[0][0])
  lengths = {'inputs': 8, 'targets': 32}
  register(tfds_dir=folder, prefix='e ', long_inputs='cut_middle')
  assert ids_of('arxiv', sequence_length=lengths)[0] == (
      [*ids[:4], *ids[-3:], 1], *tokens('One.'))
  examples = tasks.TaskExamples(
      tasks.find_task('longt5_arxiv'), 'train', (8, 32), 0)
  assert [each['lost_inputs'] for each in examples] == [len(ids) - 7, 0]
  register(tfds_dir=folder, long_inputs='leave_out')
  examples = tasks.TaskExamples(
      tasks.find_task('longt5_arxiv'), 'train', (8, 32), 0)
  (only,) = examples
  assert only['inputs'].tolist() == [*VOCABULARY.encode('two'), 1]
  assert only['left_out'] == 1
  register(tfds_dir=folder, long_inputs='refuse')
  with pytest.raises(DataError, match=r'^task longt5_arxiv: .*DataError: '
                     r'\d+ input tokens are more than inputs_length=8') as e:
    next(tasks.TaskExamples(
        tasks.find_task('longt5_arxiv'), 'train', (8, 32), 0))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('targets', ['\n', '\u200b'])
def test_targets_without_tokens(targets, register, tmp_path):
  folder = write_summaries(tmp_path, 'arxiv', [('a', targets), *PAIRS])
  # Of the quickstart, which drops what has no width.
  settings = {'vocabulary': 'corpus/vocabulary.model', 'tfds_dir': folder}
  register(**settings)
  with pytest.raises(DataError, match=(
      r"^task longt5_arxiv: .*targets='.+' has no tokens")):
    tasks.check_examples(tasks.find_task('longt5_arxiv'), 'train', (64, 32))
  register(**settings, on_bad_record='skip')
  found = list(tasks.TaskExamples(
      tasks.find_task('longt5_arxiv'), 'train', (64, 32), 0))
  assert [each['left_out'] for each in found] == [1, 0]


def test_targets_that_are_all_padding():
  """Of a task that somebody else made."""
  feature = seqio.Feature(seqio.ByteVocabulary())
  seqio.TaskRegistry.add(
      'padded', seqio.FunctionDataSource(
          lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(
              {'inputs': [5], 'targets': [0, 0]}), splits=['train']),
      preprocessors=[], output_features={'inputs': feature, 'targets': feature},
      metric_fns=[])
  try:
    with pytest.raises(DataError, match='task padded: an example has targets '
                       'that are all padding; its preprocessors must leave it'):
      tasks.check_examples(tasks.find_task('padded'), 'train', (8, 8))
  finally:
    seqio.TaskRegistry.remove('padded')


def write_records(path, records):
  path.parent.mkdir(exist_ok=True)
  with tf.io.TFRecordWriter(str(path)) as writer:
    for record in records:
      features = {name: tf.train.Feature(bytes_list=tf.train.BytesList(
          value=[text.encode('utf-8')])) for name, text in record.items()}
      writer.write(tf.train.Example(features=tf.train.Features(
          feature=features)).SerializeToString())


def test_media_sum(register, tmp_path):
  """As the paper's converter writes it."""
  for name, text in (('train', 'HOST: Hi.'), ('val', 'GUEST: Ho.')):
    write_records(tmp_path / 'media_sum' / f'{name}.tfrecords', [
        {'interview': text, 'summary': 'They talk.'}])
  register(task_dir=str(tmp_path))
  assert ids_of('media_sum') == [tokens('HOST: Hi.', 'They talk.')]
  assert texts_of('media_sum', 'validation') == [
      Example('1', 'GUEST: Ho.', 'They talk.', ('They talk.',))]


def test_natural_questions(register, tmp_path):
  """The paper trains on the shards that end in 0 to 8."""
  for name, answer in (
      ('train-00008-of-00050', 'one'), ('train-00009-of-00050', 'two'),
      ('dev-00000-of-00005', 'NULL')):
    write_records(tmp_path / 'natural_questions' / f'nq-{name}', [
        {'id_': f'q {answer}', 'title': 'T', 'context': 'some  words .\nMore',
         'question': 'who is it', 'answer': answer, 'all_answers': answer}])
  register(task_dir=str(tmp_path))
  inputs = 'question: who is it context: some words . More'
  assert ids_of('natural_questions') == [tokens(inputs, 'one')]
  assert [example for split in ('train', 'validation', 'test')
          for example in texts_of('natural_questions', split)] == [
              Example(f'q {answer}', inputs, answer, (answer,))
              for answer in ('one', 'two', 'NULL')]


TRIVIA = {
    'question': TEXT, 'question_id': TEXT, 'question_source': TEXT,
    'entity_pages': tfds.features.Sequence(dict.fromkeys(
        ('doc_source', 'filename', 'title', 'wiki_context'), TEXT)),
    'search_results': tfds.features.Sequence(dict.fromkeys(
        ('description', 'filename', 'title', 'url', 'search_context'), TEXT)
        | {'rank': np.int32}),
    'answer': {'aliases': tfds.features.Sequence(TEXT),
               'normalized_aliases': tfds.features.Sequence(TEXT),
               **dict.fromkeys((
                   'matched_wiki_entity_name',
                   'normalized_matched_wiki_entity_name', 'normalized_value',
                   'type', 'value'), TEXT)},
}


def trivia_question(name, pages, value, aliases):
  return {
      'question': "Who wrote 'The ÄND'?", 'question_id': name,
      'question_source': '', 'entity_pages': [
          dict(doc_source='', filename='', title=title, wiki_context=text)
          for title, text in pages],
      'search_results': [dict(description='', filename='', rank=1, title='web',
                              url='', search_context='Of the web.')],
      'answer': {**dict.fromkeys(TRIVIA['answer'], ''), 'value': value,
                 'aliases': aliases, 'normalized_aliases': []}}


def test_trivia_qa(register, tmp_path, monkeypatch):
  """Wikipedia alone, each page behind its title, all in ASCII's lower case. An
  id that comes again gets its place."""
  records = [trivia_question('q1', [('One', "It 'is'  so.\n"), ('Two', 'No.')],
                             "'Bob'", ["'Bob'", 'Bobby']),
             trivia_question('q1', [], 'Ann', [])]
  folder = write_tfds(tmp_path, 'trivia_qa/rc:1.1.0', TRIVIA, {
      'train': records, 'validation': records[1:]})
  # The published one counts more questions than are here.
  monkeypatch.setitem(
      task_formats.CORPORA, 'trivia_qa', task_formats.CORPORA[
          'trivia_qa']._replace(splits={
              'train': 'train[:1]', 'validation': 'train[1:]',
              'test': 'train'}))
  register(tfds_dir=folder)
  inputs = 'question: who wrote the Änd? context: one it is so. two no.'
  assert ids_of('trivia_qa') == [tokens(inputs, 'bob')]
  assert texts_of('trivia_qa', 'test') == [
      Example('q1', inputs, 'bob', ("'Bob'", 'Bobby')),
      Example('q1#2', 'question: who wrote the Änd? context: ', 'ann', ('ann',)
              )]


def write_scrolls(folder, name, split, lines):
  path = folder / 'scrolls' / name / f'{split}.jsonl'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, lines)) + '\n')
  return path


def scrolls_line(name, number, output, **changes):
  return {'id': name, 'pid': f'{name}_{number}', 'input': f'Why {name}?\n\nX.',
          'output': output} | changes


@pytest.mark.parametrize('name', SCROLLS)
def test_scrolls(name, register, tmp_path):
  """Lines of one id are one example of several references; in training each
  is an example."""
  write_scrolls(tmp_path, name, 'train', [scrolls_line('a', 0, 'So.')])
  write_scrolls(tmp_path, name, 'validation', [
      scrolls_line('a', 0, 'So.'), scrolls_line('b', 0, 'Yes'),
      scrolls_line('a', 1, 'Thus.')])
  register(task_dir=str(tmp_path))
  assert ids_of(name) == [tokens('Why a?\n\nX.', 'So.')]
  assert len(ids_of(name, 'validation')) == 3
  assert texts_of(name, 'validation') == [
      Example('a', 'Why a?\n\nX.', 'So.', ('So.', 'Thus.')),
      Example('b', 'Why b?\n\nX.', 'Yes', ('Yes',))]


@pytest.mark.parametrize('change, problem', [
    ({'output': None}, "field 'output' is NoneType, not a string"),
    ({'output': ' '}, "field 'output' is empty")])
def test_bad_line_of_scrolls(change, problem, register, tmp_path):
  path = write_scrolls(tmp_path, 'qmsum', 'train', [
      *[scrolls_line(f'{i}', 0, 'Yes') for i in range(16)],
      scrolls_line('a', 0, **{'output': ''} | change)])
  register(task_dir=str(tmp_path))
  with pytest.raises(DataError, match=f'^task longt5_qmsum: .*{problem}') as e:
    list(tasks.TaskExamples(
        tasks.find_task('longt5_qmsum'), 'train', (64, 32), 0))
  assert '\n' not in str(e.value)
  with pytest.raises(DataError) as error:
    texts_of('qmsum')
  assert str(error.value) == f'{path}:17: {problem}'


@pytest.mark.parametrize('name, what', [
    ('media_sum', 'no file {}/media_sum/train.tfrecords: it is made by hand, '
     'from MediaSum by mediasum_preprocess.py of google-research/longt5, and '
     '--config.data.task_dir=DIR names the folder that it is put in'),
    ('natural_questions', 'no file {}/natural_questions/nq-train-????[0-8]-of-'
     '?????: it is made by hand, from NaturalQuestions by nq_preprocess.py of '
     'google-research/longt5, and --config.data.task_dir=DIR names the folder '
     'that it is put in'),
    ('qasper', 'no file {}/scrolls/qasper/train.jsonl: it is made by hand, '
     'from qasper.zip of SCROLLS, scrolls-benchmark.com, and '
     '--config.data.task_dir=DIR names the folder that it is put in'),
    ('arxiv', 'no data of scientific_papers/arxiv:1.1.1 in {}/'
     'scientific_papers/arxiv/1.1.1: `tfds build scientific_papers/arxiv` '
     'downloads and prepares it, and --config.data.tfds_dir=DIR names its '
     'folder'),
    ('trivia_qa', 'no data of trivia_qa/rc:1.1.0 in {}/trivia_qa/rc/1.1.0: '
     '`tfds build trivia_qa/rc` downloads and prepares it, and '
     '--config.data.tfds_dir=DIR names its folder'),
])
def test_data_that_is_not_there(name, what, register, tmp_path):
  register(task_dir=str(tmp_path), tfds_dir=str(tmp_path))
  message = '^' + re.escape(
      f'task longt5_{name}: {what}'.format(tmp_path)) + '$'
  with pytest.raises(tasks.UnreachableError, match=message):
    tasks.TaskExamples(tasks.find_task(f'longt5_{name}'), 'train', (64, 32), 0)
  with pytest.raises(tasks.UnreachableError, match=message):
    texts_of(name)


def test_another_dataset_of_the_same_fields(register, tmp_path):
  """data.tfds_name is of the run's task alone."""
  folder = write_tfds(
      tmp_path, 'mine:1.0.0', {'article': TEXT, 'abstract': TEXT},
      {'train': [{'article': 'A b', 'abstract': 'c'}]})
  register(tfds_dir=folder, tfds_name='mine:1.0.0', task='longt5_pubmed')
  assert ids_of('pubmed') == [tokens('A b', 'c')]
  with pytest.raises(DataError, match='no data of scientific_papers/arxiv'):
    texts_of('arxiv')


@pytest.mark.parametrize('keeps_text', [True, False])
def test_texts_of_a_task_of_ones_own(keeps_text):
  """As it was tokenised, or what its tokens mean; with all its answers."""
  feature = seqio.Feature(seqio.SentencePieceVocabulary(TINY, 100))
  record = {'inputs': 'who  is it', 'targets': 'Ann', 'answers': ['Ann', 'Bo']}
  seqio.TaskRegistry.add(
      'own', seqio.FunctionDataSource(
          lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors(
              record), splits=['test']),
      preprocessors=[
          lambda data: seqio.preprocessors.tokenize(
              data, {'inputs': feature, 'targets': feature},
              copy_pretokenized=keeps_text),
          seqio.preprocessors.append_eos],
      output_features={'inputs': feature, 'targets': feature}, metric_fns=[])
  try:
    assert list(load_task_examples('own', 'test')) == [
        Example('1', 'who  is it' if keeps_text else 'who is it', 'Ann',
                ('Ann', 'Bo'))]
    with pytest.raises(DataError, match="task own has no split 'train', only"):
      load_task_examples('own', 'train')
  finally:
    seqio.TaskRegistry.remove('own')


def test_lengths_that_are_not_given(register, tmp_path):
  register(tfds_dir=write_summaries(tmp_path, 'arxiv', PAIRS))
  with pytest.raises(ValueError, match='sequence_length must say how long'):
    ids_of('arxiv', sequence_length=None)

"""The page that compares runs: what is on it, and what can never be."""

import json
import re
from html.parser import HTMLParser

import pytest

import runs
import tiny_runs
from longt5_flax import report
from longt5_flax.report_figures import figures
from longt5_flax.report_runs import read_runs
from longt5_flax.training import run_config
from longt5_flax.training.metrics import MetricsWriter

HOSTILE = '<script>alert("1")</script> $x_$ & <img src=x onerror=alert(2)>'
TAGS = set(re.findall(r'\w+', '''
    html head meta title style body h1 h2 h3 nav a ul li span b section p strong
    div table thead tbody tr th td figure figcaption svg defs path g use text
    clipPath rect details summary code article'''.lower()))


class Page(HTMLParser):
  """Reads a page as a browser does: its tags, and its text by section."""

  def __init__(self, text):
    super().__init__()
    self.stack, self.section = [], ''
    self.text, self.tags, self.attributes = {}, set(), []
    self.feed(text)
    self.close()
    assert self.stack == []

  def handle_starttag(self, tag, attrs):
    self.tags.add(tag)
    self.attributes += [(tag, *pair) for pair in attrs]
    if tag == 'section':
      self.section = dict(attrs)['id']
    if tag != 'meta':
      self.stack.append(tag)

  def handle_endtag(self, tag):
    assert self.stack.pop() == tag

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    self.handle_endtag(tag)

  def handle_data(self, data):
    self.text[self.section] = self.text.get(self.section, '') + data + ' '


def score(mean):
  return {'mean': mean, 'low': mean - 2, 'mid': mean, 'high': mean + 3}


def make_run(folder, step=40, loss=5.0, **settings):
  """A run's folder as train.py writes it, without training."""
  settings = {name.replace('__', '.'): value
              for name, value in settings.items()}
  run_config.write_config(
      str(folder), run_config.resolved(tiny_runs.tiny(settings)), 'test')
  writer = MetricsWriter(str(folder), 0)
  for at in range(4, step + 1, 4):
    writer.write(at, 'train', {
        'loss': loss + 40 / at, 'learning_rate': at / 1000,
        'encoder_tokens_per_second': 9000.0 + at,
        'decoder_tokens_per_second': 345.0, 'steps_per_second': 2.0})
    if at % 20 == 0:
      writer.write(at, 'validation', {'loss': loss + 50 / at})
  writer.close()
  return folder


def make_evaluation(folder, step, scores, predictions, **record):
  path = folder / 'eval' / str(step)
  path.mkdir(parents=True)
  (path / 'scores.json').write_text(json.dumps({
      'checkpoint': f'run:{folder}', 'metric': 'rouge',
      'examples': len(predictions), 'scores': scores, **record}))
  if not predictions:
    return
  (path / 'predictions.jsonl').write_text(''.join(
      json.dumps({'id': key, 'prediction': text, 'references': ['a dog barks',
                                                                f'or {key}']})
      + '\n' for key, text in predictions.items()))


def write(tmp_path, *folders, samples=5):
  assert report.main([*map(str, folders), f'--output={tmp_path}/out',
                      f'--samples={samples}']) == 0
  return Page((tmp_path / 'out' / 'report.html').read_text('utf-8'))


@pytest.fixture
def two(tmp_path):
  """Runs that differ in the learning rate, each evaluated twice."""
  folders = [make_run(tmp_path / 'slow', loss=5.0),
             make_run(tmp_path / 'fast', step=60, loss=4.0,
                      schedule__learning_rate=0.25)]
  for folder, mean in zip(folders, (21.5, 33.25), strict=True):
    for step in (20, 40):
      make_evaluation(folder, step, {'rouge1': score(mean + step / 20)}, {
          f'example-{i}': f'{folder.name} wrote {i} at {step}'
          for i in range(30)}, data='d', decoding={'num_beams': 4})
  return folders


def test_every_section(tmp_path, two, capsys):
  page = write(tmp_path, *two)
  said = capsys.readouterr().out
  assert said.startswith(f'Page: {tmp_path}/out/report.html\n')
  assert list(page.text) == [
      '', 'summary', 'loss', 'training', 'scores', 'configuration', 'samples']
  summary = page.text['summary']
  # Training loss at the last step, least held-out loss, medians of tokens.
  for words in ('slow', 'fast', 'tglobal-tiny', '40', '60', '6.0000', '4.6667',
                '6.2500 at step 40', '4.8333 at step 60', '9.0k + 345'):
    assert ' '.join(words.split()) in ' '.join(summary.split())
  for title in ('Training loss', 'Held-out loss'):
    assert title in page.text['loss']
  assert 'Do not compare' not in page.text['loss']
  for title in ('Learning rate', 'Throughput'):
    assert title in page.text['training']
  scores = ' '.join(page.text['scores'].split())
  assert '23.50 21.50 to 26.50' in scores
  assert '35.25 33.25 to 38.25' in scores
  assert '40 rouge 30 4 23.50' in scores
  assert 'rouge1 by step' in scores
  assert 'same examples' not in scores
  configuration = page.text['configuration']
  before, _, after = configuration.partition('settings that all runs share')
  assert 'schedule.learning_rate' in before
  assert '0.25' in before
  assert 'model.d_ff' not in before
  assert f'model.d_ff={runs.TINY["model.d_ff"]}' in after
  assert 'schedule.learning_rate' not in after
  assert 'decoding.num_beams=4' in after
  # Of the last evaluation, spread over the examples.
  samples = page.text['samples']
  assert '5 of 30 examples' in samples
  assert re.findall(r'example-(\d+) ', samples.replace('or example', ''))[
      :5] == ['0', '6', '12', '18', '24']
  for text in ('slow wrote 24 at 40', 'fast wrote 24 at 40', 'a dog barks',
               'or example-24'):
    assert text in samples
  assert 'at 20' not in samples


def test_figures_are_files_too(tmp_path, two):
  write(tmp_path, *two)
  names = {path.name for path in (tmp_path / 'out').iterdir()}
  assert names == {
      'report.html', 'train_loss.png', 'held_out_loss.png',
      'learning_rate.png', 'throughput.png', 'score_rouge1.png',
      'score_rouge1_by_step.png'}
  for name in names - {'report.html'}:
    content = (tmp_path / 'out' / name).read_bytes()
    assert content.startswith(b'\x89PNG')
    assert len(content) > 3000


def drawn(figure):
  """(x, y) of the lines that end in a letter, by letter."""
  from matplotlib.figure import Figure
  axes = Figure().subplots()
  figure.draw(axes, figure.runs)
  ends = {text.xy: text.get_text() for text in axes.texts}
  lines = {}
  for line in axes.lines:
    x, y = line.get_data()
    if (x[-1], y[-1]) in ends:
      lines[ends[x[-1], y[-1]]] = (list(x), list(y))
  return lines


def test_figures_draw_what_runs_wrote(two):
  found = {figure.name: drawn(figure)
           for group in figures(read_runs(list(map(str, two)))).values()
           for figure in group}
  assert found['held_out_loss'] == {
      'A': ([20, 40], [7.5, 6.25]),
      'B': ([20, 40, 60], [6.5, 5.25, pytest.approx(4 + 5 / 6)])}
  assert found['learning_rate']['B'][1][-1] == 0.06
  # Without the first log step, which compiles.
  assert found['throughput']['A'] == (
      list(range(8, 41, 4)), [9345 + at for at in range(8, 41, 4)])
  assert found['score_rouge1_by_step'] == {
      'A': ([20, 40], [22.5, 23.5]), 'B': ([20, 40], [34.25, 35.25])}


def test_history_is_of_one_way_of_decoding(two):
  make_evaluation(two[0], 30, {'rouge1': score(70)}, {}, data='d',
                  decoding={'num_beams': 1})
  make_evaluation(two[0], 32, {'rouge1': score(70)}, {}, data='other',
                  decoding={'num_beams': 4})
  runs_read = read_runs(list(map(str, two)))
  figure = figures(runs_read)['scores_by_step'][0]
  assert drawn(figure)['A'] == ([20, 40], [22.5, 23.5])


def test_text_is_text(tmp_path):
  """Whatever stands in names, settings, scores and predictions."""
  folder = make_run(tmp_path / 'a<b>$x_$', data__field=HOSTILE)
  make_evaluation(folder, 40, {HOSTILE: score(1)}, {HOSTILE: HOSTILE},
                  decoding={HOSTILE: HOSTILE}, metric=HOSTILE)
  other = make_run(tmp_path / 'b')
  page = write(tmp_path, folder, other)
  assert page.tags <= TAGS
  for tag, name, value in page.attributes:
    assert not name.startswith('on')
    assert name != 'src'
    if name.endswith('href'):
      assert value.startswith('#'), (tag, name, value)
    assert 'url(' not in value.replace('url(#', '')
  for section, times in (('scores', 3), ('samples', 2)):
    assert page.text[section].count(HOSTILE) >= times
  assert json.dumps(HOSTILE) in page.text['configuration']
  assert 'a<b>$x_$' in page.text['summary']


def test_page_needs_no_network(tmp_path, two):
  write(tmp_path, *two)
  text = (tmp_path / 'out' / 'report.html').read_text('utf-8')
  assert not re.search(r'https?:|//\w|@import|<script|<link|<img|<iframe', text)
  assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in text


def test_runs_that_lack_something(tmp_path):
  """No evaluation; nothing but an evaluation, as of others' weights; one
  stopped half way."""
  plain = make_run(tmp_path / 'plain')
  (plain / 'eval' / '40').mkdir(parents=True)
  page = write(tmp_path, plain)
  assert 'No run has an eval/STEP/scores.json' in page.text['scores']
  assert 'No run has an eval/STEP/predictions.jsonl' in page.text['samples']
  theirs = tmp_path / 'theirs'
  make_evaluation(theirs, 0, {'f1': score(50)}, {'x': 'written'})
  page = write(tmp_path, theirs)
  assert 'No numbers of it' in page.text['loss']
  assert 'No run has a config.json' in page.text['configuration']
  page = write(tmp_path, plain, theirs)
  assert '50.00' in page.text['scores']
  assert 'written' in page.text['samples']
  assert '1 of 1 examples' in page.text['samples']


def test_the_best_checkpoint_of_a_run_that_keeps_it(tmp_path, two):
  (two[0] / 'best.json').write_text(
      '{"keep_best": "rouge1", "best": 20, "scores": {"20": 22.5, "40": 1}}')
  page = write(tmp_path, *two)
  assert 'slow wrote 6 at 20' in page.text['samples']
  assert 'fast wrote 6 at 40' in page.text['samples']
  assert '22.50 20.50 to 25.50' in ' '.join(page.text['scores'].split())


def test_says_what_cannot_be_compared(tmp_path):
  first = make_run(tmp_path / 'first')
  second = make_run(tmp_path / 'second', data__objective='span_corruption',
                    data__extra_ids=96)
  make_evaluation(first, 40, {'f1': score(50)}, {'x': 'a'}, data='these')
  make_evaluation(second, 40, {'f1': score(50)}, {'x': 'a'}, data='others')
  page = write(tmp_path, first, second)
  assert 'Do not compare the runs by it : they differ in  data.objective' in (
      page.text['loss'])
  assert 'Not all runs were scored on the same examples.' in (
      page.text['scores'])


def test_names_tell_folders_apart(tmp_path):
  folders = [str(tmp_path / name / 'run') for name in ('a', 'b')]
  for folder in folders:
    make_run(folder)
  assert [run.name for run in read_runs(folders)] == ['a/run', 'b/run']
  assert [run.name for run in read_runs(folders[:1])] == ['run']


@pytest.mark.parametrize('file, content, message', [
    (None, None, '{}: there is no such folder.'),
    ('notes.txt', 'x', '{} is no run: there is neither metrics.jsonl nor an '
     'eval/STEP/scores.json in it.'),
    ('metrics.jsonl', '{"step": 1\n', '{}/metrics.jsonl is damaged: '),
    ('metrics.jsonl', '{"step": 1}\n', "{}/metrics.jsonl is damaged: 'split'"),
    ('eval/3/scores.json', '{"scores": {"f1": {"mean": 1}}}',
     '{}/eval/3/scores.json: scores={{"f1": {{"mean": 1}}}} must hold mean, '
     'low and high of each score, and decoding, if it is there, settings by '
     'name.'),
    ('eval/3/scores.json', '{"scores": {}, "decoding": 1}',
     '{}/eval/3/scores.json: scores={{}} must hold mean, '),
])
def test_refused(tmp_path, capsys, file, content, message):
  folder = tmp_path / 'bad'
  if file:
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text(content)
  good = make_run(tmp_path / 'good')
  assert report.main([str(good), str(folder), f'--output={tmp_path}/out']) == 2
  captured = capsys.readouterr()
  line, = captured.err.splitlines()
  assert line.startswith(f'error: {message.format(folder)}')
  assert captured.out == ''
  assert not (tmp_path / 'out').exists()


def test_fewer_than_no_samples(tmp_path, capsys):
  good = make_run(tmp_path / 'good')
  assert report.main([
      str(good), '--samples=-1', f'--output={tmp_path}/out']) == 2
  assert capsys.readouterr().err == 'error: --samples=-1 must be at least 0.\n'
  assert not (tmp_path / 'out').exists()


def test_twice_the_same(tmp_path, capsys):
  good = make_run(tmp_path / 'good')
  assert report.main([str(good), f'{good}/']) == 2
  assert capsys.readouterr().err == f'error: {good} is there twice.\n'

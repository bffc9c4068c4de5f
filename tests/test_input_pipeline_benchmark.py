"""benchmarks/input_pipeline.py: every line, of a small corpus."""

import itertools
import json

import runs
from benchmarks import input_pipeline
from longt5_flax.data.sources import load_documents

VOCABULARY = f'{runs.ROOT}/corpus/vocabulary.model'


def test_lines(tmp_path, monkeypatch, capsys):
  path = tmp_path / 'documents.jsonl'
  texts = load_documents(f'{runs.ROOT}/corpus/train.jsonl.xz')
  path.write_text(''.join(json.dumps({'text': text}) + '\n'
                          for text in itertools.islice(texts, 6)))
  # A process of its own takes two seconds to start.
  monkeypatch.setattr(input_pipeline, 'run_alone',
                      lambda function, *values: function(*values))
  monkeypatch.setattr(input_pipeline, 'SIZES', (9_000, 90_000))
  input_pipeline.main([f'--path={path}', f'--vocabulary={VOCABULARY}',
                       '--seconds=0.01', '--workers', '0', '--batch_size=1'])
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  measures = [line['measure'] for line in lines]
  assert measures == ['environment', 'prepare', *['rate'] * 4,
                      *['lengths'] * 8, *['memory'] * 2]
  assert all(line['tokens_per_second'] > 0 for line in lines[2:6])
  assert lines[6]['tokens'] < lines[-3]['tokens']
  # Every document, once.
  assert lines[-1]['epoch_tokens'] == sum(
      len(ids) for ids in map(
          input_pipeline.Vocabulary(VOCABULARY).encode,
          map(str, load_documents(str(path)))))

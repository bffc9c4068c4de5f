"""The Python in docs/api.md and README.md runs, from top to bottom."""

import re
from pathlib import Path

import numpy as np
import pytest

import golden
from longt5_flax import (
    FlaxLongT5ForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    Tokenizer,
)

REPOSITORY = Path(__file__).parent.parent.parent
VOCABULARY = REPOSITORY / 'tests' / 'testdata' / 'vocabulary'
CONFIG = LongT5Config(
    vocab_size=500, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=1,
    encoder_attention_type='transient-global', feed_forward_proj='gated-gelu',
    tie_word_embeddings=False)


def write_checkpoint(folder):
  """A tiny LongT5 that soon writes the end of a sequence."""
  ids = np.ones((1, 1), np.int32)
  params = golden.random_params(
      LongT5ForConditionalGeneration(CONFIG), ids, ids)
  model = FlaxLongT5ForConditionalGeneration(CONFIG, _do_init=False)
  head = params['decoder']['logits_dense']['kernel']
  params['decoder']['logits_dense']['kernel'] = head.at[:, 1].multiply(4)
  model.params = params
  model.save_pretrained(folder)
  Tokenizer(VOCABULARY / 'tiny.model').save_pretrained(folder)


def run_page(name, blocks=slice(None)):
  """What the program of those blocks of the page leaves."""
  page = (REPOSITORY / name).read_text('utf-8')
  found: dict = {}
  program = re.findall(r'```python\n(.*?)```', page, re.DOTALL)[blocks]
  exec(compile('\n'.join(program), name, 'exec'), found)
  return found


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
  """A folder with what the pages read."""
  write_checkpoint(tmp_path / 'long-t5-tglobal-base')
  text = (VOCABULARY / 'owl_creek.txt').read_text('utf-8')
  (tmp_path / 'article.txt').write_text(text * 2, 'utf-8')
  monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures('in_folder')
def test_api(capsys):
  found = run_page('docs/api.md')
  # Cut to 16,384 tokens, none of them padding.
  assert len(found['tokenizer'](found['article']).input_ids) > 16384
  assert found['half'].dtype == 'float16'
  assert found['output'].sequences.shape == (1, 512)
  assert np.all(np.isfinite(found['output'].scores))
  assert found['logits'].shape == (2, found['labels'].shape[1], 500)
  assert capsys.readouterr().out


@pytest.mark.usefixtures('in_folder')
def test_readme(capsys):
  """The block about weights; the next one takes minutes on a CPU."""
  found = run_page('README.md', slice(1))
  assert found['output'].sequences.shape == (1, 512)
  assert capsys.readouterr().out

r"""Gap-sentence pretraining of tglobal-base: 4096 -> 910 tokens, batch 128.

Reproduces: LongT5 base, transient-global attention: 250M parameters, 1M steps
  of C4. Published ROUGE-1 after fine-tuning at 4096 tokens: arXiv 44.87, PubMed
  47.77, BigPatent 60.95, MultiNews 46.01, MediaSum 35.09, CNN/DailyMail 42.15.
Command: python train.py --config=configs/tglobal_base.py
  and on text of your own: python train.py --config=configs/tglobal_base.py \
  --config.data.source=jsonl --config.data.path=books.jsonl.xz \
  --config.data.vocabulary=m.model
Hardware: one H200 takes 16 rows in 16.1 GB (docs/results.md);
  the published batch of 128 wants 8 of them, or optimizer.microbatches=8.
Expect: nothing close to the published scores from a corpus smaller than C4 or
  from fewer steps. Not run to its end by us.
"""

from configs import c4


def get_config():
  return c4.get_config('tglobal-base')

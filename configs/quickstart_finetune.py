"""The README's fine-tuning: the quickstart's model on meetings of QMSum.

Reproduces: nothing published; shows every part at work in a minute or two.
Command: python train.py --config=configs/quickstart_finetune.py
  after python train.py --config=configs/quickstart.py
Hardware: 2 CPU cores, 2 GB of memory.
Expect: a held-out loss that falls, and summaries of a few common words; 8
  examples, cut short, teach a tiny model no more.
"""

from configs import finetune


def get_config():
  config = finetune.get_config()
  config.init_from = 'run:runs/quickstart'
  config.steps = 40
  config.log_every_steps = 10
  config.model.preset = 'tglobal-tiny'
  config.model.vocab_size = 4096
  config.data.path = 'tests/testdata/qmsum/train.jsonl.xz'
  config.data.validation_path = 'tests/testdata/qmsum/validation.jsonl.xz'
  config.data.vocabulary = 'corpus/vocabulary.model'
  config.data.extra_ids = 0
  config.data.inputs_length = 1024
  config.data.targets_length = 128
  config.data.batch_size = 8
  config.data.workers = 0
  config.precision.dtype = 'float32'
  config.precision.remat = 'none'
  config.eval.every_steps = 10
  config.eval.metric = 'qmsum'
  config.eval.decode_every_steps = 20
  config.eval.batch_size = 8
  config.eval.keep_best = 'geometric_mean'
  return config

"""The README's first command: a tiny LongT5 on the novels in corpus/.

Reproduces: nothing published; shows every part at work in a few minutes.
Command: python train.py --config=configs/quickstart.py
Hardware: 2 CPU cores, 2 GB of memory.
Expect: a held-out loss that falls, and a held-out sentence that repeats common
  words; see the README.
"""

from configs import base


def get_config():
  config = base.get_config()
  config.steps = 200
  config.log_every_steps = 20
  config.model.preset = 'tglobal-tiny'
  config.model.vocab_size = 4096
  config.data.path = 'corpus/train.jsonl.xz'
  config.data.validation_path = 'corpus/validation.jsonl.xz'
  config.data.vocabulary = 'corpus/vocabulary.model'
  config.data.extra_ids = 0
  config.data.long_documents = 'pieces'
  config.data.inputs_length = 512
  config.data.targets_length = 192
  config.data.batch_size = 8
  config.data.workers = 0
  config.optimizer.name = 'adamw'
  config.schedule.name = 'cosine'
  config.schedule.learning_rate = 3e-3
  config.schedule.warmup_steps = 20
  config.precision.dtype = 'float32'
  config.checkpoint.every_steps = 100
  config.eval.every_steps = 100
  config.eval.samples = 1
  return config

r"""Fine-tuning as in the paper: a task, or inputs and targets of your own.

Reproduces: LongT5 (Guo et al. 2021, arXiv 2112.07916), section 4: a constant
  learning rate of 0.001, dropout 0.1, batches of 128 packed rows, as T5X's
  finetune.gin has them. The argument is a task of TASKS; `own`, or nothing, is
  for files of your own. Scores to expect of tglobal-base, -large and -xl on the
  test splits, greedy, at these input tokens (of large and xl: 16,384 for arxiv,
  pubmed and big_patent, 8192 for multi_news, which --config.data.inputs_length
  says). ROUGE-1, or 1/2/Lsum:
    arxiv          44.87 | 48.28/21.63/44.11 | 48.35/21.92/44.27
    pubmed         47.77 | 49.98/24.69/46.46 | 50.23/24.76/46.67
    big_patent     60.95 | 70.38/56.81/62.73 | 76.87/66.06/70.76
    multi_news     46.01 | 47.18/18.44/24.18 | 48.17/19.43/24.94
    media_sum      35.09 | 35.54/19.04/32.20 | 36.15
    cnn_dailymail  42.15 | 42.49/20.51/40.18 | 43.94/21.40/41.28
  Exact match/F1; natural_questions at 12k, 4k and 8k tokens, trivia_qa at 16k:
    natural_questions  58.12/62.44 | 60.77/65.38 | 62.66/66.61
    trivia_qa          74.67/78.90 | 78.38/82.45 | 81.00/84.83
  SCROLLS' own test server; F1, exact match (quality: all/hard) or ROUGE-1/2/L.
  Of large's gov_report and summ_screen_fd no trustworthy number was found:
    gov_report      57.7/30.0/31.4 | -              | 61.1/32.3/33.7
    summ_screen_fd  34.8/9.6/21.1  | -              | 35.8/9.6/21.1
    qmsum           33.9/11.0/22.8 | 35.1/12.0/23.3 | 34.9/11.8/23.5
    qasper          46.6           | 52.3           | 53.1
    narrative_qa    23.0           | 27.2           | 29.3
    quality         37.9/36.6      | 40.6/38.6      | 46.0/42.1
    contract_nli    85.6           | 87.3           | 88.2
Command: python train.py --config=configs/finetune.py:arxiv \
  --config.init_from=t5x:longt5_tglobal_base/checkpoint_1000000
  and on files of your own: python train.py --config=configs/finetune.py \
  --config.init_from=run:runs/tglobal_base --config.data.path=train.jsonl \
  --config.data.validation_path=validation.jsonl \
  --config.data.vocabulary=m.model
Hardware: not measured; the paper's batches want a pod slice, or
  --config.optimizer.microbatches=16 and time.
Expect: not run to its end by us.
"""

from configs import base
from longt5_flax.config import ConfigError

_QA = 128  # Target tokens of an answer.
# Task -> tokens of inputs and targets, and its metric. Of SCROLLS the paper
# publishes the inputs' length alone.
TASKS = {
    'arxiv': (4096, 512, 'rouge'),
    'pubmed': (4096, 512, 'rouge'),
    'big_patent': (4096, 512, 'rouge'),
    'multi_news': (4096, 512, 'rouge'),
    'media_sum': (4096, 512, 'rouge'),
    'cnn_dailymail': (4096, 512, 'rouge'),
    'natural_questions': (12288, _QA, 'squad'),
    'trivia_qa': (16384, _QA, 'trivia_qa'),
    'gov_report': (16384, 1024, 'gov_report'),
    'summ_screen_fd': (16384, 512, 'summ_screen_fd'),
    'qmsum': (16384, 512, 'qmsum'),
    'narrative_qa': (16384, _QA, 'narrative_qa'),
    'qasper': (16384, _QA, 'qasper'),
    'quality': (16384, _QA, 'quality'),
    'contract_nli': (16384, _QA, 'contract_nli'),
}


def get_config(task='own'):
  if task != 'own' and task not in TASKS:
    raise ConfigError(f'{task=} must be own or one of {", ".join(TASKS)}.')
  config = base.get_config()
  config.steps = 20_000  # Not published; a few epochs of arXiv.
  config.model.dropout_rate = 0.1
  config.schedule.name = 'constant'
  config.schedule.learning_rate = 1e-3
  config.schedule.warmup_steps = 0
  config.precision.remat = 'layer'
  config.data.objective = 'supervised'
  config.data.batch_size = 128
  if task == 'own':
    config.data.inputs_length, config.data.targets_length = 4096, 512
    return config
  (config.data.inputs_length, config.data.targets_length,
   config.eval.metric) = TASKS[task]
  config.eval.max_decode_length = config.data.targets_length
  config.eval.max_batches = 10
  config.data.source = 'seqio'
  config.data.task = f'longt5_{task}'
  config.data.validation_split = 'validation'
  # Some published records have no summary.
  config.data.on_bad_record = 'skip'
  return config

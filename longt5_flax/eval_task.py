"""What an evaluation reads: the examples to decode, and their vocabulary."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from longt5_flax.config import ConfigError, LongT5Config
from longt5_flax.data.examples import Example
from longt5_flax.data.objectives import Supervised
from longt5_flax.data.seqio_source import (
    TaskVocabulary,
    load_task_examples,
    open_task,
    register_tasks,
)
from longt5_flax.data.sources import DataError
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.eval_folder import digest
from longt5_flax.inputs import own_examples, pipeline_options
from longt5_flax.training import run_config


class Task(NamedTuple):
  """What is decoded.

  Attributes:
    path: where the examples are from, for people to read.
    examples: in the order of predictions.
    inputs: ids of each, cut to the limit, end of sequence included.
    cut: how many were cut.
    digest: of all examples that there are.
    settings: what `examples` and `inputs` follow from besides.
  """
  path: str
  examples: Sequence[Example]
  inputs: Sequence[np.ndarray]
  cut: int
  digest: str
  settings: dict[str, Any]


def load_vocabulary(config: Any, model: LongT5Config, record: dict[str, Any]
                    ) -> Vocabulary | TaskVocabulary:
  """The vocabulary to evaluate a checkpoint with.

  Args:
    config: of the evaluation.
    model: of the checkpoint.
    record: the config of its run; {} if it is of none.

  Raises:
    ConfigError: it is not the model's.
    DataError: it cannot be read.
  """
  data = config.data
  if data.source == 'seqio':
    register_tasks(data, pipeline_options(config, model.global_block_size))
    vocabulary: Any = TaskVocabulary(open_task(data.task, data.module))
  elif data.vocabulary:
    vocabulary = Vocabulary(data.vocabulary, data.extra_ids)
  else:
    raise ConfigError('data.vocabulary is empty: it must name a SentencePiece '
                      'model.')
  trained_with = record.get('vocabulary') or vocabulary.fingerprint
  if vocabulary.fingerprint not in ('', trained_with):
    raise ConfigError(
        f'data.vocabulary={data.vocabulary} with data.extra_ids='
        f'{data.extra_ids} is not the vocabulary that the checkpoint was '
        f'trained with, {record["data"]["vocabulary"]} with '
        f'{record["data"]["extra_ids"]}.')
  run_config.check_vocabulary(vocabulary, model)
  return vocabulary


def load_task(config: Any, vocabulary: Any) -> Task:
  """The examples of data.validation_path, or of the split
  data.validation_split of a seqio task.

  Raises:
    ConfigError: there are to be none.
    DataError: they cannot be read.
  """
  data = config.data
  key = 'validation_split' if data.source == 'seqio' else 'validation_path'
  where = data[key]
  if not where:
    raise ConfigError(f'data.{key} is empty: it must name the examples to '
                      'decode.')
  examples: Any
  if data.source == 'seqio':
    examples = load_task_examples(data.task, where)
    where = f'{data.task}, {where}'
  else:
    examples = own_examples(data, where, vocabulary, unique_ids=True)
  count = config.eval.max_examples
  some = examples[:count] if count else examples
  objective = Supervised(vocabulary, pipeline_options(config, 1))
  encoded = [objective.encode_inputs(example.inputs) for example in some]
  cut = sum(lost > 0 for _, lost in encoded)
  if cut and data.long_inputs == 'refuse':
    raise DataError(f'{cut} inputs of {where} have more than inputs_length='
                    f"{data.inputs_length} tokens, and long_inputs='refuse'")
  settings = {'prefix': data.prefix, 'long_inputs': data.long_inputs,
              'inputs_length': data.inputs_length,
              'max_examples': count,
              'vocabulary': vocabulary.fingerprint[:16]}
  return Task(where, some, [ids for ids, _ in encoded], cut,
              digest(json.dumps(example).encode() for example in examples),
              settings)

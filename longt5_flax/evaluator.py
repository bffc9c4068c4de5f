"""Evaluation on a task: what a model writes for its examples, and the scores.
For eval.py, and for train.py on the way."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from longt5_flax.config import ConfigError
from longt5_flax.eval_folder import EvalFolder, Found, digest
from longt5_flax.eval_task import Task, load_task
from longt5_flax.evaluation import bootstrap
from longt5_flax.evaluation.metrics import Metric, find_metric
from longt5_flax.generation.options import GenerationError, GenerationOptions
from longt5_flax.predictions import Predictor, plan_batches, writing_options
from longt5_flax.training import distributed
from longt5_flax.training.progress import Report

# Settings of `eval` that predictions follow from.
_DECODING = ('num_beams', 'length_penalty', 'no_repeat_ngram_size')
# So many numbers of a parameter tell it from others.
_SAMPLE = 64


class Evaluator:
  """Decodes and scores one task, for any parameters of a model.

  All processes of a run must make it and call it alike; the first one writes.

  Args:
    config: the run's.
    model: of the parameters.
    vocabulary: to read what is written.
    mesh: of the parameters.
    task: what to decode.

  Attributes:
    main: the name of the score that stands for all.

  Raises:
    ConfigError: a setting of `config.eval` cannot be.
  """

  def __init__(self, config: Any, model: Any, vocabulary: Any, mesh: Mesh,
               task: Task):
    settings = config.eval
    options = decoding_options(config, model.config)
    self._name, self._metric = settings.metric, eval_metric(settings)
    self.main = self._metric.main
    self._vocabulary, self._task = vocabulary, task
    self._predict = Predictor(model, mesh, options, settings.batch_size)
    self._batches = plan_batches(
        [len(ids) for ids in task.inputs], settings.batch_size,
        config.data.inputs_length)
    self._decoding = {name: settings[name] for name in _DECODING} | {
        'max_decode_length': options.max_length - 1,
        'batch_size': settings.batch_size, 'dtype': config.precision.dtype,
        **task.settings}
    self._sample = jax.jit(
        _corners, out_shardings=NamedSharding(mesh, PartitionSpec()))

  def __call__(self, params: Any, folder: str, checkpoint: str,
               report: Report, replace: bool = False
               ) -> dict[str, bootstrap.Interval]:
    """Writes predictions.jsonl and scores.json, or what is missing of them.

    Args:
      params: of the model.
      folder: for the files.
      checkpoint: what the parameters are, for people to read.
      report: to show how far it is.
      replace: predictions of other weights or data may go.

    Returns:
      The scores by name.

    Raises:
      ConfigError: such predictions are in the folder, and may not go.
    """
    files = EvalFolder(folder, {
        'weights': digest([np.asarray(self._sample(params)).tobytes()]),
        'data': self._task.digest,
        'decoding': self._decoding})
    found, done = _find(files, replace, len(self._batches))
    if found.note:
      report.say(found.note)
    batches = list(found.batches)
    for tokens in self._decode(params, done, report):
      if distributed.is_main():
        texts = [self._vocabulary.decode(row) for row in tokens.tolist()]
        files.append(len(batches), texts)
        batches.append(texts)
    scores: dict[str, Any] = {}
    if distributed.is_main():
      texts = found.predictions or self._in_order(batches)
      scores = self._score(texts)
      files.finish(self._lines(texts), {
          'checkpoint': checkpoint, 'path': self._task.path,
          'metric': self._name, 'main': self.main,
          'examples': len(texts), 'cut_inputs': self._task.cut,
          'scores': scores})
    return {name: bootstrap.Interval(**values) for name, values
            in distributed.gather_states(scores).items()}

  def _decode(self, params, done, report):
    """The tokens of each batch after those done."""
    left = self._batches[done:]
    count = sum(len(batch.numbers) for batch in left)
    total = len(self._task.examples)
    if 0 < count < total:
      report.say(f'{total - count} of {total} were decoded before; going on.')
    if left:
      with report.task('decoded', total, total - count) as advance:
        for batch in left:
          yield self._predict(
              params, [self._task.inputs[i] for i in batch.numbers],
              batch.length)
          advance(len(batch.numbers))

  def _in_order(self, batches):
    """The texts of batches, in the order of the examples."""
    numbers = [i for batch in self._batches for i in batch.numbers]
    texts = [text for batch in batches for text in batch]
    return [text for _, text in sorted(zip(numbers, texts, strict=True))]

  def _score(self, texts):
    references = [example.references for example in self._task.examples]
    found = bootstrap.intervals(
        self._metric, self._metric.score(texts, references))
    return {name: interval._asdict() for name, interval in found.items()}

  def _lines(self, texts):
    """Of predictions.jsonl."""
    for example, ids, text in zip(
        self._task.examples, self._task.inputs, texts, strict=True):
      yield {'id': example.id, 'prediction': text,
             'references': list(example.references), 'input_tokens': len(ids)}


def _find(files, replace, total):
  """What a folder holds, and on every process how many of all batches are
  done.

  Raises:
    ConfigError: on every process, if the first one finds what may not go.
  """
  found, shared = Found(), {}
  if distributed.is_main():
    try:
      found = files.find(replace)
      shared['done'] = total if found.predictions else len(found.batches)
    except ConfigError as error:
      shared['error'] = str(error)
  shared = distributed.gather_states(shared)
  if 'error' in shared:
    raise ConfigError(shared['error'])
  return found, shared['done']


def _corners(params):
  """Some numbers of every parameter, [N]."""
  return jnp.concatenate([
      jnp.ravel(leaf[(slice(1),) * (leaf.ndim - 1)])[:_SAMPLE]
      for leaf in jax.tree.leaves(params)])


def make_evaluator(config: Any, model: Any, vocabulary: Any, mesh: Mesh
                   ) -> Evaluator | None:
  """What a run evaluates with on its way; None if it does not.

  Args:
    config: the run's.
    model: its model.
    vocabulary: of the data.
    mesh: of the parameters.

  Raises:
    ConfigError, DataError: a setting that cannot be, examples that cannot be
      read.
  """
  settings = config.eval
  if settings.patience and not settings.keep_best:
    raise ConfigError(f'eval.patience={settings.patience} needs '
                      'eval.keep_best, the score that must get better.')
  if settings.keep_best and not settings.decode_every_steps:
    raise ConfigError(f'eval.keep_best={settings.keep_best!r} needs '
                      'eval.decode_every_steps.')
  if not settings.decode_every_steps:
    return None
  names = eval_metric(settings).names
  if settings.keep_best not in ('', *names):
    raise ConfigError(f'eval.keep_best={settings.keep_best!r} must be one of '
                      f'{", ".join(names)}, as eval.metric='
                      f'{settings.metric!r} has them.')
  return Evaluator(config, model, vocabulary, mesh, load_task(
      config, vocabulary))


def eval_metric(settings: Any) -> Metric:
  """The metric of `config.eval`.

  Raises:
    ConfigError: there is none of the name.
  """
  try:
    return find_metric(settings.metric)
  except ValueError as error:
    raise ConfigError(f'eval.{error}') from None


def decoding_options(config: Any, model: Any) -> GenerationOptions:
  """How `config.eval` wants a model to write.

  Args:
    config: the run's.
    model: LongT5Config, for the special ids.

  Raises:
    ConfigError: a setting cannot be.
  """
  try:
    return writing_options(
        model, config.eval.max_decode_length or config.data.targets_length,
        **{name: config.eval[name] for name in _DECODING})
  except GenerationError as error:
    raise ConfigError(f'eval.{error}') from None

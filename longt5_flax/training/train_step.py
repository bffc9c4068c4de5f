"""One step of training, and the loss of held-out rows."""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from longt5_flax.interop.layers import init_params
from longt5_flax.training.losses import LossSums, chunked_cross_entropy

Batch = dict[str, Int[Array, 'B length']]

_COMPILER_OPTIONS = {
    # Products of one operand (query, key, value) stay apart: XLA would make one
    # product of them and then copy its slices.
    'gpu': {'xla_gpu_dot_merger_threshold_mb': 0},
}


@flax.struct.dataclass
class TrainState:
  """What a checkpoint holds of the computation.

  Attributes:
    step: how many steps were taken, int32.
    params: the model's parameters, float32.
    opt_state: the optimizer's.
  """
  step: Any
  params: Any
  opt_state: Any


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, seed: int
) -> TrainState:
  """The state before the first step; parameters depend on the seed alone."""
  params = init_params(model, named_key(seed, 'params'), inputs=2)
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def named_key(seed: int, name: str) -> Array:
  """A random key for one use: every use has a name."""
  return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def batch_loss(
    model: nn.Module, loss: Any, params: Any, batch: Batch,
    dropout_key: Array | None = None,
) -> LossSums:
  """Sums of the loss over a batch.

  Args:
    model: LongT5ForConditionalGeneration.
    loss: `z_loss`, `label_smoothing` and `chunk_mib`.
    params: the model's.
    batch: with seqio's names.
    dropout_key: None for no dropout.
  """
  features: Any = model.apply(
      {'params': params}, batch['encoder_input_tokens'],
      batch['decoder_input_tokens'], batch['encoder_segment_ids'],
      batch['encoder_positions'], batch['decoder_segment_ids'],
      deterministic=dropout_key is None, with_head=False,
      rngs=None if dropout_key is None else {'dropout': dropout_key})
  return chunked_cross_entropy(
      functools.partial(_logits, model), _head_params(model.config, params),
      features, batch['decoder_target_tokens'], batch['decoder_loss_weights'],
      max_bytes=math.ceil(loss.chunk_mib * 2**20), z_loss=loss.z_loss,
      label_smoothing=loss.label_smoothing)


def _logits(model, head_params, features):
  return model.apply({'params': head_params}, features, method='logits')


def _head_params(config, params):
  """The part of the parameters that the output layer reads."""
  if config.tie_word_embeddings:
    return {'token_embedder': params['token_embedder']}
  return {'decoder': {'logits_dense': params['decoder']['logits_dense']}}


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    config: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
  """The function that a run compiles once and calls for every step.

  `schedule` is for the metric `learning_rate`; of `config`, the run's, it reads
  `seed`, `loss` and `optimizer.microbatches`.
  """
  dropout_key = named_key(config.seed, 'dropout')
  has_dropout = model.config.dropout_rate > 0

  def loss_sum(params, microbatch, step, index):
    key = None
    if has_dropout:
      key = jax.random.fold_in(jax.random.fold_in(dropout_key, step), index)
    sums = batch_loss(model, config.loss, params, microbatch, key)
    return sums.loss_sum, sums

  def train_step(state, batch):
    gradient, sums = _accumulate(
        jax.grad(loss_sum, has_aux=True), state, batch,
        config.optimizer.microbatches)
    if config.loss.normalization == 'tokens':
      tokens = jnp.maximum(sums.weight_sum, 1.0)
      gradient = jax.tree.map(lambda x: x / tokens, gradient)
    updates, opt_state = optimizer.update(
        gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = mean_metrics(sums) | padding_metrics(batch) | {
        'grad_norm': optax.tree.norm(gradient),
        'param_norm': optax.tree.norm(params),
        'learning_rate': schedule(state.step),
    }
    return TrainState(state.step + 1, params, opt_state), metrics

  return train_step


def jit_train_step(
    train_step: Callable[[TrainState, Batch],
                         tuple[TrainState, dict[str, Array]]],
    shardings: TrainState, platform: str,
) -> Any:
  """`train_step` for the devices of a platform; the state it gets is donated.

  Args:
    train_step: of `make_train_step`.
    shardings: of the state.
    platform: 'cpu', 'gpu' or 'tpu'.
  """
  return jax.jit(
      train_step, donate_argnums=0, out_shardings=(shardings, None),
      compiler_options=_COMPILER_OPTIONS.get(platform))


def _accumulate(grad_fn, state, batch, microbatches):
  """Sums gradients and losses over microbatches.

  Microbatch m holds rows m, m + M, m + 2M, ..., so that every device works on
  each of them.
  """
  if microbatches == 1:
    return grad_fn(state.params, batch, state.step, 0)
  parts = jax.tree.map(
      lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

  def add(total, part):
    microbatch, index = part
    return jax.tree.map(jnp.add, total, grad_fn(
        state.params, microbatch, state.step, index)), None

  first = grad_fn(
      state.params, jax.tree.map(lambda x: x[0], parts), state.step, 0)
  rest = jax.tree.map(lambda x: x[1:], parts)
  return jax.lax.scan(add, first, (rest, jnp.arange(1, microbatches)))[0]


def mean_metrics(sums: LossSums) -> dict[str, Float[Array, '']]:
  """Loss, z-loss and accuracy per target token."""
  tokens = jnp.maximum(sums.weight_sum, 1.0)
  return {'loss': sums.loss_sum / tokens, 'z_loss': sums.z_loss_sum / tokens,
          'accuracy': sums.correct_sum / tokens}


def padding_metrics(batch: Batch) -> dict[str, Array]:
  """Real tokens of both sides, and the share of padding."""
  metrics = {}
  for side in ('encoder', 'decoder'):
    segment_ids = batch[f'{side}_segment_ids']
    real = jnp.sum(segment_ids > 0)
    metrics[f'{side}_tokens'] = real
    metrics[f'{side}_padding'] = 1.0 - real / segment_ids.size
  return metrics

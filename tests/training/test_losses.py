"""The loss equals t5x's, and its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from longt5_flax.training.losses import chunked_cross_entropy, cross_entropy


@pytest.mark.parametrize('name', golden.names('flaxformer_'))
def test_equals_t5x_on_its_own_logits(name):
  case = golden.load(name)
  arguments = [case[key] for key in (
      'logits', 'decoder_target_tokens', 'decoder_loss_weights')]
  sums = compute(*arguments)
  for field in ('loss_sum', 'z_loss_sum', 'weight_sum'):
    golden.assert_close(getattr(sums, field), case[field], what=field)
  smooth = compute(*arguments, label_smoothing=0.1)
  golden.assert_close(smooth.loss_sum, case['loss_sum_label_smoothing_0p1'],
                      what='label smoothing')


def example(seed=0, batch=3, length=5, vocabulary=11):
  generator = np.random.default_rng(seed)
  return (3 * generator.standard_normal((batch, length, vocabulary)),
          generator.integers(0, vocabulary, (batch, length)),
          generator.integers(0, 2, (batch, length)))


def compute(logits, targets, weights, **options):
  return golden.jit(functools.partial(cross_entropy, **options))(
      jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.int32),
      jnp.asarray(weights))


@pytest.mark.parametrize('label_smoothing', [0.0, 0.1, 0.5])
@pytest.mark.parametrize('z_loss', [0.0, 1e-4, 0.3])
def test_equals_the_definition(label_smoothing, z_loss):
  """Token by token in float64, the soft target written out."""
  logits, targets, weights = example()
  loss = z_losses = 0.0
  for row in np.ndindex(targets.shape):
    log_z = np.log(np.exp(logits[row]).sum())
    soft = np.full(11, label_smoothing / 10)
    soft[targets[row]] = 1 - label_smoothing
    entropy = -sum(p * np.log(p) for p in soft if p > 0)
    z_losses += weights[row] * z_loss * log_z ** 2
    loss += weights[row] * (soft @ (log_z - logits[row]) - entropy)
  sums = compute(logits, targets, weights, z_loss=z_loss,
                 label_smoothing=label_smoothing)
  golden.assert_close(sums.loss_sum, loss + z_losses, what='loss')
  golden.assert_close(sums.z_loss_sum, z_losses, what='z-loss')
  assert sums.weight_sum == weights.sum()


def test_correct_sum_counts_weighted_tokens():
  logits, targets, weights = example()
  hits = (logits.argmax(-1) == targets) * weights
  assert compute(logits, targets, weights).correct_sum == hits.sum()


def test_tokens_without_weight_count_for_nothing():
  """Neither in the sums nor in the gradient."""
  logits, targets, weights = example()
  sums = compute(logits, targets, weights)
  changed = np.where(weights[..., None] > 0, logits, 1e3)
  for a, b in zip(sums, compute(changed, targets, weights), strict=True):
    np.testing.assert_array_equal(a, b)
  gradient = golden.jit(jax.grad(
      lambda logits: cross_entropy(
          logits, jnp.asarray(targets), jnp.asarray(weights)).loss_sum))(
              logits.astype(np.float32))
  assert (np.abs(gradient).max(-1) > 0).tolist() == (weights > 0).tolist()


def test_a_perfect_prediction_costs_nothing():
  targets = np.arange(4)[None]
  soft = np.full((1, 4, 4), 0.1 / 3)
  soft[0, range(4), range(4)] = 0.9
  sums = compute(np.log(soft), targets, np.ones((1, 4)), label_smoothing=0.1)
  assert abs(float(sums.loss_sum)) < 1e-5


def test_large_logits_are_finite():
  logits = np.zeros((1, 2, 3))
  logits[0, :, 0] = 3e4
  sums = compute(logits, [[0, 1]], np.ones((1, 2)), z_loss=0.0)
  assert float(sums.loss_sum) == 3e4


def head(params, x):
  return x @ params['kernel']


def heads_and_labels(length):
  """Arguments of the chunked loss: two rows, a vocabulary of 11."""
  _, targets, weights = example(batch=2, length=length)
  generator = np.random.default_rng(1)
  return ({'kernel': jnp.asarray(generator.standard_normal((7, 11)), 'f')},
          jnp.asarray(generator.standard_normal((2, length, 7)), 'f'),
          jnp.asarray(targets), jnp.asarray(weights))


@pytest.mark.parametrize('length, positions, widths', [
    (13, 5, [5, 5, 5]), (12, 11.9, [6, 6]), (12, 12, [12]),
    (5, 0.1, [1] * 5), (5, 0, [5])])
def test_chunks_equal_the_whole(length, positions, widths):
  """Sums and gradients, for chunks of at most so many positions."""
  arguments = heads_and_labels(length)
  options = dict(z_loss=0.3, label_smoothing=0.1)
  seen = []

  def recording_head(params, x):
    seen.append(x.shape[1])
    return head(params, x)

  def chunked(params, features):
    sums = chunked_cross_entropy(
        recording_head, params, features, *arguments[2:],
        max_bytes=int(positions * 2 * 11 * 4), **options)
    return 0.5 * sums.loss_sum, sums

  def whole(params, features):
    sums = cross_entropy(head(params, features), *arguments[2:], **options)
    return 0.5 * sums.loss_sum, sums

  gradient, sums = golden.jit(jax.grad(chunked, (0, 1), has_aux=True))(
      *arguments[:2])
  expected, expected_sums = golden.jit(jax.grad(whole, (0, 1), has_aux=True))(
      *arguments[:2])
  # The whole is seen when the shape of the logits is asked for.
  assert {*seen} == {length, *widths}
  for field, value in expected_sums._asdict().items():
    golden.assert_close(getattr(sums, field), value, what=field)
    golden.assert_close(getattr(chunked(*arguments[:2])[1], field), value,
                        what=f'{field} without gradient')
  golden.assert_close(gradient[0]['kernel'], expected[0]['kernel'])
  golden.assert_close(gradient[1], expected[1])


def test_other_sums_of_chunks_have_no_gradient():
  params, *rest = heads_and_labels(4)
  gradient = jax.grad(lambda params: chunked_cross_entropy(
      head, params, *rest, max_bytes=100).z_loss_sum)(params)
  np.testing.assert_array_equal(gradient['kernel'], 0)

"""The numbers of a log step, on a clock of the test's own."""

import time
from types import SimpleNamespace

import pytest

from longt5_flax.config import LongT5Config
from longt5_flax.training.progress import Meter


class Clock:
  """Stands still but for `pass_`."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now

  def pass_(self, seconds):
    self.now += seconds


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(time, 'perf_counter', clock)
  return clock


def test_rates_and_waiting(clock):
  """Four steps of 2 s, of which 0.5 s waiting, and a checkpoint of 10 s."""
  sizes = SimpleNamespace(inputs_length=8, targets_length=4, batch_size=2)
  meter = Meter(LongT5Config.preset('tglobal-tiny'), sizes, 'cpu', 1)

  def batches():
    while True:
      clock.pass_(0.5)
      yield 'batch'

  source = batches()
  for _ in range(4):
    assert meter.take(source) == 'batch'
    clock.pass_(1.5)
    meter.add({'encoder_tokens': 12, 'decoder_tokens': 6})
  clock.pass_(10)
  meter.leave_out(10.0)
  rates = meter.read()
  assert rates['encoder_tokens_per_second'] == pytest.approx(6)
  assert rates['decoder_tokens_per_second'] == pytest.approx(3)
  assert rates['steps_per_second'] == pytest.approx(0.5)
  assert rates['input_wait'] == pytest.approx(0.25)

  # Each reading starts anew. The device need not have run out of work.
  for is_idle in (False, True):
    running = SimpleNamespace(is_ready=lambda is_idle=is_idle: is_idle)
    meter.take(source, {'loss': running})
    clock.pass_(0.5)
    meter.add({'encoder_tokens': 12, 'decoder_tokens': 6})
    assert meter.read()['input_wait'] == (0.5 if is_idle else 0)
  clock.pass_(1)
  meter.add({'encoder_tokens': 12, 'decoder_tokens': 6})
  assert meter.read()['input_wait'] == 0
  assert meter.read() == {}

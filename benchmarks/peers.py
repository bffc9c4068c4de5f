"""PyTorch on the same shapes; called by `run_peer_alone`.

A whole model is Hugging Face's LongT5: bfloat16 throughout, attention `eager`
(it has no other), AdamW, fused, unless Adafactor is asked for. One layer's
attention is FlexAttention.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch.nn.attention import flex_attention

from benchmarks.processes import Line
from benchmarks.timing import Limits, named, spread, time_calls

OPTIMIZERS = ('adamw', 'adafactor')


def train(config: Line, length: int, rows: int, targets: int, compiled: bool,
          remat: bool, optimizer: str, limits: list[Any]) -> Iterator[Line]:
  """Time and memory of a train step; in `busy_ms` of it the GPU worked.

  Args:
    config: LongT5Config's fields.
    length, rows, targets: of the batch.
    compiled: by torch.compile.
    remat: Hugging Face's gradient checkpointing.
    optimizer: one of OPTIMIZERS.
    limits: of the measurement.
  """
  model = _model(config).train()
  if remat:
    model.gradient_checkpointing_enable()
  update = _optimizer(optimizer, model)
  forward = torch.compile(model, dynamic=False) if compiled else model
  ids, labels = (_ids(model, rows, size) for size in (length, targets))
  # torch.compile cannot do without a mask.
  inputs = {'input_ids': ids, 'attention_mask': torch.ones_like(ids),
            'labels': labels, 'use_cache': False}

  def step() -> Any:
    update.zero_grad(set_to_none=True)
    forward(**inputs).loss.backward()
    update.step()
    return _mark()

  yield _versions() | {'dtype': 'bfloat16', 'optimizer': optimizer}
  start = time.perf_counter()
  _wait(step())
  yield {'first_step_seconds': round(time.perf_counter() - start, 1)}
  seconds = time_calls(step, _wait, Limits(*limits))
  yield spread(seconds) | _memory()
  yield {'busy_ms': _busy_ms(step)}


def generate(config: Line, length: int, rows: int, new_tokens: int, beams: int,
             limits: list[Any]) -> Iterator[Line]:
  """Time and memory of decoding so many tokens, no more and no fewer."""
  model = _model(config).eval()
  ids = _ids(model, rows, length)

  def write(count: int):
    with torch.inference_mode():
      result = model.generate(
          ids, attention_mask=torch.ones_like(ids), num_beams=beams,
          do_sample=False, max_new_tokens=count, min_new_tokens=count)
    assert result.shape == (rows, count + 1)
    return _mark()

  yield _versions() | {'dtype': 'bfloat16'}
  _wait(write(min(8, new_tokens)))  # Warms up as well as all of them.
  seconds = time_calls(lambda: write(new_tokens), _wait,
                       Limits(*limits)._replace(warmup=0), ahead=False)
  yield spread(seconds) | _memory()


def attention(
    length: int, rows: int, heads: int, head_size: int, radius: int,
    block_size: int, reach: int, limits: list[Any]) -> Iterator[Line]:
  """Time and memory of FlexAttention with LongT5's mask and learnt biases.

  Arguments as in benchmarks.attention. Without a GPU it is not compiled.
  """
  device = _device()
  torch.manual_seed(0)
  sizes = {'query': length, 'key': length, 'value': length,
           'side_key': length // block_size, 'side_value': length // block_size}
  x = {name: torch.randn(rows, heads, size, head_size, device=device,
                         dtype=torch.bfloat16, requires_grad=True)
       for name, size in sizes.items()}
  bias, side_bias = (
      torch.randn(heads, 2 * far + 1, device=device, requires_grad=True)
      for far in (radius, reach))

  def score(value, row, head, query, key):
    del row
    near = bias[head, (key - query + radius).clamp(0, 2 * radius)]
    far = side_bias[head, reach + (
        key - length - query // block_size).clamp(-reach, reach)]
    return value + torch.where(key < length, near, far)

  def sees(row, head, query, key):
    del row, head
    return (key >= length) | ((key - query).abs() <= radius)

  mask = flex_attention.create_block_mask(
      sees, None, None, length, length + length // block_size, device=device)
  attend = flex_attention.flex_attention
  if device == 'cuda':
    attend = torch.compile(attend, dynamic=False)

  def forward():
    return attend(x['query'], torch.cat([x['key'], x['side_key']], 2),
                  torch.cat([x['value'], x['side_value']], 2),
                  score_mod=score, block_mask=mask, scale=1.0)

  cotangent = torch.randn_like(x['query'])

  def forward_only():
    with torch.no_grad():
      forward()
    return _mark()

  def both():
    torch.autograd.grad(
        forward(), [*x.values(), bias, side_bias], cotangent)
    return _mark()

  yield _versions() | {'dtype': 'bfloat16'}
  for name, call in (('forward', forward_only), ('forward_backward', both)):
    yield named(name, time_calls(call, _wait, Limits(*limits)))
  yield _memory()


def _device() -> str:
  return 'cuda' if torch.cuda.is_available() else 'cpu'


def _model(config: Line) -> Any:
  torch.manual_seed(0)
  with torch.device(_device()):
    model = transformers.LongT5ForConditionalGeneration(
        transformers.LongT5Config(**config))
  return model.to(torch.bfloat16)


def _optimizer(name: str, model: Any) -> Any:
  if name == 'adamw':
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  return transformers.Adafactor(
      model.parameters(), lr=1e-4, scale_parameter=True, relative_step=False)


def _ids(model: Any, rows: int, length: int) -> torch.Tensor:
  return torch.randint(2, model.config.vocab_size, (rows, length),
                       device=_device())


def _mark() -> Any:
  """Something that ends when the work so far has."""
  if _device() == 'cpu':
    return None
  event = torch.cuda.Event()
  event.record()
  return event


def _wait(event: Any) -> None:
  if event is not None:
    event.synchronize()


def _busy_ms(call: Callable[[], Any]) -> float | None:
  """What a call's kernels take: all of its time, unless Python holds it up."""
  if _device() == 'cpu':
    return None
  with torch.profiler.profile(
      activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
    _wait(call())
  return round(sum(event.self_device_time_total
                   for event in profile.key_averages()) / 1000, 3)


def _versions() -> Line:
  gpu = _device() == 'cuda'
  return {'device': torch.cuda.get_device_name() if gpu else 'cpu',
          'torch': torch.__version__, 'transformers': transformers.__version__}


def _memory() -> Line:
  count: Callable[[], int] = torch.cuda.max_memory_allocated
  return {'peak_bytes': count() if _device() == 'cuda' else None}

"""What the models return: fields by name, by key and by position.

Class and field names are those of Hugging Face's Flax models (transformers
4.57), so that code that reads them needs no change.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax

_T = TypeVar('_T')


@dataclass_transform()
def _output(cls: type[_T]) -> type[_T]:
  """A dataclass that jax.jit, jax.grad and jax.tree can look into."""
  fields = list(cls.__annotations__)
  return jax.tree_util.register_dataclass(
      dataclasses.dataclass(cls), data_fields=fields, meta_fields=[])


class ModelOutput(Mapping[str, Any]):
  """`output.logits`, `output['logits']` and `output[0]` are the same.

  Fields that are None are left out of keys, positions and length.
  """

  def to_tuple(self) -> tuple[Any, ...]:
    """The values of the fields that are not None, in order."""
    return tuple(self.values())

  def __getitem__(self, key: str | int | slice) -> Any:
    if not isinstance(key, str):
      return self.to_tuple()[key]
    value = getattr(self, key) if key in self._fields() else None
    if value is None:
      raise KeyError(key)
    return value

  def __setitem__(self, key: str, value: Any) -> None:
    if key not in self._fields():
      raise KeyError(key)
    setattr(self, key, value)

  def __iter__(self) -> Iterator[str]:
    return (name for name in self._fields()
            if getattr(self, name) is not None)

  def __len__(self) -> int:
    return sum(1 for _ in self)

  def _fields(self) -> list[str]:
    return list(type(self).__annotations__)


# Fields are Any, as JAX puts tracers, shapes and shardings in their place.


@_output
class FlaxBaseModelOutput(ModelOutput):
  """What the encoder gives.

  Attributes:
    last_hidden_state: the encoder's output, [B, L, D], float32.
    hidden_states: the embedding, what each layer but the last gives to the
      next, and the output; a tuple.
    attentions: of each layer, the weights in blocks, [B, N, H, C, 3C + G];
      [B, H, L, L] for full attention.
  """
  last_hidden_state: Any = None
  hidden_states: Any = None
  attentions: Any = None


@_output
class FlaxBaseModelOutputWithPastAndCrossAttentions(ModelOutput):
  """What the decoder gives.

  Attributes:
    last_hidden_state: the decoder's output, [B, T, D], float32.
    past_key_values: the cache, for the next call.
    hidden_states: as the encoder's.
    attentions: of each layer, the weights of self-attention, [B, H, T, S]; S
      is T, or what the cache has room for.
    cross_attentions: of each layer, those of attention to the inputs,
      [B, H, T, L].
  """
  last_hidden_state: Any = None
  past_key_values: Any = None
  hidden_states: Any = None
  attentions: Any = None
  cross_attentions: Any = None


@_output
class FlaxCausalLMOutputWithCrossAttentions(ModelOutput):
  """What the decoder and the output layer give.

  Attributes:
    logits: [B, T, V], float32.
    past_key_values, hidden_states, attentions, cross_attentions: see
      FlaxBaseModelOutputWithPastAndCrossAttentions.
  """
  logits: Any = None
  past_key_values: Any = None
  hidden_states: Any = None
  attentions: Any = None
  cross_attentions: Any = None


@_output
class FlaxSeq2SeqModelOutput(ModelOutput):
  """What encoder and decoder give.

  Attributes:
    last_hidden_state: the decoder's output, [B, T, D], float32.
    past_key_values: always None.
    decoder_hidden_states, decoder_attentions, cross_attentions: see
      FlaxBaseModelOutputWithPastAndCrossAttentions.
    encoder_last_hidden_state, encoder_hidden_states, encoder_attentions: see
      FlaxBaseModelOutput.
  """
  last_hidden_state: Any = None
  past_key_values: Any = None
  decoder_hidden_states: Any = None
  decoder_attentions: Any = None
  cross_attentions: Any = None
  encoder_last_hidden_state: Any = None
  encoder_hidden_states: Any = None
  encoder_attentions: Any = None


@_output
class FlaxSeq2SeqLMOutput(ModelOutput):
  """What encoder, decoder and output layer give.

  Attributes:
    logits: [B, T, V], float32.
    past_key_values, decoder_hidden_states, decoder_attentions,
      cross_attentions, encoder_last_hidden_state, encoder_hidden_states,
      encoder_attentions: see FlaxSeq2SeqModelOutput.
  """
  logits: Any = None
  past_key_values: Any = None
  decoder_hidden_states: Any = None
  decoder_attentions: Any = None
  cross_attentions: Any = None
  encoder_last_hidden_state: Any = None
  encoder_hidden_states: Any = None
  encoder_attentions: Any = None


@_output
class FlaxGenerateOutput(ModelOutput):
  """What `generate` wrote.

  Attributes:
    sequences: ids [rows, max_length], the start token or prompt first; the
      sequences of an input stand together, the best first.
    scores: of beams, [rows]: the sum of log-probabilities over
      length ** length_penalty. Else None.
  """
  sequences: Any = None
  scores: Any = None

"""The models with Hugging Face's calling conventions: parameters held.

May import jax, flax and longt5_flax.{config, model, generation, interop}.
"""

from longt5_flax.api.conditional_generation import (
    FlaxLongT5ForConditionalGeneration,
    shift_tokens_right,
)
from longt5_flax.api.generation import GenerationConfig
from longt5_flax.api.models import FlaxLongT5EncoderModel, FlaxLongT5Model
from longt5_flax.api.outputs import ModelOutput

__all__ = [
    'FlaxLongT5EncoderModel',
    'FlaxLongT5ForConditionalGeneration',
    'FlaxLongT5Model',
    'GenerationConfig',
    'ModelOutput',
    'shift_tokens_right',
]

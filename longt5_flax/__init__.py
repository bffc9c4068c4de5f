"""LongT5 in JAX and Flax: from raw text to the summary of a long document."""

from longt5_flax.api import (
    FlaxLongT5EncoderModel,
    FlaxLongT5ForConditionalGeneration,
    FlaxLongT5Model,
)
from longt5_flax.config import ConfigError, LongT5Config
from longt5_flax.data.tokenizer import Tokenizer
from longt5_flax.model.longt5 import (
    LongT5EncoderModel,
    LongT5ForConditionalGeneration,
    LongT5Model,
)

__all__ = [
    'ConfigError',
    'FlaxLongT5EncoderModel',
    'FlaxLongT5ForConditionalGeneration',
    'FlaxLongT5Model',
    'LongT5Config',
    'LongT5EncoderModel',
    'LongT5ForConditionalGeneration',
    'LongT5Model',
    'Tokenizer',
]
__version__ = '0.1.0'

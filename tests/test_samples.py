"""What a run shows of its model: a held-out example, and what was written."""

from types import SimpleNamespace

import jax
import numpy as np

import generation_reference
import golden
from longt5_flax import LongT5Config, LongT5ForConditionalGeneration
from longt5_flax.data.vocabulary import Vocabulary
from longt5_flax.generation.options import GenerationOptions
from longt5_flax.samples import write_samples
from longt5_flax.training.partitioning import MESH_AXES, make_mesh

MASK_ID = 2


def test_a_packed_example_is_continued_alone(testdata):
  """The second segment has room around its mask, so it is chosen; the model
  reads it as if it had the row to itself."""
  vocabulary = Vocabulary(str(testdata / 'vocabulary' / 'tiny.model'))
  tokens = np.random.default_rng(0).integers(10, 60, size=(1, 200))
  tokens[0, [5, 130]] = MASK_ID
  segments = np.where(np.arange(200) < 80, 1, 2)[None]
  targets = np.array([[11, 12, 1, 13, 14, 15, 1, 0]])
  target_segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0]])
  model = LongT5ForConditionalGeneration(LongT5Config(
      vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
      local_radius=7, feed_forward_proj='gated-gelu',
      tie_word_embeddings=False))
  params = golden.random_params(model, tokens, targets)

  [sample] = write_samples(
      model, params, {
          'encoder_input_tokens': tokens, 'encoder_segment_ids': segments,
          'decoder_target_tokens': targets,
          'decoder_segment_ids': target_segments},
      vocabulary, MASK_ID, SimpleNamespace(samples=1, sample_length=12),
      make_mesh(dict.fromkeys(MESH_AXES, 1), jax.devices()[:1]))

  teacher = golden.jit(lambda targets: model.apply(
      {'params': params}, tokens[:, 80:], targets)[0])

  def logits_of(written):
    padded = np.zeros((1, 13), int)
    padded[0, :len(written)] = written
    return np.asarray(teacher(padded))[len(written) - 1]

  expected = generation_reference.greedy(
      logits_of, [0], GenerationOptions(max_length=13))
  assert sample.written == vocabulary.decode([i for i in expected if i > 1])
  assert sample.target == vocabulary.decode([13, 14, 15])
  assert sample.context == ' [MASK] '.join(
      vocabulary.decode(tokens[0, around].tolist())
      for around in (slice(82, 130), slice(131, 178)))

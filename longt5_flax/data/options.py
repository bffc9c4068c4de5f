"""What batches are made of."""

import dataclasses
import math

from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.sources import DataError, check_choice
from longt5_flax.data.span_corruption import SpanCorruptionOptions

# Of documents, and of examples that have targets.
OBJECTIVES = ('gap_sentences', 'span_corruption')
SUPERVISED = 'supervised'
LONG_DOCUMENTS = ('cut', 'pieces')
LONG_INPUTS = ('cut_end', 'cut_middle', 'leave_out', 'refuse')


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
  """From documents to rows.

  Attributes:
    inputs_length, targets_length: of a row, in tokens.
    objective: one of OBJECTIVES, or a weighted mix; or SUPERVISED. See
      `objective_weights`.
    gap_sentences, span_corruption: of those objectives.
    long_documents: 'cut': a document is one example, scored whole, its inputs
      and targets cut. 'pieces': it becomes consecutive pieces. See
      `objectives.GapSentences` and `objectives.SpanCorruption`.
    long_inputs: of examples; see `objectives.Supervised`.
    prefix: stands before the inputs of examples.
    packing: several examples a row.
    global_block_size: packed examples start at multiples of it in the inputs.
    seed: of order and draws.

  Raises:
    DataError: a value that cannot be.
  """

  inputs_length: int
  targets_length: int
  objective: str = 'gap_sentences'
  gap_sentences: GapSentenceOptions = GapSentenceOptions()  # noqa: RUF009
  span_corruption: SpanCorruptionOptions = (
      SpanCorruptionOptions())  # noqa: RUF009
  long_documents: str = 'cut'
  long_inputs: str = 'cut_end'
  prefix: str = ''
  packing: bool = True
  global_block_size: int = 16
  seed: int = 0

  def __post_init__(self) -> None:
    objectives = objective_weights(self.objective)
    check_choice('long_documents', self.long_documents, LONG_DOCUMENTS)
    check_choice('long_inputs', self.long_inputs, LONG_INPUTS)
    # Beside the end of sequence: some text, and the sentinel of a span.
    inputs, targets = (3, 3) if 'span_corruption' in objectives else (
        2, 2 if SUPERVISED in objectives else 1)
    for name, least in (('inputs_length', inputs), ('targets_length', targets),
                        ('global_block_size', 1), ('seed', 0)):
      if getattr(self, name) < least:
        raise DataError(f'{name}={getattr(self, name)} must be at least '
                        f'{least}')


def objective_weights(objective: str) -> dict[str, float]:
  """The objectives that a setting names, each with its weight.

  Args:
    objective: one of OBJECTIVES, or several, each with a weight and separated
      by commas: 'gap_sentences:1,span_corruption:1'. Each document gets one of
      them, so often as weights say. Or SUPERVISED, which mixes with none.

  Raises:
    DataError: an unknown or repeated name, or no weight above 0.
  """
  if objective == SUPERVISED:
    return {SUPERVISED: 1.0}
  weights: dict[str, float] = {}
  parts = objective.split(',')
  for part in parts:
    name, colon, text = (word.strip() for word in part.partition(':'))
    if name == SUPERVISED:
      raise DataError(f'{objective=}: {SUPERVISED} mixes with no other')
    if name not in OBJECTIVES:
      what = f'{objective=}' + (f': {name!r}' if name != objective else '')
      known = (*OBJECTIVES, SUPERVISED)
      raise DataError(f"{what} must be one of {known}, or a mix such as "
                      "'gap_sentences:1,span_corruption:1'")
    if name in weights:
      raise DataError(f'{objective=} names {name} twice')
    try:
      weights[name] = float(text) if colon or len(parts) > 1 else 1.0
    except ValueError:
      weights[name] = math.nan
    if not 0 < weights[name] < math.inf:
      raise DataError(f'{objective=}: the weight {text!r} of {name} must be a '
                      'number above 0')
  return weights

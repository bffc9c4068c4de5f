"""What batches are made of."""

import dataclasses

from longt5_flax.data.gap_sentences import GapSentenceOptions
from longt5_flax.data.sources import DataError

OBJECTIVES = ('gap_sentences',)
LONG_DOCUMENTS = ('cut', 'pieces')


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
  """From documents to rows.

  Attributes:
    inputs_length, targets_length: of a row, in tokens.
    objective: one of OBJECTIVES.
    gap_sentences: of that objective.
    long_documents: 'cut': a document is one example, scored whole, its inputs
      and targets cut. 'pieces': it becomes consecutive pieces, see
      `objectives.GapSentences`.
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
  long_documents: str = 'cut'
  packing: bool = True
  global_block_size: int = 16
  seed: int = 0

  def __post_init__(self) -> None:
    for name, known in (('objective', OBJECTIVES),
                        ('long_documents', LONG_DOCUMENTS)):
      if getattr(self, name) not in known:
        raise DataError(
            f'{name}={getattr(self, name)!r} must be one of {known}')
    # Of one input token nothing is left beside the end of sequence.
    for name, least in (('inputs_length', 2), ('targets_length', 1),
                        ('global_block_size', 1), ('seed', 0)):
      if getattr(self, name) < least:
        raise DataError(f'{name}={getattr(self, name)} must be at least '
                        f'{least}')

"""Tiny corpora on disk, as TensorFlow Datasets prepares the real ones: a folder
NAME/CONFIG/VERSION with features.json, dataset_info.json and TFRecord shards.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

FIELDS = ('text', 'url', 'content-type', 'content-length', 'timestamp')


def write_c4(folder: Path, splits: Mapping[str, Sequence[str]],
             shard_size: int = 5, version: str = '2.2.0') -> str:
  """Writes documents, `shard_size` a file; returns the folder of datasets."""
  features = {field: tfds.features.Text() for field in FIELDS}
  return write_tfds(folder, f'c4/en:{version}', features, {
      split: [dict.fromkeys(FIELDS, '') | {'text': text} for text in texts]
      for split, texts in splits.items()}, shard_size)


def write_tfds(folder: Path, name: str, features: Mapping[str, Any],
               splits: Mapping[str, Sequence[Mapping[str, Any]]],
               shard_size: int = 5) -> str:
  """Writes a dataset; returns the folder of datasets.

  Args:
    folder: of datasets.
    name: as in `tfds.load`, with a version.
    features: of TFDS.
    splits: split -> records.
    shard_size: records a file.
  """
  name, _, version = name.partition(':')
  dataset, _, config = name.partition('/')
  path = folder / name / version
  path.mkdir(parents=True)
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(
          name=dataset, config_name=config or None, config_description='',
          version=version, data_dir=str(path), module_name=''),
      features=tfds.features.FeaturesDict(features))
  writer = tfds.core.SequentialWriter(info, shard_size)
  writer.initialize_splits(list(splits))
  for split, records in splits.items():
    writer.add_examples({split: records})
  writer.close_all()
  return str(folder)

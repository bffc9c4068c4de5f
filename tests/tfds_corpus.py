"""A tiny C4 on disk, as TensorFlow Datasets prepares the real one: a folder
c4/en/VERSION with features.json, dataset_info.json and TFRecord shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import tensorflow_datasets as tfds

FIELDS = ('text', 'url', 'content-type', 'content-length', 'timestamp')


def write_c4(folder: Path, splits: Mapping[str, Sequence[str]],
             shard_size: int = 5, version: str = '2.2.0') -> str:
  """Writes documents, `shard_size` a file; returns the folder of datasets."""
  path = folder / 'c4' / 'en' / version
  path.mkdir(parents=True)
  info = tfds.core.DatasetInfo(
      builder=tfds.core.DatasetIdentity(
          name='c4', config_name='en', config_description='', version=version,
          data_dir=str(path), module_name='tensorflow_datasets.text.c4'),
      features=tfds.features.FeaturesDict(
          {field: tfds.features.Text() for field in FIELDS}))
  writer = tfds.core.SequentialWriter(info, shard_size)
  writer.initialize_splits(list(splits))
  for split, texts in splits.items():
    writer.add_examples({split: [
        dict.fromkeys(FIELDS, '') | {'text': text} for text in texts]})
  writer.close_all()
  return str(folder)

"""Which part of a batch a process holds, on meshes of several processes."""

from typing import NamedTuple

import jax
import pytest

from longt5_flax.training import partitioning


class Device(NamedTuple):
  process_index: int
  number: int


class Sharding:
  """One row a device; `rows` lists those of each process."""

  def __init__(self, rows):
    self._rows = rows

  def devices_indices_map(self, shape):
    del shape
    return {Device(process, row): (slice(row, row + 1), slice(None))
            for process, held in enumerate(self._rows) for row in held}


@pytest.mark.parametrize('rows, parts', [
    ([[0, 1, 2, 3]], [(0, 1)]),
    ([[0, 1], [2, 3]], [(0, 2), (1, 2)]),
    ([[2, 3], [0, 1]], [(1, 2), (0, 2)]),
    # A model axis that spans two processes: both hold the same rows.
    ([[0, 1], [0, 1], [2, 3], [2, 3]], [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ([[0, 2], [1, 3]], [(0, 2), (1, 2)]),
])
def test_row_shard(rows, parts, monkeypatch):
  monkeypatch.setattr(partitioning, 'batch_sharding', lambda _: Sharding(rows))
  for process, part in enumerate(parts):
    monkeypatch.setattr(jax, 'process_index', lambda process=process: process)
    mesh = partitioning.make_mesh(
        dict(data=-1, fsdp=1, tensor=1, sequence=1), jax.devices())
    assert partitioning.row_shard(mesh, 4) == part

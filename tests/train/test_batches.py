from pathlib import Path

import numpy as np
import torch

from ray_ds.train.batches import Batches, open_split, validation_batches
from tests.train.runs import make_settings, write_shards

CPU = torch.device("cpu")


def test_ranks_share_out_one_grid_in_order(tmp_path: Path) -> None:
    write_shards(tmp_path)
    split = open_split(str(tmp_path), "train")
    settings = make_settings()
    grids = []
    for world_size in (1, 2, 4):
        ranks = [Batches(split, settings, rank=rank, world_size=world_size) for rank in range(world_size)]
        grids.append([tokens for rank in ranks for tokens, _ in rank.of_step(3, CPU)])
    assert [grid[0].shape for grid in grids] == [(4, 16)] * 3
    assert all(torch.equal(torch.cat(grid), torch.cat(grids[0])) for grid in grids)


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    write_shards(tmp_path)
    batches = Batches(open_split(str(tmp_path), "train"), make_settings(), rank=0, world_size=1)
    tokens, targets = next(batches.of_step(0, CPU))
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_validation_reads_each_row_once_and_gives_ranks_as_many_micro_batches(tmp_path: Path) -> None:
    write_shards(tmp_path)
    split = open_split(str(tmp_path), "validation")
    settings = make_settings(validate_every=1, validation_tokens=10**6)
    ranks = [list(validation_batches(split, settings, rank=rank, world_size=3, device=CPU)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    rows = [row for batches in ranks for _, targets in batches for row in targets.numpy() if row[0] >= 0]
    expected = [split.row(index, 16)[1:] for index in range(split.num_rows(16))]
    assert sorted(map(tuple, rows)) == sorted(map(tuple, expected))
    counted = sum(int((targets >= 0).sum()) for batches in ranks for _, targets in batches)
    assert counted == 16 * len(expected) and np.all(np.diff([len(batches) for batches in ranks]) == 0)

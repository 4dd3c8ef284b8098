import pytest
import torch

from ray_ds.train.parallel.cuts import Cut


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_runs_of_a_part_are_where_its_elements_lie_in_the_whole(dim: int) -> None:
    whole = torch.arange(4 * 6 * 8).view(4, 6, 8)
    for place, part in enumerate(whole.chunk(2, dim=dim)):
        cut = Cut(dim=dim, place=place, count=2)
        flat = part.flatten()
        assert cut.whole_shape(tuple(part.shape)) == (4, 6, 8)
        for start in range(0, len(flat), 5):
            for stop in range(start + 1, len(flat) + 1, 7):
                runs = cut.runs(tuple(part.shape), start, stop)
                found = torch.cat([whole.flatten()[first : first + length] for first, length in runs])
                assert torch.equal(found, flat[start:stop])
                assert len(runs) == 1 or dim > 0

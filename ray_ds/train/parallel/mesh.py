"""Which processes divide a model between them, and which do the same beside them."""

from dataclasses import dataclass

import torch.distributed as dist

from ray_ds.config.parallel import Axis, Parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """All processes, as groups of neighbours; this process is in one of them."""

    axis: Axis | None
    """What a group divides; None where a group is one process."""
    size: int
    """Processes of a group."""
    place: int
    """Of this process in its group."""
    group: dist.ProcessGroup | None
    """The neighbours; None where there are none."""
    number: int
    """Of this group among all."""
    num_groups: int
    copies: dist.ProcessGroup | None
    """The processes in the same place of each group, which hold the same part of the weights; None = all processes."""

    @property
    def shares_rows(self) -> bool:
        """Whether the processes of a group train on the same rows."""
        return self.axis in ("tensor", "sequence")

    @property
    def divides_weights(self) -> bool:
        """Whether the processes of a group hold different weights."""
        return self.axis in ("tensor", "expert")

    @property
    def reader(self) -> int:
        """Number of this process among those that train on different rows."""
        return self.number if self.shares_rows else self.number * self.size + self.place

    @property
    def num_readers(self) -> int:
        """Processes, or groups, that train on different rows."""
        return self.num_groups if self.shares_rows else self.num_groups * self.size

    @property
    def rows_shared_by(self) -> int:
        """Processes that train on the rows of this one."""
        return self.size if self.shares_rows else 1

    @property
    def num_copies(self) -> int:
        """Processes over which DeepSpeed averages a gradient."""
        return self.num_groups if self.divides_weights else self.num_groups * self.size

    # What follows are the names by which DeepSpeed asks an `mpu` for a process's places.

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Return the group."""
        return self.group

    def get_model_parallel_rank(self) -> int:
        """Return this process's place in it."""
        return self.place

    def get_model_parallel_world_size(self) -> int:
        """Return its size."""
        return self.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Return those that average their gradients."""
        return self.copies

    def get_data_parallel_rank(self) -> int:
        """Return this process's place among them."""
        return self.number

    def get_data_parallel_world_size(self) -> int:
        """Return how many they are."""
        return self.num_groups


def make_mesh(parallel: Parallel, *, rank: int, world_size: int) -> Mesh:
    """Divide all processes into groups; all call this together."""
    size = parallel.group_size
    assert world_size % size == 0, f"{world_size} processes are no whole groups of {size}"
    number, place = divmod(rank, size)
    num_groups = world_size // size
    group = copies = None
    if parallel.axis is not None:
        group = _own([list(range(first, first + size)) for first in range(0, world_size, size)], rank)
    if parallel.axis in ("tensor", "expert"):
        copies = _own([list(range(first, world_size, size)) for first in range(size)], rank)
    return Mesh(
        axis=parallel.axis,
        size=size,
        place=place,
        group=group,
        number=number,
        num_groups=num_groups,
        copies=copies,
    )


def _own(groups: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Make all groups, as every process must, and return the one that a process is in."""
    made: list[dist.ProcessGroup] = [dist.new_group(ranks) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if rank in ranks)

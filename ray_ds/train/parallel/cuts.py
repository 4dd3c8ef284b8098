"""Which part of a weight a process of a group holds."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ray_ds.train.parallel.mesh import Mesh


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """An even part of a tensor along one dimension."""

    dim: int
    place: int
    """Number of the part."""
    count: int
    """Of parts."""

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the whole, given a part's."""
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(shape))

    def runs(self, shape: tuple[int, ...], start: int, stop: int) -> list[tuple[int, int]]:
        """Return where some elements of a flattened part lie in the flattened whole.

        Args:
            shape: of the part.
        Returns:
            Start in the whole and length of each run, in order.
        """
        block = torch.Size(shape[self.dim :]).numel()  # neighbours in both
        found = []
        for number in range(start // block, -(-stop // block)):
            first, last = max(start, number * block), min(stop, (number + 1) * block)
            found.append((first + (number * (self.count - 1) + self.place) * block, last - first))
        return found


def cut(parameter: nn.Parameter, dim: int, mesh: Mesh) -> Cut:
    """Reduce a parameter to this process's part of it; tell which that is."""
    part = torch.chunk(parameter.data, mesh.size, dim=dim)[mesh.place]
    parameter.data = part.clone(memory_format=torch.contiguous_format)
    parameter.model_parallel = True  # type: ignore[attr-defined]  # by which DeepSpeed counts it in the norm
    return Cut(dim=dim, place=mesh.place, count=mesh.size)


def joined(part: Tensor, cut: Cut, mesh: Mesh) -> Tensor:
    """Return the whole of a tensor from the group's parts; all of its processes call this together."""
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(mesh.size)]
    dist.all_gather(parts, part.contiguous(), group=mesh.group)
    return torch.cat(parts, dim=cut.dim)

"""Routed experts divided over a group (GShard, arXiv 2006.16668): tokens travel to their experts and back.

Each process has rows of its own, so the gradients of all other weights are summed over the group, and then averaged
over groups like those of the experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ray_ds.model.decoder import Decoder
from ray_ds.model.experts import Experts, permute
from ray_ds.train.parallel.cuts import Cut, cut
from ray_ds.train.parallel.exchange import all_to_all, exchanged
from ray_ds.train.parallel.mesh import Mesh
from ray_ds.train.parallel.tensor import sum_gradient


def divide_experts(decoder: Decoder, mesh: Mesh) -> dict[str, Cut]:
    """Reduce each layer's experts to this process's; return which weights are cut how, by name."""
    cuts: dict[str, Cut] = {}
    for name, module in decoder.named_modules():
        if isinstance(module, Experts):
            module.elsewhere = _Travel(mesh)
            cuts |= {f"{name}.{kind}": cut(parameter, 0, mesh) for kind, parameter in module.named_parameters()}
    for name, parameter in decoder.named_parameters():
        if name not in cuts:
            sum_gradient(parameter, mesh)
    return cuts


class _Travel:
    """The way of rows to the processes that have their experts, and of what those make of them back."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def __call__(self, run: Callable[[Tensor, Tensor], Tensor], rows: Tensor, ends: Tensor) -> Tensor:
        """Return the experts' output for each of `rows` (M, D), which lie by expert.

        Args:
            run: computes rows by this process's experts, given where each one's end.
            ends: (E,), where each expert's rows end.
        """
        mesh = self._mesh
        sizes = ends.diff(prepend=ends.new_zeros(1))  # (E,)
        arriving = exchanged(sizes, None, None, mesh)  # (E,): by process, then by expert here
        by_process = torch.unflatten(arriving, 0, (mesh.size, -1))  # (P, E / P)
        sent = torch.unflatten(sizes, 0, (mesh.size, -1)).sum(dim=1).tolist()
        received = by_process.sum(dim=1).tolist()
        arrived = all_to_all(rows, mesh, received=received, sent=sent)
        numbers = torch.arange(by_process.shape[1], device=rows.device).repeat(mesh.size)  # (E,)
        order = numbers.repeat_interleave(arriving).argsort(stable=True)  # by expert here
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        made = run(permute(arrived, order, inverse, 1), by_process.sum(dim=0).cumsum(dim=0))
        return all_to_all(permute(made, inverse, order, 1), mesh, received=sent, sent=received)

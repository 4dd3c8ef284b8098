"""A whole decoder made into what one process of a group computes."""

from collections.abc import Mapping

from ray_ds.model.decoder import Decoder
from ray_ds.train.parallel.cuts import Cut
from ray_ds.train.parallel.experts import divide_experts
from ray_ds.train.parallel.mesh import Mesh
from ray_ds.train.parallel.sequence import divide_sequence
from ray_ds.train.parallel.tensor import divide_tensors


def divide(decoder: Decoder, mesh: Mesh) -> Mapping[str, Cut]:
    """Divide a decoder, the same on all processes, along the mesh's axis; return its cut weights by name."""
    match mesh.axis:
        case "tensor":
            return divide_tensors(decoder, mesh)
        case "expert":
            return divide_experts(decoder, mesh)
        case "sequence":
            divide_sequence(decoder, mesh)
            return {}
        case None:
            return {}

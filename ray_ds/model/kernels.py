"""The switch between plain and fast forms; each layer has both side by side, the plain one being its definition."""

from torch import Tensor

from ray_ds.config.model import Kernels


def is_fast(kernels: Kernels, x: Tensor, *, on_cpu: bool = False) -> bool:
    """Tell whether a layer computes in its fast form.

    Args:
        kernels: the decoder's setting.
        x: what the layer works on.
        on_cpu: whether the fast form is also the faster one on a CPU, which `auto` goes by.
    """
    return kernels == "fast" or (kernels == "auto" and (x.is_cuda or on_cpu))

"""Figures on their way from the device, read when they are there: the device need not stand still for them."""

import torch
from torch import Tensor


class Arrival:
    """A small tensor that is copied to the host behind what the device was told to do so far.

    `tensor.cpu()` waits for all that was launched before it *is called*; this waits for what was launched before it was
    made, so that more can be launched in between.
    """

    def __init__(self, values: Tensor) -> None:
        """Start the copy; `values` may change afterwards."""
        self._copied: torch.cuda.Event | None = None
        if values.device.type != "cuda":
            self._values = values.detach().clone()
            return
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values.detach(), non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """Return the values, on the CPU, as they were when the copy was started."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values

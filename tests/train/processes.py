"""Processes that train beside each other in tests, with an environment of their own."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch.multiprocessing as multiprocessing

ON_CPU = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
"""DeepSpeed's device, and Muon's arithmetic left uncompiled: a C++ compiler would take a minute for it."""


def spawn(
    function: Callable[..., None], args: tuple[Any, ...], *, count: int, environment: Mapping[str, str] = ON_CPU
) -> None:
    """Call `function(rank, *args)` in `count` new processes and wait for them.

    The test's own process keeps its environment: `TORCHDYNAMO_DISABLE` left there turns torch.compile off in all tests
    that come later.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        multiprocessing.spawn(function, args, nprocs=count)

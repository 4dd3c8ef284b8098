"""Processes that train beside each other in tests, with an environment of their own."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch.multiprocessing import start_processes

ON_CPU = {"DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}
"""DeepSpeed's device, and Muon's arithmetic left uncompiled: a C++ compiler would take a minute for it."""
PRELOADED = ["deepspeed", "ray_ds.train.loop"]


def spawn(
    function: Callable[..., None], args: tuple[Any, ...], *, count: int, environment: Mapping[str, str] = ON_CPU
) -> None:
    """Call `function(rank, *args)` in `count` new processes and wait for them.

    Those on a CPU are forked from a server that has imported what takes seconds and has done nothing else. The test's
    own process keeps its environment: `TORCHDYNAMO_DISABLE` left there turns torch.compile off in all later tests.
    """
    if environment is not ON_CPU:
        with pytest.MonkeyPatch.context() as patch:
            _set(patch, environment)
            start_processes(function, args, nprocs=count, start_method="spawn")
        return
    with pytest.MonkeyPatch.context() as patch:  # the server takes it over when it starts, before the first call
        _set(patch, environment)
        multiprocessing.set_forkserver_preload(PRELOADED)
        start_processes(_enter, (function, args, dict(os.environ)), nprocs=count, start_method="forkserver")


def _set(patch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    for name, value in environment.items():
        patch.setenv(name, value)


def _enter(rank: int, function: Callable[..., None], args: tuple[Any, ...], environment: Mapping[str, str]) -> None:
    """Call the function with the environment that the test has now, not the one in which the server started."""
    os.environ.clear()
    os.environ.update(environment)
    function(rank, *args)

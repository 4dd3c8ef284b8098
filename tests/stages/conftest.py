"""A Ray of this process for stages that need one."""

import os

os.environ["RAY_AUTH_MODE"] = "disabled"  # read when ray is imported

from collections.abc import Iterator

import pytest
import ray


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    # "local": never a cluster that happens to run on this machine.
    ray.init("local", num_cpus=2, object_store_memory=80_000_000, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()

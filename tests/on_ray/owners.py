"""Jobs that take a run directory, for tests."""

import time
from collections.abc import Callable
from functools import partial

from ray_ds.on_ray.lease import Clock, LeaseFile, Owner, check_lease

START = 1_800_000_000.0


def make_owner(name: str, cluster: str = "c1") -> Owner:
    return Owner(
        job=f"pretrain-{name}",
        is_submitted=True,
        user="ada",
        host="head",
        pid=42,
        cluster=cluster,
        since=START,
        token=f"token-{name}",
    )


def take(run_uri: str, name: str) -> Callable[[], None]:
    """Take a run directory from whoever has it; return the check of the job that has it now."""
    owner = make_owner(name)  # of the same cluster, where the lock's actor, not the lease, keeps the living apart
    LeaseFile(run_uri, owner, Clock(wall=time.time, sleep=lambda _: None)).acquire()
    return partial(check_lease, run_uri, owner.token)

"""One job at a time in a run directory: within a cluster an actor with a name, between clusters a lease file."""

import getpass
import hashlib
import json
import math
import os
import secrets
import signal
import socket
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_ds.errors import ClusterError, RetryableError, TakenOverError
from ray_ds.logs import log_event
from ray_ds.on_ray.lease import LEASE_S, RENEW_S, Clock, LeaseFile, Owner, check_lease, read_lease, refusal
from ray_ds.on_ray.session import NAMESPACE

ANSWER_TIMEOUT_S = 10.0
"""Patience with the actor of a job that may be starting or may have died with its node."""
RETRY_S = 0.2
DYING_S = 2.0
"""Time in which the actor of a job that was killed may still answer."""


def this_owner() -> Owner:
    """Return this process, which is connected to a cluster, as an owner."""
    # What `ray job submit` hands to the job's driver (Ray 2.60, job_supervisor.py `_get_driver_env_vars`).
    config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    submission: str | None = (config.get("metadata") or {}).get("job_submission_id")
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        user = str(os.getuid())
    return Owner(
        job=submission or ray.get_runtime_context().get_job_id(),
        is_submitted=submission is not None,
        user=user,
        host=socket.gethostname(),
        pid=os.getpid(),
        # Ray has no public way to ask for the cluster's id.
        cluster=ray._private.worker.global_worker.gcs_client.cluster_id.hex(),
        since=time.time(),
        token=secrets.token_hex(8),
    )


def lock_run(run_uri: str) -> "RunLock":
    """Return the lock of a step's folder for this process."""
    return RunLock(run_uri, this_owner())


class _LockHolder:
    """An actor whose name is the lock; it dies with the driver that started it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner

    def owner(self) -> Owner:
        """Return who has the lock."""
        return self._owner


class RunLock:
    """Holds a run directory as long as a `with` block runs.

    A job that finds its lease taken by another one is stopped as by SIGTERM, so that it writes no more than it must.

    Args:
        run_uri: the run directory.
        owner: this process.
    Raises:
        ClusterError: on entry: another job is at work there.
        TakenOverError: at the end, where the block broke off because another job has taken over.
    """

    def __init__(self, run_uri: str, owner: Owner, clock: Clock | None = None) -> None:
        self._run_uri, self._owner = run_uri, owner
        self._name = f"run-{hashlib.sha256(run_uri.rstrip('/').encode()).hexdigest()[:24]}"
        self._file = LeaseFile(run_uri, owner, clock)
        self._holder: Any = None
        self._is_released = threading.Event()
        self._lost: TakenOverError | None = None
        self._thread = threading.Thread(target=self._renew, daemon=True)

    @property
    def check(self) -> Callable[[], None]:
        """What tells whether this job still has the run directory, here or in a process that it is sent to.

        See `check_lease`, which it calls.
        """
        return partial(check_lease, self._run_uri, self._owner.token)

    def __enter__(self) -> "RunLock":
        self._holder = self._take_name()
        try:
            self._file.acquire()
        except BaseException:
            self._give_name_back()
            raise
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_released.set()
        self._thread.join()
        with suppress(OSError):  # the lease ends by itself
            self._file.release()
        self._give_name_back()
        if self._lost is not None and isinstance(error, RetryableError):
            raise self._lost from error

    def _take_name(self) -> Any:
        """Return the actor whose name is the lock of this run directory in this cluster."""
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, max_restarts=0)(_LockHolder)
        started, seen_since = time.monotonic(), math.inf
        while True:
            with suppress(ValueError):  # the name is taken; Ray decides which of two jobs was first
                return actor.options(name=self._name, namespace=NAMESPACE, scheduling_strategy=here).remote(self._owner)
            other, now = _ask_owner(self._name), time.monotonic()
            seen_since = min(seen_since, now) if other is not None else math.inf
            if other is not None and now - seen_since > DYING_S:
                raise refusal(self._run_uri, other, is_here=True)
            if other is None and now - started > LEASE_S:
                raise self._silent_refusal()
            time.sleep(RETRY_S)

    def _silent_refusal(self) -> ClusterError:
        """Return the error of a job that finds a name taken by one that does not answer."""
        lease = read_lease(self._run_uri)
        if lease is not None:
            return refusal(self._run_uri, lease.owner, is_here=lease.owner.cluster == self._owner.cluster)
        allowed = f"must have one job at work, and one that has not answered for {LEASE_S:.0f} s is"
        return ClusterError("run_dir", self._run_uri, allowed, f"look for it with `ray list actors` ({self._name})")

    def _give_name_back(self) -> None:
        """End the actor and wait until its name is free for the next job; without Ray, it ends with the driver."""
        deadline = time.monotonic() + DYING_S
        with suppress(ValueError, RayError):
            ray.kill(self._holder)
            while time.monotonic() < deadline:
                ray.get_actor(self._name, namespace=NAMESPACE)
                time.sleep(0.02)

    def _renew(self) -> None:
        """Renew the lease until it is released or lost."""
        while not self._is_released.wait(RENEW_S):
            try:
                self._file.renew()
            except TakenOverError as error:
                log_event("run_dir_lost", reason=str(error))
                self._lost = error
                interrupt_main(signal.SIGTERM)
                return
            except OSError as error:
                log_event("lease_not_renewed", reason=str(error))


def _ask_owner(name: str) -> Owner | None:
    """Return who has the lock of this name; None where it is gone by now or does not answer."""
    try:
        owner: Owner = ray.get(ray.get_actor(name, namespace=NAMESPACE).owner.remote(), timeout=ANSWER_TIMEOUT_S)
    except (ValueError, RayError, GetTimeoutError):
        return None
    return owner

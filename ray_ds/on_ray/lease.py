"""A file on shared storage that says which job writes in a folder, so that jobs of other clusters keep away.

Object stores give no exclusive create through pyarrow, so a job writes its name, waits a moment and reads it back: the
file decides. Who finds another name than its own has lost, at once or at the next renewal.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import pydantic

from ray_ds import storage
from ray_ds.errors import ClusterError, TakenOverError
from ray_ds.logs import log_event

RENEW_S = 5.0
"""Time between renewals."""
LEASE_S = 30.0
"""Time without renewal after which the owner counts as dead."""
SETTLE_S = 1.0
"""Time in which another job that writes its name at the same moment would be seen."""
CLOCK_ERROR_S = 900.0
"""How far the clocks of two clusters may be apart; object stores refuse requests with a greater error."""
POLL_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """A job that writes in a run directory."""

    job: str
    """Its submission id, as `ray job stop` takes it; Ray's own number for a driver that was not submitted."""
    is_submitted: bool
    user: str
    host: str
    pid: int
    cluster: str
    """Ray's id of the cluster."""
    since: float
    """Seconds since 1970."""
    token: str
    """Random; names this owner and no other."""

    def __str__(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"job {self.job} of {self.user}, process {self.pid} on {self.host}, since {began}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """What the file holds."""

    owner: Owner
    renewed: float
    """Seconds since 1970, by the owner's clock."""
    renewals: int


_LEASE = pydantic.TypeAdapter(Lease)


def lease_uri(run_uri: str) -> str:
    """Return the file that names the owner of a run directory."""
    return storage.join(run_uri, "work", "lease.json")


def read_lease(run_uri: str) -> Lease | None:
    """Return the lease of a run directory; None where there is none, or one that no job of ours wrote."""
    try:
        return _LEASE.validate_json(storage.read_bytes(lease_uri(run_uri)))
    except (FileNotFoundError, pydantic.ValidationError):
        return None


def refusal(run_uri: str, owner: Owner, *, is_here: bool) -> ClusterError:
    """Return the error of a job that finds another one at work.

    Args:
        is_here: whether that is a job of the same cluster.
    """
    where = "" if is_here else f" in the cluster {owner.cluster[:8]}"
    stop = f"stop it (`ray job stop {owner.job}`{where})" if owner.is_submitted else f"stop that process{where}"
    return ClusterError(
        "run_dir",
        run_uri,
        f"must have one job at work, and {owner} is",
        f"wait for it, {stop}, or use another run_dir",
    )


def check_lease(run_uri: str, token: str) -> None:
    """Make sure that a run directory still belongs to the owner with this token, by a look at its lease.

    Call it, in any process, right before what another owner must not find written or deleted. Storage has no write on
    condition, so an owner that is suspended between the look and the write is not kept from it.

    Raises:
        TakenOverError: it does not.
        OSError: storage does not answer, so that nobody knows.
    """
    lease = read_lease(run_uri)
    if lease is None or lease.owner.token != token:
        raise lost(run_uri, lease)


def lost(run_uri: str, lease: Lease | None) -> TakenOverError:
    """Return the error of a job that has lost its run directory to another one."""
    taker = f"and {lease.owner} has taken it over" if lease is not None else "and its lease is gone"
    action = "let that job go on, or stop it and submit this one again"
    return TakenOverError("run_dir", run_uri, f"must still belong to this job, {taker}", action)


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """What time it is, and waiting; tests have their own."""

    wall: Callable[[], float] = time.time
    sleep: Callable[[float], None] = time.sleep


class LeaseFile:
    """The lease of one owner on one run directory.

    Args:
        run_uri: the run directory.
        owner: who takes it.
    """

    def __init__(self, run_uri: str, owner: Owner, clock: Clock | None = None) -> None:
        self._run_uri, self._owner, self._clock = run_uri, owner, clock or Clock()
        self._renewals = 0

    def acquire(self) -> None:
        """Take the lease; where a job of another cluster has it, wait until that one shows that it lives, or is dead.

        A job of the same cluster is dead: this one could not have got here otherwise (see `RunLock`).

        Raises:
            ClusterError: another job lives, or took the lease at the same moment.
        """
        found = read_lease(self._run_uri)
        if found is not None and found.owner.cluster != self._owner.cluster:
            self._outlive(found)
        self._write()
        self._clock.sleep(SETTLE_S)
        found = read_lease(self._run_uri)
        if found is None or found.owner.token != self._owner.token:
            raise refusal(self._run_uri, found.owner, is_here=False) if found else lost(self._run_uri, None)

    def renew(self) -> None:
        """Say that the owner lives.

        Raises:
            TakenOverError: another job has taken the lease.
            OSError: storage does not answer.
        """
        check_lease(self._run_uri, self._owner.token)
        self._write()

    def release(self) -> None:
        """Give the lease back, unless another job has taken it."""
        found = read_lease(self._run_uri)
        if found is not None and found.owner.token == self._owner.token:
            system, path = storage.filesystem(lease_uri(self._run_uri))
            system.delete_file(path)

    def _write(self) -> None:
        self._renewals += 1
        lease = Lease(owner=self._owner, renewed=self._clock.wall(), renewals=self._renewals)
        storage.write_bytes(lease_uri(self._run_uri), json.dumps(asdict(lease), indent=1).encode())

    def _outlive(self, found: Lease) -> None:
        """Return once the owner of a lease must be dead.

        The clock of another cluster is not trusted: only that the file changes shows that its owner lives.

        Raises:
            ClusterError: it lives.
        """
        age_s = self._clock.wall() - found.renewed
        if age_s > LEASE_S + CLOCK_ERROR_S:
            log_event("lease_taken_over", run_dir=self._run_uri, owner=str(found.owner), silent_s=age_s)
            return
        log_event("waiting_for_lease", run_dir=self._run_uri, owner=str(found.owner), at_most_s=LEASE_S)
        end = self._clock.wall() + LEASE_S
        while self._clock.wall() < end:
            self._clock.sleep(POLL_S)
            now = read_lease(self._run_uri)
            if now is None:
                return
            if now != found:
                raise refusal(self._run_uri, now.owner, is_here=False)
        log_event("lease_taken_over", run_dir=self._run_uri, owner=str(found.owner), silent_s=LEASE_S)

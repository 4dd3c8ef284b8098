"""A folder of a node's disk that holds shards of an object store, each fetched once for all the node's processes.

Shard `<sha256>.arrow` has the bytes of that hash, so that runs share what they have in common. All state is in the file
system: who uses a shard holds a shared lock on it (flock, which ends with the process), who fetches one holds an
exclusive lock on its `<sha256>.partial`, which a rename makes the shard. So whatever is killed, nothing stays locked.
Since the lock moves with the file, who waits for a fetch must look again and again whether it is still that file.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path

from ray_ds import storage
from ray_ds.errors import ArtifactError, ClusterError
from ray_ds.logs import log_event

SHARD = ".arrow"
PARTIAL = ".partial"
BUDGET_LOCK = "budget.lock"
POLL_S = 0.02
"""Time after which who needs a shard looks again whether another process has fetched it."""
SHORT_SHA256 = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A shard on an object store, and what its manifest says of it."""

    uri: str
    bytes: int
    sha256: str


class NoRoomError(Exception):
    """There is no room for a shard that is read ahead."""


class ShardFolder:
    """The shards that a node has at hand; any number of processes and threads may use one folder.

    Args:
        path: on a local disk of the node.
        budget_bytes: what the folder may hold, of all runs together; None for any amount. Only a shard that is needed
            at once goes beyond it, where all others are in use or on their way.
    """

    def __init__(self, path: Path, budget_bytes: int | None) -> None:
        self.path = path
        self.budget_bytes = budget_bytes
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.places: Mapping[str, int] = {}
        """By sha256, how many other shards are needed before one is needed; those not in it are not needed at all."""
        self._checked: dict[str, tuple[int, int]] = {}
        """Inode and time of change of the files whose bytes this process has checked."""

    def open_checked(self, shard: ShardFile) -> BufferedReader | None:
        """Return a shard's file with a shared lock on it; None where there is none, or no whole one."""
        path = self.file_of(shard)
        file = _open_if_there(path)
        if file is None:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        if _is_at(file, path):
            if self._is_whole(shard, file):
                return file
            log_event("shard_damaged", path=str(path), shard=shard.uri)
            if _is_at(file, path):
                path.unlink(missing_ok=True)
        file.close()
        return None

    def _is_whole(self, shard: ShardFile, file: BufferedReader) -> bool:
        """Check a file's size and sha256, the latter once in this process as long as nobody changes the file."""
        stat = os.fstat(file.fileno())
        version = (stat.st_ino, stat.st_mtime_ns)
        if stat.st_size != shard.bytes:
            return False
        if self._checked.get(shard.sha256) != version:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return False
            self._checked[shard.sha256] = version
            file.seek(0)
        # The time of use, which many disks are mounted not to keep.
        os.utime(file.fileno(), ns=(time.time_ns(), stat.st_mtime_ns))
        return True

    def fetch(self, shard: ShardFile, *, is_needed_now: bool) -> BufferedReader | None:
        """Bring a shard into the folder, or find that another process did, and return it as `open_checked` does.

        Returns:
            None if another process is fetching it, for which this waits where the shard is needed now; then only if the
            shard was damaged or evicted at once, so that it must be tried again.
        Raises:
            ArtifactError: the bytes on the object store are not those of the manifest.
            ClusterError: the disk is full.
            NoRoomError: there is no room for what is not needed now.
        """
        path, partial = self.file_of(shard), self.file_of(shard, PARTIAL)
        file = _lock_new(partial, wait=is_needed_now)
        if file is None:
            return None
        with file:
            try:
                if path.exists():
                    return self.open_checked(shard)
                self._reserve(file, shard, is_needed_now=is_needed_now)
                self._copy(shard, file)
                os.replace(partial, path)
                stat = os.fstat(file.fileno())
                self._checked[shard.sha256] = (stat.st_ino, stat.st_mtime_ns)
                fcntl.flock(file, fcntl.LOCK_SH)  # or the lock of the reader would wait for this one
                return self.open_checked(shard)
            except OSError as error:
                if _is_full(error):
                    raise _full_disk(self.path, shard) from error
                raise
            finally:
                if _is_at(file, partial):
                    partial.unlink(missing_ok=True)

    def _copy(self, shard: ShardFile, file: BufferedRandom) -> None:
        """Write a shard's bytes, and check them on the way."""
        digest = hashlib.sha256()
        for block in storage.read_blocks(shard.uri):
            digest.update(block)
            file.write(block)
        file.flush()
        if digest.hexdigest() != shard.sha256:
            raise ArtifactError(
                shard.uri,
                f"sha256 {digest.hexdigest()[:SHORT_SHA256]}",
                f"must have sha256 {shard.sha256[:SHORT_SHA256]}, as its manifest says",
                "restore it, or delete its artefact's folder to make the step anew",
            )

    def _reserve(self, file: BufferedRandom, shard: ShardFile, *, is_needed_now: bool) -> None:
        """Take a shard's room on the disk, evicting others for it.

        Raises:
            OSError: the disk is full, and the shard is needed now.
            NoRoomError: there is no room, and the shard is not needed now.
        """
        with open(self.path / BUDGET_LOCK, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # so that two processes do not take the same room
            files = list(self.files())
            sizes = {path: size for path, size, _ in files}
            used = sum(sizes.values())
            place = -1 if is_needed_now else self.places.get(shard.sha256, len(self.places))
            victims = self._victims(place, files, but=self.file_of(shard, PARTIAL))
            while True:
                is_within = self.budget_bytes is None or used + shard.bytes <= self.budget_bytes
                if is_within or (is_needed_now and not victims):
                    try:
                        os.posix_fallocate(file.fileno(), 0, shard.bytes)
                        return
                    except OSError as error:
                        if not _is_full(error) or (is_needed_now and not victims):
                            raise
                if not victims:
                    raise NoRoomError
                victim = victims.pop()
                if _evict(victim):
                    used -= sizes[victim]

    def _victims(self, place: int, files: Sequence[tuple[Path, int, int]], *, but: Path) -> list[Path]:
        """Return what may go for the shard at a place: what is needed later or not at all, the first to go last."""
        ranked: list[tuple[bool, int, int, Path]] = []
        for path, _, used_ns in files:
            its_place = self.places.get(path.stem, len(self.places))
            if path != but and its_place > place:
                is_left_over = path.suffix == PARTIAL  # by a process that was killed; others' are locked
                ranked.append((is_left_over, its_place, -used_ns, path))
        return [path for *_, path in sorted(ranked)]

    def files(self) -> Iterator[tuple[Path, int, int]]:
        """Yield each shard and unfinished shard, its bytes and the time of its last use."""
        for path in self.path.iterdir():
            if path.suffix in (SHARD, PARTIAL):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    yield path, stat.st_size, stat.st_atime_ns

    def file_of(self, shard: ShardFile, suffix: str = SHARD) -> Path:
        """Return the path that a shard has, or will have, in the folder."""
        return self.path / f"{shard.sha256}{suffix}"


def _lock_new(partial: Path, *, wait: bool) -> BufferedRandom | None:
    """Return an empty file that only this caller writes; None if another one does and we do not wait."""
    while True:
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        is_locked = _try_lock(file)
        while wait and not is_locked and _is_at(file, partial):
            time.sleep(POLL_S)
            is_locked = _try_lock(file)
        if is_locked and _is_at(file, partial):
            file.truncate(0)  # what a killed process left
            return file
        file.close()
        if not wait:
            return None


def _try_lock(file: BufferedReader | BufferedRandom) -> bool:
    """Take the exclusive lock on a file if nobody has one; return whether it is ours."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _evict(path: Path) -> bool:
    """Delete a file unless somebody uses it; return whether it is gone."""
    file = _open_if_there(path)
    if file is None:
        return True
    with file:
        if not _try_lock(file):
            return False
        if _is_at(file, path):
            path.unlink(missing_ok=True)
        return True


def _open_if_there(path: Path) -> BufferedReader | None:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return None


def _is_at(file: BufferedReader | BufferedRandom, path: Path) -> bool:
    """Tell whether an open file is the one that has the path now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _full_disk(folder: Path, shard: ShardFile) -> ClusterError:
    free = shutil.disk_usage(folder).free
    return ClusterError(
        f"{socket.gethostname()}:{folder}",
        f"{free} bytes free",
        f"must have room for the shards in use, now for {shard.bytes} bytes of {shard.uri}",
        "free space on that node's disk, or lower window_shards",
    )

"""Shards of an object store on a node's own disk: fetched once for all its processes, ahead of use, and checked.

A folder holds `<sha256>.arrow` for each shard, so that runs share what they have in common. All of its state is in the
file system: who uses a shard holds a shared lock on it (flock, which ends with the process), who fetches one holds an
exclusive lock on its `<sha256>.partial`, which a rename makes the shard. So whatever is killed, nothing stays locked.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedRandom, BufferedReader
from pathlib import Path

from ray_ds import storage
from ray_ds.errors import ArtifactError, ClusterError, UserError
from ray_ds.logs import log_event

SHARD = ".arrow"
PARTIAL = ".partial"
BUDGET_LOCK = "budget.lock"
RETRY_S = 0.2
"""Time after which reading ahead looks again for a shard that another process fetches, or for room."""
SHORT_SHA256 = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """A shard on an object store, and what its manifest says of it."""

    uri: str
    bytes: int
    sha256: str


class ShardCache:
    """The shards that a node has at hand. Any number of processes and threads may use one folder.

    Args:
        folder: on a local disk of the node.
        budget_bytes: what the folder may hold, of all runs together; None for any amount. Only shards that are needed
            at once go beyond it, where all others are in use.
    """

    def __init__(self, folder: Path, budget_bytes: int | None = None) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._checked: dict[str, tuple[int, int]] = {}
        """Inode and time of change of the files whose bytes this process has checked."""
        self._places: dict[str, int] = {}
        """How many other shards are needed before one is needed."""
        self._wanted: list[ShardFile] = []
        self._changed = threading.Condition()
        self._reader: threading.Thread | None = None

    def open(self, shard: ShardFile) -> BufferedReader:
        """Return a shard's file, fetched if it is not there; until it is closed it is not evicted.

        Raises:
            ArtifactError: the bytes on the object store are not those of the manifest.
            ClusterError: the node's disk is full.
        """
        while True:
            found = self._open_checked(shard)
            if found is not None:
                return found
            self._fetch(shard, is_needed_now=True)

    def read_ahead(self, order: Sequence[ShardFile], count: int) -> None:
        """Say in which order shards are needed from now on; the first `count` are fetched in the background.

        What is not in the order, and then what is late in it, is evicted first.
        """
        with self._changed:
            self._places = {shard.sha256: place for place, shard in reversed(list(enumerate(order)))}
            self._wanted = list(order[:count])
            if self._reader is None:
                self._reader = threading.Thread(target=self._keep_reading, name="shard-cache", daemon=True)
                self._reader.start()
            self._changed.notify_all()

    def stop_reading(self) -> None:
        """End the thread that reads ahead, after the shard it is at."""
        with self._changed:
            self._reader = None
            self._changed.notify_all()

    def _path(self, shard: ShardFile, suffix: str = SHARD) -> Path:
        return self.folder / f"{shard.sha256}{suffix}"

    def _keep_reading(self) -> None:
        """Fetch and check what is wanted, nearest first, until reading ahead is stopped."""
        todo: list[ShardFile] = []
        seen: list[ShardFile] | None = None
        while True:
            with self._changed:
                if self._wanted is seen and self._is_reading():
                    self._changed.wait(RETRY_S if todo else None)
                if not self._is_reading():
                    return
                if self._wanted is not seen:
                    seen = todo = self._wanted
            missing = []
            for shard in todo:
                if self._wanted is not seen or not self._is_reading():
                    break
                if not self._prepare(shard):
                    missing.append(shard)
            todo = missing

    def _is_reading(self) -> bool:
        """Tell whether the calling thread is still the one that reads ahead."""
        return self._reader is threading.current_thread()

    def _prepare(self, shard: ShardFile) -> bool:
        """Have a shard fetched and checked; return whether nothing is left to do for it.

        What fails is not tried again: whoever opens the shard meets the same error where it can be raised.
        """
        try:
            found = self._open_checked(shard)
            if found is None and self._fetch(shard, is_needed_now=False):
                found = self._open_checked(shard)  # another process may have fetched it
            if found is not None:
                found.close()
            return found is not None
        except (OSError, UserError) as error:
            log_event("shard_not_read_ahead", shard=shard.uri, reason=str(error))
            return True

    def _open_checked(self, shard: ShardFile) -> BufferedReader | None:
        """Return a shard's file with a shared lock on it; None where there is none, or no whole one."""
        path = self._path(shard)
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

    def _fetch(self, shard: ShardFile, *, is_needed_now: bool) -> bool:
        """Bring a shard into the folder, or find that another process did.

        Returns:
            False if another process is fetching it, or if there is no room; never where it is needed now.
        """
        path, partial = self._path(shard), self._path(shard, PARTIAL)
        file = _lock_new(partial, wait=is_needed_now)
        if file is None:
            return False
        with file:
            try:
                if path.exists():
                    return True
                if not self._reserve(file, shard, is_needed_now=is_needed_now):
                    return False
                self._copy(shard, file)
                os.replace(partial, path)
                stat = os.fstat(file.fileno())
                self._checked[shard.sha256] = (stat.st_ino, stat.st_mtime_ns)
                return True
            except OSError as error:
                if _is_full(error):
                    raise _full_disk(self.folder, shard) from error
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

    def _reserve(self, file: BufferedRandom, shard: ShardFile, *, is_needed_now: bool) -> bool:
        """Take a shard's room on the disk, evicting others for it; return whether there is any.

        Raises:
            OSError: the disk is full, and the shard is needed now.
        """
        with open(self.folder / BUDGET_LOCK, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # so that two processes do not take the same room
            files = list(self._files())
            sizes = {path: size for path, size, _ in files}
            used = sum(sizes.values())
            place = -1 if is_needed_now else self._places.get(shard.sha256, len(self._places))
            victims = self._victims(place, files, but=self._path(shard, PARTIAL))
            while True:
                is_within = self.budget_bytes is None or used + shard.bytes <= self.budget_bytes
                if is_within or (is_needed_now and not victims):
                    try:
                        os.posix_fallocate(file.fileno(), 0, shard.bytes)
                        return True
                    except OSError as error:
                        if not _is_full(error) or (is_needed_now and not victims):
                            raise
                if not victims:
                    return False
                victim = victims.pop()
                if _evict(victim):
                    used -= sizes[victim]

    def _victims(self, place: int, files: Sequence[tuple[Path, int, int]], *, but: Path) -> list[Path]:
        """Return what may go for the shard at a place: what is needed later or not at all, the first to go last."""
        ranked: list[tuple[bool, int, int, Path]] = []
        for path, _, used_ns in files:
            its_place = self._places.get(path.stem, len(self._places))
            if path != but and its_place > place:
                is_left_over = path.suffix == PARTIAL  # by a process that was killed; others' are locked
                ranked.append((is_left_over, its_place, -used_ns, path))
        return [path for *_, path in sorted(ranked)]

    def _files(self) -> Iterator[tuple[Path, int, int]]:
        """Yield each shard and unfinished shard, its bytes and the time of its last use."""
        for path in self.folder.iterdir():
            if path.suffix in (SHARD, PARTIAL):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    yield path, stat.st_size, stat.st_atime_ns


def _lock_new(partial: Path, *, wait: bool) -> BufferedRandom | None:
    """Return an empty file that only this caller writes; None if another one does and we do not wait."""
    while True:
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        if _is_at(file, partial):
            file.truncate(0)  # what a killed process left
            return file
        file.close()  # while we waited it became a shard, or was given up


def _evict(path: Path) -> bool:
    """Delete a file unless somebody uses it; return whether it is gone."""
    file = _open_if_there(path)
    if file is None:
        return True
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
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

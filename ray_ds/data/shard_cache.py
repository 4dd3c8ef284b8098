"""A node's cache of shards on an object store, filled ahead of use by a thread."""

import threading
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path

from ray_ds.data.shard_folder import NoRoomError, ShardFile, ShardFolder
from ray_ds.errors import UserError
from ray_ds.logs import log_event

RETRY_S = 0.2
"""Time after which reading ahead looks again for a shard that another process fetches, or for room."""


class ShardCache:
    """One process's way to the shards in a folder of the node; its processes and all runs share the folder.

    Args:
        folder: on a local disk of the node.
        budget_bytes: what the folder may hold, of all runs together; None for any amount.
    """

    def __init__(self, folder: Path, budget_bytes: int | None = None) -> None:
        self.budget_bytes = budget_bytes
        self._folder = ShardFolder(folder, budget_bytes)
        self._wanted: list[ShardFile] = []
        self._changed = threading.Condition()
        self._reader: threading.Thread | None = None

    def open(self, shard: ShardFile) -> BufferedReader:
        """Return a shard's file, fetched if it is not there; until it is closed it is not evicted.

        Raises:
            ArtifactError: the bytes on the object store are not those of the manifest.
            ClusterError: the node's disk is full.
        """
        found = self._folder.open_checked(shard)
        while found is None:
            found = self._folder.fetch(shard, is_needed_now=True)
        return found

    def read_ahead(self, order: Sequence[ShardFile], count: int) -> None:
        """Say in which order shards are needed from now on; the first `count` are fetched in the background.

        What is not in the order, and then what is late in it, is evicted first.
        """
        with self._changed:
            self._folder.places = {shard.sha256: place for place, shard in reversed(list(enumerate(order)))}
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
            todo = self._prepare_all(todo)

    def _prepare_all(self, shards: Sequence[ShardFile]) -> list[ShardFile]:
        """Have shards fetched and checked, and return those that are still to do."""
        wanted, missing = self._wanted, list[ShardFile]()
        for place, shard in enumerate(shards):
            if self._wanted is not wanted or not self._is_reading():
                break
            try:
                if not self._prepare(shard):
                    missing.append(shard)  # another process fetches it
            except NoRoomError:  # what is needed later must not take what little there is
                return [*missing, *shards[place:]]
            except (OSError, UserError) as error:
                # Not tried again: whoever opens the shard meets the same error where it can be raised.
                log_event("shard_not_read_ahead", shard=shard.uri, reason=str(error))
        return missing

    def _is_reading(self) -> bool:
        """Tell whether the calling thread is still the one that reads ahead."""
        return self._reader is threading.current_thread()

    def _prepare(self, shard: ShardFile) -> bool:
        """Have a shard fetched and checked; return False where another process is at it."""
        found = self._folder.open_checked(shard)
        if found is None:
            found = self._folder.fetch(shard, is_needed_now=False)
        if found is not None:
            found.close()
        return found is not None

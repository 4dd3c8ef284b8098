"""A disk that is full when a test says so."""

import os
import resource
import signal
import subprocess
from pathlib import Path


class SmallDisk:
    """A disk whose free space the test sets; for who may not mount one, a limit on the size of each file instead."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        done = subprocess.run(["sh", "-c", 'mount -t tmpfs tmpfs "$0"', str(folder)], capture_output=True)
        self.is_mounted = done.returncode == 0
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self._handler = signal.getsignal(signal.SIGXFSZ)
        self.ignore_signal()

    def ignore_signal(self) -> None:
        """Make a process get an error where a file would be larger than the limit, which kills it otherwise."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def leave(self, num_bytes: int | None) -> None:
        """Leave so many bytes free; None = plenty."""
        if self.is_mounted:
            used = os.statvfs(self.folder)
            taken = (used.f_blocks - used.f_bfree) * used.f_frsize
            size = 1 << 28 if num_bytes is None else taken + num_bytes
            subprocess.run(["mount", "-o", f"remount,size={size}", str(self.folder)], check=True)
        else:
            soft = self._limits[0] if num_bytes is None else num_bytes // 16
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, self._limits[1]))

    def close(self) -> None:
        self.leave(None)
        signal.signal(signal.SIGXFSZ, self._handler)
        if self.is_mounted:
            subprocess.run(["umount", str(self.folder)], check=True)

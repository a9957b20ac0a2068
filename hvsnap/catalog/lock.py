"""The state directory belongs to one process at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hvsnap.errors import CatalogFailed, StoreBusy


class StateLock:
    """A lock on the state directory that the kernel drops when its holder dies, however it dies."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock, and create the directory if need be. Blocks briefly: call it in a thread.

        Raises :class:`StoreBusy` when another process holds it, :class:`CatalogFailed` for a directory that cannot
        be written.
        """
        try:
            self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            hint = "check state_dir in the configuration and its permissions"
            raise CatalogFailed(
                f"the state directory {self._path.parent} is not usable: {error.strerror}", hint=hint
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            hint = "another hvsnap daemon or `hvsnap recover` is running with this state_dir"
            raise StoreBusy(f"{self._path.parent} is in use by another process", hint=hint) from error
        self._fd = fd

    def release(self) -> None:
        """Drop the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

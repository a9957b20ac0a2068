"""A lock on a store's directory that its owner's death lets go of, whoever killed it.

The lease alone cannot tell a dead writer from one that is slow: it has to expire. Where writer and newcomer live under
one kernel, the kernel knows. A lock that was taken in another boot, or by a host that shares the file system, says
nothing: file systems of a network may keep such locks for each host by itself.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hvsnap.errors import StoreBusy

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class SoleOwner:
    """The lock of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._fd = -1

    def take(self) -> str:
        """Take the lock and return which boot it is of; "" where there are no such locks. Blocking.

        Raises :class:`StoreBusy` where a process of this very host has it.
        """
        if self._fd >= 0:
            return _boot()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return ""  # what is wrong with it, whoever reads or writes there says in its own words
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            what = f"the store {self._directory} is in use by another process of this host"
            raise StoreBusy(
                what, hint="one repository has one writer: stop the other one, or wait for its end"
            ) from error
        except OSError:
            os.close(fd)
            return ""
        self._fd = fd
        return _boot()

    def let_go(self) -> None:
        """Give the lock back; one that is not held is no error."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _boot() -> str:
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""

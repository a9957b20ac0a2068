"""Space held back on the catalog's device, so that a full device can still be told of, and made room on.

Deleting writes before it frees, and so does recording that a capture failed. The reserve is a file that is removed
when the device is nearly full; what it gives back is for such transactions, and not for new pages and blocks.
"""

from __future__ import annotations

import os
from pathlib import Path

RESERVE_BYTES_MAX = 64 * 2**20
"""The log of the largest deletion (a full page map of a TiB, handed over: 40 MiB), and some."""


class Reserve:
    """The file ``reserve`` in the state directory. Methods block briefly: call them in a thread."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "reserve"
        self._directory = directory
        self._bytes = RESERVE_BYTES_MAX
        self.held = self._path.exists()  # by a process that is gone, perhaps on a device that has filled up since

    def adjust(self) -> bool:
        """Hold the reserve while there is room for it, give it up while there is none; return whether it was now.

        On a small device it is an eighth of the whole.
        """
        device = os.statvfs(self._directory)
        free_bytes = device.f_bavail * device.f_frsize
        self._bytes = min(RESERVE_BYTES_MAX, device.f_blocks * device.f_frsize // 8)
        if self.held and free_bytes < self._bytes // 4:
            self._path.unlink(missing_ok=True)
            self.held = False
            return True
        if not self.held and free_bytes >= self._bytes * 2:
            self._hold()
        return False

    def has_room(self, reusable_bytes: int) -> bool:
        """Whether the catalog may grow, given the free space within its file."""
        if self.held:
            return True
        device = os.statvfs(self._directory)
        free_bytes = device.f_bavail * device.f_frsize
        # New rows go to free pages of the file, but through the log, which must not take the last of the device.
        return free_bytes >= self._bytes // 2 and free_bytes + reusable_bytes >= self._bytes * 2

    def _hold(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self._bytes)
            self.held = True
        except OSError:
            # Not this time (another program was faster), or not on this file system: try again at the next change.
            self._path.unlink(missing_ok=True)
        finally:
            os.close(fd)

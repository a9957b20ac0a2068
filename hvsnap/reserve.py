"""Space held back on a device, so that a full device can still be told of, and made room on.

Deleting writes before it frees, and so does recording that a capture failed. The reserve is a file that is removed
when the device is nearly full; what it gives back is for such writes, and not for new data.
"""

from __future__ import annotations

import os
from pathlib import Path

SMALL_DEVICE_PART = 8
"""On a small device the reserve is an eighth of the whole."""


class Reserve:
    """One file that takes up to ``bytes_max``. Methods block briefly: call them in a thread."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self._bytes = bytes_max
        self.held = path.exists()  # by a process that is gone, perhaps on a device that has filled up since

    def adjust(self) -> bool:
        """Hold the reserve while there is room for it, give it up while there is none; return whether it was now."""
        free_bytes = self._look()
        if self.held and free_bytes < self._bytes // 4:
            self._path.unlink(missing_ok=True)
            self.held = False
            return True
        if not self.held and free_bytes >= self._bytes * 2:
            self._hold()
        return False

    def has_room(self, reusable_bytes: int = 0) -> bool:
        """Whether new data may be written, given the space that it would find within what is there already."""
        if self.held:
            return True
        free_bytes = self._look()
        # What is reused is written elsewhere first (a log), which must not take the last of the device.
        return free_bytes >= self._bytes // 2 and free_bytes + reusable_bytes >= self._bytes * 2

    def _look(self) -> int:
        device = os.statvfs(self._path.parent)
        self._bytes = min(self._bytes_max, device.f_blocks * device.f_frsize // SMALL_DEVICE_PART)
        return device.f_bavail * device.f_frsize

    def _hold(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, self._bytes)
            self.held = True
        except OSError:
            # Not this time (another program was faster), or not on this file system: it is tried again.
            self._path.unlink(missing_ok=True)
        finally:
            os.close(fd)

"""Appending to a file past the page cache, where the file system lets us.

What goes into the store is written once and seldom read: in the page cache it would push out what guests use, and
copying it there takes a tenth of a full snapshot's processor time (docs/performance.md). Everything here blocks, and
raises :class:`OSError`.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

BUFFER_BYTES = 4 << 20
"""What is written at once: a multiple of any device's sectors, in memory that begins at a page."""


class Appender:
    """Appends to an open file that is empty. What :meth:`finish` has not written is not in the file.

    Whole buffers go past the page cache; the rest, and everything where that cannot be done, through it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        self._filled = 0
        self._direct_fits = True

    def write(self, data: memoryview) -> None:
        """Take bytes, and write what makes a whole buffer."""
        while data:
            taken = data[: BUFFER_BYTES - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            data = data[len(taken) :]
            if self._filled == BUFFER_BYTES:
                self._write_out(self._write_direct(self._buffer))
                self._filled = 0

    def finish(self) -> None:
        """Write the rest. It is not durable yet."""
        self._write_out(self._buffer[: self._filled])
        self._filled = 0

    def _write_direct(self, data: memoryview) -> memoryview:
        """Write past the page cache; returns what has to be written in the ordinary way."""
        if not self._direct_fits:
            return data
        try:
            _set_direct(self._descriptor, on=True)
            written = os.write(self._descriptor, data)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            written = 0
        # After a part of a buffer the file may end within a sector, and direct writes must not begin there.
        self._direct_fits = written == len(data)
        return data[written:]

    def _write_out(self, data: memoryview) -> None:
        if data:
            _set_direct(self._descriptor, on=False)
        while data:
            data = data[os.write(self._descriptor, data) :]


def _set_direct(descriptor: int, *, on: bool) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | os.O_DIRECT if on else flags & ~os.O_DIRECT
    if wanted != flags:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)

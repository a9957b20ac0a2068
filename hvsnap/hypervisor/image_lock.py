"""Keeping QEMU from writing to an image that is being read offline: QEMU's own locks, taken from outside.

QEMU locks single bytes of an image file: 100 + n for a permission that it uses, 200 + n for one that it does not let
others use (block/file-posix.c, "raw_apply_lock_bytes"). A guest's QEMU that wants to write looks at byte 201, and does
not start when somebody holds it. qemu-nbd does this by itself for qcow2, whose metadata must not change under a reader,
but not for raw images; and nobody does it between the readings of two disks of one group.

Such locks do not reach a block device in the private /dev that libvirt makes for each guest: it is another inode there.
So a block device's write counters are compared, too: what was written to while it was read was not of one instant.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from hvsnap.errors import Busy, HypervisorFailed

_USED, _UNSHARED = 100, 200
_WRITE, _RESIZE = 1, 3  # numbers of QEMU's permissions BLK_PERM_WRITE and BLK_PERM_RESIZE
_WRITING = (_WRITE, _RESIZE)
_FLOCK = "hhqqi4x"  # struct flock on 64-bit Linux: type, whence, start, length, process
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
"""A file system without such locks: QEMU goes without them there, too."""


def _request(fd: int, command: int, kind: int, byte: int) -> int:
    """Ask for a lock of one byte that belongs to the open file, or who has it; return the lock's type then."""
    answer = fcntl.fcntl(fd, command, struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0))
    found: int = struct.unpack(_FLOCK, answer)[0]
    return found


def _lock(path: str) -> int:
    """Return an open file that holds the lock. Blocking."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HypervisorFailed(f"cannot open {path}: {error.strerror}") from error
    try:
        # As QEMU does: take first, then look, so that of two who come at once at least one sees the other.
        for permission in _WRITING:
            _request(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, _UNSHARED + permission)
        for permission in _WRITING:
            if _request(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, _USED + permission) != fcntl.F_UNLCK:
                raise Busy(f"{path} is open for writing elsewhere", hint="try again; a guest may just have started")
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(fd)
            raise Busy(f"{path} cannot be locked: {error.strerror}", hint="try again") from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def in_use(path: str) -> bool:
    """Whether a program has an image file open as QEMU does, be it for reading alone. Blocking.

    What cannot be looked at counts as in use, but where there are no locks at all.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        whole = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _USED, 2 * (_UNSHARED - _USED), 0)
        found: int = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, whole))[0]
        return found != fcntl.F_UNLCK
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(fd)


def is_written(path: str) -> bool:
    """Whether a program has an image file open so that it may write to it, as QEMU does. Blocking."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        return any(_request(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, _USED + one) != fcntl.F_UNLCK for one in _WRITING)
    except OSError as error:
        return error.errno not in _NO_LOCKS
    finally:
        os.close(fd)


@contextlib.asynccontextmanager
async def images_locked(paths: Sequence[str]) -> AsyncIterator[None]:
    """Keep images from being opened for writing for as long as the context lasts; readers are not disturbed.

    Raises :class:`Busy` when one is open for writing already, and at the end for a block device that was written to all
    the same. A guest that is started meanwhile is refused by QEMU ("Failed to get "write" lock").
    """
    with contextlib.ExitStack() as held:
        writes: list[tuple[str, int, int | None]] = []
        for path in paths:
            locking = asyncio.ensure_future(asyncio.to_thread(_lock, path))
            try:
                fd = await asyncio.shield(locking)
            except asyncio.CancelledError:
                locking.add_done_callback(_release)
                raise
            held.callback(os.close, fd)
            writes.append((path, fd, await asyncio.to_thread(_writes, fd)))
        yield
        for path, fd, before in writes:
            if await asyncio.to_thread(_writes, fd) != before:
                raise Busy(f"{path} was written to while it was read", hint="try again; a guest may have been started")


def _writes(fd: int) -> int | None:
    """Return how many sectors of a block device were ever written or discarded, in memory or not; None: no device.

    Sectors and not requests: a flush, such as the one made here, counts as a request (docs.kernel.org/block/stat.html).
    """
    seen = os.fstat(fd)
    if not stat.S_ISBLK(seen.st_mode):
        return None
    os.fsync(fd)
    numbers = f"{os.major(seen.st_rdev)}:{os.minor(seen.st_rdev)}"
    try:
        fields = Path(f"/sys/dev/block/{numbers}/stat").read_text().split()
    except OSError:
        return None  # a host without /sys: nobody can tell
    return int(fields[6]) + (int(fields[13]) if len(fields) > 13 else 0)


def _release(locking: asyncio.Future[int]) -> None:
    """Let go of a lock that nobody waits for any more."""
    if not locking.cancelled() and locking.exception() is None:
        os.close(locking.result())

"""Files and directories that last: the blocking half of the local object store.

Every step that can lose data is followed by the fsync that makes it last. A failed fsync is final (the kernel may have
dropped the pages, and report success the next time): the file is thrown away. Everything here raises :class:`OSError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from hvsnap.store.direct import Appender

DIRECTORY_MODE = 0o700  # disks' contents are their owners' affair
FILE_MODE = 0o600


class Directories:
    """Directories below a root, created as they are needed and made durable in their parents.

    One that exists is synced once, too: another thread may have created it a moment ago, and not be that far.
    The root's own parent must exist; creating more would hide a disk that is not mounted.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._durable: set[Path] = set()

    def make(self, directory: Path) -> None:
        """Return when the directory, the root or one below it, exists and will go on existing."""
        if directory in self._durable and directory.is_dir():
            return
        if directory != self._root:
            self.make(directory.parent)
        with contextlib.suppress(FileExistsError):
            directory.mkdir(DIRECTORY_MODE)
        sync_directory(directory.parent)
        self._durable.add(directory)


class NewFile:
    """A file under a temporary name, until it is published under its own or discarded."""

    def __init__(self, directories: Directories, temporaries: Path, path: Path) -> None:
        self.path = path
        self._directories = directories
        self._temporary = temporaries / secrets.token_hex(16)
        self._descriptor = -1
        self._appender: Appender | None = None
        self._over = False

    def write(self, *pieces: bytes | memoryview) -> None:
        """Append bytes, piece after piece; the file is created with the first ones."""
        try:
            appender = self._require_open()
            for piece in pieces:
                appender.write(memoryview(piece).cast("B"))
        except OSError:
            self.discard()
            raise

    def publish(self) -> None:
        """Make the file durable, then give it its name; an existing file stays: :class:`FileExistsError`."""
        try:
            self._require_open().finish()
            os.fsync(self._descriptor)
            self._directories.make(self.path.parent)
            os.link(self._temporary, self.path)
            try:
                sync_directory(self.path.parent)
            except OSError:
                self.path.unlink()
                raise
        finally:
            self.discard()

    def discard(self) -> None:
        """Close and remove the temporary name; what was published stays."""
        self._over = True
        self._appender = None
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            # The contents are synced or unwanted: nothing that closing could still report matters.
            with contextlib.suppress(OSError):
                os.close(descriptor)
            with contextlib.suppress(OSError):  # what stays is found by remove_all at the next start
                self._temporary.unlink()

    def _require_open(self) -> Appender:
        if self._over:
            raise OSError(errno.EBADF, "it was finished or given up before")
        if self._appender is None:
            self._directories.make(self._temporary.parent)
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            self._appender = Appender(self._descriptor)
        return self._appender


def sync_directory(directory: Path) -> None:
    """Make a directory's entries durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_range(path: Path, start: int, length: int) -> bytes:
    """Return ``length`` bytes from ``start``, fewer only at the end of the file."""
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        data = file.read(length)
        while len(data) < length and (more := file.read(length - len(data))):
            data += more
        return data


_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, linux/falloc.h


def punch(path: Path, holes: Sequence[tuple[int, int]]) -> bool:
    """Give the space of ``(start, length)`` parts of a file back, durably; False if the file system cannot.

    The file keeps its size, and the parts read as zeroes. Python has no fallocate(2) with flags.
    """
    fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        for start, length in holes:
            while fallocate(descriptor, _PUNCH_HOLE_KEEP_SIZE, start, length):
                code = ctypes.get_errno()
                if code in (errno.EOPNOTSUPP, errno.ENOSYS):
                    return False
                if code != errno.EINTR:
                    raise OSError(code, os.strerror(code))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return True


def delete(path: Path) -> None:
    """Remove a file for good; one that is not there is no error."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    sync_directory(path.parent)


def remove_all(directory: Path) -> int:
    """Remove all files in a directory and return how many there were; the directory may be missing."""
    if not directory.is_dir():
        return 0
    names = os.listdir(directory)
    for name in names:
        (directory / name).unlink(missing_ok=True)
    return len(names)

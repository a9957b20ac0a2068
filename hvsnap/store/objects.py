"""Objects in a local directory: the :class:`~hvsnap.ports.ObjectStore` of a single host.

Calls to the file system run in threads of this store's own, so that a device that hangs does not take the
threads that talk to guests.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple, Unpack

from hvsnap.errors import NoSpace, NotFound, ObjectExists, StoreFailed
from hvsnap.ports import ObjectInfo
from hvsnap.reserve import Reserve
from hvsnap.store import files
from hvsnap.store.uninterrupted import uninterrupted

THREADS = 8
"""Calls under way at once: two packs being made durable, one being written, some reads ahead."""

DATA = "packs/"
RESERVE = ".reserve"  # no valid name reaches it
RESERVE_BYTES_MAX = 16 << 20
"""What is kept free beside packs: for manifests and leases, without which nothing could be deleted."""

PART_BYTES_MAX = 255
NAME_BYTES_MAX = 1024

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")
_TEMPORARY = ".tmp"  # no valid name reaches it

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def check_name(name: str) -> str:
    """Return the name. Raises :class:`ValueError` for one against the rules (docs/format.md): a caller's mistake."""
    parts_fit = all(len(part) <= PART_BYTES_MAX for part in name.split("/"))
    if len(name) > NAME_BYTES_MAX or not parts_fit or _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not an object name")
    return name


class LocalObjects:
    """Immutable objects as files below ``root``, which is created with the first one if its parent exists."""

    object_bytes_best = 64 << 20
    reads_at_once = 4

    def __init__(self, root: Path) -> None:
        self._root = root
        self._directories = files.Directories(root)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="objects")
        self._reserve: Reserve | None = None

    async def get(self, name: str) -> bytes:
        """Return a whole object."""
        path = self._path(name)
        return await self._read(path, path.read_bytes)

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``; :class:`StoreFailed` if the object ends before."""
        path = self._path(name)
        data = await self._read(path, files.read_range, path, start, length)
        if len(data) != length:
            raise StoreFailed(f"{path} ends before byte {start + length}", hint="it was cut: check the store")
        return data

    async def put(self, name: str, data: bytes) -> None:
        """Write an object, durable on return; :class:`ObjectExists` if there is one."""
        writer = await self.writer(name)
        try:
            await writer.write(data)
            await writer.commit()
        finally:
            await writer.abort()

    async def writer(self, name: str) -> LocalWriter:
        """Start an object. Data (a pack) is refused with :class:`NoSpace` before the device is quite full."""
        path = self._path(name)
        if not await self._read(path, self._room_for, name.startswith(DATA)):
            raise NoSpace(f"cannot write {path}: the device is nearly full")
        return LocalWriter(self, files.NewFile(self._directories, self._root / _TEMPORARY, self._path(name)))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Yield the objects below ``prefix``, in order of their names; one directory of a level in memory at a time."""
        prefix = prefix.removesuffix("/")
        pending = [f"{check_name(prefix)}/" if prefix else ""]
        while pending:
            name = pending.pop()
            if name and not name.endswith("/"):
                with contextlib.suppress(NotFound):  # deleted since it was listed
                    yield ObjectInfo(name, await self.size(name))
                continue
            with contextlib.suppress(NotFound):
                pending += reversed(await self._read(self._root / name, _scan, self._root / name, name))

    async def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        path = self._path(name)
        return (await self._read(path, path.stat)).st_size

    async def delete(self, name: str) -> None:
        """Remove an object for good; one that is not there is no error."""
        path = self._path(name)
        await self._write(f"cannot delete {path}", files.delete, path)

    async def punch(self, name: str, holes: Sequence[tuple[int, int]]) -> bool:
        """Give the space of ``(start, length)`` parts back; see :class:`~hvsnap.ports.Punching`."""
        path = self._path(name)
        try:
            return await self._write(f"cannot punch holes into {path}", files.punch, path, holes)
        except StoreFailed as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise NotFound(f"{path} is not there") from error
            raise

    async def clean_temporaries(self) -> int:
        """Remove what interrupted writers left; return how many. Only while nobody writes: at the start."""
        directory = self._root / _TEMPORARY
        return await self._write(f"cannot clean {directory}", files.remove_all, directory)

    def close(self) -> None:
        """Let the threads go, once they are done."""
        self._threads.shutdown(wait=False)

    def _room_for(self, data: bool) -> bool:
        """Keep the reserve, or give it up: without it there is room for what frees space, and no longer for data."""
        if self._reserve is None:
            if not self._root.is_dir():
                return True  # the first object of all; a missing parent is told of when that is written
            self._reserve = Reserve(self._root / RESERVE, RESERVE_BYTES_MAX)
        self._reserve.adjust()
        return not data or self._reserve.has_room()

    def _path(self, name: str) -> Path:
        return self._root / check_name(name)

    async def _read(self, path: Path, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run a blocking call in a thread; what is missing is :class:`NotFound`."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
                raise NotFound(f"{path} is not there") from error
            raise _translated(error, f"cannot read {path}") from error

    async def _write(self, what: str, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        """Run a blocking call that changes something in a thread; a cancelled caller waits for its end."""
        return await uninterrupted(self._in_thread(what, function, *args), name=what)

    async def _in_thread(self, what: str, function: Callable[[Unpack[Ts]], T], *args: *Ts) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except OSError as error:
            raise _translated(error, what) from error


class LocalWriter:
    """An object being written. Made by :meth:`LocalObjects.writer`."""

    def __init__(self, objects: LocalObjects, file: files.NewFile) -> None:
        self._objects = objects
        self._file = file

    async def write(self, *pieces: bytes | memoryview) -> None:
        """Append bytes, piece after piece."""
        await self._objects._write(f"cannot write {self._file.path}", self._file.write, *pieces)

    async def commit(self) -> None:
        """Make it durable and visible. After any failure nothing is visible, and the writer is of no more use."""
        await self._objects._write(f"cannot finish {self._file.path}", self._file.publish)

    async def abort(self) -> None:
        """Forget what was written, unless it has been committed."""
        await self._objects._write(f"cannot discard {self._file.path}", self._file.discard)


def _translated(error: OSError, what: str) -> StoreFailed:
    """Return our error for one of the operating system's."""
    message = f"{what}: {error.strerror}"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return NoSpace(message)
        case errno.EEXIST:
            return ObjectExists(message)
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return StoreFailed(message, hint="the daemon's user must be able to write in the store's directory")
        case errno.ENOENT:
            return StoreFailed(message, hint="create the store's directory, or mount the disk that it is on")
    return StoreFailed(message)


def _scan(path: Path, prefix: str) -> list[str]:
    """Return the names in a directory, a ``/`` behind each directory's, in the order of whole object names."""
    with os.scandir(path) as entries:
        return sorted(
            f"{prefix}{entry.name}/" if entry.is_dir(follow_symlinks=False) else f"{prefix}{entry.name}"
            for entry in entries
            if _NAME.fullmatch(entry.name) and not entry.is_symlink()
        )

"""Where a new disk is written: a file of its own, one in the place of another, or a block device.

A file is written beside, and gets its name when it is whole. A device has no beside: it is blank until its first
blocks, which come last, are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from enum import StrEnum

from hvsnap.errors import BadRequest, Failed, NoSpace, Refused, TargetExists

FORMATS = ("qcow2", "raw")

BLANK_BYTES = 1 << 20
"""What is zeroed at both ends of a device that was not finished: partition tables, headers of file systems or qcow2."""

FS_IOC_GETVERSION = 0x8008_7601
"""Asks for a file's generation (linux/fs.h, for 64 bits)."""


class Manner(StrEnum):
    """How a new disk comes to its place."""

    NEW = "new"
    REPLACE = "replace"
    DEVICE = "device"


def check_target(path: str, image_format: str, *, force: bool = False) -> Manner:
    """Return how a target is to be written; refuse one that is there or cannot be made. Blocking.

    Only with ``force`` is anything written over: a regular file, or a block device. A symbolic link is followed to a
    device alone, whose lasting names are links. Raises :class:`TargetExists`, :class:`BadRequest`, :class:`Refused`.
    """
    if image_format not in FORMATS:
        raise BadRequest(f"the format {image_format[:32]} is not known", hint=f"choose {' or '.join(FORMATS)}")
    if not os.path.isabs(path) or os.path.basename(path) in ("", ".", ".."):
        raise BadRequest(f"{path[:256]} is not an absolute path of a file", hint="give the target's whole path")
    # lexists: a dangling symbolic link is there, too, and would lead elsewhere.
    there = os.path.lexists(path)
    if there and not force:
        raise TargetExists(f"{path} exists")
    if there:
        manner = _over(path)
        if manner is Manner.DEVICE:
            return manner
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise BadRequest(f"there is no directory {directory}", hint="create it first")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Refused(f"the directory {directory} is not writable for the daemon", hint="choose another place")
    return Manner.REPLACE if there else Manner.NEW


def _over(path: str) -> Manner:
    """Return how something that is there is written over."""
    if is_device(path):
        return Manner.DEVICE
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        real = os.path.realpath(path)
        raise TargetExists(f"{path} is a symbolic link", hint=f"name what it leads to: {real}")
    if not stat.S_ISREG(mode):
        raise TargetExists(f"{path} is neither a file nor a block device", hint="choose another path")
    return Manner.REPLACE


def is_device(path: str) -> bool:
    """Whether a path leads to a block device. Blocking."""
    with contextlib.suppress(OSError):
        return stat.S_ISBLK(os.stat(path).st_mode)
    return False


def check_space(path: str, needed_bytes: int) -> None:
    """Refuse a file that plainly does not fit. Blocking."""
    seen = os.statvfs(os.path.dirname(path))
    free_bytes = seen.f_bavail * seen.f_frsize
    if free_bytes < needed_bytes:
        raise NoSpace(
            f"{os.path.dirname(path)} has {free_bytes} bytes free, the disk needs {needed_bytes}",
            hint="free some space there, or choose another place",
        )


def free_bytes(path: str) -> int:
    """Return the room on the file system of an image, whether that is there or not; 0 where nobody can tell. Blocking.

    Of an image on a block device it is that of /dev, which says nothing.
    """
    try:
        room = os.statvfs(os.path.dirname(os.path.realpath(path)))
    except OSError:
        return 0
    return room.f_bavail * room.f_frsize


def check_growth(path: str, held_bytes: int, new_bytes: int) -> None:
    """Refuse to write ``new_bytes`` into holes of an image where that plainly does not fit. Blocking.

    ``held_bytes`` of it are data. What it takes beyond that (preallocated, zeroed in place) is reused first.
    """
    seen = os.stat(path)
    needed_bytes = new_bytes - max(0, seen.st_blocks * 512 - held_bytes)
    room = os.statvfs(path)
    free_bytes = room.f_bavail * room.f_frsize
    if needed_bytes > free_bytes:
        raise NoSpace(
            f"{os.path.dirname(path)} has {free_bytes} bytes free, {path} would grow by {needed_bytes}",
            hint="free some space there: nothing was written",
        )


def check_device(path: str, needed_bytes: int) -> None:
    """Refuse a device that is too small. Blocking."""
    size_bytes = device_bytes(path)
    if size_bytes < needed_bytes:
        hint = "choose a larger device"
        raise NoSpace(f"{path} has {size_bytes} bytes, the disk needs {needed_bytes}", hint=hint)


def device_bytes(path: str) -> int:
    """Return the size of a block device. Blocking."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Failed(f"{path} cannot be opened: {error.strerror}") from error
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def blank(path: str) -> None:
    """Zero both ends of a block device, durably: nobody takes for a disk what is none. Blocking."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            size_bytes = os.lseek(fd, 0, os.SEEK_END)
            for start in {0, max(0, size_bytes - BLANK_BYTES)}:
                os.pwrite(fd, bytes(min(BLANK_BYTES, size_bytes - start)), start)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error.strerror}") from error


# -- giving a file its name -----------------------------------------------------------------------


def temporary_beside(path: str, operation: str) -> str:
    """Return where a file is written before it gets its name; ``operation`` is the journal's entry for it."""
    directory, name = os.path.split(path)
    return os.path.join(directory, f".{name[:200]}.{operation}.hvsnap")


def publish(temporary: str, path: str, *, replace: bool = False) -> None:
    """Make a finished file durable under its name: never over another one, but with ``replace``. Blocking."""
    try:
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        if replace:
            os.rename(temporary, path)
        else:
            os.link(temporary, path, follow_symlinks=False)
    except FileExistsError as error:
        raise TargetExists(f"{path} was created by somebody else meanwhile") from error
    except OSError as error:
        raise Failed(f"{path} cannot be created: {error.strerror}") from error
    try:
        if not replace:
            os.unlink(temporary)
        sync_directory(path)
    except OSError as error:
        # Nobody may take for durable what is not.
        if not replace:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise Failed(f"{path} cannot be made durable: {error.strerror}") from error


def sync_directory(path: str) -> None:
    """Make a file's name durable. Blocking."""
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def inode_of(path: str) -> int | None:
    """Return what tells a file from another one of its name; None for what is no regular file, or not there.

    Blocking.
    """
    with contextlib.suppress(OSError):
        seen = os.lstat(path)
        return seen.st_ino if stat.S_ISREG(seen.st_mode) else None
    return None


def file_identity(path: str) -> str:
    """Return what tells a file from any that comes after it; "" for what is no regular file, or not there. Blocking.

    A file that is made anew has often the number of the one before, but not its generation, where the file system has
    such a thing (ext4, xfs and btrfs do).
    """
    generation = bytearray(8)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode):
            return ""
        with contextlib.suppress(OSError):
            fcntl.ioctl(fd, FS_IOC_GETVERSION, generation)
        return f"{seen.st_ino}.{int.from_bytes(generation, 'little')}"
    finally:
        os.close(fd)


def was_published(path: str, inode: int) -> bool:
    """Whether a file that was about to get its name has it; the name is durable then. Blocking."""
    published = inode_of(path) == inode
    if published:
        sync_directory(path)
    return published

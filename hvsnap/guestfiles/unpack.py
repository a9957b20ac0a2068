"""Writing files that a guest made up into one directory of the host, and nowhere else.

A tar stream comes from a virtual machine that has read a hostile file system, so nothing in it is believed: every part
of every name is opened by itself, relative to the directory before it, and never through a symbolic link; nothing that
exists is opened; what the host would obey (devices, set-user-id bits) is left out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Protocol, Self

from hvsnap.errors import Failed, NoSpace

CHUNK_BYTES = 1 << 20
HOLE_BYTES = 1 << 16
"""Zeroes of this size and place become a hole; a file of zeroes takes no space."""

SKIPPED_MAX = 1000
_END: type[Exception] = vars(tarfile)["EOFHeaderError"]
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_BITS, _DIRECTORY_BITS = 0o1777, 0o3777
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Reader(Protocol):
    """Where content comes from."""

    def read(self, size: int, /) -> bytes:
        """Return at most ``size`` bytes; none at the end."""
        ...


@dataclass
class Tally:
    """What has been written; ``skipped`` is path and kind of the first ones that were left out, of all ``left_out``."""

    files: int = 0
    directories: int = 0
    symlinks: int = 0
    copied_bytes: int = 0
    left_out: int = 0
    disarmed: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def skip(self, path: str, kind: str) -> None:
        """Note something that is not copied."""
        self.left_out += 1
        if len(self.skipped) < SKIPPED_MAX:
            self.skipped.append((path, kind))


@dataclass(frozen=True, slots=True)
class Traits:
    """A file's permission bits, owner and time of change (ns since 1970)."""

    mode: int
    uid: int
    gid: int
    modified_ns: int


class Tree:
    """The directory ``path``, below which everything goes. ``report`` is called as it proceeds.

    Owners are kept for root alone, as nobody else may give files away.
    """

    def __init__(self, path: str, report: Callable[[Tally], None] = lambda _tally: None) -> None:
        self.tally = Tally()
        self._report = report
        self._owners = os.geteuid() == 0
        self._open: list[tuple[str, int]] = [("", os.open(path, _DIRECTORY))]
        self._pending: list[tuple[tuple[str, ...], Traits]] = []

    def close(self) -> None:
        """Close what is open."""
        for _name, descriptor in self._open:
            os.close(descriptor)
        self._open = []

    # -- what is written --------------------------------------------------------------------------

    def directory(self, parts: Sequence[str], traits: Traits) -> None:
        """Make a directory; what it is to look like in the end is given to it by :meth:`finish`."""
        with _disk_told(parts):
            os.mkdir(parts[-1], 0o700, dir_fd=self._parent(parts))
        self._pending.append((tuple(parts), traits))
        self.tally.directories += 1

    def file(self, parts: Sequence[str], traits: Traits, content: Reader) -> None:
        """Write a file, with holes where its content is zero."""
        with _disk_told(parts):
            descriptor = os.open(parts[-1], _NEW, 0o600, dir_fd=self._parent(parts))
            try:
                size = 0
                while chunk := content.read(CHUNK_BYTES):
                    _write_sparsely(descriptor, chunk, size)
                    size += len(chunk)
                    self.tally.copied_bytes += len(chunk)
                    self._report(self.tally)
                os.ftruncate(descriptor, size)
                self._dress(descriptor, traits, _FILE_BITS)
            finally:
                os.close(descriptor)
        self.tally.files += 1

    def symlink(self, parts: Sequence[str], target: str, traits: Traits) -> None:
        """Make a symbolic link, wherever it points: it is never followed here."""
        with _disk_told(parts):
            parent = self._parent(parts)
            os.symlink(target, parts[-1], dir_fd=parent)
            if self._owners:
                with contextlib.suppress(OSError, OverflowError):
                    os.chown(parts[-1], traits.uid, traits.gid, dir_fd=parent, follow_symlinks=False)
            with contextlib.suppress(OSError, OverflowError):
                times = (traits.modified_ns, traits.modified_ns)
                os.utime(parts[-1], ns=times, dir_fd=parent, follow_symlinks=False)
        self.tally.symlinks += 1

    def link(self, parts: Sequence[str], other: Sequence[str]) -> None:
        """Give a file that was written before another name."""
        with _disk_told(parts):
            # The second look-up may close what the first one has opened.
            source = os.dup(self._parent(other))
            try:
                target = self._parent(parts)
                os.link(other[-1], parts[-1], src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
            finally:
                os.close(source)
        self.tally.files += 1

    def finish(self) -> None:
        """Give the directories their permissions, owners and times, the deepest first."""
        for parts, traits in reversed(self._pending):
            with _disk_told(parts):
                descriptor = os.open(parts[-1], _DIRECTORY, dir_fd=self._parent(parts))
                try:
                    self._dress(descriptor, traits, _DIRECTORY_BITS)
                finally:
                    os.close(descriptor)
        self._pending = []

    # -- how --------------------------------------------------------------------------------------

    def _parent(self, parts: Sequence[str]) -> int:
        """Return the open directory that the last of ``parts`` lies in, each one entered by its own name."""
        wanted = parts[:-1]
        same = 0
        while same < min(len(wanted), len(self._open) - 1) and self._open[same + 1][0] == wanted[same]:
            same += 1
        while len(self._open) > same + 1:
            os.close(self._open.pop()[1])
        for part in wanted[same:]:
            self._open.append((part, os.open(part, _DIRECTORY, dir_fd=self._open[-1][1])))
        return self._open[-1][1]

    def _dress(self, descriptor: int, traits: Traits, bits: int) -> None:
        if self._owners:
            with contextlib.suppress(OverflowError):
                os.fchown(descriptor, traits.uid, traits.gid)
        mode = traits.mode & bits
        self.tally.disarmed += mode != traits.mode
        os.fchmod(descriptor, mode)
        with contextlib.suppress(OSError, OverflowError):  # a time that no file of this host can have
            os.utime(descriptor, ns=(traits.modified_ns, traits.modified_ns))


def parts_of(name: str) -> tuple[str, ...]:
    """Return the parts of a name in a tar stream, empty for the tree's own root. Raises :class:`Failed` for `..`."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    if ".." in parts or "\0" in name:
        raise Failed(
            f"{name[:200]!a} would lie outside of what is copied; nothing was kept", hint="is the guest hostile?"
        )
    return parts


class _StrictInfo(tarfile.TarInfo):
    """A member; what is no member and not the end is an error, where tarfile would take it for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if isinstance(error, _END):
                raise
            raise tarfile.ReadError(str(error)) from error


def unpack(stream: IO[bytes], tree: Tree, root: Sequence[str], shown: str) -> None:
    """Write what comes as a tar stream below ``root`` (a name in ``tree``). ``shown`` is its path in the guest.

    Raises :class:`Failed` for what no honest tar of a directory holds. The stream is read to its end.
    """
    try:
        with tarfile.open(
            fileobj=stream, mode="r|", tarinfo=_StrictInfo, encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
                _unpack_one(tar, member, tree, root, shown)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise Failed(f"{shown} did not come as it should: {error}", hint="try again") from error
    while stream.read(CHUNK_BYTES):
        pass
    tree.finish()


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, tree: Tree, root: Sequence[str], shown: str) -> None:
    parts = (*root, *parts_of(member.name))
    traits = Traits(member.mode, member.uid, member.gid, int(member.mtime * 1_000_000_000))
    if member.isdir():
        tree.directory(parts, traits)
    elif len(parts) == len(root):
        raise Failed(f"{shown} came as something that is no directory", hint="try again")
    elif member.isreg():
        content = tar.extractfile(member)
        if content is not None:
            tree.file(parts, traits, content)
    elif member.issym():
        tree.symlink(parts, member.linkname, traits)
    elif member.islnk():
        other = parts_of(member.linkname)
        if other:
            tree.link(parts, (*root, *other))
    else:
        kind = {tarfile.CHRTYPE: "character device", tarfile.BLKTYPE: "block device", tarfile.FIFOTYPE: "fifo"}
        path = "/".join([shown.rstrip("/"), *parts[len(root) :]])
        tree.tally.skip(_legible(path), kind.get(member.type, "unknown"))


def _write_sparsely(descriptor: int, chunk: bytes, offset: int) -> None:
    """Write a piece of a file at ``offset``, but for its zeroes."""
    for start, end in _data(chunk):
        at = start
        while at < end:
            at += os.pwrite(descriptor, chunk[at:end], offset + at)


def _data(chunk: bytes) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a piece that are not zero, in steps of :data:`HOLE_BYTES`."""
    begin: int | None = None
    for start in range(0, len(chunk), HOLE_BYTES):
        part = chunk[start : start + HOLE_BYTES]
        if part.count(0) == len(part):
            if begin is not None:
                yield begin, start
            begin = None
        elif begin is None:
            begin = start
    if begin is not None:
        yield begin, len(chunk)


def _legible(path: str) -> str:
    """Return a path whose bytes may be no UTF-8 as text."""
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")


@contextlib.contextmanager
def _disk_told(parts: Sequence[str]) -> Iterator[None]:
    """Raise what the host's file system says as an error of ours."""
    try:
        yield
    except OSError as error:
        shown = _legible("/".join(parts))
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(
                f"{shown}: {error.strerror}", hint="free some space and try again; nothing was kept"
            ) from error
        raise Failed(f"{shown}: {error.strerror}; nothing was kept", hint="see what is at the target") from error

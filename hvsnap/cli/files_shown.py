"""How files of a snapshot look, and what is told while they are read."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType

from rich.console import Console
from rich.markup import escape

from hvsnap import wire
from hvsnap.cli.render import size, table, when
from hvsnap.cli.text import safe

LINE_INTERVAL_S = 5.0

_BITS = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "block device": stat.S_IFBLK,
    "character device": stat.S_IFCHR,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}


def filesystems(answer: wire.FileSystemList, *, headers: bool = True) -> str:
    """Return the list of file systems."""
    names = ("DEVICE", "TYPE", "LABEL", "SIZE", "MOUNTED AT", "NOTE")
    rows = []
    for one in answer.filesystems:
        note = "encrypted by the guest: it cannot be opened here" if one.encrypted else one.system
        rows.append(
            (one.device, one.type, one.label or "-", size(one.size_bytes), ", ".join(one.mounted_at) or "-", note)
        )
    return table(names, rows, headers=headers)


def files(listed: Sequence[wire.GuestFile], *, recursive: bool, headers: bool = True) -> str:
    """Return what lies in a directory, as `ls -l` shows it; with ``recursive`` the whole path of each."""
    names = ("MODE", "UID", "GID", "SIZE", "MODIFIED", "NAME")
    rows = []
    for one in listed:
        mode = "?" * 10 if one.mode is None else stat.filemode(_BITS.get(one.kind, 0) | one.mode)
        name = one.path if recursive else one.path.rpartition("/")[2] or one.path
        if one.kind == "symlink":
            name += f" -> {one.target}"
        plain = one.kind in ("file", "symlink")
        rows.append(
            (
                mode,
                _number(one.uid),
                _number(one.gid),
                size(one.size_bytes) if plain else "-",
                when(one.modified_at),
                name,
            )
        )
    return table(names, rows, headers=headers)


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def copied(answer: wire.FilesCopied) -> str:
    """Return what was copied, and where to."""
    counts = [(answer.files, "file", "files"), (answer.directories, "directory", "directories"),
              (answer.symlinks, "symbolic link", "symbolic links")]  # fmt: skip
    words = [f"{count} {one if count == 1 else many}" for count, one, many in counts if count]
    return "\n".join(
        [*map(safe, answer.targets), f"{', '.join(words)}; {size(answer.copied_bytes)} from {answer.snapshot}"]
    )


def notes(answer: wire.FilesCopied) -> Iterator[str]:
    """Yield what is to be said about what was copied otherwise than it was."""
    if answer.left_out:
        first = ", ".join(f"{one.path} ({one.kind})" for one in answer.skipped[:3])
        more = f", and {answer.left_out - 3} more" if answer.left_out > 3 else ""
        yield f"not copied: {first}{more}"
    if answer.disarmed:
        yield f"set-user-id and set-group-id bits of {answer.disarmed} files were not kept: they would hold here, too"


class Pace:
    """What is going on: in place on a terminal, elsewhere a line every five seconds, on stderr."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._status = None if quiet or not sys.stderr.isatty() else Console(stderr=True).status("")
        self._said_at = self._began_at = time.monotonic()

    def __enter__(self) -> Pace:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Clear it away."""
        self.stop()

    def show(self, text: str) -> None:
        """Tell what is going on."""
        now = time.monotonic()
        if self._status is not None:
            self._status.update(escape(text))
            self._status.start()
        elif not self._quiet and now - self._said_at >= LINE_INTERVAL_S:
            self._said_at = now
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def copied(self, *, files: int, bytes: int) -> None:
        """Tell how far a copy is."""
        passed_s = time.monotonic() - self._began_at
        what = f"{files} file{'' if files == 1 else 's'}, {size(bytes)}"
        self.show(f"copying: {what}, {size(bytes / passed_s)}/s" if passed_s > 0 else f"copying: {what}")

    def stop(self) -> None:
        """Tell no more in place."""
        if self._status is not None:
            self._status.stop()


@contextlib.contextmanager
def output() -> Iterator[tuple[int, bool]]:
    """Give a descriptor of the standard output, and whether it may take an archive.

    A terminal gets a file's text with nothing in it that it would obey, and no archive.
    """
    if not sys.stdout.isatty():
        yield sys.stdout.fileno(), True
        return
    reading, writing = os.pipe()
    thread = threading.Thread(target=_show, args=(reading,), name="output")
    thread.start()
    try:
        yield writing, False
    finally:
        os.close(writing)
        thread.join()


def _show(descriptor: int) -> None:
    with os.fdopen(descriptor, encoding="utf-8", errors="backslashreplace", newline="\n") as text:
        for line in text:
            ended = line.endswith("\n")
            sys.stdout.write("\t".join(safe(part) for part in line.rstrip("\n").split("\t")) + "\n" * ended)
        sys.stdout.flush()

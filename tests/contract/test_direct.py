"""Files appended to past the page cache hold every byte, whatever the file system makes of direct writes."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hvsnap.store import direct
from hvsnap.store.direct import BUFFER_BYTES, Appender

LENGTHS = (0, 1, 4095, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES + 12345)


def appended(path: Path, data: bytes, seed: int = 1) -> bytes:
    """Append data in pieces of random lengths; returns what the file holds."""
    rng = random.Random(seed)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        appender = Appender(descriptor)
        rest = memoryview(data)
        while rest:
            length = rng.choice([1, 100, 65536, 1 << 20, BUFFER_BYTES, 2 * BUFFER_BYTES])
            appender.write(rest[:length])
            rest = rest[length:]
        appender.finish()
    finally:
        os.close(descriptor)
    return path.read_bytes()


def is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("length", LENGTHS)
def test_file_holds_what_was_appended(workdir: Path, length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert appended(workdir / "file", data) == data


def test_whole_buffers_go_past_the_page_cache(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, int]] = []
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        seen.append((is_direct(descriptor), len(data)))
        return real(descriptor, data)

    monkeypatch.setattr(direct.os, "write", write)
    appended(workdir / "file", bytes(2 * BUFFER_BYTES + 5))
    assert seen == [(True, BUFFER_BYTES), (True, BUFFER_BYTES), (False, 5)]


def refusing(code: int) -> Callable[[int, memoryview], int]:
    """A file system that takes the flag, and then no direct write."""
    real = os.write

    def write(descriptor: int, data: memoryview) -> int:
        if is_direct(descriptor):
            raise OSError(code, os.strerror(code))
        return real(descriptor, data)

    return write


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_direct_writes_that_are_refused_are_made_in_the_ordinary_way(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    data = random.Random(2).randbytes(2 * BUFFER_BYTES + 5)
    monkeypatch.setattr(direct.os, "write", refusing(code))
    assert appended(workdir / "file", data) == data


def test_flag_that_is_refused_is_no_error(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(3).randbytes(2 * BUFFER_BYTES + 5)
    real = fcntl.fcntl

    def refuse(descriptor: int, command: int, argument: int = 0) -> int:
        if command == fcntl.F_SETFL and argument & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, command, argument)

    monkeypatch.setattr(direct.fcntl, "fcntl", refuse)
    assert appended(workdir / "file", data) == data


@pytest.mark.parametrize("short", [1, 511, 512, 4096, BUFFER_BYTES - 1])
def test_short_direct_write_is_continued(workdir: Path, monkeypatch: pytest.MonkeyPatch, short: int) -> None:
    data = random.Random(short).randbytes(2 * BUFFER_BYTES + 5)
    real = os.write

    def write(descriptor: int, piece: memoryview) -> int:
        if is_direct(descriptor):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_WRONLY)  # so that a part of a sector can be written
            return real(descriptor, piece[:short])
        return real(descriptor, piece)

    monkeypatch.setattr(direct.os, "write", write)
    assert appended(workdir / "file", data) == data


def test_other_errors_of_direct_writes_are_raised(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct.os, "write", refusing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space"):
        appended(workdir / "file", bytes(BUFFER_BYTES))

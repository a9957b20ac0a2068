"""What a power cut leaves of an image: all that was flushed, and of the rest some.

QEMU's ``blklogwrites`` notes every write and flush in their order (:mod:`tests.faults.killing_daemon` puts it below).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from random import Random

SECTOR = 512
FLUSH, FUA, DISCARD = 1, 2, 4


@dataclass(frozen=True)
class Write:
    """One entry of the log: ``data`` at a byte, unless it only discards; flushed are those before a ``flush``."""

    offset: int
    length: int
    data: bytes
    flush: bool
    discard: bool


def logged(path: Path) -> list[Write]:
    """Return what was written, in order: after a first sector, entries of a sector and their data each.

    How many there are is in the first sector only once something was flushed; the file's end tells it as well.
    """
    raw = path.read_bytes()
    found, at = [], SECTOR
    while at + SECTOR <= len(raw):
        where, sectors, flags, _size = struct.unpack_from("<QQQQ", raw, at)
        at += SECTOR
        length = sectors * SECTOR
        data = b"" if flags & DISCARD else raw[at : at + length]
        at += len(data)
        if not flags and not sectors:
            break
        found.append(Write(where * SECTOR, length, data, bool(flags & (FLUSH | FUA)), bool(flags & DISCARD)))
    return found


def left(writes: list[Write], random: Random | None) -> list[Write]:
    """Return what a power cut leaves: all up to the last flush, of the rest what chance wants (None: nothing)."""
    safe = max((number for number, one in enumerate(writes, 1) if one.flush), default=0)
    return writes[:safe] + [one for one in writes[safe:] if random is not None and random.random() < 0.5]


def replay(image: Path, writes: list[Write]) -> None:
    """Do writes to an image, which grows as it needs to."""
    with image.open("r+b") as file:
        for one in writes:
            data = bytes(one.length) if one.discard else one.data
            if one.discard and one.offset + one.length > os.fstat(file.fileno()).st_size:
                continue
            file.seek(one.offset)
            file.write(data)

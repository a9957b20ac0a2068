"""What a disk must hold, known without hvsnap: a copy that the same operations are applied to, and how to compare."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from tests.guest.workload import pattern

Bytes = npt.NDArray[np.uint8]

BLOCK = 65536
SECTOR = 512


class Mismatch(AssertionError):
    """Bytes are not what they must be; only this tells that the product is broken."""


@dataclass(frozen=True)
class Operation:
    """One operation on a disk. ``data`` only for a write; a discard leaves what was there, or zeroes."""

    kind: str  # write, zero, unmap (zeroes that may free space), discard
    offset: int
    length: int
    data: Bytes | None = None

    @property
    def stop(self) -> int:
        return self.offset + self.length


def differences(got: Bytes, wanted: Bytes, what: str) -> str:
    """Return which blocks differ, for an error; empty: none do."""
    if got.size != wanted.size:
        return f"{what}: {got.size} bytes instead of {wanted.size}"
    wrong = np.flatnonzero(got != wanted)
    if not wrong.size:
        return ""
    blocks = np.unique(wrong // BLOCK)
    first = int(wrong[0])
    return (
        f"{what}: {wrong.size} bytes differ in blocks {blocks[:12].tolist()} of {-(-wanted.size // BLOCK)}, "
        f"the first at {first}: {int(got[first])} instead of {int(wanted[first])}"
    )


def check_same(got: Bytes, wanted: Bytes, what: str) -> None:
    """Raise :class:`Mismatch` unless all bytes are the same."""
    text = differences(got, wanted, what)
    if text:
        raise Mismatch(text)


def load(path: Path) -> Bytes:
    """Return a raw file's bytes."""
    return np.fromfile(path, np.uint8)


def converted(path: Path, image_format: str, scratch: Path) -> Bytes:
    """Return what an image holds, by qemu-img alone. Nobody may be writing to it, and its owner must have flushed."""
    return read_image(["-f", image_format], str(path), scratch / f"{path.name}.converted")


def read_image(how: list[str], image: str, out: Path) -> Bytes:
    """Return what an image holds that is opened in a certain way (``DiskSpec.opened``)."""
    command = ["qemu-img", "convert", "-U", *how, "-O", "raw", image, str(out)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    data = load(out)
    out.unlink()
    return data


class Replica:
    """A disk's content by its operations."""

    def __init__(self, initial: Bytes) -> None:
        self.data = initial.copy()
        self._loose = np.zeros(initial.size, np.bool_)  # discarded: what was there, or zero

    def apply(self, one: Operation) -> None:
        """Do an operation that the disk has acknowledged."""
        span = slice(one.offset, one.stop)
        if one.kind == "discard":
            self._loose[span] = True
            return
        self._loose[span] = False
        self.data[span] = 0 if one.data is None else one.data

    def check(self, seen: Bytes, what: str) -> None:
        """Compare with what the disk was seen to hold; from then on a discarded range is as it was seen."""
        wanted = self.data
        if seen.size == wanted.size and self._loose.any():
            wanted = np.where(self._loose & (seen == 0), np.uint8(0), wanted)
        check_same(seen, wanted, what)
        self.data = seen.copy()
        self._loose[:] = False

    def resize(self, size: int) -> None:
        """Grow with zeroes, or cut."""
        data = np.zeros(size, np.uint8)
        kept = min(size, self.data.size)
        data[:kept] = self.data[:kept]
        self.data, self._loose = data, np.zeros(size, np.bool_)


def random_operation(random: Random, size: int) -> Operation:
    """Return an operation of any size at any place, fond of the disk's end and of the borders of blocks."""
    kind = random.choices(("write", "zero", "unmap", "discard"), (6, 1, 2, 2))[0]
    scale = random.choices((4096, BLOCK, 4 * BLOCK, 16 * BLOCK), (3, 3, 2, 1))[0]
    unit = random.choices((1, SECTOR, 4096, BLOCK), (2, 4, 2, 1))[0]
    length = max(unit, random.randrange(1, scale + 1) // unit * unit)
    length = min(length, size)
    where = random.random()
    if where < 0.2:
        offset = size - length
    elif where < 0.4:
        offset = max(0, random.randrange(size // BLOCK + 1) * BLOCK - random.randrange(length + 1) // unit * unit)
    else:
        offset = random.randrange(size) // unit * unit
    offset = min(offset, size - length)
    data = np.frombuffer(random.randbytes(1021), np.uint8) if kind == "write" else None
    return Operation(kind, offset, length, None if data is None else np.resize(data, length))


# -- a log of operations and an instant that nobody knows -----------------------------------------


def logged_operation(line: str) -> Operation:
    """Return the operation that ``stress`` printed once it was acknowledged."""
    verb, *numbers = line.split()
    offset, length = int(numbers[0]), int(numbers[1])
    data = np.frombuffer(pattern(length, int(numbers[2])), np.uint8) if verb == "write" else None
    return Operation(verb, offset, length, data)


def instant_in_log(got: Bytes, initial: Bytes, log: Sequence[Operation]) -> int:
    """Return after how many operations of a log a disk held ``got``.

    An operation that was under way at the instant may be there in part, sector by sector. Raises :class:`Mismatch`
    when there is no such instant: something later is there, or something earlier is missing.
    """
    if got.size != initial.size or got.size % SECTOR:
        raise Mismatch(f"{got.size} bytes instead of {initial.size}")
    state = Replica(initial)
    sectors = got.reshape(-1, SECTOR)
    wrong = np.any(sectors != state.data.reshape(-1, SECTOR), axis=1)
    best = int(wrong.sum())
    for done in range(len(log) + 1):
        count = int(wrong.sum())
        best = min(best, count)
        if done == len(log):
            if count == 0:
                return done
            break
        one = log[done]
        span = slice(one.offset // SECTOR, -(-one.stop // SECTOR))
        before = int(wrong[span].sum())
        after = Replica(state.data[one.offset : one.stop])
        after.apply(Operation(one.kind if one.kind != "discard" else "zero", 0, one.length, one.data))
        then = np.any(sectors[span] != after.data.reshape(-1, SECTOR), axis=1)
        if count == before and not np.any(wrong[span] & then):
            return done + (not then.any())
        if one.kind == "discard":
            # Either is right, from now on the one that is seen; sectors overwritten later settle it anyway.
            keep = wrong[span] < then
            after.data.reshape(-1, SECTOR)[keep] = state.data[one.offset : one.stop].reshape(-1, SECTOR)[keep]
            then = np.minimum(then, wrong[span])
        state.data[one.offset : one.stop] = after.data
        wrong[span] = then
    raise Mismatch(f"no instant of the log's {len(log)} operations is what was restored: {best} sectors are wrong")

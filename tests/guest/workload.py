"""The host's copy of what stress.c did: the same bytes, from the lines that it printed once they were acknowledged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(0xBF58476D1CE4E5B9)
_TWO = np.uint64(0x94D049BB133111EB)


def pattern(length: int, seed: int) -> bytes:
    """Return the bytes that ``stress write`` makes of a seed (splitmix64)."""
    with np.errstate(over="ignore"):
        state = np.uint64(seed) + np.arange(1, length // 8 + 1, dtype=np.uint64) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _ONE
        state = (state ^ (state >> np.uint64(27))) * _TWO
        return (state ^ (state >> np.uint64(31))).astype("<u8").tobytes()


class Mirror:
    """An independent copy of a disk: a sparse file that the same operations are applied to."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._fd, size_bytes)

    def apply(self, line: str) -> None:
        """Apply one printed operation."""
        verb, *numbers = line.split()
        offset, length = int(numbers[0]), int(numbers[1])
        data = pattern(length, int(numbers[2])) if verb == "write" else bytes(length)
        if os.pwrite(self._fd, data, offset) != length:
            raise OSError("short write to the mirror")

    def close(self) -> None:
        os.close(self._fd)

"""Digests that are in the catalog but not yet in its index: sorted arrays in memory, searched at once.

A new digest belongs anywhere in an index of digests. Entered pack by pack, a thousand digests touch a thousand pages of
a large index; gathered until they are half a million, they touch each page several times, and it is written once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hvsnap.ports import UInt64Array

PREFIX_BITS = 47
"""Bits of a digest that the index holds: what SQLite keeps in six bytes. At 16.7 million blocks one look-up in eight
million finds a block that turns out to be another one."""

Prefixes = npt.NDArray[np.int64]


def prefixes_of(digests: npt.NDArray[np.uint8]) -> Prefixes:
    """Return the prefixes, ``int64[n]``, of digests, ``uint8[n, 32]``."""
    first = np.ascontiguousarray(digests[:, :8]).view(">u8").reshape(-1)
    return (first >> np.uint64(64 - PREFIX_BITS)).astype(np.int64)


class Recent:
    """Pairs of prefix and block id, sorted by prefix."""

    def __init__(self) -> None:
        self.prefixes: Prefixes = np.zeros(0, np.int64)
        self.ids: UInt64Array = np.zeros(0, np.uint64)
        self.packs: list[int] = []
        """Numbers of the packs whose blocks these are."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return int(self.ids.size)

    def add(self, pack: int, prefixes: Prefixes, ids: UInt64Array) -> None:
        """Enter the blocks of one pack."""
        order = np.argsort(prefixes)
        place = np.searchsorted(self.prefixes, prefixes[order])
        self.prefixes = np.insert(self.prefixes, place, prefixes[order])
        self.ids = np.insert(self.ids, place, ids[order])
        self.packs.append(pack)

    def remove(self, ids: UInt64Array) -> None:
        """Forget blocks; those that are not here are no error."""
        keep = ~np.isin(self.ids, ids)
        self.prefixes, self.ids = self.prefixes[keep], self.ids[keep]

    def candidates(self, prefixes: Prefixes) -> UInt64Array:
        """Return the ids of all blocks with one of these prefixes."""
        if not len(self):
            return self.ids
        first = np.searchsorted(self.prefixes, prefixes)
        there = self.prefixes[np.minimum(first, len(self) - 1)] == prefixes  # most are not
        first = first[there]
        last = np.searchsorted(self.prefixes, prefixes[there], "right")
        parts = [self.ids[start:end] for start, end in zip(first, last, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)

"""A set of block numbers of one disk, a bit each: 2 MiB for a TiB of disk, whatever its fragmentation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hvsnap.model import PAGE_BLOCKS

BoolArray = npt.NDArray[np.bool_]

_PAGE_BYTES = PAGE_BLOCKS // 8


class BlockSet:
    """Block numbers below ``blocks``, held and handed out a page (:data:`PAGE_BLOCKS`) at a time."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.pages = -(-blocks // PAGE_BLOCKS)
        self._bits = np.zeros(self.pages * _PAGE_BYTES, np.uint8)

    def page(self, number: int) -> BoolArray:
        """Return membership of one page's blocks, ``bool[PAGE_BLOCKS]`` (a copy)."""
        packed = self._bits[number * _PAGE_BYTES : (number + 1) * _PAGE_BYTES]
        return np.unpackbits(packed).astype(np.bool_)

    def add_page(self, number: int, members: BoolArray) -> None:
        """Add blocks of one page; members beyond the disk's end are an error of the caller."""
        last = self.blocks - number * PAGE_BLOCKS
        if members[max(0, last) :].any():
            raise ValueError(f"block beyond the end of a disk of {self.blocks} blocks")
        packed = self._bits[number * _PAGE_BYTES : (number + 1) * _PAGE_BYTES]
        packed |= np.packbits(members)

    def add_index(self, number: int, index: npt.NDArray[np.uint16]) -> None:
        """Add blocks of one page by their index in it; those beyond the disk's end are left out."""
        members = np.zeros(PAGE_BLOCKS, np.bool_)
        members[index] = True
        members[max(0, self.blocks - number * PAGE_BLOCKS) :] = False
        self.add_page(number, members)

    def count(self) -> int:
        """Return how many blocks are members."""
        return int(np.bitwise_count(self._bits).sum())

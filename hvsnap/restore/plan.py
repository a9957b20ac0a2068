"""What to write to bring a disk to a snapshot: pure, on views and sets of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvsnap.capture.blockset import BlockSet
from hvsnap.model import PAGE_BLOCKS, ZERO_BLOCK
from hvsnap.ports import UInt64Array

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PageWrites:
    """What to do with one page: ``blocks`` (ascending block numbers of the disk) get ``ids``, ``zero`` gets zeroes."""

    blocks: IndexArray
    ids: UInt64Array
    zero: IndexArray


def page_writes(page: int, wanted: npt.NDArray[np.bool_], target: UInt64Array, snapshot_blocks: int) -> PageWrites:
    """Return what to write of a page: ``wanted`` (``bool[PAGE_BLOCKS]``) blocks, as the target's view has them.

    Blocks from ``snapshot_blocks`` on get zeroes: the disk has grown since (SERVICE 6.6), and entries there are left
    from a time when it was larger still.
    """
    index = np.flatnonzero(wanted)
    numbers = index + page * PAGE_BLOCKS
    stored = (target[index] != ZERO_BLOCK) & (numbers < snapshot_blocks)
    return PageWrites(numbers[stored], target[index[stored]], numbers[~stored])


def ranges(numbers: IndexArray) -> Iterator[tuple[int, int]]:
    """Yield ``(first, count)`` of neighbouring block numbers."""
    if not numbers.size:
        return
    starts = np.concatenate(([0], np.flatnonzero(np.diff(numbers) != 1) + 1, [numbers.size]))
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        yield int(numbers[start]), stop - start


def add_difference(differs: BlockSet, page: int, present: UInt64Array, target: UInt64Array) -> None:
    """Add the blocks at which two views of a page differ; the disk's end bounds them."""
    if page < differs.pages:
        differs.add_index(page, np.flatnonzero(present != target).astype(np.uint16))

"""Pure decisions of a capture: which method, why, and which blocks to read.

Nothing here touches a guest, a disk or the catalog.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvsnap.capture.blockset import BlockSet
from hvsnap.model import PAGE_BLOCKS, Bitmap, Disk, Kind, Method

GROUP_BYTES = 4 << 20
"""Blocks that travel through the pipeline together: with half of it the hops between threads cost a full snapshot
4 % more processor time, with more only memory grows (docs/performance.md)."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How a disk will be captured. ``reason`` is empty where the method is the ordinary one."""

    kind: Kind
    method: Method
    reason: str = ""
    bitmap: str | None = None


def decide(disk: Disk, bitmaps: Mapping[str, Bitmap], *, size_bytes: int, head_size_bytes: int | None,
           block_size: int) -> Decision:  # fmt: skip
    """Choose full, bitmap or rescan (docs/architecture.md, "Capture").

    ``bitmaps`` are those of the disk's active image now; ``head_size_bytes`` is the size of the disk in the
    snapshot that its present state continues from, None if there is none. A bitmap is believed only if the
    catalog expects it and it is whole: a name alone is never trusted.
    """
    if disk.head is None or head_size_bytes is None:
        return Decision(Kind.FULL, Method.FULL)

    def rescan(reason: str) -> Decision:
        return Decision(Kind.INCREMENTAL, Method.RESCAN, reason)

    if size_bytes != head_size_bytes:
        return rescan(f"the disk was resized from {head_size_bytes} to {size_bytes} bytes")
    if disk.bitmap is None:
        return rescan(
            "no dirty bitmap is known: the format stores none, the image is another, or the catalog was rebuilt"
        )
    bitmap = bitmaps.get(disk.bitmap)
    if bitmap is None:
        return rescan(f"the dirty bitmap {disk.bitmap} is missing")
    if bitmap.inconsistent:
        return rescan(f"the dirty bitmap {disk.bitmap} is inconsistent: QEMU was not shut down cleanly")
    if not bitmap.recording or not bitmap.persistent or bitmap.granularity != block_size:
        return rescan(f"the dirty bitmap {disk.bitmap} is not the one that was made")
    return Decision(Kind.INCREMENTAL, Method.BITMAP, bitmap=disk.bitmap)


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks of one page that are read together: ``index`` (``uint16[n]``, ascending) counts within the page."""

    page: int
    index: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class PageWork:
    """What a capture does with one page: blocks to read, and blocks known to read as zeroes."""

    page: int
    read: npt.NDArray[np.uint16]
    zero: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Selection:
    """Which blocks a capture must look at.

    ``data`` are the blocks that may hold something else than zeroes. ``candidates`` limits them to what may have
    changed (dirty bitmap and carried-over blocks); None: every block is looked at.
    """

    data: BlockSet
    candidates: BlockSet | None

    def page_work(self, number: int) -> PageWork:
        """Return what is to be done with one page.

        A candidate that holds no data is recorded as zero, never skipped: a skipped one would restore stale data.
        """
        data = self.data.page(number)
        if self.candidates is None:
            wanted = np.ones(PAGE_BLOCKS, np.bool_)
            wanted[max(0, self.data.blocks - number * PAGE_BLOCKS) :] = False
        else:
            wanted = self.candidates.page(number)
        return PageWork(
            number,
            np.flatnonzero(wanted & data).astype(np.uint16),
            np.flatnonzero(wanted & ~data).astype(np.uint16),
        )

    def work(self) -> Iterator[PageWork]:
        """Yield the pages that have something to do, ascending."""
        for number in range(self.data.pages):
            work = self.page_work(number)
            if work.read.size or work.zero.size:
                yield work

    def read_blocks(self) -> int:
        """Return how many blocks will be read."""
        if self.candidates is None:
            return self.data.count()
        return sum(work.read.size for work in self.work())


def group_blocks(block_size: int) -> int:
    """Return how many blocks a group has at most."""
    return max(1, GROUP_BYTES // block_size)


def groups(work: PageWork, block_size: int) -> Iterator[Group]:
    """Split a page's reads into groups."""
    blocks = group_blocks(block_size)
    for start in range(0, work.read.size, blocks):
        yield Group(work.page, work.read[start : start + blocks])


def runs(index: npt.NDArray[np.uint16], length_max: int) -> list[tuple[int, int, int]]:
    """Return ``(position in index, first block, blocks)`` of neighbouring blocks, each at most ``length_max`` long."""
    if index.size == 0:
        return []
    numbers = index.astype(np.int64)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(numbers) != 1) + 1))
    stops = np.concatenate((starts[1:], [numbers.size]))
    found = []
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        for position in range(start, stop, length_max):
            found.append((position, int(numbers[position]), min(length_max, stop - position)))
    return found

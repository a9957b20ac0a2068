"""Giving back at once what a capture will not read of a held instant, so that guests' writes there are not copied.

A fleeced guest pays for every block that it overwrites for the first time: the old content is copied before. A capture
reads only some of the blocks; for all others nobody needs the copy (docs/bare-qemu.md has measurements).
"""

from __future__ import annotations

import nbd
import numpy as np
import numpy.typing as npt

from hvsnap.capture.plan import Selection
from hvsnap.capture.reader import connected
from hvsnap.errors import ReadFailed
from hvsnap.model import PAGE_BLOCKS
from hvsnap.ports import NbdExport

RANGES_MAX = 20_000
"""Ranges that are given back, the longest: each takes some 40 µs of QEMU's main loop."""

RANGE_BYTES_MAX = 1 << 30
"""NBD's lengths have 32 bits."""

Ranges = npt.NDArray[np.int64]


def unread_ranges(selection: Selection) -> Ranges:
    """Return what a capture will not read, as rows of ``(first block, blocks)``, ``int64[n, 2]``: the longest ones."""
    kept = np.empty((0, 2), np.int64)
    for number in range(selection.data.pages):
        kept = np.concatenate((kept, _unread_of_page(selection, number)))
        if len(kept) > 2 * RANGES_MAX:
            kept = _longest(_joined(kept))
    return _longest(_joined(kept))


def _unread_of_page(selection: Selection, number: int) -> Ranges:
    start = number * PAGE_BLOCKS
    unread = np.zeros(PAGE_BLOCKS + 2, np.int8)
    unread[1 : 1 + min(PAGE_BLOCKS, selection.data.blocks - start)] = 1
    unread[1 + selection.page_work(number).read.astype(np.int64)] = 0
    edges = np.flatnonzero(np.diff(unread))
    return np.column_stack((edges[::2] + start, edges[1::2] - edges[::2])).astype(np.int64)


def _joined(ranges: Ranges) -> Ranges:
    """Join ranges that meet, as they do at the pages' borders; ``ranges`` are ascending."""
    if len(ranges) == 0:
        return ranges
    apart = np.flatnonzero(ranges[:-1].sum(axis=1) != ranges[1:, 0]) + 1
    firsts = ranges[np.concatenate(([0], apart)), 0]
    ends = ranges[np.concatenate((apart - 1, [len(ranges) - 1]))].sum(axis=1)
    return np.column_stack((firsts, ends - firsts))


def _longest(ranges: Ranges) -> Ranges:
    if len(ranges) <= RANGES_MAX:
        return ranges
    return ranges[np.sort(np.argpartition(ranges[:, 1], -RANGES_MAX)[-RANGES_MAX:])]


def give_back(export: NbdExport, selection: Selection, size_bytes: int, block_size: int) -> None:
    """Discard what will not be read. Blocking: call it in a thread. Raises :class:`ReadFailed`."""
    try:
        with connected(export, []) as handle:
            for first, blocks in unread_ranges(selection).tolist():
                offset, end = first * block_size, min((first + blocks) * block_size, size_bytes)
                while offset < end:
                    length = min(RANGE_BYTES_MAX, end - offset)
                    handle.trim(length, offset)
                    offset += length
    except nbd.Error as error:
        raise ReadFailed(f"what is not read cannot be given back: {error.string}") from error

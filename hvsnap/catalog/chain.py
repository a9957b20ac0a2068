"""Algebra of the chain: pure functions on block-map pages.

A page covers :data:`~hvsnap.model.PAGE_BLOCKS` blocks of a disk. A snapshot holds, for each page, only the entries
that differ from its parent; a *view* is the dense page that results from laying a lineage's entries over each other,
oldest first. Block id 0 reads as zeroes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvsnap.errors import CatalogFailed
from hvsnap.model import PAGE_BLOCKS
from hvsnap.ports import UInt64Array

IndexArray = npt.NDArray[np.uint16]
_ENTRY_BYTES = 2 + 8


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """Entries of one page: ``index uint16[n]``, ascending and unique, and ``block uint64[n]``."""

    index: IndexArray
    block: UInt64Array

    def __len__(self) -> int:
        """Return the number of entries."""
        return int(self.index.size)


EMPTY = Page(np.zeros(0, np.uint16), np.zeros(0, np.uint64))


def encode(page: Page) -> bytes:
    """Return a page as bytes: all indexes (u16), then all block ids (u64), little-endian."""
    return page.index.astype("<u2").tobytes() + page.block.astype("<u8").tobytes()


def decode(blob: bytes) -> Page:
    """Return the page of :func:`encode`; anything else is :class:`CatalogFailed`."""
    count, rest = divmod(len(blob), _ENTRY_BYTES)
    if rest or count > PAGE_BLOCKS:
        raise CatalogFailed(f"a block-map page has {len(blob)} bytes", hint="the catalog is damaged")
    index = np.frombuffer(blob, "<u2", count).astype(np.uint16)
    block = np.frombuffer(blob, "<u8", count, offset=2 * count).astype(np.uint64)
    if count and (int(index[-1]) >= PAGE_BLOCKS or (np.diff(index.astype(np.int32)) <= 0).any()):
        raise CatalogFailed("a block-map page's entries are out of order", hint="the catalog is damaged")
    return Page(index, block)


def blank() -> UInt64Array:
    """Return the view of a page that nobody wrote: all zeroes."""
    return np.zeros(PAGE_BLOCKS, np.uint64)


def lay_over(pages: Iterable[Page]) -> UInt64Array:
    """Return the view (``uint64[PAGE_BLOCKS]``) of a lineage's entries of one page, given oldest first."""
    view = blank()
    for page in pages:
        view[page.index] = page.block
    return view


def changed(parent: UInt64Array, index: IndexArray, block: UInt64Array) -> Page:
    """Return the entries that differ from the parent's view."""
    differs = parent[index] != block
    return Page(index[differs], block[differs])


def difference(one: UInt64Array, other: UInt64Array) -> IndexArray:
    """Return the indexes at which two views of the same page differ."""
    return np.flatnonzero(one != other).astype(np.uint16)


def hand_over(deleted: Page, child: Page) -> Page:
    """Return the child's entries after its parent was deleted: its own win, the parent's others move to it."""
    moving = ~np.isin(deleted.index, child.index, assume_unique=True)
    index = np.concatenate((child.index, deleted.index[moving]))
    block = np.concatenate((child.block, deleted.block[moving]))
    order = np.argsort(index)
    return Page(index[order], block[order])


def join_indexes(one: IndexArray, other: IndexArray) -> IndexArray:
    """Return the union of two sets of indexes, ascending."""
    return np.union1d(one, other).astype(np.uint16)


def encode_indexes(index: IndexArray) -> bytes:
    """Return indexes as bytes (u16, little-endian)."""
    return index.astype("<u2").tobytes()


def decode_indexes(blob: bytes) -> IndexArray:
    """Return the indexes of :func:`encode_indexes`."""
    return np.frombuffer(blob, "<u2").astype(np.uint16)

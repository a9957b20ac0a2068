"""Where blocks lie, by ranges of their ids: pure functions on the blobs of the table ``blocks``.

Ids are given out one after the other, so that the blocks of a pack are neighbours: one row for a range of ids is
written at once, read at once, and costs no index entry for each block. Entries are :data:`ENTRY` arrays.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hvsnap.errors import CatalogFailed
from hvsnap.ports import UInt64Array

RANGE_BLOCKS = 512
"""Ids of a range: 26 KiB of entries. Twice as many make dedup's scattered look-ups slower, half as many the packs'."""

DIGEST_BYTES = 32

ENTRY = np.dtype(
    [
        ("slot", "<u2"),
        ("flags", "<u2"),
        ("pack", "<u4"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("digest", "u1", DIGEST_BYTES),
    ]
)
"""One block: ``slot`` is its id's place in the range; the others are :class:`~hvsnap.model.BlockPlace`'s."""

EntryArray = npt.NDArray[Any]

_HEAD = struct.Struct("<BI")  # form, CRC-32 of what follows: as the pages of block maps have it (chain.py)
_FORM_1 = 1  # without the range's number under the checksum; still read
_FORM = 2
_LIVE = struct.Struct("<I")


def range_of(ids: UInt64Array) -> UInt64Array:
    """Return the ranges that ids lie in."""
    return ids // np.uint64(RANGE_BLOCKS)


def ids_of(number: int, entries: EntryArray) -> UInt64Array:
    """Return the ids of a range's entries."""
    return np.uint64(number * RANGE_BLOCKS) + entries["slot"].astype(np.uint64)


def group(ids: UInt64Array) -> Iterator[tuple[int, slice]]:
    """Yield ``(range, slice of ids)`` of ascending ids."""
    if not ids.size:
        return
    numbers = range_of(ids)
    starts = np.flatnonzero(np.append(True, numbers[1:] != numbers[:-1]))
    for start, end in zip(starts, np.append(starts[1:], ids.size), strict=True):
        yield int(numbers[start]), slice(int(start), int(end))


def encode(number: int, entries: EntryArray) -> bytes:
    """Return a range's entries as bytes; raises :class:`ValueError` for what :func:`decode` would refuse."""
    wrong = _wrong(entries)
    if wrong:
        raise ValueError(f"not a range of blocks: {wrong}")
    body = entries.tobytes()
    return _HEAD.pack(_FORM, zlib.crc32(body, _seed(number, _FORM))) + body


def decode(number: int, live: bytes, blob: bytes) -> EntryArray:
    """Return those of the entries of :func:`encode` that are live; anything else is :class:`CatalogFailed`."""
    entries = _decode_all(number, blob)
    mask = decode_live(live)
    there = mask[entries["slot"]]
    if int(there.sum()) != int(mask.sum()):
        raise _damaged("a block is live and lies nowhere")
    return entries if there.all() else entries[there]


def stored(blob: bytes) -> int:
    """Return how many entries a blob of :func:`encode` has, live or not."""
    return (len(blob) - _HEAD.size) // ENTRY.itemsize


def _seed(number: int, form: int) -> int:
    """Return what a checksum begins with: a range that is found under another number would give blocks other ids."""
    return form if form == _FORM_1 else zlib.crc32(number.to_bytes(8, "little", signed=True), form)


def _decode_all(number: int, blob: bytes) -> EntryArray:
    if not isinstance(blob, bytes):
        raise _damaged("it is none")
    body = memoryview(blob)[_HEAD.size :]
    if len(blob) < _HEAD.size or len(body) % ENTRY.itemsize:
        raise _damaged(f"it has {len(blob)} bytes")
    form, checksum = _HEAD.unpack_from(blob)
    if form not in (_FORM_1, _FORM) or zlib.crc32(body, _seed(number, form)) != checksum:
        raise _damaged("its checksum is wrong")
    entries = np.frombuffer(body, ENTRY)
    wrong = _wrong(entries)
    if wrong:
        raise _damaged(wrong)
    return entries


def encode_live(slots: npt.NDArray[np.uint16]) -> bytes:
    """Return which slots are live as bytes: CRC-32, then a bit for each slot."""
    mask = np.zeros(RANGE_BLOCKS, np.bool_)
    mask[slots] = True
    body = np.packbits(mask, bitorder="little").tobytes()
    return _LIVE.pack(zlib.crc32(body)) + body


def decode_live(blob: bytes) -> npt.NDArray[np.bool_]:
    """Return which slots are live, ``bool[RANGE_BLOCKS]``; what is not of :func:`encode_live` is damaged."""
    body = blob[_LIVE.size :] if isinstance(blob, bytes) else b""
    if len(body) != RANGE_BLOCKS // 8 or _LIVE.unpack_from(blob) != (zlib.crc32(body),):
        raise _damaged("which of its blocks are live is not known")
    return np.unpackbits(np.frombuffer(body, np.uint8), bitorder="little").astype(np.bool_)


def find(entries: EntryArray, slots: npt.NDArray[np.uint16]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Return for each slot where its entry stands, and whether there is one."""
    if not entries.size:
        return np.zeros(slots.size, np.intp), np.zeros(slots.size, np.bool_)
    place = np.minimum(np.searchsorted(entries["slot"], slots), entries.size - 1)
    return place, entries["slot"][place] == slots


def replace(old: EntryArray, new: EntryArray) -> EntryArray:
    """Return the entries of both, the new ones in place of old ones of the same slot."""
    kept = old[~np.isin(old["slot"], new["slot"])]
    both = np.concatenate((kept, new))
    return both[np.argsort(both["slot"])]


def _wrong(entries: EntryArray) -> str:
    """Return what makes entries invalid, or nothing."""
    slot = entries["slot"]
    if not 1 <= entries.size <= RANGE_BLOCKS:
        return f"{entries.size} entries"
    if int(slot[-1]) >= RANGE_BLOCKS or (slot[1:] <= slot[:-1]).any():
        return "its ids are out of order or out of the range"
    return "" if entries["length"].all() and entries["pack"].all() else "a block lies nowhere"


def _damaged(what: str) -> CatalogFailed:
    hint = "`hvsnap store-rebuild` makes a new catalog"
    return CatalogFailed(f"a range of the table of blocks is damaged: {what}", hint=hint)

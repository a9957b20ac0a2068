"""Sets of block ids: a bit each, in pieces that exist only where there are ids.

Ids are given out in order and never again, so that live ones lie in clusters of an ever growing space: a TiB of blocks
takes 2 MiB here, wherever its ids lie.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]

PIECE_IDS = 32768
_SHIFT = np.uint64(15)
_MASK = np.uint64(PIECE_IDS - 1)
_COUNTS = np.array([bin(byte).count("1") for byte in range(256)], np.uint16)


class IdSet:
    """Block ids; 0, the block of zeroes, is never one of them."""

    def __init__(self, ids: Iterable[int] | UInt64Array = ()) -> None:
        self._pieces: dict[int, npt.NDArray[np.uint8]] = {}
        self.add(np.fromiter(ids, np.uint64) if not isinstance(ids, np.ndarray) else ids)

    def __len__(self) -> int:
        """Return the number of ids."""
        return sum(int(_COUNTS[piece].sum()) for piece in self._pieces.values())

    def __contains__(self, block: int) -> bool:
        """Whether a block is in it."""
        return bool(self.has(np.array([block], np.uint64))[0])

    def add(self, ids: UInt64Array) -> None:
        """Add ids, in any order, any of them several times; 0 is left out."""
        for number, inside in _by_piece(ids):
            bits = np.zeros(PIECE_IDS, np.bool_)
            bits[inside] = True
            packed = np.packbits(bits, bitorder="little")
            if number == 0:
                packed[0] &= 0xFE
            if number in self._pieces:
                self._pieces[number] |= packed
            else:
                self._pieces[number] = packed

    def update(self, other: IdSet) -> None:
        """Add all ids of another set."""
        for number, piece in other._pieces.items():
            if number in self._pieces:
                self._pieces[number] |= piece
            else:
                self._pieces[number] = piece.copy()

    def has(self, ids: UInt64Array) -> npt.NDArray[np.bool_]:
        """Return which of these ids are in it, ``bool[n]``."""
        found = np.zeros(ids.size, np.bool_)
        numbers = ids >> _SHIFT
        for number in np.unique(numbers).tolist():
            piece = self._pieces.get(number)
            if piece is not None:
                mine = numbers == number
                inside = ids[mine] & _MASK
                byte, bit = (inside >> np.uint64(3)).astype(np.intp), (inside & np.uint64(7)).astype(np.uint8)
                found[mine] = (piece[byte] >> bit) & 1
        return found

    def array(self) -> UInt64Array:
        """Return all ids, ascending."""
        parts = [np.zeros(0, np.uint64)]
        for number in sorted(self._pieces):
            bits = np.unpackbits(self._pieces[number], bitorder="little")
            parts.append(np.flatnonzero(bits).astype(np.uint64) + np.uint64(number * PIECE_IDS))
        return np.concatenate(parts)

    def count(self, start: int, end: int) -> int:
        """Return how many ids there are from ``start`` to before ``end``, both multiples of 8 within one piece."""
        piece = self._pieces.get(start // PIECE_IDS)
        if piece is None:
            return 0
        first = start % PIECE_IDS // 8
        return int(_COUNTS[piece[first : first + (end - start) // 8]].sum())


class IdCounts:
    """How often each block id was added, 0 included; takes memory only where there are ids."""

    def __init__(self) -> None:
        self._pieces: dict[int, npt.NDArray[np.uint32]] = {}

    def add(self, ids: UInt64Array) -> None:
        """Count ids, in any order, any of them several times."""
        for number, inside in _by_piece(ids):
            if number not in self._pieces:
                self._pieces[number] = np.zeros(PIECE_IDS, np.uint32)
            self._pieces[number] += np.bincount(inside, minlength=PIECE_IDS).astype(np.uint32)

    def of(self, ids: UInt64Array) -> npt.NDArray[np.uint32]:
        """Return how often each of these ids was added, ``uint32[n]``."""
        found = np.zeros(ids.size, np.uint32)
        numbers = ids >> _SHIFT
        for number in np.unique(numbers).tolist():
            if number in self._pieces:
                mine = numbers == number
                found[mine] = self._pieces[number][(ids[mine] & _MASK).astype(np.intp)]
        return found


def _by_piece(ids: UInt64Array) -> Iterable[tuple[int, npt.NDArray[np.intp]]]:
    """Yield ``(piece, places within it)``."""
    if not ids.size:
        return
    numbers = ids >> _SHIFT
    first = int(numbers[0])
    if (numbers == numbers[0]).all():
        yield first, (ids & _MASK).astype(np.intp)
        return
    for number in np.unique(numbers).tolist():
        yield number, (ids[numbers == number] & _MASK).astype(np.intp)

"""Blocks to digests and stored bytes, and back: the work that runs in the store's threads.

Everything here is a plain function over whole batches, called once a batch: a hop between threads costs about as much
as hashing two blocks, and one zstd call for 32 blocks, without the interpreter's lock, compresses file data a quarter
faster than 32 calls.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import zstandard
from blake3 import blake3

from hvsnap.errors import Damaged
from hvsnap.model import BlockPlace
from hvsnap.store.pack import FLAG_SEALED, FLAG_ZSTD, check_flags
from hvsnap.store.seal import Seal

PROBE_WORDS = 16
"""Words of each block that are looked at first: if every block of a batch shows data there, that was all."""

GAIN_SHARE = 32
"""Compression must save this fraction of a block (a 32nd), or the block is kept as it is: it is read faster."""


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """Stored blocks, one after another in ``pieces``: never copied together, they are gigabytes."""

    pieces: list[bytes | memoryview]
    lengths: list[int]
    flags: list[int]

    @property
    def size_bytes(self) -> int:
        """Bytes of all blocks as they are stored."""
        return sum(self.lengths)


def nonzero_blocks(data: memoryview, block_size: int) -> list[int]:
    """Return the positions of the blocks that are not all zeroes."""
    words = np.frombuffer(data, np.uint64).reshape(-1, block_size // 8)
    shown = np.any(words[:, :: words.shape[1] // PROBE_WORDS] != 0, axis=1)
    if not np.all(shown):
        shown = np.any(words, axis=1)
    return [int(position) for position in np.flatnonzero(shown)]


def digest_blocks(data: memoryview, block_size: int, key: bytes) -> dict[int, bytes]:
    """Return the digest of each block that is not all zeroes, by its position."""
    return {
        position: blake3(data[position * block_size : (position + 1) * block_size], key=key).digest()
        for position in nonzero_blocks(data, block_size)
    }


class Codec:
    """Compresses and restores; each thread has its own zstd contexts. With a ``seal`` every block is encrypted, too."""

    def __init__(self, block_size: int, level: int, key: bytes, seal: Seal | None = None) -> None:
        self._seal = seal
        self._block_size = block_size
        self._level = level
        self._key = key
        self._local = threading.local()

    def compress(self, data: memoryview, positions: Sequence[int], digests: Sequence[bytes] = ()) -> StoredBatch:
        """Return the blocks at ``positions``, one or more, as they are stored; ``digests`` are what sealing needs."""
        blocks: list[bytes | bytearray | memoryview] = [
            data[at * self._block_size : (at + 1) * self._block_size] for at in positions
        ]
        frames = self._compressor().multi_compress_to_buffer(blocks, threads=1)
        worth = self._block_size - self._block_size // GAIN_SHARE
        pieces: list[bytes | memoryview] = []
        flags: list[int] = []
        for number, block in enumerate(blocks):
            frame = frames[number]
            gained = len(frame) <= worth
            # The frames' memory is the pieces' own; that of the blocks will be somebody else's soon.
            pieces.append(memoryview(frame) if gained else bytes(block))  # type: ignore[arg-type]  # is a buffer
            flags.append(FLAG_ZSTD if gained else 0)
        if self._seal is not None:
            seal = self._seal.seal
            pieces = [seal(b"block", digest, piece) for digest, piece in zip(digests, pieces, strict=True)]
            flags = [flag | FLAG_SEALED for flag in flags]
        return StoredBatch(pieces, [len(piece) for piece in pieces], flags)

    def restore(self, data: memoryview, start: int, places: Sequence[BlockPlace]) -> list[bytes]:
        """Return the contents of blocks of one pack, of which ``data`` holds the bytes from ``start`` on.

        Raises :class:`Damaged`, naming block and pack, :class:`~hvsnap.errors.FormatUnknown` for unknown flags.
        """
        return [self._restore_one(data[at.offset - start : at.offset - start + at.length], at) for at in places]

    def check(self, data: memoryview, start: int, places: Sequence[BlockPlace]) -> dict[int, str]:
        """Return those blocks of :meth:`restore` that are not what was stored, with the reason, by their ids.

        ``data`` may end early: what lies beyond is damaged. Raises :class:`~hvsnap.errors.FormatUnknown`.
        """
        damaged: dict[int, str] = {}
        for place in places:
            try:
                self.restore(data, start, [place])
            except Damaged as error:
                damaged[place.id] = error.message
        return damaged

    def _restore_one(self, stored: memoryview, place: BlockPlace) -> bytes:
        what = f"block {place.id} in {place.pack}"
        check_flags(place.flags, what, sealed=self._seal is not None)
        if self._seal is not None:
            stored = memoryview(self._seal.open(b"block", place.digest, stored, what))
        block = self._decompress(stored, what) if place.flags & FLAG_ZSTD else bytes(stored)
        if len(block) != self._block_size or blake3(block, key=self._key).digest() != place.digest:
            raise Damaged(f"{what} is not what was stored: its digest is wrong")
        return block

    def _decompress(self, stored: memoryview, what: str) -> bytes:
        try:
            # Before anything is allocated for it: the header decides how much that would be.
            if zstandard.frame_content_size(stored) != self._block_size:
                raise Damaged(f"{what} is not what was stored: its frame is not of a block")
            return self._decompressor().decompress(stored, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise Damaged(f"{what} is not what was stored: {error}") from error

    def _compressor(self) -> zstandard.ZstdCompressor:
        if not hasattr(self._local, "compressor"):
            self._local.compressor = zstandard.ZstdCompressor(level=self._level, write_checksum=False)
        compressor: zstandard.ZstdCompressor = self._local.compressor
        return compressor

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = zstandard.ZstdDecompressor()
        decompressor: zstandard.ZstdDecompressor = self._local.decompressor
        return decompressor

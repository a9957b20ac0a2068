"""Blocks that were read from the store and verified, in memory until they are written to a disk.

All that a rollback writes is verified before its disk is touched. What has room here meanwhile need not be read from
the store a second time; what has none is.
"""

from __future__ import annotations

from collections.abc import Iterable

KEPT_BYTES_MAX = 128 << 20
"""Of all rollbacks together: what a hundredth of a disk of 10 GiB takes, however large disks are."""


class Room:
    """How many bytes may still be kept, by all who share it."""

    def __init__(self, free_bytes: int = KEPT_BYTES_MAX) -> None:
        self.free_bytes = free_bytes


class Kept:
    """Blocks by their ids, in a room that others share; :meth:`close` leaves it."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._blocks: dict[int, bytes] = {}

    def keep(self, block_id: int, block: bytes) -> None:
        """Keep a verified block if there is room for it."""
        if block_id not in self._blocks and len(block) <= self._room.free_bytes:
            self._room.free_bytes -= len(block)
            self._blocks[block_id] = block

    def get(self, block_id: int) -> bytes | None:
        """Return a block, or None if it is not kept."""
        return self._blocks.get(block_id)

    def forget(self, block_ids: Iterable[int]) -> None:
        """Give the room of blocks back; those that are not kept do not matter."""
        for block_id in block_ids:
            self._room.free_bytes += len(self._blocks.pop(block_id, b""))

    def close(self) -> None:
        """Give all room back."""
        self.forget(list(self._blocks))

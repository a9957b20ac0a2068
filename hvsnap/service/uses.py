"""Who uses what right now: snapshots being restored or deleted, disks being rolled back (SERVICE 4.6).

It is about this process alone and forgets with it; what must survive a crash is in the journal. All checks and holds
happen between two ``await`` of the event loop, so no two holders can pass each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from hvsnap.errors import Busy, SnapshotInUse
from hvsnap.model import DiskId, SnapshotId


class Uses:
    """Holds on snapshots (shared, or exclusive for deletion), on disks and paths (exclusive)."""

    def __init__(self) -> None:
        self._shared: dict[SnapshotId, list[str]] = {}
        self._exclusive: dict[SnapshotId, str] = {}
        self._held: dict[str, str] = {}

    @contextlib.contextmanager
    def hold_snapshot(self, snapshot: SnapshotId, use: str) -> Iterator[None]:
        """Keep a snapshot from being deleted; ``use`` is what an error will say ("being restored to …").

        Raises :class:`SnapshotInUse` while it is being deleted.
        """
        if snapshot in self._exclusive:
            raise SnapshotInUse(f"snapshot {snapshot} is {self._exclusive[snapshot]}", hint="choose another one")
        self._shared.setdefault(snapshot, []).append(use)
        try:
            yield
        finally:
            uses = self._shared[snapshot]
            uses.remove(use)
            if not uses:
                del self._shared[snapshot]

    @contextlib.contextmanager
    def hold_for_deletion(self, snapshots: Iterable[SnapshotId]) -> Iterator[None]:
        """Keep snapshots from being used; raises :class:`SnapshotInUse` with the use if one is."""
        snapshots = list(snapshots)
        for snapshot in snapshots:
            use = next(iter(self._shared.get(snapshot, ())), self._exclusive.get(snapshot))
            if use is not None:
                raise SnapshotInUse(f"snapshot {snapshot} is {use}", hint="try again when that has ended")
        self._exclusive.update(dict.fromkeys(snapshots, "being deleted"))
        try:
            yield
        finally:
            for snapshot in snapshots:
                self._exclusive.pop(snapshot, None)

    @contextlib.contextmanager
    def hold_disk(self, disk: DiskId, use: str) -> Iterator[None]:
        """Keep a disk for oneself; raises :class:`Busy` with the use if somebody has it."""
        self.check_disk(disk)
        with self._hold(disk, use):
            yield

    def check_disk(self, disk: DiskId) -> None:
        """Raise :class:`Busy`, naming the use, if a disk is held."""
        self._check(disk, f"disk {disk}")

    @contextlib.contextmanager
    def hold_path(self, path: str, use: str) -> Iterator[None]:
        """Keep the path of a disk that is being made for oneself; raises :class:`Busy` if somebody has it."""
        self._check(path, path)
        with self._hold(path, use):
            yield

    def held(self) -> set[str]:
        """Return the disks and paths that are held."""
        return set(self._held)

    def _check(self, key: str, shown: str) -> None:
        use = self._held.get(key)
        if use is not None:
            raise Busy(f"{shown} is {use}", hint="try again when that has ended")

    @contextlib.contextmanager
    def _hold(self, key: str, use: str) -> Iterator[None]:
        self._held[key] = use
        try:
            yield
        finally:
            del self._held[key]

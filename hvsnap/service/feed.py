"""The stream of what happens, for everybody who watches: stored events without a gap, and the latest progress.

Events are always read from the catalog, and announcements only wake the readers, so that a reader may be slow, or come
back after a pause, and loses none. Progress is only ever the latest: a slow reader misses what is outdated anyway. So a
reader costs the same whatever happens.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Busy, NotFound, Stopping
from hvsnap.model import Event, Progress, SnapshotId
from hvsnap.service.tasks import Tasks

READERS_MAX = 64
BATCH = 200
KEEP_ALIVE_S = 15.0

FeedItem = Event | Progress | None
"""None: nothing has happened for a while, and the reader should be told that the stream is alive."""


class _Reader:
    """One reader: what woke it, and the latest progress of each thing that it has not yet seen."""

    def __init__(self) -> None:
        self.woken = asyncio.Event()
        self.progress: dict[str, Progress] = {}


class Feed:
    """Implements :class:`hvsnap.ports.Publisher`; ``newest`` is the sequence of the newest stored event."""

    def __init__(self, catalog: Catalog, tasks: Tasks, newest: int, *, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._catalog = catalog
        self._tasks = tasks
        self._newest = newest
        self._keep_alive_s = keep_alive_s
        self._readers: set[_Reader] = set()
        self._closed = False

    # -- the publishing side ----------------------------------------------------------------------

    def event(self, event: Event) -> None:
        """Take note of a committed event."""
        self._newest = max(self._newest, event.sequence)
        for reader in self._readers:
            reader.woken.set()

    def progress(self, progress: Progress) -> None:
        """Take note of progress."""
        for reader in self._readers:
            reader.progress[progress.id] = progress
            reader.woken.set()

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for reader in self._readers:
            reader.woken.set()

    # -- the reading side -------------------------------------------------------------------------

    def open(self, since: int | None, guest: str = "") -> AsyncIterator[FeedItem]:
        """Return the stream of what happens after event ``since`` (None: from now on), for one guest or all.

        Raises :class:`Busy` when too many read already, and :class:`Stopping`.
        """
        if self._closed:
            raise Stopping("the daemon is stopping")
        if len(self._readers) >= READERS_MAX:
            raise Busy(f"{len(self._readers)} readers follow the events already", hint="close one of them")
        # A number from before the catalog was rebuilt is in its future: such a reader starts from now.
        start = self._newest if since is None else min(since, self._newest)
        return self._stream(start, guest)

    async def _stream(self, sequence: int, guest: str) -> AsyncIterator[FeedItem]:
        reader = _Reader()
        self._readers.add(reader)
        try:
            while True:
                reader.woken.clear()
                while events := await self._catalog.events(sequence, BATCH):
                    for event in events:
                        sequence = event.sequence
                        if guest in ("", event.payload.get("guest"), event.payload.get("guest_uuid")):
                            yield event
                fresh, reader.progress = reader.progress, {}
                for progress in fresh.values():
                    if not guest or guest in await self._guest_of(progress.id):
                        yield progress
                if self._closed:
                    return
                try:
                    await asyncio.wait_for(reader.woken.wait(), self._keep_alive_s)
                except TimeoutError:
                    yield None
        finally:
            self._readers.discard(reader)

    async def _guest_of(self, name: str) -> tuple[str, ...]:
        """Return the name and UUID of the guest that a snapshot or task is about."""
        with contextlib.suppress(NotFound):
            if name.startswith("t-"):
                return (self._tasks.get(name).guest,)
            snapshot = await self._catalog.snapshot(SnapshotId(name))
            disk = await self._catalog.disk(snapshot.disk)
            return (disk.guest_name, disk.guest_uuid)
        return ()


async def newest_sequence(catalog: Catalog) -> int:
    """Return the sequence of the newest stored event, 0 if there is none. For the start: it reads them all."""
    sequence = 0
    while events := await catalog.events(sequence, BATCH):
        sequence = events[-1].sequence
    return sequence

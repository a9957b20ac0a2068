"""Snapshots as disks to look into: served until somebody ends it, and not deleted meanwhile (SERVICE 12, 4.6)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Busy, NotFound, Refused, Stopping
from hvsnap.model import Disk, Snapshot, SnapshotId, State
from hvsnap.ports import Clock
from hvsnap.restore.serve import Access, Served
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.uses import Uses
from hvsnap.service.views import when

SERVED_MAX = 64
"""Each is a process, and memory of its own."""

LOOKERS_MAX = 64
"""Each is a connection to our socket, which takes 256 of them."""

KEEP_ALIVE_S = 15.0


class Server(Protocol):
    """Serves snapshots: :class:`hvsnap.restore.serve.SnapshotServer`."""

    async def open(
        self, snapshot: Snapshot, name: str, access: Access, *, writable: bool = False, outlives: bool = False
    ) -> Served:
        """Serve a snapshot at a socket of this name."""
        ...

    def watch(self, served: Served, gone: Callable[[Served], Awaitable[None]]) -> None:
        """Call ``gone`` if what serves it ends by itself."""
        ...

    async def end(self, served: Served) -> None:
        """Serve it no more."""
        ...


@dataclass(slots=True)
class _One:
    """A snapshot that is served; ``hold`` keeps it from being deleted.

    It ends with the last of those who look into it, unless it ``stays``.
    """

    served: Served
    disk: Disk
    since: float
    hold: contextlib.ExitStack
    stays: bool = False
    lookers: int = 0
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Serving:
    """Serves snapshots on request, each once: until it is ended, or as long as somebody looks into it.

    What is served ends with the daemon.
    """

    def __init__(
        self, catalog: Catalog, snapshots: Snapshots, uses: Uses, server: Server, clock: Clock, access: Access
    ) -> None:
        self._catalog = catalog
        self._snapshots = snapshots
        self._uses = uses
        self._server = server
        self._clock = clock
        self._access = access
        self._served: dict[SnapshotId, _One] = {}
        self._turn = asyncio.Lock()
        self._leaving: set[asyncio.Task[None]] = set()
        self._ended = False

    async def serve(self, snapshot_id: str, *, writable: bool) -> wire.Served:
        """Serve a snapshot until it is ended; one that is served the same way already is told again.

        Raises :class:`SnapshotUnknown`, :class:`Refused`, :class:`SnapshotInUse` while it is being deleted,
        :class:`Busy`, and :class:`Failed` where nbdkit is not installed.
        """
        async with self._turn:
            one = await self._known(snapshot_id, writable=writable)
            one.stays = True
            return _view(one)

    async def look(self, snapshot_id: str, *, writable: bool) -> AsyncIterator[wire.Served]:
        """Serve a snapshot as long as this is being read: it tells what is served, at once and then every 15 seconds.

        Whoever asks may vanish in whatever way: closed or dropped, this lets go. It ends by itself when the snapshot is
        not served any more. Raises what :meth:`serve` raises, with the first item.
        """
        async with self._turn:
            if sum(one.lookers for one in self._served.values()) >= LOOKERS_MAX:
                raise Busy(f"{LOOKERS_MAX} clients look into snapshots already", hint="try again when one has ended")
            one = await self._known(snapshot_id, writable=writable)
            one.lookers += 1
        try:
            while not one.ended.is_set():
                yield _view(one)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(one.ended.wait(), KEEP_ALIVE_S)
        finally:
            one.lookers -= 1
            # Not here: whose request was cancelled cannot wait for anything any more.
            leaving = asyncio.create_task(self._leave(one), name=f"leave snapshot {one.served.snapshot.id}")
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _leave(self, one: _One) -> None:
        """End what nobody looks into any more."""
        async with self._turn:
            if one.lookers or one.stays or self._served.get(one.served.snapshot.id) is not one:
                return
            try:
                await self._end(one)
            finally:  # listed until the snapshot is free: whoever waits for that may then delete it
                self._served.pop(one.served.snapshot.id, None)

    async def _known(self, snapshot_id: str, *, writable: bool) -> _One:
        """Return what serves a snapshot, begun if need be; the turn is ours."""
        row = await self._snapshots.row(snapshot_id)
        if row.state is not State.ACCOMPLISHED:
            raise Refused(f"snapshot {row.id} is {row.state}", hint="only accomplished snapshots can be served")
        known = self._served.get(row.id)
        if known is None:
            return await self._begin(row, writable=writable)
        if known.served.what.writable != writable:
            how = "writable" if known.served.what.writable else "read-only"
            hint = f"end that first: `hvsnap snapshot-unserve {row.id}`"
            raise Busy(f"snapshot {row.id} is served {how} already", hint=hint)
        return known

    async def _begin(self, row: Snapshot, *, writable: bool) -> _One:
        if self._ended:
            raise Stopping("the daemon is stopping")
        if len(self._served) >= SERVED_MAX:
            hint = "`hvsnap snapshot-serve` lists them, `hvsnap snapshot-unserve` ends one"
            raise Busy(f"{len(self._served)} snapshots are served already", hint=hint)
        disk = await self._catalog.disk(row.disk)
        with contextlib.ExitStack() as hold:
            use = f"being served; `hvsnap snapshot-unserve {row.id}` ends that"
            hold.enter_context(self._uses.hold_snapshot(row.id, use))
            served = await self._server.open(row, f"{row.id}.sock", self._access, writable=writable)
            self._server.watch(served, self._gone)
            one = self._served[row.id] = _One(served, disk, self._clock.now(), hold.pop_all())
        return one

    async def unserve(self, snapshot_id: str) -> wire.Served:
        """Serve it no more: its clients are cut off. Raises :class:`NotFound` if it is not served."""
        row = await self._snapshots.row(snapshot_id)
        async with self._turn:
            one = self._served.pop(row.id, None)
            if one is None:
                hint = "`hvsnap snapshot-serve` lists those that are"
                raise NotFound(f"snapshot {row.id} is not served", hint=hint)
            await self._end(one)
        return _view(one)

    async def listing(self) -> wire.ServedList:
        """Return what is served, oldest first."""
        return wire.ServedList(served=[_view(one) for one in self._served.values()])

    async def close(self) -> None:
        """Serve nothing any more."""
        async with self._turn:
            self._ended = True
            ending, self._served = list(self._served.values()), {}
            await asyncio.gather(*(self._end(one) for one in ending))
        await asyncio.gather(*self._leaving)

    async def _end(self, one: _One) -> None:
        one.ended.set()
        with one.hold:
            await asyncio.shield(self._server.end(one.served))

    async def _gone(self, served: Served) -> None:
        """Let go of what ended by itself."""
        one = self._served.get(served.snapshot.id)
        if one is not None and one.served is served:
            del self._served[served.snapshot.id]
            await self._end(one)


def _view(one: _One) -> wire.Served:
    what = one.served.what
    return wire.Served(
        snapshot=one.served.snapshot.id,
        guest=one.disk.guest_name,
        target=one.disk.target,
        uri=one.served.uri,
        socket=what.socket,
        writable=what.writable,
        size_bytes=one.served.snapshot.size_bytes,
        since=when(one.since),
        stays=one.stays,
        lookers=one.lookers,
    )

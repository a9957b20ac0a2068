"""The retained state of each disk: made from the catalog, published when an event says that it may have changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from hvsnap.alarm import Alarm
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError
from hvsnap.model import Disk, DiskId, Event, Snapshot, SnapshotId, State
from hvsnap.mqtt import discovery
from hvsnap.mqtt.connection import Connection, Refused
from hvsnap.mqtt.messages import DiskState, Health, LastFailure, LastSnapshot, OpenAlarm
from hvsnap.mqtt.topics import Topics
from hvsnap.ports import Clock
from hvsnap.service.freeing import chain_blocks, stored_bytes
from hvsnap.service.views import when, when_or_none

log = logging.getLogger(__name__)

REFUSED_S = 3600.0
"""How long a broker that refuses announcements is left alone with them."""


def disk_state(host_id: str, at: float, disk: Disk, snapshots: Sequence[Snapshot], stored: int | None) -> DiskState:
    """Return a disk's state; ``snapshots`` are its snapshots, oldest first. Pure."""
    accomplished = [row for row in snapshots if row.state is State.ACCOMPLISHED]
    ended = [row for row in snapshots if row.state is not State.PROGRESSING]
    last = accomplished[-1] if accomplished else None
    failed = ended[-1] if ended and ended[-1].state is State.FAILED else None
    alarm = next((_alarm(row, row.alarm) for row in reversed(accomplished) if row.alarm and row.alarm.open), None)
    return DiskState(
        host=host_id,
        at=when(at),
        guest=disk.guest_name,
        guest_uuid=disk.guest_uuid,
        disk=disk.id,
        target=disk.target,
        system=disk.system,
        size_bytes=disk.size_bytes,
        health=_health(last, failed, alarm),
        snapshots=len(accomplished),
        stored_bytes=stored,
        last_snapshot=None if last is None else _last_snapshot(last),
        last_failure=None
        if failed is None
        else LastFailure(id=failed.id, at=when(failed.created_at), error=failed.error),
        alarm=alarm,
    )


def _health(last: Snapshot | None, failed: Snapshot | None, alarm: OpenAlarm | None) -> Health:
    if failed is not None:
        return Health.FAILED
    if last is None:
        return Health.UNPROTECTED
    return Health.OK if alarm is None else Health.UNUSUAL


def _alarm(row: Snapshot, alarm: Alarm) -> OpenAlarm:
    return OpenAlarm(snapshot=row.id, at=when(row.created_at), level=alarm.level)


def _last_snapshot(row: Snapshot) -> LastSnapshot:
    return LastSnapshot(
        id=row.id,
        name=row.name,
        created_at=when(row.created_at),
        accomplished_at=when_or_none(row.accomplished_at),
        kind=row.kind,
        consistency=row.consistency,
        size_bytes=row.size_bytes,
        changed_bytes=row.changed_bytes,
        stored_bytes=row.stored_bytes,
    )


class DiskStates:
    """Keeps what the broker retains equal to what the catalog holds."""

    def __init__(
        self, catalog: Catalog, clock: Clock, host_id: str, topics: Topics, discovery_prefix: str = ""
    ) -> None:
        self._catalog = catalog
        self._clock = clock
        self._host_id = host_id
        self._topics = topics
        self._announcer = _Announcer(discovery_prefix, host_id, topics, clock) if discovery_prefix else None
        self._changed: dict[DiskId, None] = {}
        self._published_at: dict[DiskId, str] = {}
        self._published: dict[DiskId, DiskState] = {}
        self._stored: dict[DiskId, tuple[tuple[SnapshotId, ...], int]] = {}
        self._woken = asyncio.Event()

    def changed(self, event: Event) -> None:
        """Take note of the disk that an event is about."""
        disk = event.payload.get("disk")
        if isinstance(disk, str):
            self._changed[DiskId(disk)] = None
            self._woken.set()

    async def run(self, connection: Connection) -> None:
        """Publish all states, and then those that change, until cancelled. Raises :class:`BrokerFailed`."""
        # The broker may have forgotten them, or be another one.
        self._published.clear()
        if self._announcer is not None:
            await self._announcer.begin(connection)
        await self._all_changed()
        while True:
            self._woken.clear()
            while self._changed:
                disk_id = next(iter(self._changed))
                del self._changed[disk_id]
                try:
                    await self._publish(connection, disk_id)
                except Refused as error:
                    # Events matter more: they go on.
                    log.warning("%s", error)
                except HvsnapError as error:
                    log.warning("the state of disk %s is not published: %s", disk_id, error.message)
                except BaseException:
                    self._changed[disk_id] = None
                    raise
            await self._woken.wait()

    async def _all_changed(self) -> None:
        try:
            for disk in await self._catalog.disks():
                self._changed[disk.id] = None
        except HvsnapError as error:
            log.warning("the states of disks are not published: %s", error.message)

    async def _publish(self, connection: Connection, disk_id: DiskId) -> None:
        disk = await self._catalog.disk(disk_id)
        topic = self._topics.disk_state(disk.guest_name, disk.id)
        former = self._published_at.get(disk.id)
        if former is not None and (former != topic or disk.released):
            # The guest was renamed, or the disk is gone: what is retained there would stay for ever.
            await connection.publish(former, b"", retain=True)
            del self._published_at[disk.id]
        if disk.released:
            if self._announcer is not None:
                await self._announcer.gone(connection, disk.id)
            return
        snapshots = await self._catalog.snapshots(disk.id)
        stored = await self._stored_bytes(disk.id, snapshots)
        state = disk_state(self._host_id, self._clock.now(), disk, snapshots, stored)
        before = self._published.get(disk.id)
        if before is not None and state.model_copy(update={"at": before.at}) == before:
            return
        self._published_at[disk.id] = topic
        await connection.publish(topic, state.to_json(), retain=True)
        self._published[disk.id] = state
        if self._announcer is not None:
            await self._announcer.disk(connection, state)

    async def _stored_bytes(self, disk_id: DiskId, snapshots: Sequence[Snapshot]) -> int | None:
        """Return what the store holds for a chain; counted anew only when other snapshots make it up."""
        nodes = tuple(row.id for row in snapshots if row.state is State.ACCOMPLISHED)
        known = self._stored.get(disk_id)
        if known is None or known[0] != nodes:
            try:
                counted = await stored_bytes(self._catalog, await chain_blocks(self._catalog, nodes))
            except HvsnapError as error:  # a snapshot was deleted meanwhile, which another event will tell
                log.info("what disk %s takes in the store is not counted: %s", disk_id, error.message)
                return None
            self._stored[disk_id] = known = (nodes, counted)
        return known[1]


class _Announcer:
    """Tells who reads discovery which states are there. A broker that refuses it is told nothing more for an hour.

    Not only until the next connection: mosquitto 2.0.11 ends the connection after it has refused a message.
    """

    def __init__(self, prefix: str, host_id: str, topics: Topics, clock: Clock) -> None:
        self._prefix = prefix
        self._host_id = host_id
        self._topics = topics
        self._clock = clock
        self._told: dict[str, bytes] = {}
        self._quiet_until_s = 0.0

    async def begin(self, connection: Connection) -> None:
        """Announce the host, on a new connection; all else anew, too."""
        self._told.clear()
        await self._tell(connection, None, discovery.of_host(self._topics, self._host_id).to_json())

    async def disk(self, connection: Connection, state: DiskState) -> None:
        """Announce a disk whose state was published."""
        await self._tell(connection, state.disk, discovery.of_disk(self._topics, state).to_json())

    async def gone(self, connection: Connection, disk: str) -> None:
        """Take back what was announced of a disk, perhaps by an earlier daemon."""
        await self._tell(connection, disk, b"")

    async def _tell(self, connection: Connection, disk: str | None, payload: bytes) -> None:
        topic = discovery.topic(self._prefix, self._host_id, disk)
        if self._clock.monotonic() < self._quiet_until_s or self._told.get(topic) == payload:
            return
        try:
            await connection.publish(topic, payload, retain=True)
        except Refused as error:
            self._quiet_until_s = self._clock.monotonic() + REFUSED_S
            log.warning("mqtt.discovery_prefix: %s", error)
        else:
            self._told[topic] = payload

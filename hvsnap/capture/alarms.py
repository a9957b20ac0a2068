"""Looking at what a snapshot found changed, as it becomes accomplished: an alarm, and what is held because of it.

In the transaction that makes the snapshot accomplished, so that no crash separates the two.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from hvsnap.alarm import Alarm, Change
from hvsnap.capture.unusual import Rules, is_news, judge
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.transaction import Transaction
from hvsnap.happenings import EventType, snapshot_payload
from hvsnap.model import Disk, Snapshot, State

log = logging.getLogger(__name__)

DAY_S = 86_400.0
HELD_MAX = 4
"""Snapshots of a disk that are held at once. More alarms hold no more: else a guest that sets off one after the other
could fill its chain with snapshots that make no room (SERVICE 3.2), or drive out the one that was held first."""


class Alarms:
    """Judges accomplished snapshots by the configured rules."""

    def __init__(self, catalog: Catalog, rules: Rules) -> None:
        self._catalog = catalog
        self._rules = rules

    async def look(self, tx: Transaction, disk: Disk, snapshot: Snapshot, data_bytes: int) -> None:
        """Remember how much a disk has changed up to a snapshot; mark it, and tell, if that is unusual.

        ``data_bytes`` are of its changed blocks that are not zero.
        """
        rows = [row for row in await self._catalog.snapshots(disk.id, State.ACCOMPLISHED) if row.id != snapshot.id]
        parent = next((row for row in rows if row.id == snapshot.parent), None)
        before = parent.created_at if parent is not None else None
        change = Change.since(before, snapshot.created_at, data_bytes, snapshot.stored_bytes)
        alarm = judge(self._rules, await self._catalog.changes.of(disk.id), change)
        await tx.add_change(disk.id, change)
        if alarm is None:
            return
        await tx.update_snapshot(snapshot.id, alarm=alarm)
        good = last_good(rows)
        held_until = await self._hold(tx, rows, good, snapshot.created_at)
        if is_news(alarm, rows[-1].alarm if rows else None):
            log.warning("%s of %s/%s is unusual (%s)", snapshot.id, disk.guest_name, disk.target, alarm.level)
            payload = snapshot_payload(disk, snapshot) | _told(alarm)
            payload |= {"last_good": good.id if good is not None else None, "held_until": _zulu(held_until)}
            await tx.emit(EventType.SNAPSHOT_UNUSUAL, payload)

    async def _hold(self, tx: Transaction, rows: Sequence[Snapshot], good: Snapshot | None, now: float) -> float | None:
        """Hold the last good snapshot, if rules could let it go; return until when it is held."""
        until = now + self._rules.hold_days * DAY_S
        if good is None or not good.automatic or until <= now:
            return None
        others = [row for row in rows if row.id != good.id and (row.held_until or 0.0) > now]
        if len(others) >= HELD_MAX:
            return good.held_until
        until = max(until, good.held_until or 0.0)
        await tx.update_snapshot(good.id, held_until=until)
        return until


def last_good(rows: Sequence[Snapshot]) -> Snapshot | None:
    """Return the newest snapshot (of some, oldest first) that is not under suspicion."""
    return next((row for row in reversed(rows) if row.alarm is None or not row.alarm.open), None)


def _zulu(moment: float | None) -> str | None:
    """Return an instant as all times of events are written."""
    return None if moment is None else datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")


def _told(alarm: Alarm) -> dict[str, object]:
    """Return what an event tells of an alarm."""
    return {key: value for key, value in asdict(alarm).items() if key != "acknowledged_at"}

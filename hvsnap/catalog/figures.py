"""Sums over the catalog, made by SQLite: what monitoring asks for again and again, and nobody may wait for."""

from __future__ import annotations

from dataclasses import dataclass

from hvsnap.catalog.db import Database, Row
from hvsnap.model import DiskId


@dataclass(frozen=True, slots=True)
class DiskFigures:
    """One disk. ``last_at`` is when its newest accomplished snapshot was taken (s since the epoch), None without one.

    ``failed``: the newest snapshot that has ended failed. ``alarm``: the worst level of those that nobody has
    acknowledged. ``drilled_at``: when its last restore drill that passed began; ``drill_failed``: its newest one did
    not pass.
    """

    disk: DiskId
    guest: str
    target: str
    size_bytes: int
    policy: str | None
    snapshots: int
    last_at: float | None
    failed: bool
    alarm: str | None
    drilled_at: float | None
    drill_failed: bool


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """The store, by the catalog. ``verified_since``: every pack that was verified at all was since then."""

    packs: int
    size_bytes: int
    live_bytes: int
    live_blocks: int
    unverified_packs: int
    verified_since: float | None
    damaged_blocks: int


@dataclass(frozen=True, slots=True)
class Figures:
    """All of it. ``operations``: kind → how many are open."""

    disks: list[DiskFigures]
    store: StoreFigures
    operations: dict[str, int]


_DISKS = """
SELECT d.id, d.guest_name, d.target, d.size_bytes, p.name,
       count(s.id) FILTER (WHERE s.state = 'accomplished'),
       max(s.created_at) FILTER (WHERE s.state = 'accomplished'),
       coalesce(max(s.sequence) FILTER (WHERE s.state = 'failed'), -1)
           > coalesce(max(s.sequence) FILTER (WHERE s.state = 'accomplished'), -1),
       min(s.alarm ->> 'level') FILTER (WHERE s.alarm ->> 'acknowledged_at' IS NULL),  -- severe < warning
       (SELECT max(began_at) FROM drills WHERE disk = d.id AND outcome = 'passed'),
       (SELECT outcome <> 'passed' FROM drills WHERE disk = d.id ORDER BY number DESC LIMIT 1)
FROM disks d LEFT JOIN snapshots s ON s.disk = d.id LEFT JOIN policies p ON p.id = d.policy
WHERE NOT d.released GROUP BY d.id ORDER BY d.guest_name, d.target, d.id
"""

_STORE = """
SELECT count(*), coalesce(sum(size_bytes), 0), coalesce(sum(live_bytes), 0), coalesce(sum(live_blocks), 0),
       count(*) FILTER (WHERE verified_at IS NULL), min(verified_at), (SELECT count(*) FROM damaged)
FROM packs
"""


async def read(database: Database) -> Figures:
    """Return the figures as of now; a few rows of each disk and one pass over the packs, no block and no page."""
    disks = [_disk(row) for row in await database.read(_DISKS)]
    (store,) = await database.read(_STORE)
    kinds = await database.read("SELECT kind, count(*) FROM operations GROUP BY kind")
    return Figures(disks, StoreFigures(*store), {str(kind): int(count) for kind, count in kinds})


def _disk(row: Row) -> DiskFigures:
    disk, guest, target, size, policy, snapshots, last_at, failed, alarm, drilled_at, drill_failed = row
    last = (last_at, bool(failed), alarm, drilled_at, bool(drill_failed))
    return DiskFigures(DiskId(disk), guest, target, size, policy, snapshots, *last)

"""Policies in the catalog, and how far the schedule has got."""

from __future__ import annotations

import json
from dataclasses import asdict

from hvsnap.catalog.db import Cursor, Database, Row
from hvsnap.catalog.row_sums import whole
from hvsnap.catalog.rows import checked, or_damaged
from hvsnap.errors import NotFound
from hvsnap.policy import Keep, Policy, PolicyId

_COLUMNS = "id, name, hours, weekdays, timezone, retain_days, keep, created_at"
_CHECKED = "schedule/checked"


@or_damaged
def _policy(row: Row) -> Policy:
    row = checked(row)
    hours, weekdays = tuple(json.loads(row[2])), tuple(json.loads(row[3]))
    return Policy(PolicyId(row[0]), row[1], hours, weekdays, row[4], row[5], Keep(**json.loads(row[6])), row[7])


def _values(policy: Policy) -> tuple[object, ...]:
    lists = (json.dumps(policy.hours), json.dumps(policy.weekdays))
    keep = json.dumps(asdict(policy.keep))
    return (policy.id, policy.name, *lists, policy.timezone, policy.retain_days, keep, policy.created_at)


async def read_all(reader: Database) -> list[Policy]:
    """Return all policies, by name."""
    sql = f"SELECT {_COLUMNS}, {whole('policies')} FROM policies ORDER BY name"
    return [_policy(row) for row in await reader.read(sql)]


async def read_checked(reader: Database) -> float | None:
    """Return until when policies have been looked at; None before the first look."""
    found = await reader.read("SELECT value FROM meta WHERE key = ?", (_CHECKED,))
    return float(found[0][0]) if found else None


async def put(cursor: Cursor, policy: Policy) -> None:
    """Add a policy, or write it anew."""
    changes = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS.split(", ")[1:])
    sql = f"INSERT INTO policies ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?) ON CONFLICT (id) DO UPDATE SET {changes}"
    await cursor.execute(sql, _values(policy))


async def remove(cursor: Cursor, policy: PolicyId) -> None:
    """Remove a policy; its disks have none from then on. Raises :class:`NotFound`."""
    await cursor.execute("UPDATE disks SET policy = NULL WHERE policy = ?", (policy,))
    if not await cursor.execute("DELETE FROM policies WHERE id = ?", (policy,)):
        raise NotFound(f"there is no policy {policy}")


async def put_checked(cursor: Cursor, moment: float) -> None:
    """Note until when policies have been looked at."""
    sql = "INSERT INTO meta VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
    await cursor.execute(sql, (_CHECKED, repr(moment)))

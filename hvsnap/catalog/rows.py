"""Rows to values and back: the one place that knows the order of columns."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any

from hvsnap.catalog.db import Row
from hvsnap.model import (
    Consistency,
    Disk,
    DiskId,
    Event,
    GroupId,
    GuestUuid,
    Impact,
    Kind,
    Method,
    Operation,
    OperationId,
    Snapshot,
    SnapshotId,
    State,
)

DISK_FIELDS = tuple(field.name for field in fields(Disk))
SNAPSHOT_FIELDS = tuple(field.name for field in fields(Snapshot))


def columns(names: tuple[str, ...]) -> str:
    """Return a list of quoted column names ("group" is a keyword)."""
    return ", ".join(f'"{name}"' for name in names)


DISK_COLUMNS = columns(DISK_FIELDS)
SNAPSHOT_COLUMNS = columns(SNAPSHOT_FIELDS)
OPERATION_COLUMNS = "id, kind, guest_uuid, step, facts, created_at"
EVENT_COLUMNS = "id, type, at, payload, sequence"


def to_column(name: str, value: Any) -> Any:
    """Return a field's value as SQLite holds it."""
    if name == "tags":
        return json.dumps(value, sort_keys=True)
    if isinstance(value, Impact):
        return json.dumps(asdict(value))
    if isinstance(value, bool):
        return int(value)
    return value


def disk(row: Row) -> Disk:
    """Return the disk of a row in the order of :data:`DISK_COLUMNS`."""
    raw = dict(zip(DISK_FIELDS, row, strict=True))
    raw |= {
        "id": DiskId(raw["id"]),
        "guest_uuid": GuestUuid(raw["guest_uuid"]),
        "system": bool(raw["system"]),
        "released": bool(raw["released"]),
        "delete_auto_with_disk": bool(raw["delete_auto_with_disk"]),
        "encrypted": bool(raw["encrypted"]),
        "head": None if raw["head"] is None else SnapshotId(raw["head"]),
    }
    return Disk(**raw)


def snapshot(row: Row) -> Snapshot:
    """Return the snapshot of a row in the order of :data:`SNAPSHOT_COLUMNS`."""
    raw = dict(zip(SNAPSHOT_FIELDS, row, strict=True))
    raw |= {
        "id": SnapshotId(raw["id"]),
        "disk": DiskId(raw["disk"]),
        "parent": None if raw["parent"] is None else SnapshotId(raw["parent"]),
        "kind": Kind(raw["kind"]),
        "method": Method(raw["method"]),
        "consistency": Consistency(raw["consistency"]),
        "state": State(raw["state"]),
        "group": None if raw["group"] is None else GroupId(raw["group"]),
        "tags": json.loads(raw["tags"]),
        "automatic": bool(raw["automatic"]),
        "impact": None if raw["impact"] is None else Impact(**json.loads(raw["impact"])),
    }
    return Snapshot(**raw)


def operation(row: Row) -> Operation:
    """Return the operation of a row in the order of :data:`OPERATION_COLUMNS`."""
    return Operation(OperationId(row[0]), row[1], GuestUuid(row[2]), row[3], json.loads(row[4]), row[5])


def event(row: Row) -> Event:
    """Return the event of a row in the order of :data:`EVENT_COLUMNS`."""
    return Event(row[0], row[1], row[2], json.loads(row[3]), row[4])

"""Rows to values and back: the one place that knows the order of columns."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import wraps
from typing import Any, TypeVar

from hvsnap.alarm import Alarm, Level
from hvsnap.catalog.db import Row
from hvsnap.catalog.row_sums import whole
from hvsnap.errors import CatalogFailed
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
    Pack,
    Snapshot,
    SnapshotId,
    State,
)

T = TypeVar("T")

DISK_FIELDS = tuple(field.name for field in fields(Disk))
SNAPSHOT_FIELDS = tuple(field.name for field in fields(Snapshot))


def columns(names: tuple[str, ...]) -> str:
    """Return a list of quoted column names ("group" is a keyword)."""
    return ", ".join(f'"{name}"' for name in names)


DISK_COLUMNS = f"{columns(DISK_FIELDS)}, {whole('disks')}"
SNAPSHOT_COLUMNS = f"{columns(SNAPSHOT_FIELDS)}, {whole('snapshots')}"
PACK_COLUMNS = columns(tuple(field.name for field in fields(Pack)))
OPERATION_COLUMNS = f"id, kind, guest_uuid, step, facts, created_at, {whole('operations')}"
EVENT_COLUMNS = "id, type, at, payload, sequence"


def to_column(name: str, value: Any) -> Any:
    """Return a field's value as SQLite holds it."""
    if name == "tags":
        return json.dumps(value, sort_keys=True)
    if isinstance(value, Impact | Alarm):
        return json.dumps(asdict(value))
    if isinstance(value, bool):
        return int(value)
    return value


def or_damaged(convert: Callable[[Row], T]) -> Callable[[Row], T]:
    """Let a conversion raise :class:`CatalogFailed` for what was never written like that."""

    @wraps(convert)
    def checked(row: Row) -> T:
        try:
            return convert(row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            what = f"a row of the catalog ({convert.__name__.lstrip('_')} {row[0]}) is damaged: {error}"
            raise CatalogFailed(what, hint="`hvsnap store-rebuild --force` makes a new catalog") from error

    return checked


@or_damaged
def check_meta(row: Row) -> None:
    """Check that a single value is of its kind: a count, a time or an object. Raises :class:`CatalogFailed`."""
    key, value = str(row[0]), str(row[1])
    kind = key.partition("/")[0]
    if kind in ("block_id_max", "sequence") and not (value.isascii() and value.isdecimal()):
        raise ValueError(f"{value!r} is no number")
    if kind in ("note", "schedule") and not math.isfinite(float(value)):
        raise ValueError(f"{value!r} is no time")
    if kind == "guest":
        json.loads(value)


def checked(row: Row) -> Row:
    """Return a row without its last column, which is :func:`~hvsnap.catalog.row_sums.whole`.

    Raises :class:`ValueError`: within what :func:`or_damaged` wraps.
    """
    if not row[-1]:
        raise ValueError("its checksum is wrong")
    return row[:-1]


_OBJECT = re.compile(r"[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")
"""What an object may be called (docs/format.md)."""

_STORED: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (int,), "float": (float, int)}
"""What fields of these types are in SQLite; a flipped bit in a row's header makes it another one."""


def _named(cls: Any, row: Row) -> dict[str, Any]:
    """Return a row's columns by the fields of a dataclass."""
    raw = {field.name: value for field, value in zip(fields(cls), row, strict=True)}
    for field in fields(cls):
        kind, _, optional = str(field.type).partition(" | ")
        stored, value = _STORED.get(kind), raw[field.name]
        if stored is not None and not isinstance(value, stored) and not (optional and value is None):
            raise ValueError(f"{field.name} is {value!r}")
    return raw


@or_damaged
def disk(row: Row) -> Disk:
    """Return the disk of a row in the order of :data:`DISK_COLUMNS`."""
    raw = _named(Disk, checked(row))
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


@or_damaged
def snapshot(row: Row) -> Snapshot:
    """Return the snapshot of a row in the order of :data:`SNAPSHOT_COLUMNS`."""
    raw = _named(Snapshot, checked(row))
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
        "alarm": None if raw["alarm"] is None else _alarm(raw["alarm"]),
    }
    return Snapshot(**raw)


def _alarm(text: str) -> Alarm:
    raw = json.loads(text)
    return Alarm(**raw | {"level": Level(raw["level"])})


@or_damaged
def pack(row: Row) -> Pack:
    """Return the pack of a row in the order of its fields."""
    raw = _named(Pack, row)
    if _OBJECT.fullmatch(raw["name"]) is None:
        raise ValueError(f"no object can be called {raw['name']!r}")
    return Pack(**raw)


@or_damaged
def operation(row: Row) -> Operation:
    """Return the operation of a row in the order of :data:`OPERATION_COLUMNS`."""
    name, kind, guest, step, facts, created_at = checked(row)
    return Operation(OperationId(name), kind, GuestUuid(guest), step, json.loads(facts), created_at)


@or_damaged
def event(row: Row) -> Event:
    """Return the event of a row in the order of :data:`EVENT_COLUMNS`."""
    return Event(row[0], row[1], row[2], json.loads(row[3]), row[4])

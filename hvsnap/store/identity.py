"""What a manifest says about its snapshot, beside blocks: enough to rebuild the catalog from the store alone."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from hvsnap.errors import Damaged
from hvsnap.model import (
    Consistency,
    Disk,
    DiskId,
    GroupId,
    GuestUuid,
    Impact,
    Kind,
    Method,
    Snapshot,
    SnapshotId,
    State,
)

MANIFESTS = "manifests"
REVISION_MAX = 9999
SEQUENCE_MAX = 99_999_999

_NAME = re.compile(MANIFESTS + r"/([a-z0-9-]{1,64})/([0-9]{8})-([a-z0-9-]{1,64}?)(?:\.([0-9]{4}))?")


@dataclass(frozen=True, slots=True)
class ManifestName:
    """What the name of a manifest object tells. Sorts by disk, then as the snapshots were made."""

    disk: DiskId
    sequence: int
    snapshot: SnapshotId
    revision: int = 0

    def __str__(self) -> str:
        """Return the object's name."""
        revision = f".{self.revision:04d}" if self.revision else ""
        return f"{MANIFESTS}/{self.disk}/{self.sequence:08d}-{self.snapshot}{revision}"

    @classmethod
    def parse(cls, name: str) -> ManifestName:
        """Return what an object's name tells. Raises :class:`Damaged`."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise Damaged(f"{name} is not the name of a manifest")
        return cls(DiskId(match[1]), int(match[2]), SnapshotId(match[3]), int(match[4] or 0))


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """A snapshot, its disk and its guest at that time. Read back, the snapshot is accomplished, without error.

    ``revision`` counts how often the manifest was written anew because a neighbour's entries moved to it.
    """

    snapshot: Snapshot
    disk: Disk
    block_size: int
    domain_xml: str = ""
    revision: int = 0

    @property
    def name(self) -> str:
        """The object's name."""
        return str(ManifestName(self.snapshot.disk, self.snapshot.sequence, self.snapshot.id, self.revision))


_DISK_KEYS = ("id", "guest_uuid", "guest_name", "target", "serial", "source", "format")
_SNAPSHOT_KEYS = ("id", "disk", "name", "description", "kind", "method", "reason", "consistency", "retention")
_SNAPSHOT_OTHERS = ("parent", "group", "created_at", "tags", "automatic", "expires_at", "locked_until", "skew_ms")
_DISK_OTHERS = ("size_bytes", "system", "created_at", "encrypted")
_SNAPSHOT_NUMBERS = ("sequence", "size_bytes", "read_bytes", "changed_bytes", "stored_bytes")


def encode_document(head: ManifestHead) -> bytes:
    """Return a manifest's document."""
    snapshot, disk = head.snapshot, head.disk
    values: dict[str, object] = {
        "revision": head.revision,
        "block_size": head.block_size,
        "snapshot": {key: str(getattr(snapshot, key)) for key in _SNAPSHOT_KEYS}
        | {key: getattr(snapshot, key) for key in (*_SNAPSHOT_NUMBERS, *_SNAPSHOT_OTHERS)}
        | {"impact": None if snapshot.impact is None else asdict(snapshot.impact)},
        "disk": {key: getattr(disk, key) for key in (*_DISK_KEYS, *_DISK_OTHERS)},
        "domain_xml": head.domain_xml,
    }
    return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()


def decode_document(document: bytes, name: str) -> ManifestHead:
    """Return what a manifest's document says. Raises :class:`Damaged`, naming the manifest."""
    try:
        fields = _Fields(json.loads(document))
        head = ManifestHead(
            _snapshot(_Fields(fields.get("snapshot", dict))),
            _disk(_Fields(fields.get("disk", dict))),
            fields.number("block_size"),
            fields.text("domain_xml"),
            fields.number("revision"),
        )
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name}: its document is wrong: {error}") from error
    if head.snapshot.disk != head.disk.id:
        raise Damaged(f"{name}: its snapshot is of another disk")
    if head.revision > REVISION_MAX or head.snapshot.sequence > SEQUENCE_MAX or head.block_size == 0:
        raise Damaged(f"{name}: a number in its document is not possible")
    return head


class _Fields:
    """A JSON object's fields by name and type; anything else is a :class:`ValueError`."""

    def __init__(self, values: object) -> None:
        if not isinstance(values, dict):
            raise ValueError("not an object")
        self._values: dict[str, Any] = values

    def get(self, key: str, *kinds: type) -> Any:
        """Return a value of exactly one of these types."""
        value = self._values.get(key)
        if type(value) not in kinds:
            raise ValueError(f"{key} is missing or of another type")
        return value

    def maybe(self, key: str, kind: type) -> Any:
        """Return a value of a type; None where it is null or missing."""
        return self.get(key, kind, type(None))

    def measure(self, key: str) -> float:
        """Return a number that was measured, from 0 up."""
        value = float(self.get(key, float, int))
        if not 0 <= value < math.inf:
            raise ValueError(f"{key} is not a measure")
        return value

    def text(self, key: str) -> str:
        """Return a string."""
        return str(self.get(key, str))

    def number(self, key: str) -> int:
        """Return a whole number from 0 up."""
        value = int(self.get(key, int))
        if value < 0:
            raise ValueError(f"{key} is negative")
        return value

    def optional(self, key: str, kind: Callable[[str], str]) -> str | None:
        """Return a string of a kind of our own, or None for null."""
        value = self.get(key, str, type(None))
        return None if value is None else kind(value)

    def tags(self) -> dict[str, str]:
        """Return the tags."""
        tags: dict[str, str] = self.get("tags", dict)
        if not all(isinstance(value, str) for value in tags.values()):
            raise ValueError("a tag is not a string")
        return tags


def _snapshot(fields: _Fields) -> Snapshot:
    parent, group = fields.optional("parent", SnapshotId), fields.optional("group", GroupId)
    expires_at = fields.get("expires_at", float, int, type(None))
    locked_until = fields.get("locked_until", float, int, type(None))
    return Snapshot(
        id=SnapshotId(fields.text("id")),
        disk=DiskId(fields.text("disk")),
        sequence=fields.number("sequence"),
        parent=None if parent is None else SnapshotId(parent),
        name=fields.text("name"),
        description=fields.text("description"),
        kind=Kind(fields.text("kind")),
        method=Method(fields.text("method")),
        reason=fields.text("reason"),
        consistency=Consistency(fields.text("consistency")),
        state=State.ACCOMPLISHED,
        size_bytes=fields.number("size_bytes"),
        created_at=float(fields.get("created_at", float, int)),
        group=None if group is None else GroupId(group),
        read_bytes=fields.number("read_bytes"),
        changed_bytes=fields.number("changed_bytes"),
        stored_bytes=fields.number("stored_bytes"),
        tags=fields.tags(),
        automatic=bool(fields.get("automatic", bool)),
        expires_at=None if expires_at is None else float(expires_at),
        locked_until=None if locked_until is None else float(locked_until),
        retention=fields.text("retention"),
        impact=_impact(fields.maybe("impact", dict)),
        skew_ms=None if fields.get("skew_ms", float, int, type(None)) is None else fields.measure("skew_ms"),
    )


def _impact(values: dict[str, Any] | None) -> Impact | None:
    """Return what a guest felt; manifests of earlier versions do not tell."""
    if values is None:
        return None
    fields = _Fields(values)
    low = fields.get("rate_low_bytes_s", int, type(None))
    return Impact(
        rest_iops=fields.measure("rest_iops"),
        rest_write_us=None if values.get("rest_write_us") is None else fields.measure("rest_write_us"),
        held_iops=fields.measure("held_iops"),
        held_write_us=None if values.get("held_write_us") is None else fields.measure("held_write_us"),
        slowdown=fields.measure("slowdown"),
        rate_low_bytes_s=low,
    )


def _disk(fields: _Fields) -> Disk:
    return Disk(
        id=DiskId(fields.text("id")),
        guest_uuid=GuestUuid(fields.text("guest_uuid")),
        guest_name=fields.text("guest_name"),
        target=fields.text("target"),
        serial=fields.text("serial"),
        source=fields.text("source"),
        format=fields.text("format"),
        size_bytes=fields.number("size_bytes"),
        system=bool(fields.get("system", bool)),
        created_at=float(fields.get("created_at", float, int)),
        encrypted=bool(fields.get("encrypted", bool)),
    )

"""What can happen, by name, and what is told of it (SERVICE 10): the one list of event types and payloads.

Payloads are plain JSON. Their form is documented in docs/mqtt.md; a key is never removed or given another meaning.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from hvsnap.model import Disk, Image, Snapshot


class EventType(StrEnum):
    """Types of stored events. Progress is not among them: it is announced, never stored."""

    SNAPSHOT_CREATED = "snapshot.created"
    SNAPSHOT_ACCOMPLISHED = "snapshot.accomplished"
    SNAPSHOT_FAILED = "snapshot.failed"
    SNAPSHOT_DELETED = "snapshot.deleted"
    SNAPSHOT_EXPIRED = "snapshot.expired"
    SNAPSHOT_EVICTED = "snapshot.evicted"
    SNAPSHOT_UNUSUAL = "snapshot.unusual"
    SNAPSHOT_ACKNOWLEDGED = "snapshot.acknowledged"
    POLICY_RUN = "policy.run"
    POLICY_MISSED = "policy.missed"
    POLICY_FAILED = "policy.failed"
    DISK_CREATED = "disk.created"
    DISK_FILLED = "disk.filled"
    DISK_CREATE_FAILED = "disk.create-failed"
    DISK_ATTACH_FAILED = "disk.attach-failed"
    IMAGE_CREATED = "image.created"
    IMAGE_DELETED = "image.deleted"
    ROLLBACK_STARTED = "rollback.started"
    ROLLBACK_FINISHED = "rollback.finished"
    ROLLBACK_FAILED = "rollback.failed"
    DISK_ATTACHED = "disk.attached"
    DISK_DETACHED = "disk.detached"
    DISK_RELEASED = "disk.released"
    GUEST_ATTACHED = "guest.attached"
    GUEST_LOST = "guest.lost"
    GUEST_STARTED = "guest.started"
    GUEST_START_FAILED = "guest.start-failed"
    VERIFICATION_FAILED = "verification.failed"
    DRILL_PASSED = "drill.passed"
    DRILL_FAILED = "drill.failed"
    STORE_INCOMPLETE = "store.incomplete"
    STORE_NEARLY_FULL = "store.nearly-full"
    DAEMON_ONLINE = "daemon.online"
    DAEMON_OFFLINE = "daemon.offline"


def disk_payload(disk: Disk) -> dict[str, Any]:
    """Return what names a disk in an event."""
    return {"disk": disk.id, "guest": disk.guest_name, "guest_uuid": disk.guest_uuid, "target": disk.target}


def image_payload(disk: Disk, image: Image) -> dict[str, Any]:
    """Return what is told of an image in an event; ``disk`` is the one that its snapshot is of."""
    return disk_payload(disk) | {"image": image.id, "name": image.name, "snapshot": image.snapshot}


def snapshot_payload(disk: Disk, snapshot: Snapshot) -> dict[str, Any]:
    """Return what is told of a snapshot in an event."""
    return disk_payload(disk) | {
        "snapshot": snapshot.id,
        "name": snapshot.name,
        "state": snapshot.state,
        "kind": snapshot.kind,
        "method": snapshot.method,
        "reason": snapshot.reason,
        "consistency": snapshot.consistency,
        "group": snapshot.group,
        "skew_ms": snapshot.skew_ms,
        "size_bytes": snapshot.size_bytes,
        "read_bytes": snapshot.read_bytes,
        "changed_bytes": snapshot.changed_bytes,
        "stored_bytes": snapshot.stored_bytes,
        "error": snapshot.error,
    }

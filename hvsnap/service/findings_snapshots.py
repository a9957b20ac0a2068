"""What the doctor concludes about snapshots, from the catalog alone: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvsnap.alarm import Level
from hvsnap.capture.alarms import last_good
from hvsnap.model import Disk, DiskId, Snapshot, State
from hvsnap.service.findings import size
from hvsnap.wire import Finding, Severity


def unusual(disks: Mapping[DiskId, Disk], snapshots: Sequence[Snapshot]) -> list[Finding]:
    """Tell of each disk with an alarm that nobody has acknowledged, by its newest one; snapshots come oldest first."""
    found = []
    for disk in disks.values():
        mine = [row for row in snapshots if row.disk == disk.id and row.state is State.ACCOMPLISHED]
        alarmed = [row for row in mine if row.alarm is not None and row.alarm.open]
        if alarmed:
            before = [row for row in mine if row.sequence < alarmed[0].sequence]
            found.append(_unusual(disk, alarmed, last_good(before)))
    return found


def _unusual(disk: Disk, alarmed: Sequence[Snapshot], good: Snapshot | None) -> Finding:
    newest, first = alarmed[-1], alarmed[0]
    severe = any(row.alarm is not None and row.alarm.level is Level.SEVERE for row in alarmed)
    keep = f"`hvsnap snapshot-lock {good.id} --until DATE` keeps the last one before it; " if good is not None else ""
    evidence = f"{first.id}" + (f" to {newest.id}" if newest is not first else "")
    if (alarm := newest.alarm) is not None:
        evidence += f": {size(alarm.changed_bytes_h)} an hour, usually up to {size(alarm.usual_bytes_h)}; "
        evidence += f"{alarm.stored_share:.0%} of it had to be stored, usually up to {alarm.usual_share:.0%}"
    return Finding(
        severity=Severity.ERROR if severe else Severity.WARNING,
        check="unusual-change",
        what=f"disk {disk.target} of {disk.guest_name} has changed as it never does, as if its files were encrypted"
        if severe
        else f"disk {disk.target} of {disk.guest_name} has changed as it never does",
        evidence=evidence,
        remedy=f"look into the guest; {keep}if all is well there: `hvsnap snapshot-edit {newest.id} --usual`",
    )

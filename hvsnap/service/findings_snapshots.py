"""What the doctor concludes about snapshots, from the catalog alone: pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvsnap.alarm import Level
from hvsnap.capture.alarms import last_good
from hvsnap.drill import Drill, Outcome
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


def drills(disks: Mapping[DiskId, Disk], newest: Mapping[str, Drill]) -> list[Finding]:
    """Tell of each disk whose newest restore drill did not pass."""
    last = [(disk, newest[disk.id]) for disk in disks.values() if disk.id in newest]
    return [_drill(disk, drill) for disk, drill in last if drill.outcome is not Outcome.PASSED]


def _drill(disk: Disk, drill: Drill) -> Finding:
    where = f"the last restore drill of disk {disk.target} of {disk.guest_name}"
    evidence = f"{drill.snapshot}: {drill.error}"
    if drill.outcome is Outcome.DAMAGED:
        what = f"{where} shows a snapshot that does not restore"
        remedy = f"`hvsnap snapshot-verify {drill.snapshot}` names what is damaged; make a snapshot of the disk now"
        return Finding(severity=Severity.ERROR, check="restore-drill", what=what, evidence=evidence, remedy=remedy)
    remedy = f"see to it, then `hvsnap snapshot-drill --disk {disk.id}`"
    what = f"{where} did not come to its end"
    return Finding(severity=Severity.WARNING, check="restore-drill", what=what, evidence=evidence, remedy=remedy)

"""How things look: sizes, times, tables. What comes from guests is never trusted with the terminal."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from datetime import datetime

from hvsnap import wire

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
GAP = "   "


def safe(text: str) -> str:
    """Return text without anything that a terminal would obey."""
    return "".join(c if unicodedata.category(c)[0] != "C" else f"\\x{ord(c):02x}" for c in text)


def size(value: float | None) -> str:
    """Return bytes in the largest unit that leaves a number from 1 up."""
    if value is None:
        return "-"
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    return f"{value:.0f} {_UNITS[unit]}" if unit == 0 or value >= 100 else f"{value:.1f} {_UNITS[unit]}"


def when(moment: datetime | None) -> str:
    """Return a time in the user's own time zone."""
    return "-" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float | None) -> str:
    """Return a time span as people write it."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as virsh draws it: no frame, nothing cut off, so that it can be piped."""
    cells = [list(headers), *([safe(cell) for cell in row] for row in rows)]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(headers))]
    lines = []
    for row in cells:
        line = GAP.join(cell + " " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
        lines.append(line.rstrip())
    return "\n".join(lines)


def _width(text: str) -> int:
    """Return the columns that a text takes: East Asian wide characters take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def fields(pairs: Sequence[tuple[str, str]]) -> str:
    """Return names and values, one a line; empty ones are left out."""
    shown = [(name, safe(value)) for name, value in pairs if value]
    width = max((len(name) for name, _value in shown), default=0)
    return "\n".join(f"{name + ':':<{width + 1}} {value}" for name, value in shown)


def say(text: str) -> None:
    """Print a line of the answer."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


# -- what the commands show -----------------------------------------------------------------------


def guests(answer: wire.GuestList) -> str:
    """Return the list of guests and their disks."""
    rows = []
    for guest in answer.guests:
        for disk in guest.disks:
            note = disk.skip_reason or ("bitmap lost: the next snapshot re-reads the disk" * (disk.bitmap == "lost"))
            rows.append(
                (
                    guest.name,
                    guest.state,
                    disk.target + ("*" if disk.system else ""),
                    disk.id or "-",
                    size(disk.size_bytes),
                    "capturing" if disk.capturing else disk.protection,
                    str(disk.snapshots),
                    when(disk.last_snapshot_at),
                    disk.policy or "-",
                    note,
                )
            )
        if not guest.disks:
            rows.append((guest.name, guest.state, "-", "-", "-", "-", "-", "-", "-", "no disks"))
    headers = ("GUEST", "STATE", "DISK", "ID", "SIZE", "PROTECTION", "SNAPSHOTS", "LAST", "POLICY", "NOTE")
    return table(headers, rows)


def snapshots(answer: Sequence[wire.Snapshot]) -> str:
    """Return the list of snapshots."""
    headers = ("ID", "NAME", "GUEST", "DISK", "SIZE", "STORED", "KIND", "CONSISTENCY", "CREATED", "PROGRESS", "STATE")
    rows = [
        (
            s.id,
            s.name,
            s.guest,
            s.target,
            size(s.size_bytes),
            size(s.stored_bytes),
            s.kind,
            s.consistency,
            when(s.created_at),
            f"{s.progress} %",
            s.state,
        )
        for s in answer
    ]
    return table(headers, rows)


def snapshot(s: wire.Snapshot) -> str:
    """Return all that is known of one snapshot."""
    return fields(
        [
            ("Id", s.id),
            ("Name", s.name),
            ("Description", s.description),
            ("Tags", ", ".join(f"{key}={value}" for key, value in s.tags.items())),
            ("Guest", s.guest),
            ("Disk", f"{s.target} ({s.disk})"),
            ("Group", s.group or ""),
            ("State", s.state + (f" ({s.progress} %)" if s.state == "progressing" else "")),
            ("Error", s.error),
            ("Kind", f"{s.kind}, found by {s.method}"),
            ("Note", s.reason),
            ("Consistency", s.consistency),
            ("Parent", s.parent or "none"),
            ("Created", when(s.created_at)),
            ("Accomplished", when(s.accomplished_at) if s.accomplished_at else ""),
            ("Size", size(s.size_bytes)),
            ("Read", size(s.read_bytes)),
            ("Changed", size(s.changed_bytes)),
            ("Stored", size(s.stored_bytes)),
        ]
    )


def deletion(answer: wire.Deletion) -> str:
    """Return what was freed, or would be."""
    verb = "would free" if answer.dry_run else "freed"
    lines = [f"{one.id}: {verb} {size(one.freed_bytes)}" for one in answer.snapshots]
    if len(answer.snapshots) > 1:
        lines.append(f"all together: {verb} {size(answer.freed_bytes)}")
    return "\n".join(lines)


def chains(answer: wire.ChainList) -> str:
    """Return the list of chains."""
    headers = ("DISK", "GUEST", "TARGET", "SIZE", "SNAPSHOTS", "LOGICAL", "STORED", "EXCLUSIVE", "PATH")
    rows = [
        (
            c.disk,
            c.guest,
            c.target + (" (released)" if c.released else ""),
            size(c.size_bytes),
            f"{c.snapshots}/{c.limit}",
            size(c.logical_bytes),
            size(c.stored_bytes),
            size(c.exclusive_bytes),
            c.path,
        )
        for c in answer.chains
    ]
    return table(headers, rows)


def chain(answer: wire.Chain) -> str:
    """Return one chain and its nodes."""
    about = fields(
        [
            ("Disk", f"{answer.disk} ({answer.guest}/{answer.target})"),
            ("Path", answer.path),
            ("Size", size(answer.size_bytes)),
            ("Snapshots", f"{answer.snapshots} of at most {answer.limit}"),
            ("Logical", size(answer.logical_bytes)),
            ("Stored", size(answer.stored_bytes)),
        ]
    )
    headers = ("", "ID", "NAME", "PARENT", "CREATED", "KIND", "CHANGED", "EXCLUSIVE", "STATE")
    rows = [
        (
            "*" if node.head else "",
            node.snapshot.id,
            node.snapshot.name,
            node.snapshot.parent or "-",
            when(node.snapshot.created_at),
            node.snapshot.kind,
            size(node.snapshot.changed_bytes),
            size(node.exclusive_bytes),
            node.snapshot.state,
        )
        for node in answer.nodes
    ]
    note = "\n* the disk's present state continues from this one" if any(node.head for node in answer.nodes) else ""
    return f"{about}\n\n{table(headers, rows)}{note}"


def doctor(report: wire.DoctorReport) -> str:
    """Return the findings, the remedy below each one that needs it."""
    lines = []
    for finding in report.findings:
        evidence = f" ({safe(finding.evidence)})" if finding.evidence else ""
        lines.append(f"{finding.severity.upper():<8} {finding.check}: {safe(finding.what)}{evidence}")
        if finding.remedy and finding.severity != "ok":
            lines.append(f"{'':<8} -> {safe(finding.remedy)}")
    return "\n".join(lines)


def recovery(answer: wire.Recovery) -> str:
    """Return what a recovery did."""
    if not answer.operations:
        return "nothing was open"
    return "\n".join(
        f"{one.kind} {one.id} of {safe(one.guest)}: {one.outcome}" + (f" ({safe(one.detail)})" if one.detail else "")
        for one in answer.operations
    )


def plan(p: wire.RollbackPlan) -> str:
    """Return what a rollback would do."""
    written = "known once the disk is read" if p.write_bytes is None else size(p.write_bytes)
    steps = [
        *(["shut the guest down"] if p.stop else []),
        *(["take a safety snapshot"] if p.safety_snapshot else []),
        "write what differs",
        *(["start the guest"] if p.start else []),
    ]
    pairs = [
        ("Disk", f"{p.disk} ({p.guest}/{p.target})"),
        ("Path", p.path),
        ("Snapshot", p.snapshot),
        ("Steps", ", ".join(steps)),
        ("Found by", p.method),
        ("To write", written),
    ]
    return fields(pairs + [("Note", note) for note in p.notes])


def event(e: wire.Event) -> str:
    """Return an event as one line."""
    about = {k: v for k, v in e.payload.items() if k in ("guest", "target", "snapshot", "name", "error", "path") and v}
    words = " ".join(f"{key}={safe(str(value))}" for key, value in about.items())
    return f"{when(e.at)} {e.type} {words}"

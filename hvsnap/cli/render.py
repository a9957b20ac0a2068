"""How things look: sizes, times, tables. What comes from guests is never trusted with the terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from datetime import datetime

from hvsnap import wire
from hvsnap.cli.text import one_line, safe

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
GAP = "   "


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


def table(names: Sequence[str], rows: Sequence[Sequence[str]], *, headers: bool = True) -> str:
    """Return a table as virsh draws it: no frame, nothing cut off, so that it can be piped."""
    cells = [list(names)] * headers + [[safe(cell) for cell in row] for row in rows]
    if not cells:
        return ""
    widths = [max(_width(row[column]) for row in cells) for column in range(len(names))]
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


# -- what the commands show -----------------------------------------------------------------------


def guests(answer: wire.GuestList, *, headers: bool = True) -> str:
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
    names = ("GUEST", "STATE", "DISK", "ID", "SIZE", "PROTECTION", "SNAPSHOTS", "LAST", "POLICY", "NOTE")
    unseen = [f"not seen: {safe(note)}" for note in answer.notes] * headers
    return "\n".join([table(names, rows, headers=headers), *unseen])


def snapshots(answer: Sequence[wire.Snapshot], *, headers: bool = True) -> str:
    """Return the list of snapshots."""
    names = ("ID", "NAME", "GUEST", "DISK", "SIZE", "STORED", "KIND", "CONSISTENCY", "CREATED", "EXPIRES",
             "PROGRESS", "STATE")  # fmt: skip
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
            when(s.expires_at),
            f"{s.progress} %",
            s.state + (", unusual" if s.alarm is not None and s.alarm.acknowledged_at is None else ""),
        )
        for s in answer
    ]
    return table(names, rows, headers=headers)


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
            ("Skew", "" if s.skew_ms is None else skew(s.skew_ms)),
            ("State", s.state + (f" ({s.progress} %)" if s.state == "progressing" else "")),
            ("Error", s.error),
            ("Kind", f"{s.kind}, found by {s.method}"),
            ("Note", s.reason),
            ("Consistency", s.consistency),
            ("Parent", s.parent or "none"),
            ("Created", when(s.created_at)),
            ("Accomplished", when(s.accomplished_at) if s.accomplished_at else ""),
            ("Expires", when(s.expires_at) if s.expires_at else ""),
            ("Locked until", when(s.locked_until) if s.locked_until else ""),
            ("Held until", when(s.held_until) if s.held_until else ""),
            ("Unusual", "" if s.alarm is None else alarm(s.alarm)),
            ("Last drill", drill(s.drill)),
            ("Size", size(s.size_bytes)),
            ("Read", size(s.read_bytes)),
            ("Changed", size(s.changed_bytes)),
            ("Stored", size(s.stored_bytes)),
            ("Impact", "" if s.impact is None else impact(s.impact)),
        ]
    )


def served(answer: wire.ServedList, *, headers: bool = True) -> str:
    """Return the list of what is served."""
    names = ("SNAPSHOT", "GUEST", "DISK", "SIZE", "WRITABLE", "SINCE", "URI")
    rows = [
        (s.snapshot, s.guest, s.target, size(s.size_bytes), "yes" if s.writable else "no", when(s.since), s.uri)
        for s in answer.served
    ]
    return table(names, rows, headers=headers)


def skew(ms: float) -> str:
    """Return how far the instants of a group's guests are apart at most."""
    return f"{bound(ms)} between its guests" if ms else "none: one instant for all guests"


def bound(ms: float) -> str:
    """Return a time that is not exceeded: rounded up."""
    return f"at most {math.ceil(ms * 10) / 10:.1f} ms"


def alarm(a: wire.Alarm) -> str:
    """Return why a snapshot is unusual, as one line."""
    rate = f"{size(a.changed_bytes_h)} changed an hour (usually up to {size(a.usual_bytes_h)})"
    share = f"{a.stored_share:.0%} of it had to be stored (usually up to {a.usual_share:.0%})"
    seen_to = "" if a.acknowledged_at is None else f"; acknowledged {when(a.acknowledged_at)}"
    return f"{a.level}: {rate}, {share}{seen_to}"


def drill(d: wire.Drill | None) -> str:
    """Return what came of a restore drill, as one line; empty for none."""
    if d is None:
        return ""
    what = f"{size(d.written_bytes)} in {duration(d.duration_s)}" if d.outcome == "passed" else d.error
    return f"{d.outcome} {when(d.began_at)} ({d.snapshot}: {what})"


def impact(i: wire.Impact) -> str:
    """Return what the guest felt, as one line."""
    words = [
        f"requests took {i.slowdown:.2f} times as long",
        f"{i.held_iops:.0f} IOPS (at rest {i.rest_iops:.0f})",
        f"a write {latency(i.held_write_us)} (at rest {latency(i.rest_write_us)})",
    ]
    if i.rate_low_bytes_s is not None:
        words.append(f"slowed down to {size(i.rate_low_bytes_s)}/s at times")
    return ", ".join(words)


def latency(us: float | None) -> str:
    """Return a latency as people write it."""
    if us is None:
        return "-"
    return f"{us:.0f} µs" if us < 1000 else f"{us / 1000:.1f} ms"


def deletion(answer: wire.Deletion) -> str:
    """Return what was freed, or would be."""
    verb = "would free" if answer.dry_run else "freed"
    lines = [f"{one.id}: {verb} {size(one.freed_bytes)}" for one in answer.snapshots]
    if len(answer.snapshots) > 1:
        lines.append(f"all together: {verb} {size(answer.freed_bytes)}")
    could = "could" if answer.dry_run else "can"
    for one in answer.snapshots:
        lines += [f"{safe(disk)} {could} no longer be re-initialised: it was made of {one.id}" for disk in one.disks]
    return "\n".join(lines)


def chains(answer: wire.ChainList, *, headers: bool = True) -> str:
    """Return the list of chains."""
    names = ("DISK", "GUEST", "TARGET", "SIZE", "SNAPSHOTS", "LOGICAL", "STORED", "EXCLUSIVE", "PATH")
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
    return table(names, rows, headers=headers)


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
            ("Last drill", drill(answer.drill)),
        ]
    )
    names = ("", "ID", "NAME", "PARENT", "CREATED", "KIND", "CHANGED", "EXCLUSIVE", "STATE")
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
    return f"{about}\n\n{table(names, rows)}{note}"


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
    shown = ("guest", "target", "snapshot", "name", "path", "level", "last_good", "error")
    words = " ".join(f"{key}={safe(str(e.payload[key]))}" for key in shown if e.payload.get(key))
    return f"{when(e.at)} {safe(e.type)} {words}".rstrip()


def progress(p: wire.Progress) -> str:
    """Return how far something is, as one line."""
    rate = f", {size(p.rate_bytes_s)}/s" if p.rate_bytes_s else ""
    eta = f", {duration(p.eta_s)} left" if p.eta_s else ""
    return f"{p.id}: {p.progress} % of {size(p.total_bytes)}{rate}{eta}"


def made(answer: Sequence[wire.Snapshot], *, quiet: bool) -> str:
    """Return what became of accomplished snapshots, a line each that begins with the id; or the ids alone."""
    return "\n".join(one.id if quiet else _made(one) for one in answer)


def _made(s: wire.Snapshot) -> str:
    words = [
        f"{s.kind} snapshot of {safe(s.guest)}/{safe(s.target)}",
        f"{size(s.read_bytes)} read",
        f"{size(s.stored_bytes)} stored",
        f"{s.consistency}-consistent",
        *([f"skew {bound(s.skew_ms)}"] if s.skew_ms else []),
    ]
    return f"{s.id}  {', '.join(words)}" + (f" ({one_line(s.reason)})" if s.reason else "")


def disk(d: wire.Disk) -> str:
    """Return what holds for a disk."""
    pairs = [
        ("Disk", f"{d.id} ({safe(d.guest)}/{safe(d.target)})"),
        ("Path", safe(d.path)),
        ("Made of", d.origin or ""),
        ("Policy", safe(d.policy or "")),
        ("Encrypted", "yes: it is never stored in plain" if d.encrypted else "no"),
        ("Release", f"its automatic snapshots {'go with it' if d.delete_auto_with_disk else 'stay until they expire'}"),
        ("Gone", "" if d.gone_since is None else f"since {when(d.gone_since)}"),
    ]
    return fields([pair for pair in pairs if pair[1]])


def released(r: wire.DiskReleased) -> str:
    """Return what a release has done, or would do."""
    verb, gone = ("would be released", "would go") if r.dry_run else ("is released", "are deleted")
    where = f"{r.disk.id} ({safe(r.disk.guest)}/{safe(r.disk.target)})"
    lines = [f"{where} {verb}; snapshots that stay: {r.kept}"]
    if r.deleted:
        lines.append(f"automatic snapshots that {gone} with it: {', '.join(r.deleted)}; {size(r.freed_bytes)} freed")
    return "\n".join(lines)


def status(s: wire.Status) -> str:
    """Return the daemon at a glance."""
    if not s.mqtt.configured:
        mqtt = "off"
    else:
        state = "connected" if s.mqtt.connected else f"not connected ({s.mqtt.error or 'not tried yet'})"
        mqtt = f"{state}, {s.mqtt.pending} events wait"
    return fields(
        [
            ("Version", s.version),
            ("Host", s.host_id),
            ("State", "stopping" if s.stopping else "running"),
            ("Since", f"{when(s.started_at)} ({duration(s.uptime_s)})"),
            ("Guests", "the hypervisor does not answer" if s.guests is None else str(s.guests)),
            ("Disks", f"{s.disks} with snapshots"),
            ("Snapshots", str(s.snapshots)),
            ("At work", f"{s.captures} captures, {s.tasks} tasks"),
            ("Open", f"{s.open_operations} entries of the journal"),
            ("Stored", size(s.stored_bytes)),
            ("Store full", "" if s.days_to_full is None else f"in {s.days_to_full:.1f} days"),
            ("MQTT", mqtt),
        ]
    )

"""What tasks came to, as it is told: by whoever followed one, and by whoever waited for it later."""

from __future__ import annotations

from collections.abc import Sequence

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.text import one_line, safe
from hvsnap.errors import Damaged

LINES_MAX = 20
"""Differences, damaged blocks and packs that are shown; the others only with `--json`."""


def outcome(task: wire.Task, *, quiet: bool) -> str:
    """Return what an accomplished task made, found or did; with ``quiet`` only its data, which may be none."""
    match task.result:
        case wire.DiskCreated():
            return _created(task.result, quiet=quiet)
        case wire.RolledBack() | wire.Reinitialised():
            return _set_back(task.result, quiet=quiet)
        case wire.ImageExported():
            return _exported(task.result, quiet=quiet)
        case wire.SnapshotsVerified():
            return _verified(task.result, quiet=quiet)
        case wire.SnapshotDrilled():
            return _drilled(task.result, quiet=quiet)
        case wire.StoreChecked():
            return _checked(task.result, quiet=quiet)
        case wire.StoreCompacted():
            return _compacted(task.result, quiet=quiet)
        case None:
            return task.id


def damage(result: wire.TaskResult | None) -> Damaged | None:
    """Return the damage that a result tells of."""
    hint = "make a snapshot of the disk now: it heals all blocks that the disk still holds"
    if isinstance(result, wire.SnapshotsVerified) and (result.damaged_blocks or result.affected):
        blocks = count(result.damaged_blocks, "stored block")
        return Damaged(f"{blocks} damaged{whom(result.affected)}", hint=hint)
    if isinstance(result, wire.StoreChecked) and not result.sound:
        return Damaged(f"something is damaged or missing{whom(result.affected)}", hint=hint)
    return None


def whom(affected: Sequence[wire.AffectedSnapshot]) -> str:
    """Return whom damage affects, as the end of a sentence; empty if nobody."""
    if not affected:
        return ""
    names = ", ".join(one.id for one in affected[:5]) + (", …" if affected[5:] else "")
    verb = "does" if len(affected) == 1 else "do"
    return f"; {count(len(affected), 'snapshot')} {verb} not restore: {names}"


def count(number: int, what: str) -> str:
    """Return a number of things: ``1 block``, ``2 blocks``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# -- by its kind ----------------------------------------------------------------------------------


def _created(result: wire.DiskCreated, *, quiet: bool) -> str:
    if quiet:
        return safe(result.path)
    words = [f"{result.format} of {render.size(result.size_bytes)} made of {result.made_of}"]
    words += [f"{render.size(result.written_bytes)} written"]
    words += [f"attached as {safe(result.attached)}"] if result.attached else []
    return f"{safe(result.path)}  {', '.join(words)}"


def _set_back(result: wire.SetBack, *, quiet: bool) -> str:
    if quiet:
        return result.safety_snapshot or ""
    saved = f"the state before it is {result.safety_snapshot}" if result.safety_snapshot else "no safety snapshot"
    to = result.origin if isinstance(result, wire.Reinitialised) else result.snapshot
    words = [f"set back to {to}", f"{render.size(result.written_bytes)} written", saved]
    words += ["guest started"] * result.started
    return "\n".join([f"{result.disk}  {', '.join(words)}", *(f"note: {one_line(note)}" for note in result.notes)])


def _exported(result: wire.ImageExported, *, quiet: bool) -> str:
    if quiet:
        return safe(result.path)
    what = f"qcow2 of {render.size(result.size_bytes)}, {render.size(result.written_bytes)} written"
    return f"{safe(result.path)}  {what}, compressed to {render.size(result.file_bytes)}"


def _verified(result: wire.SnapshotsVerified, *, quiet: bool) -> str:
    lines = [f"{safe(one.detail)}" for one in result.damaged[:LINES_MAX]]
    lines += [f"written anew: {safe(name)}" for name in result.rewritten[:LINES_MAX]]
    lines += _affected(result.affected)
    if not quiet:
        what = f"{count(result.snapshots, 'snapshot')}, {count(result.blocks, 'block')}"
        what += f", {render.size(result.read_bytes)} read"
        healed = f", {result.healed_blocks} whole again" if result.healed_blocks else ""
        lines.append(f"{what}: {result.damaged_blocks or 'none'} damaged{healed}")
    return "\n".join(lines)


def _drilled(result: wire.SnapshotDrilled, *, quiet: bool) -> str:
    if quiet:
        return ""
    where = f"{result.snapshot} of {safe(result.guest)}/{safe(result.target)} restores"
    done = f"{render.size(result.written_bytes)} written, checked and compared in {render.duration(result.duration_s)}"
    return f"{where}: {done}; nothing of it is left"


def _checked(result: wire.StoreChecked, *, quiet: bool) -> str:
    lines = [f"{one.kind}: {safe(one.subject)}: {safe(one.detail)}" for one in result.differences[:LINES_MAX]]
    if result.difference_count > len(lines):
        lines.append(f"… and {result.difference_count - len(lines)} more (`--json` shows up to 1000)")
    lines += _affected(result.affected)
    if not quiet:
        lines.append(
            f"{count(result.packs, 'pack')}, {count(result.manifests, 'manifest')}, {count(result.blocks, 'block')}: "
            f"{'sound' if result.sound else 'not sound'}"
        )
    return "\n".join(lines)


def _compacted(result: wire.StoreCompacted, *, quiet: bool) -> str:
    if quiet:
        return str(result.freed_bytes)
    lines = [f"{one.fate} {safe(one.pack)}, {render.size(one.live_bytes)} kept" for one in result.packs[:LINES_MAX]]
    verb = "would be freed" if result.dry_run else "freed"
    work = [
        (result.deleted_packs, "deleted"),
        (result.punched_packs, "punched"),
        (result.rewritten_packs, "rewritten"),
        (result.orphans, "left over by an interruption"),
    ]
    packs = ", ".join(f"{count} {what}" for count, what in work if count)
    freed = f"{render.size(result.freed_bytes)} in {count(result.dropped_blocks, 'block')} {verb}"
    lines.append(f"{freed}; packs: {packs}" if packs else freed)
    return "\n".join(lines)


def _affected(affected: Sequence[wire.AffectedSnapshot]) -> list[str]:
    return [
        f"does not restore: {one.id} {safe(one.guest)}/{safe(one.target)} {safe(one.name)} "
        f"({count(one.blocks, 'block')})"
        for one in affected
    ]

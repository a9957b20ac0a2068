"""Commands about the store: showing, checking, verifying, compacting it."""

from __future__ import annotations

from collections.abc import Sequence

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import Client, body
from hvsnap.cli.complaints import INTERRUPTED, complain
from hvsnap.cli.disks import followed, task_error
from hvsnap.cli.session import Session
from hvsnap.cli.text import safe
from hvsnap.errors import Damaged

LINES_MAX = 20
"""Differences, damaged blocks and packs that are shown; the others only with `--json`."""


def info(session: Session) -> None:
    """Show the store at a glance."""
    with session.client() as client:
        answer = client.get("/store", wire.StoreInfo)
    session.answer(answer, shown(answer))


def check(session: Session, *, detach: bool) -> int:
    """Compare catalog and store; return the exit status."""
    with session.client() as client:
        return _ended(session, client, client.post("/store/check", wire.Task), "store-check", detach=detach)


def compact(session: Session, *, dry_run: bool, detach: bool) -> int:
    """Free space, or tell what that would free; return the exit status."""
    request = body(wire.StoreCompact, dry_run=dry_run)
    with session.client() as client:
        task = client.post("/store/compact", wire.Task, request)
        return _ended(session, client, task, "store-compact", detach=detach)


def verify(session: Session, ids: Sequence[str], *, everything: bool, detach: bool) -> int:
    """Read blocks again; return the exit status."""
    request = body(wire.SnapshotVerify, ids=list(ids), all=everything)
    with session.client() as client:
        task = client.post("/snapshots/verify", wire.Task, request)
        return _ended(session, client, task, "snapshot-verify", detach=detach)


def drill(session: Session, snapshot: str, disk: str, *, detach: bool) -> int:
    """Restore a snapshot for trial; return the exit status."""
    request = body(wire.SnapshotDrill, snapshot=snapshot, disk=disk)
    with session.client() as client:
        task = client.post("/snapshots/drill", wire.Task, request)
        return _ended(session, client, task, "snapshot-drill", detach=detach)


def _ended(session: Session, client: Client, task: wire.Task, what: str, *, detach: bool) -> int:
    """Follow a task and tell what it found; damage is an error, with all that is known of it."""
    if detach:
        session.answer(task, task.id)
        return 0
    now = followed(session, client, task)
    if now is None:
        return INTERRUPTED
    also = {"task": now.model_dump(mode="json")}
    if now.state is not wire.TaskState.ACCOMPLISHED:
        return complain(task_error(now), what, as_json=session.json, also=also)
    damage = _damage(now.result)
    if damage is None:
        session.answer(now, found(now.result, quiet=session.quiet))
        return 0
    if not session.json:
        session.answer(now, found(now.result, quiet=session.quiet))
    return complain(damage, what, as_json=session.json, also=also)


def _damage(result: wire.TaskResult | None) -> Damaged | None:
    """Return the damage that a result tells of."""
    hint = "make a snapshot of the disk now: it heals all blocks that the disk still holds"
    if isinstance(result, wire.SnapshotsVerified) and (result.damaged_blocks or result.affected):
        blocks = count(result.damaged_blocks, "stored block")
        return Damaged(f"{blocks} damaged{_whom(result.affected)}", hint=hint)
    if isinstance(result, wire.StoreChecked) and not result.sound:
        return Damaged(f"something is damaged or missing{_whom(result.affected)}", hint=hint)
    return None


def _whom(affected: Sequence[wire.AffectedSnapshot]) -> str:
    if not affected:
        return ""
    names = ", ".join(one.id for one in affected[:5]) + (", …" if affected[5:] else "")
    verb = "does" if len(affected) == 1 else "do"
    return f"; {count(len(affected), 'snapshot')} {verb} not restore: {names}"


def count(number: int, what: str) -> str:
    """Return a number of things: ``1 block``, ``2 blocks``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


# -- how it looks ---------------------------------------------------------------------------------


def shown(answer: wire.StoreInfo) -> str:
    """Return the store at a glance."""
    space = f"{render.size(answer.free_bytes)} of {render.size(answer.total_bytes)}"
    verified = "never" if answer.verified_since is None else f"since {render.when(answer.verified_since)}"
    if answer.verified_since is not None and answer.unverified_packs:
        verified += f"; {count(answer.unverified_packs, 'pack')} never yet"
    damaged = f"{count(answer.damaged_blocks, 'block')}{_whom(answer.affected)}"
    return render.fields(
        [
            ("Place", answer.url),
            ("Repository", answer.repository),
            ("Block size", render.size(answer.block_size)),
            ("Snapshots", str(answer.snapshots)),
            ("Packs", f"{answer.packs}, {render.size(answer.size_bytes)}"),
            ("Kept", f"{answer.live_blocks} blocks, {render.size(answer.live_bytes)}"),
            ("Free", "" if answer.free_bytes is None else space),
            ("Swept", "now" if answer.sweeping else render.when(answer.swept_at)),
            ("Verified", verified),
            ("Damaged", damaged if answer.damaged_blocks else ""),
            ("Last drill", render.drill(answer.drill)),
            ("Drills", f"{count(answer.drills_failed, 'disk')} did not pass" if answer.drills_failed else ""),
        ]
    )


def found(result: wire.TaskResult | None, *, quiet: bool) -> str:
    """Return what work on the store found or did."""
    match result:
        case wire.SnapshotsVerified():
            return _verified(result, quiet=quiet)
        case wire.SnapshotDrilled():
            return _drilled(result, quiet=quiet)
        case wire.StoreChecked():
            return _checked(result, quiet=quiet)
        case wire.StoreCompacted():
            return _compacted(result, quiet=quiet)
        case _:
            return ""


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

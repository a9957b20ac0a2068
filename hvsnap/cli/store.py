"""Commands about the store: showing, checking, verifying, compacting it."""

from __future__ import annotations

from collections.abc import Sequence

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import body
from hvsnap.cli.outcomes import count, whom
from hvsnap.cli.session import Session
from hvsnap.cli.tasks import finished


def info(session: Session) -> None:
    """Show the store at a glance."""
    with session.client() as client:
        answer = client.get("/store", wire.StoreInfo)
    session.answer(answer, shown(answer))


def check(session: Session, *, detach: bool) -> int:
    """Compare catalog and store; return the exit status."""
    with session.client() as client:
        return finished(session, client, client.post("/store/check", wire.Task), "store-check", detach=detach)


def compact(session: Session, *, dry_run: bool, detach: bool) -> int:
    """Free space, or tell what that would free; return the exit status."""
    request = body(wire.StoreCompact, dry_run=dry_run)
    with session.client() as client:
        task = client.post("/store/compact", wire.Task, request)
        return finished(session, client, task, "store-compact", detach=detach)


def verify(session: Session, ids: Sequence[str], *, everything: bool, detach: bool) -> int:
    """Read blocks again; return the exit status."""
    request = body(wire.SnapshotVerify, ids=list(ids), all=everything)
    with session.client() as client:
        task = client.post("/snapshots/verify", wire.Task, request)
        return finished(session, client, task, "snapshot-verify", detach=detach)


def drill(session: Session, snapshot: str, disk: str, *, detach: bool) -> int:
    """Restore a snapshot for trial; return the exit status."""
    request = body(wire.SnapshotDrill, snapshot=snapshot, disk=disk)
    with session.client() as client:
        task = client.post("/snapshots/drill", wire.Task, request)
        return finished(session, client, task, "snapshot-drill", detach=detach)


def shown(answer: wire.StoreInfo) -> str:
    """Return the store at a glance."""
    space = f"{render.size(answer.free_bytes)} of {render.size(answer.total_bytes)}"
    verified = "never" if answer.verified_since is None else f"since {render.when(answer.verified_since)}"
    if answer.verified_since is not None and answer.unverified_packs:
        verified += f"; {count(answer.unverified_packs, 'pack')} never yet"
    damaged = f"{count(answer.damaged_blocks, 'block')}{whom(answer.affected)}"
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

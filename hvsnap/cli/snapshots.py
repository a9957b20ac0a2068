"""Commands about snapshots: making, listing, showing, deleting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import Client, body, place
from hvsnap.cli.complaints import INTERRUPTED, complain
from hvsnap.cli.follow import Sight, cancel, follow
from hvsnap.cli.session import Session
from hvsnap.errors import BadRequest, Failed
from hvsnap.model import Consistency, State

LIST_MAX = 10_000
"""As many as the daemon tells at once."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `snapshot-create` was told, as typed."""

    guest: str
    disks: list[str]
    name: str
    description: str
    tags: list[str]
    consistency: Consistency
    group: bool
    wait: bool
    others: list[str] = field(default_factory=list)

    def request(self) -> wire.SnapshotCreate:
        """Return it as the daemon takes it; raises :class:`BadRequest`."""
        return body(
            wire.SnapshotCreate,
            guest=self.guest,
            disks=self.disks,
            name=self.name,
            description=self.description,
            tags=parse_tags(self.tags),
            consistency=self.consistency,
            group=self.group,
            others=parse_others(self.others),
            wait=self.wait,
        )


def parse_others(texts: Sequence[str]) -> list[wire.GuestDisks]:
    """Return guests given as ``GUEST`` or, once for each disk, ``GUEST/DISK``; raises :class:`BadRequest`."""
    found: dict[str, list[str]] = {}
    for text in texts:
        guest, slash, disk = text.partition("/")
        if not guest or (slash and not disk):
            hint = "a further guest is GUEST, or GUEST/DISK for each of its disks: --with app01/vda --with app01/vdb"
            raise BadRequest(f"--with {text[:100]!a} names no {'disk' if guest else 'guest'}", hint=hint)
        named = found.get(guest)
        if named is not None and (not disk or not named):
            hint = "name some of its disks, or none of them for all that can be captured"
            raise BadRequest(f"guest {guest[:100]!a} is asked for twice", hint=hint)
        found[guest] = [*(named or ()), *([disk] if disk else ())]
    return [body(wire.GuestDisks, guest=guest, disks=disks) for guest, disks in found.items()]


def parse_tags(texts: Sequence[str]) -> dict[str, str]:
    """Return tags given as ``key=value``; raises :class:`BadRequest` for another form, or a key given twice."""
    tags: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise BadRequest(f"the tag {text[:100]!a} has no value", hint="a tag is key=value: --tag release=9")
        if key in tags:
            raise BadRequest(f"the tag {key[:100]!a} is given twice", hint="a snapshot has one value for each key")
        tags[key] = value
    return tags


def create(session: Session, wanted: Wanted, *, detach: bool) -> int:
    """Make snapshots, follow them to their end, tell what became of them; return the exit status."""
    request = wanted.request()
    with session.client() as client:
        made = client.post("/snapshots", wire.SnapshotList, request).snapshots
        if detach:
            session.answer(wire.SnapshotList(snapshots=made), "\n".join(one.id for one in made))
            return 0
        now = made

        def look() -> list[Sight]:
            nonlocal now
            now = [client.get(place("snapshots", one.id), wire.Snapshot) for one in made]
            return [sight(one) for one in now]

        hint = f"`hvsnap task-wait {' '.join(one.id for one in made)}` follows it again"
        try:
            follow(client, look, quiet=session.quiet, cancel=lambda: _cancel(client, now), leave_hint=hint)
        except KeyboardInterrupt:
            return INTERRUPTED
    return _tell(session, now)


def sight(snapshot: wire.Snapshot) -> Sight:
    """Return how far a snapshot is."""
    return Sight(
        id=snapshot.id,
        title=f"{snapshot.guest}/{snapshot.target} {snapshot.id}",
        done_bytes=snapshot.done_bytes or 0,
        total_bytes=snapshot.total_bytes or 0,
        percent=snapshot.progress,
        rate_bytes_s=snapshot.rate_bytes_s,
        eta_s=snapshot.eta_s,
        ended=snapshot.state is not State.PROGRESSING,
    )


def _cancel(client: Client, snapshots: Sequence[wire.Snapshot]) -> None:
    """Ask for the end of those that still go on."""
    for one in snapshots:
        if one.state is State.PROGRESSING:
            cancel(client, "snapshots", one.id, wire.Snapshot)


def _tell(session: Session, snapshots: Sequence[wire.Snapshot]) -> int:
    failed = [one for one in snapshots if one.state is not State.ACCOMPLISHED]
    answer = wire.SnapshotList(snapshots=list(snapshots))
    done = [one for one in snapshots if one not in failed]
    if not failed:
        session.answer(answer, render.made(done, quiet=session.quiet))
        return 0
    if done and not session.json:
        session.answer(answer, render.made(done, quiet=session.quiet))
    reasons = "; ".join(f"{one.id} of {one.guest}/{one.target} failed: {one.error or one.state}" for one in failed)
    hint = f"nothing is left of it but its record: `hvsnap snapshot-info {failed[0].id}`"
    also = answer.model_dump(mode="json")
    return complain(Failed(reasons, hint=hint), "snapshot-create", as_json=session.json, also=also)


def listing(session: Session, guest: str, disk: str) -> None:
    """Show snapshots, newest first."""
    with session.client() as client:
        answer = client.get("/snapshots", wire.SnapshotList, guest=guest, disk=disk, limit=LIST_MAX)
    session.answer(answer, render.snapshots(answer.snapshots, headers=not session.quiet))
    if len(answer.snapshots) == LIST_MAX:
        session.remark(f"these are the newest {LIST_MAX}; name a guest or a disk to see others")


def info(session: Session, snapshot: str) -> None:
    """Show one snapshot."""
    with session.client() as client:
        answer = client.get(place("snapshots", snapshot), wire.Snapshot)
    session.answer(answer, render.snapshot(answer))


def delete(session: Session, ids: list[str], *, dry_run: bool) -> None:
    """Delete snapshots, or tell what that would free."""
    request = body(wire.SnapshotDelete, ids=ids, dry_run=dry_run)
    with session.client() as client:
        answer = client.post("/snapshots/delete", wire.Deletion, request)
    session.answer(answer, "" if session.quiet and not dry_run else render.deletion(answer))

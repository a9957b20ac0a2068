"""Commands about policies, and about how long a snapshot stays."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from hvsnap import policy as rules
from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import body, place
from hvsnap.cli.session import Session
from hvsnap.cli.snapshots import parse_tags
from hvsnap.cli.text import safe
from hvsnap.errors import BadRequest

FOREVER = "forever"


def policy_fields(
    *, hours: str, weekdays: str, timezone: str, retain_days: str, keep: Sequence[str], name: str = ""
) -> dict[str, Any]:
    """Return what was typed of a policy as the daemon takes it; what was not typed is left out."""
    fields: dict[str, Any] = {}
    if name:
        fields["name"] = name
    if hours:
        fields["hours"] = list(rules.parse_hours(hours))
    if weekdays:
        fields["weekdays"] = list(rules.parse_weekdays(weekdays))
    if timezone:
        fields["timezone"] = timezone
    if retain_days and keep:
        raise BadRequest("--retain-days and --keep exclude each other", hint="keep snapshots for days, or by count")
    if retain_days:
        fields["retain_days"] = _parse_days(retain_days)
        fields["keep"] = None
    if keep:
        fields["retain_days"] = None
        fields["keep"] = _parse_keep(keep)
    return fields


def _parse_days(text: str) -> int | None:
    if text.lower() == FOREVER:
        return None
    if not text.isascii() or not text.isdigit():
        raise BadRequest(f"{text[:32]!a} is no number of days", hint="for example --retain-days 30, or forever")
    return int(text)


def _parse_keep(texts: Sequence[str]) -> dict[str, int]:
    kept: dict[str, int] = {}
    for text in texts:
        period, equals, count = text.partition("=")
        if not equals or period not in wire.PolicyKeep.model_fields or not (count.isascii() and count.isdigit()):
            hint = "for example --keep daily=7 --keep weekly=4; also last, hourly, monthly"
            raise BadRequest(f"{text[:32]!a} is no rule", hint=hint)
        kept[period] = int(count)
    return kept


def create(session: Session, name: str, fields: dict[str, Any]) -> None:
    """Make a policy."""
    with session.client() as client:
        made = client.post("/policies", wire.Policy, body(wire.PolicyCreate, name=name, **fields))
    session.answer(made, made.name if session.quiet else render_one(made))
    if not session.json:
        session.remark(f"no disk has it yet: hvsnap policy-apply {made.name} GUEST/DISK")


def listing(session: Session) -> None:
    """Show the policies."""
    with session.client() as client:
        answer = client.get("/policies", wire.PolicyList)
    headers = ("NAME", "HOURS", "WEEKDAYS", "TIME ZONE", "KEPT", "NEXT RUN", "DISKS")
    rows = [
        (
            one.name,
            _spans(one.hours, tuple(map(str, range(24)))),
            _weekdays(one.weekdays),
            one.timezone or "the host's",
            kept(one),
            render.when(one.next_run),
            ", ".join(f"{disk.guest}/{disk.target}" for disk in one.disks) or "none",
        )
        for one in answer.policies
    ]
    session.answer(answer, render.table(headers, rows, headers=not session.quiet))


def edit(session: Session, name: str, fields: dict[str, Any]) -> None:
    """Change a policy."""
    with session.client() as client:
        made = client.post(place("policies", name, "edit"), wire.Policy, body(wire.PolicyEdit, **fields))
    session.answer(made, render_one(made))


def delete(session: Session, name: str) -> None:
    """Remove a policy."""
    with session.client() as client:
        gone = client.post(place("policies", name, "delete"), wire.Policy)
    had = ", ".join(f"{disk.guest}/{disk.target}" for disk in gone.disks)
    session.answer(gone, safe(f"{gone.name} is deleted" + (f"; without a policy now: {had}" if had else "")))


def apply(session: Session, name: str, disks: Sequence[str]) -> None:
    """Put disks under a policy."""
    with session.client() as client:
        answer = client.post(
            place("policies", name, "apply"), wire.PolicyApplied, body(wire.PolicyDisks, disks=list(disks))
        )
    session.answer(answer, _applied(answer))


def cancel(session: Session, disks: Sequence[str]) -> None:
    """Take disks out of their policies."""
    with session.client() as client:
        answer = client.post("/policies/cancel", wire.PolicyApplied, body(wire.PolicyDisks, disks=list(disks)))
    session.answer(answer, _applied(answer))


def lock(session: Session, snapshot: str, until: str) -> None:
    """Lock a snapshot until a date."""
    with session.client() as client:
        locked = client.post(
            place("snapshots", snapshot, "lock"), wire.Snapshot, body(wire.SnapshotLock, until=parse_until(until))
        )
    session.answer(locked, f"{locked.id} is locked until {render.when(locked.locked_until)}")


def edit_snapshot(
    session: Session,
    snapshot: str,
    name: str,
    description: str | None,
    tags: list[str] | None,
    *,
    usual: bool = False,
) -> None:
    """Change what a snapshot is called, or end its alarm."""
    fields: dict[str, Any] = {}
    if name:
        fields["name"] = name
    if description is not None:
        fields["description"] = description
    if tags:
        fields["tags"] = parse_tags([tag for tag in tags if tag])
    if usual:
        fields["usual"] = True
    if not fields:
        raise BadRequest("nothing was said to change", hint="give --name, --description, --tag or --usual")
    with session.client() as client:
        changed = client.post(place("snapshots", snapshot, "edit"), wire.Snapshot, body(wire.SnapshotEdit, **fields))
    session.answer(changed, render.snapshot(changed))


def parse_until(text: str) -> datetime:
    """Return the end of a day, or a time of day, in the user's own time zone. Raises :class:`BadRequest`."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        hint = "for example 2027-01-31, or 2027-01-31T18:00"
        raise BadRequest(f"{text[:32]!a} is no date", hint=hint) from error
    if "T" not in text and ":" not in text:
        moment += timedelta(days=1)  # the whole day is in it
    return moment.astimezone()


def kept(one: wire.Policy) -> str:
    """Return how long a policy's snapshots stay, for people."""
    if one.retain_days is not None:
        return f"{one.retain_days} days"
    counts = [f"{count} {name}" for name, count in one.keep.model_dump().items() if count]
    return ", ".join(counts) if counts else "until the chain is full"


def render_one(one: wire.Policy) -> str:
    """Return all that is known of one policy."""
    return render.fields(
        [
            ("Id", one.id),
            ("Name", one.name),
            ("Hours", _spans(one.hours, tuple(map(str, range(24))))),
            ("Weekdays", _weekdays(one.weekdays)),
            ("Time zone", one.timezone or "the host's"),
            ("Kept", kept(one)),
            ("Next run", render.when(one.next_run) if one.next_run else ""),
            ("Disks", ", ".join(f"{disk.guest}/{disk.target}" for disk in one.disks)),
        ]
    )


def _weekdays(days: Sequence[int]) -> str:
    return "daily" if len(days) == 7 else _spans(days, rules.WEEKDAYS)


def _spans(numbers: Sequence[int], names: Sequence[str]) -> str:
    """Return numbers as people write them: three or more that follow each other as a range."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ",".join(
        f"{names[span[0]]}-{names[span[-1]]}" if len(span) > 2 else ",".join(names[number] for number in span)
        for span in spans
    )


def _applied(answer: wire.PolicyApplied) -> str:
    lines = []
    for disk in answer.disks:
        had = answer.replaced.get(disk.id)
        note = f", in the place of {had}" if had and answer.policy else f", had {had}" if had else ""
        now = f"has policy {answer.policy}" if answer.policy else "has no policy any more"
        lines.append(safe(f"{disk.guest}/{disk.target} {now}{note}"))
    return "\n".join(lines)

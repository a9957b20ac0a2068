"""The command that shows what was stored, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from hvsnap import wire
from hvsnap.cli import plotting, render
from hvsnap.cli.session import Session, say
from hvsnap.errors import BadRequest

POINTS = 240
"""Averages that a plot is drawn of: three hours each, of a month."""

_AGO = re.compile(r"([0-9]{1,6})([hdw])")
_UNITS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def show(session: Session, since: str, until: str, by: str, plot: str) -> None:
    """Show what was stored; with ``plot`` draw it, too, to a file or (`-`) to the terminal."""
    target = plotting.check(plot) if plot else None
    now = datetime.now().astimezone()
    start, end = parse_time(since, now), parse_time(until, now)
    with session.client() as client:
        answer = client.get(
            "/usage",
            wire.Usage,
            since=None if start is None else start.isoformat(),
            until=None if end is None else end.isoformat(),
            by=by,
            points=POINTS if plot else 0,
        )
    if target is not None:
        plotting.save(answer, target)
        session.remark(f"drawn: {target}")
    elif plot and not session.json:
        say(plotting.terminal(answer) + "\n")
    session.answer(answer, told(answer, quiet=session.quiet))


def parse_time(text: str, now: datetime) -> datetime | None:
    """Return a moment: a date (its first minute), a time, or how long ago; None for nothing."""
    if not text:
        return None
    if ago := _AGO.fullmatch(text):
        try:
            return now - int(ago[1]) * _UNITS[ago[2]]
        except OverflowError as error:
            raise BadRequest(f"{text} ago is too long ago", hint="for example 30d") from error
    try:
        moment = datetime.fromisoformat(text)
        return moment.astimezone()
    except (ValueError, OverflowError) as error:
        hint = "for example 2026-11-01, 2026-11-01T18:00, 7d or 12h"
        raise BadRequest(f"{text[:32]!a} is no time", hint=hint) from error


def told(answer: wire.Usage, *, quiet: bool) -> str:
    """Return a table and, below it, what the figures rest on."""
    headers = ("CHAIN", "GUEST", "DISK", "LAST", "MEAN", "PEAK", "GIB·HOURS", "BILLED", "COST")
    lines = answer.lines if quiet or answer.by == "host" else [*answer.lines, answer.total]
    rows = [
        (
            line.subject,
            line.guest or "-",
            line.target or "-",
            render.size(line.last_bytes),
            render.size(line.mean_bytes),
            render.size(line.peak_bytes),
            _number(line.gib_hours),
            _number(line.billable_gib_hours),
            _money(line.cost, answer.currency),
        )
        for line in lines
    ]
    table = render.table(headers, rows, headers=not quiet)
    return table if quiet else "\n".join([table, "", *_notes(answer)])


def _notes(answer: wire.Usage) -> Sequence[str]:
    notes = [f"From {render.when(answer.since)} to {render.when(answer.until)}."]
    if answer.known_since is None:
        notes.append("Nothing has been noted yet.")
    elif answer.known_since > answer.since:
        notes.append(f"Noted since {render.when(answer.known_since)}; what was before counts as nothing.")
    if answer.by == "chain" and len(answer.lines) > 1:
        notes.append("Blocks that chains share count once for the host, and for each of them.")
    if answer.price_per_gib_month is not None:
        price = f"{_money(answer.price_per_gib_month, answer.currency, places=4)} a GiB·month (730 hours)"
        paid = f", {answer.prepaid_gib:g} GiB prepaid" if answer.prepaid_gib else ""
        notes.append(f"Estimate, not a bill: {_money(answer.total.cost, answer.currency)}, at {price}{paid}.")
    if answer.days_to_full is not None:
        notes.append(f"The store's device is full in {answer.days_to_full:.0f} days, at the pace of the last week.")
    return notes


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _money(value: float | None, currency: str, *, places: int = 2) -> str:
    return "-" if value is None else f"{value:.{places}f} {currency}".rstrip()

"""Automatic snapshot policies, decided purely: when they are due, what they make, what they let go (SERVICE 5).

Instants are seconds since the epoch; a policy's hours are those of its time zone.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import NewType
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from hvsnap.errors import BadRequest
from hvsnap.model import Snapshot, SnapshotId, State

PolicyId = NewType("PolicyId", str)

NAME_LENGTH_MIN = 2
NAME_LENGTH_MAX = 128
RETAIN_DAYS_DEFAULT = 30
RETAIN_DAYS_MAX = 65_536
KEEP_MAX = 4096
DAY_S = 86_400.0

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
AUTOMATIC_NAME = re.compile(r"auto_(\d{8})_(\d+)")

_NAME_HINT = (
    f"a policy's name has {NAME_LENGTH_MIN} to {NAME_LENGTH_MAX} characters: first a letter, then letters, digits, "
    "`.` `_` `-` `:`"
)


@dataclass(frozen=True, slots=True)
class Keep:
    """How many automatic snapshots stay: the newest, and the last of each of so many hours, days, weeks, months."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0

    @property
    def empty(self) -> bool:
        """Whether it keeps nothing, and so is no rule at all."""
        return not any(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Policy:
    """When automatic snapshots are made, and how long they are kept.

    ``weekdays`` count from Monday, 0. ``timezone`` empty: the host's. ``retain_days`` None: until the chain's limit
    evicts them, or, where ``keep`` is given, as that says.
    """

    id: PolicyId
    name: str
    hours: tuple[int, ...]
    weekdays: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6)
    timezone: str = ""
    retain_days: int | None = RETAIN_DAYS_DEFAULT
    keep: Keep = field(default_factory=Keep)
    created_at: float = 0.0


# -- checking -------------------------------------------------------------------------------------


def check_policy(policy: Policy) -> Policy:
    """Return a policy in its stored form, or refuse it (SERVICE 5.1). Raises :class:`BadRequest`."""
    name = unicodedata.normalize("NFC", policy.name)
    if not NAME_LENGTH_MIN <= len(name) <= NAME_LENGTH_MAX:
        raise BadRequest(f"the policy's name has {len(name)} characters", hint=_NAME_HINT)
    if not unicodedata.category(name[0]).startswith("L"):
        raise BadRequest("the policy's name does not start with a letter", hint=_NAME_HINT)
    for character in name:
        category = unicodedata.category(character)
        if category[0] not in "LM" and category != "Nd" and character not in "._-:":
            raise BadRequest(f"the policy's name contains {character!a}", hint=_NAME_HINT)
    hours, weekdays = tuple(sorted(set(policy.hours))), tuple(sorted(set(policy.weekdays)))
    if not hours or hours[0] < 0 or hours[-1] > 23:
        raise BadRequest("a policy has one or more hours from 0 to 23", hint="for example --hours 0,6,12,18")
    if not weekdays or weekdays[0] < 0 or weekdays[-1] > 6:
        raise BadRequest("a policy has one or more weekdays", hint="for example --weekdays mon-fri")
    if policy.retain_days is not None and not 1 <= policy.retain_days <= RETAIN_DAYS_MAX:
        hint = f"1 to {RETAIN_DAYS_MAX}, or forever"
        raise BadRequest(f"{policy.retain_days} days of retention are not possible", hint=hint)
    _check_keep(policy)
    zone_of(policy.timezone)
    changed = {"name": name, "hours": hours, "weekdays": weekdays}
    return Policy(**{**{key: getattr(policy, key) for key in Policy.__slots__}, **changed})


def _check_keep(policy: Policy) -> None:
    counts = asdict(policy.keep)
    for name, count in counts.items():
        if not 0 <= count <= KEEP_MAX:
            raise BadRequest(f"keep-{name} {count} is not possible", hint=f"0 to {KEEP_MAX}")
    if not policy.keep.empty and policy.retain_days is not None:
        raise BadRequest(
            "a policy keeps snapshots for days or by count, not both", hint="give --retain-days or --keep-…"
        )


def zone_of(name: str) -> ZoneInfo:
    """Return a time zone by its name, the host's for an empty one. Raises :class:`BadRequest`."""
    try:
        return ZoneInfo(name) if name else host_zone()
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        hint = "use a name of the time zone database, such as Europe/Berlin"
        raise BadRequest(f"there is no time zone {name[:64]!a}", hint=hint) from error


def zone_or_hosts(name: str) -> ZoneInfo:
    """Return a time zone by its name, or the host's where that is not known here (any more).

    It was once: by another host, or before an update of the time zone database. A policy that does not run at all would
    be worse than one that runs some hours earlier or later.
    """
    try:
        return zone_of(name)
    except BadRequest:
        return host_zone()


def host_zone() -> ZoneInfo:
    """Return the host's time zone: what /etc/localtime holds, UTC where there is none."""
    try:
        with open("/etc/localtime", "rb") as file:
            return ZoneInfo.from_file(file, key="localtime")
    except (OSError, ValueError):
        return ZoneInfo("UTC")


def parse_hours(text: str) -> tuple[int, ...]:
    """Return the hours of ``0,6,12-15``. Raises :class:`BadRequest`."""
    return _parse_list(text, "hour", lambda word: int(word) if re.fullmatch(r"\d{1,2}", word) else -1, 23)


def parse_weekdays(text: str) -> tuple[int, ...]:
    """Return the weekdays of ``mon-fri,sun`` (or ``daily``), 0 for Monday. Raises :class:`BadRequest`."""
    if text.strip().lower() in ("daily", "all", "*"):
        return tuple(range(7))
    return _parse_list(text, "weekday", lambda word: WEEKDAYS.index(word[:3]) if word[:3] in WEEKDAYS else -1, 6)


def _parse_list(text: str, what: str, number: Callable[[str], int], highest: int) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.lower().split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        start, stop = number(first), number(last if dash else first)
        if not (0 <= start <= highest and 0 <= stop <= highest):
            example = "0,6,12" if what == "hour" else "mon-fri"
            raise BadRequest(f"{part.strip()[:32]!a} is no {what}", hint=f"for example {example}")
        # A range may go over the end: sat-mon, 22-2.
        found.update(range(start, stop + 1) if start <= stop else [*range(start, highest + 1), *range(stop + 1)])
    return tuple(sorted(found))


# -- when -----------------------------------------------------------------------------------------


def instant(day: date, hour: int, zone: ZoneInfo) -> float:
    """Return when an hour of a day begins (SERVICE 5.7).

    An hour that occurs twice is its first occurrence. One that the clock skips is the moment of the skip, which is what
    the offset before it makes of it.
    """
    return datetime(day.year, day.month, day.day, hour, tzinfo=zone, fold=0).timestamp()


def due_times(policy: Policy, after: float, until: float) -> list[float]:
    """Return the instants in ``(after, until]`` at which a policy is due, ascending, each once."""
    if until <= after:
        return []
    zone = zone_or_hosts(policy.timezone)
    day = datetime.fromtimestamp(after, zone).date() - timedelta(days=1)
    last = datetime.fromtimestamp(until, zone).date() + timedelta(days=1)
    found: set[float] = set()
    while day <= last:
        if day.weekday() in policy.weekdays:
            found.update(instant(day, hour, zone) for hour in policy.hours)
        day += timedelta(days=1)
    return sorted(moment for moment in found if after < moment <= until)


def next_due(policy: Policy, after: float) -> float:
    """Return the first instant after ``after`` at which a policy is due."""
    return due_times(policy, after, after + 9 * DAY_S)[0]


@dataclass(frozen=True, slots=True)
class Due:
    """What a policy owes now: ``run`` is the instant to run for, if there is one; ``missed`` are too long past."""

    run: float | None
    missed: tuple[float, ...]


def decide_due(policy: Policy, last_checked: float, now: float, late_max_s: float) -> Due:
    """Return what a policy owes since it was last looked at.

    Of several instants only the newest runs, however many there were: a snapshot made now is the same for all of them.
    """
    times = due_times(policy, last_checked, now)
    if not times:
        return Due(None, ())
    if now - times[-1] < late_max_s:
        # Those before it within the same hour are satisfied by this run.
        return Due(times[-1], tuple(moment for moment in times[:-1] if now - moment >= late_max_s))
    return Due(None, tuple(times))


# -- what it makes --------------------------------------------------------------------------------


def automatic_name(policy: Policy, moment: float, names: Iterable[str]) -> str:
    """Return ``auto_YYYYMMDD_X``: the day in the policy's zone, the X-th of the disk (whose ``names`` these are)."""
    day = datetime.fromtimestamp(moment, zone_or_hosts(policy.timezone)).strftime("%Y%m%d")
    numbers = [int(match[2]) for match in map(AUTOMATIC_NAME.fullmatch, names) if match and match[1] == day]
    return f"auto_{day}_{max(numbers, default=0) + 1}"


def expires_at(policy: Policy, now: float) -> float | None:
    """Return when a snapshot that is made now expires; None: not by time."""
    return None if policy.retain_days is None else now + policy.retain_days * DAY_S


def retention(policy: Policy) -> str:
    """Return the rule that a snapshot made now carries; empty where its expiry says it all."""
    if policy.keep.empty:
        return ""
    return json.dumps({**asdict(policy.keep), "timezone": policy.timezone}, sort_keys=True)


# -- what it lets go ------------------------------------------------------------------------------


def expired(snapshots: Sequence[Snapshot], now: float, *, active: bool) -> list[SnapshotId]:
    """Return which snapshots of one disk have come to their end, oldest first (SERVICE 5.3, 5.8).

    By their own expiry, or by the rule of counts that each carries. Locked and held ones stay, and so does the last
    accomplished one of a disk under a policy (``active``).
    """
    accomplished = [one for one in snapshots if one.state is State.ACCOMPLISHED]
    automatic = sorted((one for one in accomplished if one.automatic), key=lambda one: one.sequence)
    last = max(accomplished, key=lambda one: one.sequence, default=None)
    found = []
    for one in automatic:
        if is_kept(one, now) or (active and one is last):
            continue
        by_time = one.expires_at is not None and one.expires_at <= now
        if by_time or (one.retention and not _kept(one, automatic)):
            found.append(one.id)
    return found


def evictable(snapshots: Sequence[Snapshot], now: float) -> list[Snapshot]:
    """Return the automatic snapshots that make room at the chain's limit, the oldest first (SERVICE 3.2)."""
    return sorted(
        (one for one in snapshots if one.automatic and one.state is State.ACCOMPLISHED and not is_kept(one, now)),
        key=lambda one: one.sequence,
    )


def is_kept(snapshot: Snapshot, now: float) -> bool:
    """Whether no rule may let a snapshot go at present: it is locked, or held since an alarm (SERVICE 12)."""
    return any(until is not None and until > now for until in (snapshot.locked_until, snapshot.held_until))


def _kept(one: Snapshot, automatic: Sequence[Snapshot]) -> bool:
    """Whether a snapshot's own rule keeps it, among all automatic ones of its disk (ascending)."""
    rule = json.loads(one.retention)
    zone = zone_or_hosts(rule.get("timezone", ""))
    later = [other for other in automatic if other.sequence > one.sequence]
    if len(later) < rule.get("last", 0):
        return True
    for name, period in _PERIODS.items():
        count = rule.get(name, 0)
        mine = period(one, zone)
        after = {period(other, zone) for other in later}
        # The last one of its period stands for it, while fewer than so many later periods have one of their own.
        if count and mine not in after and len(after) < count:
            return True
    return False


def _local(one: Snapshot, zone: ZoneInfo) -> datetime:
    return datetime.fromtimestamp(one.created_at, zone)


_PERIODS: dict[str, Callable[[Snapshot, ZoneInfo], object]] = {
    # By the instant, so that the hour that occurs twice is two.
    "hourly": lambda one, _zone: datetime.fromtimestamp(one.created_at, UTC).strftime("%Y%m%d%H"),
    "daily": lambda one, zone: _local(one, zone).date(),
    "weekly": lambda one, zone: _local(one, zone).isocalendar()[:2],
    "monthly": lambda one, zone: (_local(one, zone).year, _local(one, zone).month),
}

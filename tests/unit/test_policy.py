"""When policies are due, what they call their snapshots, what they let go: SERVICE 5, without a clock or a disk."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvsnap import policy
from hvsnap.errors import BadRequest
from hvsnap.model import DiskId, Snapshot, State
from hvsnap.policy import DAY_S, Keep, Policy, PolicyId
from tests.catalog_kit import a_snapshot

HOUR_S = 3600.0
BERLIN = ZoneInfo("Europe/Berlin")


def a_policy(**changes: Any) -> Policy:
    return replace(Policy(PolicyId("p-a"), "nightly", hours=(2,), timezone="Europe/Berlin"), **changes)


def at(text: str, zone: str = "Europe/Berlin") -> float:
    """Return a local time's instant; a Z at the end means UTC."""
    if text.endswith("Z"):
        return datetime.fromisoformat(text).timestamp()
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def utc(moments: list[float]) -> list[str]:
    return [datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M") for moment in moments]


def test_hours_and_weekdays_are_those_of_the_policys_zone() -> None:
    one = a_policy(hours=(0, 12), weekdays=(0, 4))
    found = policy.due_times(one, at("2026-06-01 00:00"), at("2026-06-08 00:00"))
    # The first instant is left out, the last one is in: Monday noon, Friday twice, Monday midnight.
    assert utc(found) == ["2026-06-01 10:00", "2026-06-04 22:00", "2026-06-05 10:00", "2026-06-07 22:00"]


def test_an_hour_that_occurs_twice_runs_once() -> None:
    """FAULTS 22."""
    found = policy.due_times(a_policy(hours=(2,)), at("2026-10-24 12:00"), at("2026-10-26 00:00"))
    assert utc(found) == ["2026-10-25 00:00"]


def test_an_hour_that_the_clock_skips_runs_at_the_skip() -> None:
    """FAULTS 22."""
    found = policy.due_times(a_policy(hours=(2,)), at("2026-03-28 12:00"), at("2026-03-30 00:00"))
    assert utc(found) == ["2026-03-29 01:00"]
    both = policy.due_times(a_policy(hours=(2, 3)), at("2026-03-28 12:00"), at("2026-03-30 00:00"))
    assert utc(both) == ["2026-03-29 01:00"]


@pytest.mark.parametrize("zone", ["Australia/Lord_Howe", "America/St_Johns", "Pacific/Apia", "Asia/Kathmandu", "UTC"])
def test_every_day_of_a_year_has_its_run_once(zone: str) -> None:
    """FAULTS 22."""
    one = a_policy(hours=(2,), timezone=zone)
    start = datetime(2026, 1, 1, tzinfo=ZoneInfo(zone)).timestamp()
    end = datetime(2027, 1, 1, tzinfo=ZoneInfo(zone)).timestamp()
    assert len(policy.due_times(one, start, end)) == 365


@settings(deadline=None)
@given(
    cuts=st.lists(st.integers(0, 400 * 24 * 60), max_size=20),
    zone=st.sampled_from(["Europe/Berlin", "America/New_York"]),
)
def test_however_often_it_is_looked_at_each_instant_comes_once(cuts: list[int], zone: str) -> None:
    one = a_policy(hours=(1, 2, 3, 12), timezone=zone)
    start = at("2026-01-01 00:00")
    moments = [start, *(start + cut * 60 for cut in sorted(cuts)), start + 400 * DAY_S]
    pieces = [due for a, b in itertools.pairwise(moments) for due in policy.due_times(one, a, b)]
    assert pieces == policy.due_times(one, moments[0], moments[-1])


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "America/New_York"])
def test_the_hosts_time_zone_changes_nothing(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies have a zone of their own, which is that of the host only when nobody named one. FAULTS 22."""
    one, start, end = a_policy(hours=(0, 2, 12)), at("2026-03-25 00:00"), at("2026-11-05 00:00")
    before = policy.due_times(one, start, end), policy.automatic_name(one, start, [])
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        after = policy.due_times(one, start, end), policy.automatic_name(one, start, [])
        assert time.localtime(start).tm_gmtoff != datetime.fromtimestamp(start, BERLIN).utcoffset()
    time.tzset()
    assert after == before


def test_a_run_less_than_an_hour_late_is_caught_up_and_others_are_missed() -> None:
    one = a_policy(hours=(0, 1, 2, 3))
    due = policy.decide_due(one, at("2026-06-01 23:30"), at("2026-06-02 03:20"), HOUR_S)
    assert due.run == at("2026-06-02 03:00")
    assert due.missed == (at("2026-06-02 00:00"), at("2026-06-02 01:00"), at("2026-06-02 02:00"))
    late = policy.decide_due(one, at("2026-06-01 23:30"), at("2026-06-02 04:00"), HOUR_S)
    assert late.run is None
    assert len(late.missed) == 4
    assert policy.decide_due(one, at("2026-06-02 03:00"), at("2026-06-02 03:00"), HOUR_S) == policy.Due(None, ())


def test_a_clock_that_jumps_back_owes_nothing() -> None:
    assert policy.decide_due(a_policy(), at("2026-06-02 03:00"), at("2026-06-01 03:00"), HOUR_S) == policy.Due(None, ())


def test_names_count_the_disks_automatic_snapshots_of_the_policys_day() -> None:
    one = a_policy(timezone="Asia/Tokyo")
    late_in_utc = at("2026-06-01T20:00:00Z")
    assert policy.automatic_name(one, late_in_utc, []) == "auto_20260602_1"
    taken = ["auto_20260602_1", "auto_20260602_9", "auto_20260601_12", "manual", "auto_20260602_x"]
    assert policy.automatic_name(one, late_in_utc, taken) == "auto_20260602_10"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "x"},
        {"name": "1st"},
        {"name": "a" * 129},
        {"name": "with space"},
        {"name": "a\n"},
        {"hours": ()},
        {"hours": (24,)},
        {"hours": (-1,)},
        {"weekdays": ()},
        {"weekdays": (7,)},
        {"retain_days": 0},
        {"retain_days": 65_537},
        {"timezone": "Europe/Atlantis"},
        {"timezone": "../../etc/passwd"},
        {"keep": Keep(daily=7)},  # beside the 30 days
        {"retain_days": None, "keep": Keep(daily=-1)},
    ],
)
def test_an_impossible_policy_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        policy.check_policy(a_policy(**changes))
    assert caught.value.hint


def test_a_policy_is_stored_in_one_form() -> None:
    stored = policy.check_policy(a_policy(name="n\u00e4chtlich", hours=(12, 0, 12), weekdays=(4, 0)))
    assert stored.hours == (0, 12)
    assert stored.weekdays == (0, 4)
    assert policy.check_policy(stored) == stored
    assert policy.check_policy(a_policy(retain_days=65_536)).retain_days == 65_536


def test_hours_and_weekdays_are_read_as_people_write_them() -> None:
    assert policy.parse_hours("0,6,12-14") == (0, 6, 12, 13, 14)
    assert policy.parse_hours("22-1") == (0, 1, 22, 23)
    assert policy.parse_weekdays("mon-fri") == (0, 1, 2, 3, 4)
    assert policy.parse_weekdays("Saturday-mon") == (0, 5, 6)
    assert policy.parse_weekdays("daily") == tuple(range(7))
    for wrong in ("", "24", "1,,2", "x", "-1", "1-"):
        with pytest.raises(BadRequest):
            policy.parse_hours(wrong)
    for wrong in ("", "noday", "mon-", "1"):
        with pytest.raises(BadRequest):
            policy.parse_weekdays(wrong)


# -- what is let go -------------------------------------------------------------------------------

DISK = DiskId("d-a")


def automatic(sequence: int, created: str = "2026-06-01 02:00", **changes: Any) -> Snapshot:
    return a_snapshot(DISK, sequence, automatic=True, created_at=at(created), **changes)


def test_snapshots_expire_by_their_own_time_and_manual_ones_never() -> None:
    old, young = automatic(1, expires_at=100.0), automatic(2, expires_at=300.0)
    manual, newest = a_snapshot(DISK, 3), automatic(4, expires_at=300.0)
    assert policy.expired([old, young, manual, newest], 200.0, active=True) == [old.id]
    assert policy.expired([old, young, manual, newest], 300.0, active=False) == [old.id, young.id, newest.id]


def test_the_last_snapshot_of_a_protected_disk_never_expires() -> None:
    one, two = automatic(1, expires_at=1.0), automatic(2, expires_at=1.0)
    assert policy.expired([one, two], 9.0, active=True) == [one.id]
    assert policy.expired([one, two], 9.0, active=False) == [one.id, two.id]
    # A failed attempt after it is no snapshot to fall back on.
    failed = automatic(3, state=State.FAILED)
    assert policy.expired([one, two, failed], 9.0, active=True) == [one.id]


def test_a_locked_snapshot_neither_expires_nor_makes_room() -> None:
    locked, free = automatic(1, expires_at=1.0, locked_until=50.0), automatic(2, expires_at=1.0)
    assert policy.expired([locked, free], 49.0, active=False) == [free.id]
    assert policy.evictable([free, locked], 49.0) == [free]
    assert policy.expired([locked, free], 50.0, active=False) == [locked.id, free.id]


def test_keeping_by_count_leaves_the_last_of_each_period() -> None:
    rule = policy.retention(a_policy(retain_days=None, keep=Keep(last=2, daily=3, monthly=2)))
    days = ["2026-04-30", "2026-05-30", "2026-05-31", "2026-06-01", "2026-06-02", "2026-06-03"]
    made = [
        automatic(2 * n + half, f"{day} {hour}:00", retention=rule)
        for n, day in enumerate(days)
        for half, hour in enumerate(("02", "14"))
    ]
    gone = set(policy.expired(made, at("2026-06-04 00:00"), active=True))
    left = [datetime.fromtimestamp(one.created_at, BERLIN).strftime("%m-%d %H") for one in made if one.id not in gone]
    # The two newest; the last of 3 days; the last of 2 months (May's is also within).
    assert left == ["05-31 14", "06-01 14", "06-02 14", "06-03 02", "06-03 14"]


def test_each_snapshot_follows_the_rule_that_it_was_made_under() -> None:
    strict = policy.retention(a_policy(retain_days=None, keep=Keep(last=1)))
    loose = policy.retention(a_policy(retain_days=None, keep=Keep(last=10)))
    made = [automatic(1, retention=loose), automatic(2, retention=strict), automatic(3, retention=strict)]
    assert policy.expired(made, 1e10, active=True) == [made[1].id]


@settings(deadline=None)
@given(counts=st.tuples(*(st.integers(0, 5) for _ in range(5))), size=st.integers(0, 60), seed=st.integers(0, 99))
def test_letting_go_twice_is_letting_go_once(counts: tuple[int, ...], size: int, seed: int) -> None:
    keep = Keep(*counts)
    rule = "" if keep.empty else policy.retention(a_policy(retain_days=None, keep=keep))
    start = at("2026-01-01 00:00") + seed * 1234.0
    made = [a_snapshot(DISK, n, automatic=True, created_at=start + n * 7 * HOUR_S, retention=rule) for n in range(size)]
    gone = policy.expired(made, 1e12, active=True)
    left = [one for one in made if one.id not in gone]
    assert policy.expired(left, 1e12, active=True) == []
    if not keep.empty:
        assert len(left) <= max(1, sum(counts))


def test_a_year_of_two_hundred_disks_under_ten_policies_keeps_exactly_what_the_rules_say() -> None:
    """Every hour of a year is looked at, every day is tidied; what must be left is worked out apart from that."""
    zones = ("Europe/Berlin", "America/New_York", "Asia/Tokyo", "UTC", "Australia/Lord_Howe")
    plans = [
        a_policy(
            name=f"policy-{n}",
            hours=(n, n + 12) if n % 2 else (2,),
            weekdays=(0, 1, 2, 3, 4) if n % 3 == 0 else (0, 1, 2, 3, 4, 5, 6),
            timezone=zones[n % 5],
            retain_days=5 + n,
        )
        for n in range(10)
    ]
    start, end = at("2026-01-01T00:00Z"), at("2027-01-01T00:00Z")
    kept: dict[int, list[Snapshot]] = {disk: [] for disk in range(200)}
    number, last = 0, start
    while last < end:
        now = last + HOUR_S
        due = [policy.decide_due(plan, last, now, HOUR_S + 1) for plan in plans]
        assert not any(one.missed for one in due)
        for disk, mine in kept.items():
            plan = plans[disk % 10]
            if due[disk % 10].run is not None:
                number += 1
                name = policy.automatic_name(plan, now, [one.name for one in mine[-4:]])
                expires = policy.expires_at(plan, now)
                mine.append(a_snapshot(DISK, number, automatic=True, created_at=now, expires_at=expires, name=name))
            if now % DAY_S == 0:
                gone = set(policy.expired(mine, now, active=True))
                mine[:] = [one for one in mine if one.id not in gone]
        last = now
    for disk, mine in kept.items():
        plan = plans[disk % 10]
        ran = {-(-moment // HOUR_S) * HOUR_S for moment in policy.due_times(plan, start, end)}
        assert {one.created_at for one in mine} == {m for m in ran if m + DAY_S * int(plan.retain_days or 0) > end}
        assert len({one.name for one in mine}) == len(mine)

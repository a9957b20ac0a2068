"""What is unusual about a disk's changes, on made-up histories of steady, rhythmic, growing and attacked disks."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvsnap.alarm import Alarm, Change, Level
from hvsnap.capture.unusual import HISTORY_MAX, Rules, is_news, judge

MIB, GIB = 1 << 20, 1 << 30
RULES = Rules()
HOUR_S = 3600.0


def a_change(data_bytes: float, share: float = 0.4, hours: float | None = 1.0) -> Change:
    return Change(0.0, hours, int(data_bytes), int(data_bytes * share))


def alarms(history: list[Change], rules: Rules = RULES) -> list[tuple[int, Alarm]]:
    """Return the alarms of a life, each change judged by those before it, with their numbers."""
    found = [(number, judge(rules, history[:number], history[number])) for number in range(len(history))]
    return [(number, alarm) for number, alarm in found if alarm is not None]


def a_life(random: Random, hours: int, of_hour: dict[int, float], *, share: float = 0.4) -> list[Change]:
    """Return hourly changes: so many bytes in each hour of the day, give or take a half, compressing more or less."""
    life = [replace(a_change(20 * GIB, share), hours=None)]
    for hour in range(hours):
        data = of_hour.get(hour % 24, 10 * MIB) * random.uniform(0.5, 1.5)
        life.append(a_change(data, share * random.uniform(0.7, 1.2)))
    return life


BUSY_DAYS = dict.fromkeys(range(8, 18), 3.0 * GIB)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("of_hour", [{}, dict.fromkeys(range(24), 2.0 * GIB), BUSY_DAYS, {3: 30.0 * GIB}])
def test_steady_disks_and_disks_with_days_and_nights_raise_an_alarm_twice_at_most(
    of_hour: dict[int, float], seed: int
) -> None:
    """The first nights' backups, say, before the second highest of the history knows them; and never again."""
    found = alarms(a_life(Random(seed), 24 * 14, of_hour))
    assert len(found) <= 2
    assert all(number <= 3 * 24 and alarm.level is Level.WARNING for number, alarm in found)


@pytest.mark.parametrize("seed", range(20))
def test_a_disk_that_grows_busier_by_and_by_raises_no_alarm(seed: int) -> None:
    random = Random(seed)
    life = [a_change(GIB * 1.02**day * random.uniform(0.5, 1.5), hours=24.0) for day in range(300)]
    assert alarms(life) == []


def test_a_quiet_disk_may_do_something_now_and_then() -> None:
    life = [a_change(3 * MIB) for _ in range(50)] + [a_change(RULES.min_bytes - 1, share=1.0)]
    assert alarms(life) == []


def test_a_large_upgrade_is_a_warning_once_and_does_not_blind_for_what_comes_after() -> None:
    life = [a_change(GIB) for _ in range(50)]
    upgraded = [*life, a_change(12 * GIB, share=0.5), *life]
    assert [(number, alarm.level) for number, alarm in alarms(upgraded)] == [(50, Level.WARNING)]
    assert judge(RULES, upgraded, a_change(12 * GIB, share=1.0)) is not None


@pytest.mark.parametrize("hours", [1.0, 6.0, 24.0, 168.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_disk_being_encrypted_is_a_severe_alarm_however_often_one_looks(hours: float, seed: int) -> None:
    random = Random(seed)
    life = [replace(a_change(40 * GIB), hours=None)]
    life += [a_change(2 * GIB * random.uniform(0.5, 1.5), random.uniform(0.2, 0.6), hours) for _ in range(30)]
    attack = a_change(25 * GIB, share=0.98, hours=hours)
    alarm = judge(RULES, life, attack)
    assert alarm is not None
    assert (alarm.level, alarm.faster, alarm.denser) == (Level.SEVERE, True, True)
    assert alarm.usual_bytes_h < 3 * GIB / hours + 1 < alarm.changed_bytes_h
    assert alarm.usual_share <= 0.6
    assert alarm.stored_share > 0.95
    # Encrypted slowly, so that no hour changes more than another: what no longer compresses tells.
    slow = judge(RULES, life, a_change(2 * GIB, share=0.98, hours=hours))
    assert slow is not None
    assert (slow.level, slow.faster, slow.denser) == (Level.WARNING, False, True)


def test_a_disk_whose_data_never_compressed_is_judged_by_its_rate_alone() -> None:
    films = [replace(a_change(100 * GIB, share=0.99), hours=None)] + [a_change(20 * MIB, share=0.3) for _ in range(20)]
    alarm = judge(RULES, films, a_change(30 * GIB, share=0.99))
    assert alarm is not None
    assert (alarm.level, alarm.denser) == (Level.WARNING, False)


def test_another_interval_is_no_other_rate() -> None:
    """A database rewrites the same blocks: in a day not 24 times as many as in an hour, nor in a minute a 60th."""
    daily = [a_change(4 * GIB, hours=24.0) for _ in range(20)]
    assert judge(RULES, daily, a_change(4 * GIB, hours=1.0)) is None
    hourly = [a_change(4 * GIB) for _ in range(20)]
    assert judge(RULES, hourly, a_change(100 * GIB, hours=72.0)) is None
    assert judge(RULES, hourly, a_change(4 * GIB, hours=0.01)) is None


def test_what_is_not_judged() -> None:
    life, attack = [a_change(GIB) for _ in range(RULES.history_min)], a_change(90 * GIB, share=1.0)
    assert judge(RULES, life, attack) is not None
    assert judge(RULES, life[1:], attack) is None
    assert judge(RULES, life, replace(attack, hours=None)) is None
    assert judge(replace(RULES, enabled=False), life, attack) is None
    assert judge(RULES, [replace(one, hours=None) for one in life], attack) is None
    assert judge(RULES, life, a_change(0, 0)) is None


@given(st.integers(0, 2**32), st.sampled_from([0.5, 1.0, 2.0, 3.0]))
@settings(max_examples=40, deadline=None)
def test_a_new_habit_is_an_alarm_twice_at_most_whatever_the_disk_does(seed: int, spread: float) -> None:
    """The bound that the second highest gives: two of any height, and nothing up to that height is news any more."""
    random = Random(seed)
    life = [a_change(GIB * random.lognormvariate(0, spread), random.uniform(0, 1)) for _ in range(60)]
    height, share = GIB * random.uniform(1, 1000), random.uniform(0, 1)
    habit = [a_change(height, share) for _ in range(50)]
    assert len([number for number, _ in alarms([*life, *habit]) if number >= len(life)]) <= 2


@given(st.lists(st.tuples(st.integers(0, 2**44), st.integers(0, 2**44), st.floats(0, 1e5) | st.none()), max_size=30))
@settings(max_examples=200, deadline=None)
def test_any_history_can_be_judged(rows: list[tuple[int, int, float | None]]) -> None:
    life = [Change(0.0, hours, data, stored) for data, stored, hours in rows]
    for _number, alarm in alarms(life, replace(RULES, history_min=2, min_bytes=1)):
        assert 0 <= alarm.stored_share <= 1
        assert alarm.faster or alarm.denser
        assert (alarm.level is Level.SEVERE) == (alarm.faster and alarm.denser)


def test_only_the_recent_past_counts() -> None:
    old = [a_change(100 * GIB, 1.0) for _ in range(5)]
    assert judge(RULES, [*old, *[a_change(GIB)] * HISTORY_MAX], a_change(90 * GIB, 1.0)) is not None
    assert judge(RULES, [*old, *[a_change(GIB)] * (HISTORY_MAX - 5)], a_change(90 * GIB, 1.0)) is None


def test_an_alarm_is_told_once_and_again_when_it_gets_worse() -> None:
    warning = Alarm(Level.WARNING, True, False, 1, 0, 0, 0)
    severe = replace(warning, level=Level.SEVERE, denser=True)
    assert is_news(warning, None)
    assert not is_news(warning, warning)
    assert is_news(severe, warning)
    assert not is_news(severe, severe)
    assert not is_news(warning, severe)
    assert is_news(warning, replace(severe, acknowledged_at=5.0))

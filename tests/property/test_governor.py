"""The governor's decisions against simulated guests, and the bucket that carries them out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvsnap.capture.governor import (
    CEILING_BYTES_S,
    FLOOR_BYTES_S,
    FLOOR_LOOKS,
    INTERVAL_S,
    MIB,
    Course,
    compare,
    requests,
    since,
    steer,
    together,
)
from hvsnap.capture.throttle import BURST_S, Throttle
from hvsnap.model import DiskActivity

FULL_SPEED = 500.0 * MIB

slowdowns = st.one_of(st.none(), st.floats(0.01, 1000))
budgets = st.floats(0.1, 1000)
counters = st.integers(0, 2**50)
activities = st.builds(DiskActivity, *[counters] * 6)


def simulated(budget_pct: float, looks: int, feels: Callable[[int, float], float | None]) -> list[tuple[Course, float]]:
    """Return each look's course, and what was read a second before it, for a guest that ``feels`` so much."""
    course, seen = Course(), []
    for number in range(looks):
        read = FULL_SPEED if course.rate_bytes_s is None else min(FULL_SPEED, course.rate_bytes_s)
        course = steer(course, budget_pct, feels(number, read), read)
        seen.append((course, read))
    return seen


# -- steering -------------------------------------------------------------------------------------


@given(budgets, st.lists(st.tuples(slowdowns, st.floats(0, 1e10)), max_size=60))
def test_a_rate_is_never_below_the_floor_whatever_is_seen(
    budget_pct: float, looks: list[tuple[float | None, float]]
) -> None:
    course = Course()
    for slowdown, read in looks:
        course = steer(course, budget_pct, slowdown, read)
        assert course.rate_bytes_s is None or FLOOR_BYTES_S <= course.rate_bytes_s <= CEILING_BYTES_S
        assert course.tolerated >= 1


@given(budgets, st.lists(st.tuples(slowdowns, st.floats(0, 1e10)), max_size=60))
def test_a_guest_within_its_budget_or_idle_never_slows_its_capture_down(
    budget_pct: float, looks: list[tuple[float | None, float]]
) -> None:
    course = Course()
    for slowdown, read in looks:
        within = None if slowdown is None else min(slowdown, 1 + budget_pct / 100)
        course = steer(course, budget_pct, within, read)
        assert course.rate_bytes_s is None


@given(budgets, st.floats(1.0, 1000))
def test_what_reading_is_not_the_cause_of_holds_no_capture_for_long(budget_pct: float, slowdown: float) -> None:
    """However much the guest suffers: if it does so at the floor, too, the capture is soon as fast as before."""
    courses = [course for course, _read in simulated(budget_pct, 200, lambda _number, _read: slowdown)]
    assert courses[-1].rate_bytes_s is None
    assert sum(course.rate_bytes_s == FLOOR_BYTES_S for course in courses) <= FLOOR_LOOKS + 2


@given(budgets, st.lists(slowdowns, max_size=40))
def test_a_guest_that_falls_idle_is_read_at_full_speed_in_the_end(
    budget_pct: float, before: list[float | None]
) -> None:
    def feels(number: int, _read: float) -> float | None:
        return before[number] if number < len(before) else None

    assert simulated(budget_pct, len(before) + 50, feels)[-1][0].rate_bytes_s is None


@given(st.floats(5, 50), st.floats(1.0, 20.0))
def test_a_guest_that_suffers_from_reading_is_brought_within_its_budget(budget_pct: float, harm: float) -> None:
    """The guest's suffering grows with the rate, to ``1 + harm`` at full speed: the mean over a minute is in budget."""

    def feels(_number: int, read: float) -> float:
        return 1 + harm * read / FULL_SPEED

    seen = simulated(budget_pct, 120, feels)[20:]
    mean = sum(feels(0, read) for _course, read in seen) / len(seen)
    at_floor = feels(0, FLOOR_BYTES_S)
    assert mean <= max(at_floor, 1.0) * (1 + budget_pct / 100) * 1.05
    if at_floor < 1 + budget_pct / 200 and harm > budget_pct / 50:
        # And it is not slower than it must be: half of what the budget has room for is used.
        assert mean - 1 >= budget_pct / 100 / 2


@pytest.mark.parametrize("harm", [0.5, 2.0, 10.0])
def test_a_tight_budget_lets_less_be_read_than_a_loose_one(harm: float) -> None:
    read = [
        sum(
            rate * INTERVAL_S for _course, rate in simulated(budget, 120, lambda _n, rate: 1 + harm * rate / FULL_SPEED)
        )
        for budget in (2.0, 10.0, 50.0, 2000.0)
    ]
    assert all(one <= other for one, other in pairwise(read))
    assert read[0] < read[1] < read[-1]
    assert read[-1] == 120 * INTERVAL_S * FULL_SPEED


def test_the_tolerance_that_a_burst_of_the_guest_earned_is_lost_again() -> None:
    burst = 20

    def feels(number: int, read: float) -> float:
        return 20.0 if number < burst else 1 + 3 * read / FULL_SPEED

    seen = simulated(10.0, 240, feels)
    assert max(course.tolerated for course, _read in seen) > 10
    assert seen[-1][0].tolerated < 1.1


# -- comparing ------------------------------------------------------------------------------------


@given(activities, activities)
def test_what_was_done_in_between_is_the_difference_or_unknown(one: DiskActivity, more: DiskActivity) -> None:
    assert since(one, together(one, more)) == more
    if requests(more):
        assert since(together(one, more), one) is None


@given(activities.filter(lambda one: one.reads > 5 and one.read_ns > 0), st.integers(1, 1000), st.floats(0.1, 50))
def test_requests_that_take_longer_are_a_slowdown_and_more_of_them_are_none(
    rest: DiskActivity, count: int, factor: float
) -> None:
    mean_ns = rest.read_ns / rest.reads
    now = DiskActivity(reads=count * 1000, read_ns=round(mean_ns * factor * count * 1000))
    found = compare([(rest, now)])
    assert found.requests == count * 1000
    assert found.slowdown == pytest.approx(factor, rel=0.01, abs=1 / mean_ns)


def test_a_kind_of_request_that_was_not_seen_at_rest_is_left_out() -> None:
    rest = DiskActivity(writes=100, write_ns=100_000)
    now = DiskActivity(writes=10, write_ns=20_000, flushes=50, flush_ns=10**9, reads=7, read_ns=10**9)
    assert compare([(rest, now)]).requests == 10
    assert compare([(rest, now)]).slowdown == 2.0
    assert compare([(rest, DiskActivity(flushes=5, flush_ns=5))]).slowdown is None
    assert compare([(DiskActivity(), now)]).slowdown is None
    assert compare([]).slowdown is None


# -- the bucket -----------------------------------------------------------------------------------


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


lengths = st.integers(1, 4 * MIB)
steps = st.lists(st.tuples(lengths, st.floats(0, 2)), min_size=1, max_size=80)


@given(steps, st.floats(MIB, 100 * MIB), st.sampled_from([None, 2.0 * MIB]))
def test_a_bucket_gives_no_more_than_its_rate_and_that_of_the_one_above(
    steps: list[tuple[int, float]], rate: float, above_rate: float | None
) -> None:
    time = Time()
    above = Throttle(above_rate, clock=time)
    throttle = Throttle(rate, above, clock=time)
    given_out: list[tuple[float, int]] = []
    for length, pause_s in steps:
        time.now += pause_s
        if not throttle.take(length):
            given_out.append((time.now, length))
    assert throttle.taken_bytes == above.taken_bytes == sum(length for _at, length in given_out)
    slowest = min(rate, above_rate or rate)
    for first, (start, _length) in enumerate(given_out):
        total = 0
        for at, length in given_out[first:]:
            assert total <= slowest * (at - start + BURST_S) + 4 * MIB
            total += length


@given(st.lists(lengths, min_size=1, max_size=30), st.floats(MIB, 100 * MIB))
def test_whoever_waits_as_long_as_told_gets_it_and_nobody_for_ever(wanted: list[int], rate: float) -> None:
    time = Time()
    throttle = Throttle(rate, clock=time)
    for length in wanted:
        while pause_s := throttle.take(length):
            time.now += pause_s * 1.0001 + 1e-9
    assert time.now <= sum(wanted) / rate * 1.001 + 0.001


def test_a_bucket_without_a_rate_makes_nobody_wait_and_a_new_one_counts_from_now_on() -> None:
    time = Time()
    throttle = Throttle(clock=time)
    assert [throttle.take(100 * MIB) for _ in range(5)] == [0.0] * 5
    throttle.set_rate(10 * MIB)
    assert throttle.take(20 * MIB) == 0
    assert throttle.take(1) == pytest.approx(2.0)
    throttle.set_rate(20 * MIB)
    assert throttle.take(1) == pytest.approx(1.0)
    throttle.set_rate(None)
    assert throttle.take(1) == 0


def test_a_thread_that_waits_goes_on_when_the_rate_rises_and_ends_when_it_is_told_to() -> None:
    throttle, stop, done = Throttle(1.0), threading.Event(), []
    assert throttle.wait(100, stop)
    threads = [threading.Thread(target=lambda: done.append(throttle.wait(100, stop))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert not done  # at a byte a second, a hundred of them overdrawn
    throttle.set_rate(None)
    for thread in threads:
        thread.join(10)
    assert done == [True, True]
    throttle.set_rate(1.0)
    assert throttle.wait(100, stop)
    waiting = threading.Thread(target=lambda: done.append(throttle.wait(100, stop)))
    waiting.start()
    stop.set()
    waiting.join(10)
    assert done == [True, True, False]

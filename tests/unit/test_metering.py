"""Sums over samples, whatever is averaged away; what a trend says of a device."""

from __future__ import annotations

from math import floor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvsnap.metering import (
    DAY_S,
    FULL_DAYS_MAX,
    GIB,
    HOUR_S,
    TIERS,
    Sample,
    cost,
    days_to_full,
    gib_hours,
    meter,
    resampled,
    thin,
)

NOW = 1_780_000_123.5


@st.composite
def histories(draw: st.DrawFn) -> list[Sample]:
    """Some years, or days, of samples; the ages are such that all tiers and their borders are met."""
    span = draw(st.sampled_from([HOUR_S, 3 * DAY_S, 40 * DAY_S, 900 * DAY_S]))
    values = draw(st.dictionaries(st.integers(0, int(span)), st.integers(0, 1 << 44), max_size=25))
    return [Sample(NOW - age, values[age]) for age in sorted(values, reverse=True)]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(histories(), st.integers(0, 500), st.integers(1, 100))
def test_s9_2_what_is_averaged_away_changes_no_sum_of_whole_parts(series: list[Sample], ago: int, long: int) -> None:
    week = TIERS[-1][1]
    since = (floor(NOW / week) - ago) * week
    thinned = thin(series, NOW)
    for until in (min(since + long * week, NOW), NOW):
        if since < until and (until == NOW or until % week == 0):
            before, after = meter(series, since, until).byte_s, meter(thinned, since, until).byte_s
            assert after == pytest.approx(before, rel=1e-9, abs=(until - since))
    assert thin(thinned, NOW) == thinned
    assert [one.at for one in thinned] == sorted({one.at for one in thinned})
    recent = NOW - TIERS[0][0]
    assert [one for one in thinned if one.at > recent + HOUR_S and one in series] == [
        one
        for number, one in enumerate(series)
        if one.at > recent + HOUR_S and one.value != (series[number - 1].value if number else None)
    ]


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(histories(), st.integers(1, 30))
def test_thinning_day_by_day_keeps_the_sum_and_stays_small(series: list[Sample], days: int) -> None:
    step_by_step, week = series, TIERS[-1][1]
    for day in range(days):
        step_by_step = thin(step_by_step, NOW + day * DAY_S)
    since, until = floor((NOW - 1000 * DAY_S) / week) * week, NOW + days * DAY_S
    assert meter(step_by_step, since, until).byte_s == pytest.approx(
        meter(series, since, until).byte_s, rel=1e-9, abs=3 * (until - since)
    )


def test_s9_2_five_hundred_days_of_samples_become_hours_days_and_weeks() -> None:
    series: list[Sample] = []
    now = NOW
    for hour in range(500 * 24):
        now = NOW + hour * HOUR_S
        series += [Sample(now + minute * 60.0, hour * 1000 + minute) for minute in (0, 20, 40)]
        if hour % 240 == 239:
            series = thin(series, now)
    series = thin(series, now)
    assert 48 * 3 + 29 * 24 < len(series) < 49 * 3 + 30 * 24 + 400 + 20


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(histories(), st.integers(1, 50))
def test_a_plot_s_points_have_the_sum_of_the_series(series: list[Sample], count: int) -> None:
    since, until = NOW - 50 * DAY_S, NOW
    points = resampled(series, since, until, count)
    width = (until - since) / count
    assert len(points) == count
    whole = meter(series, since, until).byte_s
    assert sum(point.value for point in points) * width == pytest.approx(whole, rel=1e-9, abs=until - since)


def test_s9_3_prepaid_capacity_is_deducted_first_at_every_moment() -> None:
    series = [Sample(0.0, 4 * GIB), Sample(10 * HOUR_S, GIB), Sample(20 * HOUR_S, 6 * GIB)]
    found = meter(series, 0.0, 30 * HOUR_S, 2 * GIB)
    assert gib_hours(found.byte_s) == 40 + 10 + 60
    assert gib_hours(found.billable_byte_s) == 20 + 0 + 40
    assert (found.peak, found.last) == (6 * GIB, 6 * GIB)
    assert cost(60.0, 0.73) == pytest.approx(0.06)
    # Half an interval, and one that begins before anything was known.
    assert gib_hours(meter(series, 5 * HOUR_S, 15 * HOUR_S).byte_s) == 20 + 5
    assert gib_hours(meter(series, -10 * HOUR_S, HOUR_S).byte_s) == 4
    assert meter([], 0.0, 1.0).byte_s == 0


def a_growth(per_day: float, days: float = 7.0, swing: int = 0) -> list[Sample]:
    hours = int(days * 24)
    start = NOW - hours * HOUR_S
    return [
        Sample(start + hour * HOUR_S, round(50 * GIB + per_day * hour / 24 + (hour % 24 < 12) * swing))
        for hour in range(hours)
    ]


def test_s9_2_the_days_to_full_follow_the_trend_of_the_last_week() -> None:
    assert days_to_full(a_growth(GIB), 30 * GIB, NOW) == pytest.approx(30, rel=0.05)
    assert days_to_full(a_growth(GIB, swing=GIB // 2), 30 * GIB, NOW) == pytest.approx(30, rel=0.2)
    grown_once = [Sample(NOW - 100 * DAY_S, 10 * GIB), Sample(NOW - 60 * DAY_S, 50 * GIB)]
    assert days_to_full(grown_once + a_growth(GIB / 2), 30 * GIB, NOW) == pytest.approx(60, rel=0.05)
    assert days_to_full(grown_once, 30 * GIB, NOW) is None
    assert days_to_full(a_growth(-GIB), 30 * GIB, NOW) is None
    assert days_to_full(a_growth(GIB, days=0.2), 30 * GIB, NOW) is None
    assert days_to_full(a_growth(GIB), round(2 * FULL_DAYS_MAX) * GIB, NOW) is None
    assert days_to_full([], 30 * GIB, NOW) is None
    assert days_to_full(a_growth(GIB), 0, NOW) == 0

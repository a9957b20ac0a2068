"""How much was stored over time, from samples: sums, averages, what it costs, when a device will be full. Pure.

A series is a step function: each sample holds until the next one, the last one to this day, and before the first
there is nothing. So what does not change needs no sample, and a daemon that was away has missed nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor, inf

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
GIB = 1 << 30
MONTH_HOURS = 730.0
"""Hours of a month as clouds bill it: a twelfth of 365 days."""

TIERS = ((2 * DAY_S, HOUR_S), (31 * DAY_S, DAY_S), (400 * DAY_S, 7 * DAY_S))
"""Samples older than this (s) are averaged over so long (s); each is a multiple of the one before."""

TREND_S = 7 * DAY_S
TREND_MIN_S = 6 * HOUR_S
FULL_DAYS_MAX = 3650.0


@dataclass(frozen=True, slots=True)
class Sample:
    """So many bytes from ``at`` on (s since the epoch, UTC)."""

    at: float
    value: int


Series = Sequence[Sample]
"""Samples, ascending by time."""


@dataclass(frozen=True, slots=True)
class Metered:
    """What was stored in an interval: byte-seconds, those beyond what is prepaid, the most, and the last."""

    byte_s: float
    billable_byte_s: float
    peak: int
    last: int


def steps(series: Series, since: float, until: float) -> Iterator[tuple[float, float, int]]:
    """Yield ``(from, to, value)`` of a series within an interval, all of it, in order."""
    value, at = 0, since
    for sample in series:
        if sample.at >= until:
            break
        if sample.at > at:
            yield at, sample.at, value
            at = sample.at
        value = sample.value
    if at < until:
        yield at, until, value


def meter(series: Series, since: float, until: float, prepaid_bytes: float = 0.0) -> Metered:
    """Sum a series up over an interval."""
    total = billable = 0.0
    peak = last = 0
    for start, end, value in steps(series, since, until):
        total += value * (end - start)
        billable += max(0.0, value - prepaid_bytes) * (end - start)
        peak, last = max(peak, value), value
    return Metered(total, billable, peak, last)


def resampled(series: Series, since: float, until: float, count: int) -> list[Sample]:
    """Return the averages of ``count`` equal parts of an interval."""
    width = (until - since) / count
    edges = [since + width * number for number in range(count)] + [until]
    # One pass over the series for each part would be slow: a part sees only what can matter to it.
    found, first = [], 0
    for start, end in pairwise(edges):
        while first + 1 < len(series) and series[first + 1].at <= start:
            first += 1
        byte_s = meter(series[first:], start, end).byte_s
        found.append(Sample(start, round(byte_s / (end - start))))
    return found


def thin(series: Series, now: float) -> list[Sample]:
    """Return a series with the details of its past averaged away, the coarser the older (:data:`TIERS`).

    The sum over any interval that begins and ends with whole parts stays what it was, but for rounding to bytes.
    """
    bounds = [floor((now - age) / width) * width for age, width in TIERS]
    kept: list[Sample] = []
    place, value = 0, 0
    while place < len(series):
        at = series[place].at
        width = next(
            (width for bound, (_, width) in zip(reversed(bounds), reversed(TIERS), strict=True) if at < bound), 0
        )
        if not width:
            value = series[place].value
            _put(kept, Sample(at, value))
            place += 1
            continue
        start = floor(at / width) * width
        end, moment, total = start + width, start, 0.0
        while place < len(series) and series[place].at < end:
            total += value * (series[place].at - moment)
            moment, value = series[place].at, series[place].value
            place += 1
        _put(kept, Sample(start, round((total + value * (end - moment)) / width)))
        _put(kept, Sample(end, value))
    return kept


def _put(kept: list[Sample], sample: Sample) -> None:
    """Append a sample: in the place of one of the same moment, and only if it says something new."""
    if kept and kept[-1].at >= sample.at:
        kept.pop()
    if not kept or kept[-1].value != sample.value:
        kept.append(sample)


def days_to_full(used: Series, free_bytes: int, now: float) -> float | None:
    """Return in how many days a device is full if it goes on as in the last week.

    None: it does not grow, not for ten years, or what is known is too little to tell.
    """
    known = [sample for sample in used if sample.at <= now]
    since = max(now - TREND_S, known[0].at if known else inf)
    if now - since < TREND_MIN_S:
        return None
    count = max(2, int((now - since) / HOUR_S))
    points = resampled(known, since, now, count)
    # Least squares over hourly averages: a policy's daily saw-tooth tells nothing of a trend.
    middle = (count - 1) / 2
    mean = sum(point.value for point in points) / count
    above = sum((number - middle) * (point.value - mean) for number, point in enumerate(points))
    slope = above / sum((number - middle) ** 2 for number in range(count)) / ((now - since) / count)
    if slope <= 0:
        return None
    days = free_bytes / slope / DAY_S
    return days if days <= FULL_DAYS_MAX else None


def gib_hours(byte_s: float) -> float:
    """Return byte-seconds as GiB·hours."""
    return byte_s / GIB / HOUR_S


def cost(billable_gib_hours: float, price_per_gib_month: float) -> float:
    """Return what GiB·hours cost at a price for a GiB and month."""
    return billable_gib_hours / MONTH_HOURS * price_per_gib_month

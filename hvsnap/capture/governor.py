"""How fast a capture may read so that its guest suffers little: pure decisions on what the guest's requests take.

The guest's requests while it is read are compared with the same kinds of requests at rest. Beyond the budget the reader
is slowed down at once, within it it gets faster step by step, as TCP does it. Two things keep a capture from being
held for ever: the floor, and that what reading is not the cause of is tolerated: what the guest still feels at
the floor is the price of holding the instant, or its own doing, and slowing down further cannot help it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace

from hvsnap.model import DiskActivity

MIB = 1 << 20

REST_S = 1.0
"""How long a guest that is at work is watched before its capture begins."""

INTERVAL_S = 0.5
"""How often it is looked at while it is read."""

QUIET_S = 2.0
"""So long is waited for enough requests; a guest that did none in it is idle, one that did few is judged by these."""

FLOOR_BYTES_S = 8 * MIB
"""No capture is slowed down below this: a TiB in a day and a half, two per cent of a processor for zstd and BLAKE3."""

CEILING_BYTES_S = 16 << 30
"""A rate beyond this is none."""

STEP_BYTES_S = MIB
GROWTH = 1.25
CUTS = (0.5, 0.9)
"""What one step leaves at least and at most: a guest only just beyond its budget costs the reader less."""

FLOOR_LOOKS = 3
"""Looks at the floor, one after the other, after which what the guest still feels is tolerated."""

FORGOTTEN = 0.75
"""How much of a tolerance that is not needed any more goes with each look."""

DOUBTED = 0.9
"""What is left of a tolerance with each cut."""

REQUESTS_MIN = 20
"""Requests whose mean latency says something."""

KIND_REQUESTS_MIN = 5
"""Requests of one kind at rest, for those of that kind to be compared with."""


# -- what a guest does ----------------------------------------------------------------------------


def since(before: DiskActivity, now: DiskActivity) -> DiskActivity | None:
    """Return what was done between two looks; None where the counters began anew: another QEMU."""
    differences = [b - a for a, b in zip(astuple(before), astuple(now), strict=True)]
    return None if min(differences) < 0 else DiskActivity(*differences)


def together(one: DiskActivity, other: DiskActivity) -> DiskActivity:
    """Return the sum of two stretches."""
    return DiskActivity(*(a + b for a, b in zip(astuple(one), astuple(other), strict=True)))


def requests(activity: DiskActivity) -> int:
    """Return how many requests were done."""
    return activity.reads + activity.writes + activity.flushes


@dataclass(frozen=True, slots=True)
class Comparison:
    """``requests`` could be compared with those at rest, and took ``slowdown`` times as long; None: there was none."""

    requests: int
    slowdown: float | None


def compare(pairs: Iterable[tuple[DiskActivity, DiskActivity]]) -> Comparison:
    """Compare disks at rest with the same disks now: what their requests took, and would have taken at rest.

    Each kind of request is held against its own mean at rest: more flushes or reads than before are no suffering.
    """
    count, took_ns, expected_ns = 0, 0, 0.0
    for rest, now in pairs:
        for (rest_count, rest_ns), (now_count, now_ns) in zip(_kinds(rest), _kinds(now), strict=True):
            if rest_count >= KIND_REQUESTS_MIN and rest_ns > 0:
                count += now_count
                took_ns += now_ns
                expected_ns += now_count * rest_ns / rest_count
    return Comparison(count, took_ns / expected_ns if expected_ns else None)


def _kinds(activity: DiskActivity) -> tuple[tuple[int, int], ...]:
    return (
        (activity.reads, activity.read_ns),
        (activity.writes, activity.write_ns),
        (activity.flushes, activity.flush_ns),
    )


# -- how fast -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Course:
    """Where the governor stands. ``rate_bytes_s`` is what may be read; None: as fast as it goes.

    ``tolerated`` is the slowdown that reading is not the cause of, ``at_floor`` what was seen there lately.
    ``settling``: it was just slowed down, and what is under way is still hashed and compressed at the old pace.
    """

    rate_bytes_s: float | None = None
    tolerated: float = 1.0
    at_floor: tuple[float, ...] = ()
    settling: bool = False


def steer(course: Course, budget_pct: float, slowdown: float | None, read_bytes_s: float) -> Course:
    """Return the course after one look.

    ``slowdown`` is the guest's at this look (None: it does nothing), ``read_bytes_s`` what was read lately.
    """
    if slowdown is None:
        return _faster(course)
    limit = course.tolerated * (1 + budget_pct / 100)
    if slowdown <= limit:
        # The guest feels less than was tolerated, so that much is not needed any more, if this look was no accident.
        excess = max(0.0, course.tolerated - max(1.0, slowdown))
        tolerated = course.tolerated - excess * FORGOTTEN
        return _faster(replace(course, tolerated=tolerated))
    if course.settling:
        return replace(course, settling=False)
    if course.rate_bytes_s == FLOOR_BYTES_S or read_bytes_s <= FLOOR_BYTES_S:
        return _at_floor(course, slowdown)
    base = read_bytes_s if course.rate_bytes_s is None else min(course.rate_bytes_s, read_bytes_s)
    rate = max(float(FLOOR_BYTES_S), base * min(max(CUTS[0], limit / slowdown), CUTS[1]))
    # A tolerance is doubted with each cut: in the end the floor is reached, and it is found out anew.
    tolerated = 1 + (course.tolerated - 1) * DOUBTED
    return replace(course, rate_bytes_s=rate, tolerated=tolerated, at_floor=(), settling=True)


def _faster(course: Course) -> Course:
    rate = None if course.rate_bytes_s is None else course.rate_bytes_s * GROWTH + STEP_BYTES_S
    if rate is not None and rate > CEILING_BYTES_S:
        rate = None
    return replace(course, rate_bytes_s=rate, at_floor=(), settling=False)


def _at_floor(course: Course, slowdown: float) -> Course:
    """The guest suffers though hardly anything is read: after some looks that is tolerated."""
    seen = (*course.at_floor, slowdown)
    if len(seen) < FLOOR_LOOKS:
        return replace(course, at_floor=seen)
    return replace(course, tolerated=max(1.0, sum(seen) / len(seen)), at_floor=())

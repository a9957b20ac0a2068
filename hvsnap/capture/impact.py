"""What a guest feels of its capture: measured at rest and while its instant is held, and acted on by the governor.

Nothing here ever fails a capture or holds it up: a guest that cannot be looked at is read as fast as it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from hvsnap.capture.governor import (
    INTERVAL_S,
    QUIET_S,
    REQUESTS_MIN,
    REST_S,
    Comparison,
    Course,
    compare,
    requests,
    since,
    steer,
)
from hvsnap.capture.throttle import Throttle
from hvsnap.errors import HvsnapError
from hvsnap.model import DiskActivity, GuestUuid, Impact
from hvsnap.ports import Clock, Hypervisor

log = logging.getLogger(__name__)

LAST_LOOK_S = 2.0
"""How long the last look may take: it is for the record only."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """What a guest did with its disks, by target, in a stretch of time."""

    seconds: float
    disks: Mapping[str, DiskActivity]

    @property
    def requests(self) -> int:
        """Requests of all disks."""
        return sum(requests(disk) for disk in self.disks.values())


@dataclass(frozen=True, slots=True)
class Look:
    """Counters of a guest's disks at one moment."""

    at: float
    disks: Mapping[str, DiskActivity]

    def until(self, later: Look) -> Stretch | None:
        """Return what was done until a later look; None where the counters began anew, or a disk is gone."""
        found = {}
        for target, before in self.disks.items():
            now = later.disks.get(target)
            done = None if now is None else since(before, now)
            if done is None:
                return None
            found[target] = done
        return Stretch(later.at - self.at, found)


class Watch:
    """Watches the guest of one capture, and sets the rate of its readers."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        guest: GuestUuid,
        targets: Sequence[str],
        clock: Clock,
        budget_pct: float,
        limit: Throttle,
    ) -> None:
        """``limit`` is the bucket of all captures together. A budget of 0 lets the guest be measured only."""
        self.throttle = Throttle(above=limit, clock=clock.monotonic)
        self._hypervisor = hypervisor
        self._guest = guest
        self._targets = targets
        self._clock = clock
        self._budget_pct = budget_pct
        self._first: Look | None = None
        self._rest: Stretch | None = None
        self._held: Stretch | None = None
        self._rate_low: float | None = None

    async def begin(self) -> None:
        """Take the first look at a running guest, some time before :meth:`rest`."""
        self._first = await self._look()

    async def rest(self) -> None:
        """Find out what the guest's requests take at rest. A guest that does nothing costs the capture no time."""
        if self._first is None:
            return
        stretch = await self._stretch(self._first)
        if stretch is not None and stretch.requests and self._budget_pct and stretch.seconds < REST_S:
            await asyncio.sleep(REST_S - stretch.seconds)
            stretch = await self._stretch(self._first)
        if stretch is not None and stretch.requests >= REQUESTS_MIN:
            self._rest = stretch

    @contextlib.asynccontextmanager
    async def governing(self, pressed: Callable[[], bool]) -> AsyncIterator[None]:
        """Measure, and govern the reading, for as long as the context lasts; the instant is held.

        ``pressed`` (blocking) tells that space runs short for what the guest writes meanwhile: then nothing is slowed
        down any more, since the sooner it is over the better.
        """
        start = await self._look() if self._rest is not None else None
        if self._rest is None or start is None:
            yield
            return
        work = asyncio.create_task(self._govern_or_let_go(self._rest, start, pressed), name=f"govern {self._guest}")
        try:
            yield
            with contextlib.suppress(TimeoutError):
                self._held = await asyncio.wait_for(self._stretch(start), LAST_LOOK_S)
        finally:
            work.cancel()
            await asyncio.wait([work])
            self.throttle.set_rate(None)

    def impact(self, target: str) -> Impact | None:
        """Return what was measured of one disk; None where there was too little to tell."""
        if self._rest is None or self._held is None or min(self._rest.seconds, self._held.seconds) <= 0:
            return None
        rest, held = self._rest.disks.get(target), self._held.disks.get(target)
        if rest is None or held is None:
            return None
        found = compare([(rest, held)])
        if found.slowdown is None or not _tells(found, self._held.seconds):
            return None
        return Impact(
            rest_iops=round((rest.reads + rest.writes) / self._rest.seconds, 1),
            rest_write_us=_mean_us(rest),
            held_iops=round((held.reads + held.writes) / self._held.seconds, 1),
            held_write_us=_mean_us(held),
            slowdown=round(found.slowdown, 3),
            rate_low_bytes_s=None if self._rate_low is None else round(self._rate_low),
        )

    # -- inside -----------------------------------------------------------------------------------

    async def _govern_or_let_go(self, rest: Stretch, look: Look, pressed: Callable[[], bool]) -> None:
        """Govern; whatever goes wrong with that, the capture goes on at full speed."""
        try:
            await self._govern(rest, look, pressed)
        except Exception:
            log.exception("guest %s: the governor failed, so it is read as fast as it goes", self._guest)
            self.throttle.set_rate(None)

    async def _govern(self, rest: Stretch, look: Look, pressed: Callable[[], bool]) -> None:
        """Look, decide, act, again and again; the decisions are :func:`hvsnap.capture.governor.steer`'s."""
        course, taken = Course(), 0
        while self._budget_pct:
            await asyncio.sleep(INTERVAL_S)
            if await asyncio.to_thread(pressed):
                self.throttle.set_rate(None)
                log.warning("guest %s: space for its writes runs short, so it is read as fast as it goes", self._guest)
                return
            now = await self._look()
            stretch = None if now is None else look.until(now)
            if now is None or stretch is None or not self.throttle.taken_bytes:  # nothing to slow down yet
                look, taken = now or look, self.throttle.taken_bytes
                continue
            found = compare(
                (rest.disks[target], done) for target, done in stretch.disks.items() if target in rest.disks
            )
            if not _tells(found, stretch.seconds):
                continue  # a longer stretch tells more
            read_bytes_s = (self.throttle.taken_bytes - taken) / stretch.seconds
            course = steer(course, self._budget_pct, found.slowdown, read_bytes_s)
            self._apply(course)
            look, taken = now, self.throttle.taken_bytes

    def _apply(self, course: Course) -> None:
        self.throttle.set_rate(course.rate_bytes_s)
        if course.rate_bytes_s is not None:
            self._rate_low = min(course.rate_bytes_s, self._rate_low or course.rate_bytes_s)

    async def _stretch(self, start: Look) -> Stretch | None:
        now = await self._look()
        return None if now is None else start.until(now)

    async def _look(self) -> Look | None:
        """Return the counters now; None where they cannot be had."""
        try:
            return Look(self._clock.monotonic(), await self._hypervisor.activity(self._guest, self._targets))
        except HvsnapError as error:
            log.debug("what guest %s does cannot be seen: %s", self._guest, error.message)
            return None


def _tells(found: Comparison, seconds: float) -> bool:
    """Whether a stretch is enough to judge by: many requests, or few in a time in which there should be many."""
    return found.requests >= REQUESTS_MIN or seconds >= QUIET_S


def _mean_us(activity: DiskActivity) -> float | None:
    return round(activity.write_ns / activity.writes / 1000, 1) if activity.writes else None

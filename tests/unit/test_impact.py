"""Watching a guest while it is captured: what is measured, and what the readers are told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from hvsnap.capture import impact
from hvsnap.capture.governor import FLOOR_BYTES_S, MIB
from hvsnap.capture.impact import Watch
from hvsnap.capture.throttle import Throttle
from hvsnap.errors import HypervisorFailed
from hvsnap.model import DiskActivity, GuestUuid
from tests.service_kit import WEB, FakeHypervisor

REQUESTS = 100


class Time:
    """A clock that a look moves on by as much as the watch slept."""

    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> float:
        return self.at

    def monotonic(self) -> float:
        return self.at


class Working(FakeHypervisor):
    """A guest whose disk does so many requests between two looks, each of so many microseconds."""

    def __init__(self, time: Time, *looks: tuple[int, int]) -> None:
        super().__init__()
        self._time = time
        self._looks = iter(looks)
        self._last = looks[-1]
        self.seen = DiskActivity()
        self.looks = 0
        self.fails = False

    async def activity(self, uuid: GuestUuid, targets: Sequence[str]) -> dict[str, DiskActivity]:
        if self.fails:
            raise HypervisorFailed("the monitor is gone")
        self.looks += 1
        count, us = next(self._looks, self._last)
        self.seen = DiskActivity(writes=self.seen.writes + count, write_ns=self.seen.write_ns + count * us * 1000)
        self._time.at += 0.5
        return dict.fromkeys(targets, self.seen)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impact, "INTERVAL_S", 0.002)
    monkeypatch.setattr(impact, "REST_S", 0.5)


def a_watch(hypervisor: Working, time: Time, budget_pct: float = 10.0, limit: Throttle | None = None) -> Watch:
    return Watch(hypervisor, WEB, ["vda"], time, budget_pct, limit or Throttle(clock=time.monotonic))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0)


async def read(
    watch: Watch, hypervisor: Working, looks: int, pressed: Callable[[], bool] = lambda: False
) -> list[float]:
    """Read as much as is allowed until the guest was looked at so often; return the rates that were set meanwhile."""
    rates: list[float] = []
    wanted = hypervisor.looks + looks
    async with watch.governing(pressed):
        while hypervisor.looks < wanted:
            while not watch.throttle.take(MIB) and watch.throttle.taken_bytes < 10_000 * MIB:
                pass
            if watch.throttle.rate_bytes_s is not None:
                rates.append(watch.throttle.rate_bytes_s)
            await asyncio.sleep(0)
    return rates


async def test_a_guest_that_suffers_is_read_slower_and_what_it_felt_is_told() -> None:
    time = Time()
    guest = Working(time, (0, 0), (REQUESTS, 200), (REQUESTS, 200), *[(REQUESTS // 2, 1000)] * 4, (REQUESTS, 210))
    watch = a_watch(guest, time)
    await watch.begin()
    await watch.rest()
    rates = await read(watch, guest, 4)
    assert rates
    assert min(rates) >= FLOOR_BYTES_S
    felt = watch.impact("vda")
    assert felt is not None
    assert (felt.rest_iops, felt.rest_write_us) == (200.0, 200.0)
    assert felt.held_iops < felt.rest_iops
    assert felt.slowdown > 2
    assert felt.rate_low_bytes_s is not None
    assert FLOOR_BYTES_S <= felt.rate_low_bytes_s <= min(rates)
    assert watch.throttle.rate_bytes_s is None  # whoever reads on is not held by a governor that has ended


@pytest.mark.parametrize(("budget_pct", "us"), [(0.0, 1000), (10.0, 215), (900.0, 1000)])
async def test_within_the_budget_or_without_one_nothing_is_slowed_down_and_all_is_measured(
    budget_pct: float, us: int
) -> None:
    time = Time()
    guest = Working(time, (0, 0), (REQUESTS, 200), (REQUESTS, 200), (REQUESTS, us))
    watch = a_watch(guest, time, budget_pct)
    await watch.begin()
    await watch.rest()
    assert await read(watch, guest, 4 if budget_pct else 0) == []
    felt = watch.impact("vda")
    assert felt is not None
    assert felt.rate_low_bytes_s is None
    assert felt.slowdown == pytest.approx(us / 200, rel=0.2)


async def test_an_idle_guest_is_not_waited_for_not_slowed_down_and_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impact, "REST_S", 1e6)
    time = Time()
    guest = Working(time, (0, 0))
    watch = a_watch(guest, time)
    await watch.begin()
    async with asyncio.timeout(10):
        await watch.rest()
    assert await read(watch, guest, 0) == []
    assert guest.looks == 2
    assert watch.impact("vda") is None


async def test_short_space_for_what_the_guest_writes_ends_all_slowing_down() -> None:
    time = Time()
    guest = Working(time, (0, 0), (REQUESTS, 200), (REQUESTS, 200), (REQUESTS, 2000))
    watch = a_watch(guest, time)
    await watch.begin()
    await watch.rest()
    short = threading.Event()
    async with watch.governing(short.is_set):
        watch.throttle.take(10_000 * MIB)
        await until(lambda: watch.throttle.rate_bytes_s is not None)
        short.set()
        await until(lambda: watch.throttle.rate_bytes_s is None)
        looks = guest.looks
        await asyncio.sleep(0.05)
        assert watch.throttle.rate_bytes_s is None
        assert guest.looks == looks
    assert watch.impact("vda") is not None


async def test_a_guest_that_cannot_be_looked_at_is_captured_all_the_same() -> None:
    time = Time()
    guest = Working(time, (0, 0), (REQUESTS, 200))
    guest.fails = True
    watch = a_watch(guest, time)
    await watch.begin()
    await watch.rest()
    async with watch.governing(lambda: False):
        pass
    assert watch.impact("vda") is None


async def test_looks_that_fail_in_the_middle_and_counters_that_begin_anew_are_passed_over() -> None:
    time = Time()
    guest = Working(time, (0, 0), (1000 * REQUESTS, 200), (REQUESTS, 200), (REQUESTS, 200))
    watch = a_watch(guest, time)
    await watch.begin()
    await watch.rest()
    async with watch.governing(lambda: False):
        await asyncio.sleep(0.02)
        guest.fails = True
        await asyncio.sleep(0.02)
        guest.fails = False
        guest.seen = DiskActivity()  # its QEMU was killed and started again
        looks = guest.looks
        await until(lambda: guest.looks >= looks + 3)
    assert watch.throttle.rate_bytes_s is None
    assert watch.impact("vda") is None


async def test_a_governor_that_breaks_lets_go() -> None:
    def broken() -> bool:
        raise OSError("the directory is gone")

    time = Time()
    watch = a_watch(Working(time, (0, 0), (REQUESTS, 200)), time)
    await watch.begin()
    await watch.rest()
    async with watch.governing(broken):
        watch.throttle.set_rate(1.0)
        await until(lambda: watch.throttle.rate_bytes_s is None)


async def test_all_captures_together_keep_to_the_one_limit() -> None:
    time = Time()
    limit = Throttle(10.0 * MIB, clock=time.monotonic)
    one, other = (a_watch(Working(time, (0, 0)), time, limit=limit) for _ in range(2))
    assert one.throttle.take(20 * MIB) == 0
    assert other.throttle.take(MIB) == pytest.approx(2.0)

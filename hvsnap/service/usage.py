"""What was stored over an interval, and what that costs (SERVICE 9.2, 9.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.usage import DEVICE, HOST
from hvsnap.errors import BadRequest, HvsnapError
from hvsnap.metering import DAY_S, GIB, Metered, Sample, Series, cost, gib_hours, meter, resampled
from hvsnap.model import Disk
from hvsnap.ports import Clock
from hvsnap.service.sampling import Sampler
from hvsnap.service.views import when, when_or_none

INTERVAL_S = 30 * DAY_S
"""What is told of when nobody says since when."""


@dataclass(frozen=True, slots=True)
class Tariff:
    """What a GiB costs for a month, in ``currency`` (0: no price); so many GiB are prepaid."""

    price_per_gib_month: float
    currency: str
    prepaid_gib: float


class UsageReports:
    """Tells what was stored, by the samples."""

    def __init__(self, catalog: Catalog, sampler: Sampler, clock: Clock, tariff: Tariff) -> None:
        self._catalog = catalog
        self._sampler = sampler
        self._clock = clock
        self._tariff = tariff

    async def report(
        self, since: float | None, until: float | None, by: Literal["chain", "host"], points: int
    ) -> wire.Usage:
        """Return what was stored in an interval, with ``points`` averages of each line for a plot.

        Raises :class:`BadRequest` for an interval that has not begun, or ends before it begins.
        """
        now = self._clock.now()
        end = now if until is None else min(until, now)
        # Not before 1970: nothing is known of it, and a calendar ends somewhere.
        start = max(0.0, end - INTERVAL_S if since is None else since)
        if start >= end:
            raise BadRequest("the interval is empty", hint="give a --since before --until, and before now")
        with contextlib.suppress(HvsnapError):  # a full device: what was noted before is told all the same
            await self._sampler.sample()
        series = await self._catalog.usage.series()
        host = series.pop(HOST, [])
        series.pop(DEVICE, None)
        whole = meter(host, start, end, self._tariff.prepaid_gib * GIB)
        total = self._line(HOST, None, host, whole, gib_hours(whole.billable_byte_s), (start, end, points))
        lines = [total] if by == "host" else await self._chains(series, total, (start, end, points))
        return wire.Usage(
            since=when(start),
            until=when(end),
            known_since=when_or_none(host[0].at if host else None),
            by=by,
            currency=self._tariff.currency,
            price_per_gib_month=self._tariff.price_per_gib_month or None,
            prepaid_gib=self._tariff.prepaid_gib,
            lines=lines,
            total=total,
            days_to_full=await self._sampler.days_to_full(),
        )

    async def _chains(
        self, series: dict[str, list[Sample]], total: wire.UsageLine, span: tuple[float, float, int]
    ) -> list[wire.UsageLine]:
        """Return a line for each chain that held anything, the largest first; they share what the host costs.

        A block that chains share counts once for the host and once for each of them, so they share by proportion.
        """
        start, end, _points = span
        metered = {subject: meter(one, start, end) for subject, one in series.items()}
        metered = {subject: one for subject, one in metered.items() if one.byte_s}
        together = sum(one.byte_s for one in metered.values())
        disks = {str(disk.id): disk for disk in await self._catalog.disks(include_released=True)}
        lines = []
        for subject in sorted(metered, key=lambda subject: (-metered[subject].byte_s, subject)):
            share = total.billable_gib_hours * metered[subject].byte_s / together
            lines.append(self._line(subject, disks.get(subject), series[subject], metered[subject], share, span))
        return lines

    def _line(
        self,
        subject: str,
        disk: Disk | None,
        series: Series,
        metered: Metered,
        billable_gib_hours: float,
        span: tuple[float, float, int],
    ) -> wire.UsageLine:
        start, end, points = span
        price = self._tariff.price_per_gib_month
        shown: Sequence[Sample] = resampled(series, start, end, points) if points else []
        return wire.UsageLine(
            subject=subject,
            guest=None if disk is None else disk.guest_name,
            target=None if disk is None else disk.target,
            last_bytes=metered.last,
            mean_bytes=round(metered.byte_s / (end - start)),
            peak_bytes=metered.peak,
            gib_hours=gib_hours(metered.byte_s),
            billable_gib_hours=billable_gib_hours,
            cost=cost(billable_gib_hours, price) if price else None,
            points=[wire.UsagePoint(at=when(point.at), bytes=point.value) for point in shown],
        )

"""One capture of one or several guests' disks: the steps of docs/capture.md, in their order.

Every step is journaled before it is done. Whatever raises here, the caller settles the journal's entries afterwards
(:mod:`hvsnap.capture.settle`), so that there is one way of undoing for errors, cancellation and crashes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from hvsnap.capture.facts import Step
from hvsnap.capture.freeze import Freeze, Freezer
from hvsnap.capture.part import Part
from hvsnap.capture.pipeline import Totals
from hvsnap.capture.record import DiskPlan, Recorded, Recorder
from hvsnap.capture.space import SpaceLimits, check, room, watch
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import AgentMissing, AgentUnavailable, HvsnapError, HypervisorFailed
from hvsnap.hypervisor.image_lock import images_locked
from hvsnap.instant import skew_ms
from hvsnap.model import Consistency, GuestUuid


@dataclass(frozen=True, slots=True)
class CaptureOrder:
    """What was asked for, and how far the capture may go for it."""

    consistency: Consistency
    freeze_timeout_s: float
    space: SpaceLimits


class Capture:
    """Captures the disks of its parts, one for each guest, at one instant: all of them or none."""

    def __init__(
        self, freezer: Freezer, catalog: Catalog, recorder: Recorder, order: CaptureOrder, parts: Sequence[Part]
    ) -> None:
        self._freezer = freezer
        self._catalog = catalog
        self._recorder = recorder
        self._order = order
        self._parts = parts
        self._running = [part for part in parts if not part.offline]
        self._beside = [path for part in parts for path in part.beside]

    async def run(self) -> None:
        """Take the snapshots: accomplished when this returns. The guests are not yet back on their images."""
        await self._each(self._parts, Part.rest)
        async with self._instant(), self._watching_space(), self._governing():
            # One after the other: as many disks are read at once as captures are at work, however large their groups.
            read = [(part, *await self._read(part, plan)) for part in self._parts for plan in part.plans]
        done = [self._told(*one) for one in read]
        await self._recorder.accomplish([part.order.operation for part in self._parts], done)

    async def _read(self, part: Part, plan: DiskPlan) -> tuple[DiskPlan, Totals]:
        with self._naming(part), part.explaining():
            return await self._recorder.record(plan)

    def _told(self, part: Part, plan: DiskPlan, totals: Totals) -> Recorded:
        """Return a disk that was read with all that is to be kept of its instant."""
        impact = part.order.watch.impact(plan.captured.target)
        # A guest that is off is the same at all instants.
        spans = [one.span for one in self._parts if one.span is not None]
        skew = skew_ms(spans) if len(self._parts) > 1 else None
        return Recorded(plan, totals, part.consistency, part.note, part.definition, impact, skew)

    # -- holding the instant ----------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _instant(self) -> AsyncIterator[None]:
        """Keep the disks as they were at one instant for as long as the context lasts.

        A guest that was started and stopped before its images were locked does no harm: both bitmaps recorded it.
        """
        await asyncio.to_thread(check, self._beside, self._order.space)
        await self._each(self._parts, Part.prepare)
        off = [part for part in self._parts if part.offline]
        async with images_locked([base for part in off for base in part.bases]):
            await self._each(off, lambda part: part.tell_offline(self._order.consistency))
            if self._running:
                await self._switch_consistently()
            await self._each(self._parts, Part.check)
            await self._step(Step.READING, self._parts)
            yield

    async def _switch_consistently(self) -> None:
        """Switch with the file systems frozen, if that is asked for and can be had (SERVICE 2.8)."""
        asked = self._order.consistency
        if asked is Consistency.CRASH:
            await self._switch({})
            return
        await self._step(Step.FREEZING, self._running, freezing=True)
        guests = [part.order.guest for part in self._running]
        async with self._freezer.frozen(guests, self._order.freeze_timeout_s) as freezes:
            missing = [p for p in self._running if isinstance(freezes[p.order.guest].error, AgentMissing)]
            if missing:
                await self._step(Step.FREEZING, missing, freezing=False)
            for part in self._running:
                error = freezes[part.order.guest].error
                part.note = "" if error is None else error.message
                if error is not None and asked is Consistency.APP:
                    with self._naming(part):
                        raise error
            await self._switch(freezes)
        for part in self._running:
            if part.consistency is Consistency.CRASH and not part.note:
                part.note = f"the freeze ended after {self._order.freeze_timeout_s:g} s, before the disks were switched"
                if asked is Consistency.APP:
                    with self._naming(part):
                        hint = "try again, or raise capture.freeze_timeout_s (at most 9)"
                        raise AgentUnavailable(part.note, hint=hint)

    async def _switch(self, freezes: Mapping[GuestUuid, Freeze]) -> None:
        """Switch all guests that run, as close together as can be; return when all have answered, even if one fails.

        Each waits for the others right before its command is sent, so that looking, which takes longer with some, does
        not part them; one that fails before that keeps all from being switched.
        """
        await self._step(Step.SWITCHING, self._running)
        barrier = asyncio.Barrier(len(self._running))

        async def ready() -> None:
            try:
                await barrier.wait()
            except asyncio.BrokenBarrierError as error:
                raise HypervisorFailed("it was not switched, since another guest could not be") from error

        async def switch(part: Part) -> None:
            try:
                await self._named(part, part.switch(freezes.get(part.order.guest), ready))
            except BaseException:
                await barrier.abort()
                raise

        ended = await asyncio.gather(*map(switch, self._running), return_exceptions=True)
        failures = [one for one in ended if one is not None]
        for failure in sorted(failures, key=lambda one: isinstance(one.__cause__, asyncio.BrokenBarrierError)):
            raise failure

    # -- around it --------------------------------------------------------------------------------

    async def _each(self, parts: Sequence[Part], work: Callable[[Part], Awaitable[None]]) -> None:
        """Do something with all parts side by side; if one fails, the others are cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for part in parts:
                    group.create_task(self._named(part, work(part)), name=f"capture of {part.order.name}")
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors

    async def _named(self, part: Part, work: Awaitable[None]) -> None:
        with self._naming(part):
            await work

    @contextlib.contextmanager
    def _naming(self, part: Part) -> Iterator[None]:
        """Say of an error which guest it is about, where there are several."""
        try:
            yield
        except HvsnapError as error:
            if len(self._parts) > 1 and not error.message.startswith("guest "):
                error.message = f"guest {part.order.name}: {error.message}"
            raise

    async def _step(self, step: Step, parts: Sequence[Part], **facts: bool) -> None:
        """Write an intent of several parts into the journal, in one transaction."""
        async with self._catalog.write() as tx:
            for part in parts:
                await tx.step(part.order.operation, step, **facts)

    @contextlib.asynccontextmanager
    async def _governing(self) -> AsyncIterator[None]:
        """Spare the guests while they are read, until half of the space for their writes is used."""
        beside, limits = self._beside, self._order.space
        room_at_first = await asyncio.to_thread(room, beside, limits) if beside else 0

        def pressed() -> bool:
            return bool(beside) and room(beside, limits) < room_at_first / 2

        async with contextlib.AsyncExitStack() as watches:
            for part in self._parts:
                await watches.enter_async_context(part.order.watch.governing(pressed))
            yield

    @contextlib.asynccontextmanager
    async def _watching_space(self) -> AsyncIterator[None]:
        """Give the capture up, as :class:`NoSpace`, when the overlays' file system runs short."""
        if not self._beside:
            yield
            return
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(watch(self._beside, self._order.space), name="watch-space")
                yield
                watcher.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors

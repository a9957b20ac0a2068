"""Freezing guests' file systems for an instant: bounded, one at a time for each guest, and always undone.

What was asked to freeze is thawed, however late its agent answers. An agent that hangs may carry out a freeze long
after it was given up: the thaw is then owed, in the journal, and tried again until the agent confirms it or the guest
is off.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import AgentMissing, AgentUnavailable, HvsnapError, NotFound
from hvsnap.model import GuestUuid, Operation
from hvsnap.ports import Hypervisor

log = logging.getLogger(__name__)

KIND = "thaw"
"""The journal's name for thaws that are owed."""

THAW_TIMEOUT_S = 2.0
"""An answer takes milliseconds; one that does not come is asked for again, and meanwhile the capture goes on."""

ANSWER_SHARE = 0.5
"""Of several guests, those that answer at once stay frozen while the others are waited for: so an agent that hangs may
use up no more than this part of the time that a freeze may last."""

RETRY_S_FIRST = 0.5
RETRY_S_MAX = 15.0


@dataclass(slots=True)
class Freeze:
    """What became of freezing one guest.

    ``error``: it could not be frozen, as far as anybody knows. ``expired``: its deadline came first, and it has been
    thawed.
    """

    error: AgentUnavailable | None = None
    expired: bool = False
    deadline: asyncio.Task[None] | None = None

    @property
    def in_force(self) -> bool:
        """Whether the guest is frozen now."""
        return self.error is None and not self.expired


class Freezer:
    """Freezes and thaws guests. All of it goes through here, so that no thaw breaks into somebody else's freeze."""

    def __init__(self, hypervisor: Hypervisor, catalog: Catalog) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._turns: dict[GuestUuid, asyncio.Lock] = {}
        self._owed: dict[GuestUuid, HvsnapError] = {}
        self._wake = asyncio.Event()

    @contextlib.asynccontextmanager
    async def frozen(self, guests: Sequence[GuestUuid], timeout_s: float) -> AsyncIterator[Mapping[GuestUuid, Freeze]]:
        """Keep guests' file systems frozen side by side, for ``timeout_s`` at most, and thaw them whatever happens.

        All of them have been frozen, or could not be, when the context begins; each one's :class:`Freeze` tells. Waits
        while somebody else has one of them frozen. Who could not be frozen is thawed in the end, too, since a freeze
        that timed out may have happened all the same. No guest stays frozen while a slow switch is waited for (Windows
        gives up after 10 s; SERVICE 2.8): the deadline thaws on its own, and tells by ``expired``.
        """
        freezes = {uuid: Freeze() for uuid in guests}
        answer_s = timeout_s * ANSWER_SHARE if len(freezes) > 1 else timeout_s
        async with contextlib.AsyncExitStack() as turns:
            for uuid in sorted(freezes):  # in one order, so that no two wait for each other
                await turns.enter_async_context(self._turn(uuid))
            try:
                asking = (self._freeze(uuid, freeze, answer_s, timeout_s) for uuid, freeze in freezes.items())
                for failure in await asyncio.gather(*asking, return_exceptions=True):
                    if failure is not None:
                        raise failure
                yield freezes
            except BaseException:
                await _in_any_case(self._end(freezes))
                raise
            await _in_any_case(self._end(freezes))

    async def thaw(self, uuid: GuestUuid) -> None:
        """Thaw a guest that may have been left frozen: now, or as soon as its agent answers."""
        async with self._turn(uuid):
            await self._thaw(uuid)

    async def recover(self) -> list[tuple[Operation, HvsnapError | None]]:
        """Try every thaw that is owed once; returns each, and why it is owed still."""
        outcome: list[tuple[Operation, HvsnapError | None]] = []
        for operation in await self._catalog.operations(KIND):
            await self.thaw(operation.guest_uuid)
            outcome.append((operation, self._owed.get(operation.guest_uuid)))
        return outcome

    async def run(self) -> None:
        """Try what is owed again and again, until cancelled."""
        pause_s = RETRY_S_FIRST
        while True:
            owed = set(self._owed) | {operation.guest_uuid for operation in await self._catalog.operations(KIND)}
            if not owed:
                await self._wake.wait()
                self._wake.clear()
                pause_s = RETRY_S_FIRST
                continue
            await asyncio.gather(*(self.thaw(uuid) for uuid in owed))
            await asyncio.sleep(pause_s)
            pause_s = min(RETRY_S_MAX, pause_s * 1.25)

    # -- within one's turn ------------------------------------------------------------------------

    def _turn(self, uuid: GuestUuid) -> asyncio.Lock:
        return self._turns.setdefault(uuid, asyncio.Lock())

    async def _freeze(self, uuid: GuestUuid, freeze: Freeze, answer_s: float, timeout_s: float) -> None:
        """Freeze one guest, and see to it that it is thawed at its deadline."""

        async def expire() -> None:
            await asyncio.sleep(timeout_s)
            freeze.expired = True
            await self._thaw(uuid)

        try:
            await self._hypervisor.freeze(uuid, answer_s)
            freeze.deadline = asyncio.create_task(expire(), name=f"thaw-deadline-{uuid}")
        except AgentUnavailable as error:
            freeze.error = error

    async def _end(self, freezes: Mapping[GuestUuid, Freeze]) -> None:
        """Thaw all that may be frozen, side by side."""

        async def end(uuid: GuestUuid, freeze: Freeze) -> None:
            if freeze.deadline is not None:
                freeze.deadline.cancel()
                await asyncio.wait([freeze.deadline])
            await self._thaw(uuid)

        # Where no agent is, nothing was asked of anybody.
        asked = {uuid: freeze for uuid, freeze in freezes.items() if not isinstance(freeze.error, AgentMissing)}
        await asyncio.gather(*(end(uuid, freeze) for uuid, freeze in asked.items()))

    async def _thaw(self, uuid: GuestUuid) -> None:
        """Thaw, or owe it."""
        try:
            await self._hypervisor.thaw(uuid, THAW_TIMEOUT_S)
        except NotFound:
            pass
        except HvsnapError as error:
            if await self._may_be_frozen(uuid):
                await self._owe(uuid, error)
                return
        await self._settle(uuid)

    async def _may_be_frozen(self, uuid: GuestUuid) -> bool:
        try:
            return (await self._hypervisor.guest(uuid)).active
        except NotFound:
            return False
        except HvsnapError:
            return True  # nobody can tell

    async def _owe(self, uuid: GuestUuid, error: HvsnapError) -> None:
        """Write down that a guest must still be thawed. If even that fails, it is known here as long as this runs."""
        if uuid not in self._owed:
            log.warning("guest %s may stay frozen until its agent answers: %s", uuid, error.message)
        self._owed[uuid] = error
        self._wake.set()
        try:
            if not await self._journaled(uuid):
                async with self._catalog.write() as tx:
                    await tx.open_operation(KIND, uuid, "thawing", {})
        except HvsnapError as failure:
            log.warning("the thaw owed to guest %s cannot be written down: %s", uuid, failure.message)

    async def _settle(self, uuid: GuestUuid) -> None:
        """Cross out what was owed."""
        if self._owed.pop(uuid, None) is not None:
            log.info("guest %s is thawed", uuid)
        for operation in await self._journaled(uuid):
            async with self._catalog.write() as tx:
                await tx.close_operation(operation.id)

    async def _journaled(self, uuid: GuestUuid) -> list[Operation]:
        return [operation for operation in await self._catalog.operations(KIND) if operation.guest_uuid == uuid]


async def _in_any_case(ending: Coroutine[Any, Any, None]) -> None:
    """Await something that must come to its end even if whoever waits for it is cancelled."""
    task = asyncio.ensure_future(ending)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise

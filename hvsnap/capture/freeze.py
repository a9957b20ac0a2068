"""Freezing a guest's file systems for an instant: bounded, and always undone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from hvsnap.errors import HvsnapError
from hvsnap.model import GuestUuid
from hvsnap.ports import Hypervisor

THAW_TIMEOUT_S = 5.0


@dataclass(slots=True)
class Freeze:
    """A freeze that is in force. ``expired``: its deadline came first, and the guest has been thawed."""

    expired: bool = False


@contextlib.asynccontextmanager
async def frozen(hypervisor: Hypervisor, uuid: GuestUuid, timeout_s: float) -> AsyncIterator[Freeze]:
    """Keep a guest's file systems frozen, for ``timeout_s`` at most, and thaw them whatever happens.

    Raises :class:`AgentUnavailable` when they could not be frozen; they are thawed then, too, since a freeze that
    timed out may have happened all the same. A guest does not stay frozen while a slow switch is waited for (Windows
    gives up after 10 s; SERVICE 2.8): the deadline thaws on its own, and tells by ``expired``.
    """
    state = Freeze()

    async def expire() -> None:
        await asyncio.sleep(timeout_s)
        state.expired = True
        await hypervisor.thaw(uuid, THAW_TIMEOUT_S)

    deadline: asyncio.Task[None] | None = None
    try:
        await hypervisor.freeze(uuid, timeout_s)
        deadline = asyncio.create_task(expire(), name=f"thaw-deadline-{uuid}")
        yield state
    except BaseException:
        # Something else is on its way to the caller; the journal's step makes the settling thaw again.
        with contextlib.suppress(HvsnapError):
            await asyncio.shield(_end(hypervisor, uuid, deadline))
        raise
    await asyncio.shield(_end(hypervisor, uuid, deadline))


async def _end(hypervisor: Hypervisor, uuid: GuestUuid, deadline: asyncio.Task[None] | None) -> None:
    if deadline is not None:
        deadline.cancel()
        with contextlib.suppress(asyncio.CancelledError, HvsnapError):
            await deadline
    await hypervisor.thaw(uuid, THAW_TIMEOUT_S)

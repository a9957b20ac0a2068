"""Which guests are there: tells when one appears or goes (SERVICE 10)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError
from hvsnap.happenings import EventType
from hvsnap.model import GuestUuid, GuestView
from hvsnap.ports import Hypervisor

log = logging.getLogger(__name__)

RETRY_S = 10.0
GATHER_S = 0.25
"""A capture alone makes libvirt send half a dozen events (suspended, resumed, defined, …): one look serves many."""

LOOK_S = 300.0
"""A look without being woken: an event of the hypervisor may be lost with its connection."""


class Attendance:
    """Compares what the hypervisor shows with what it showed before; woken by its lifecycle events.

    A hypervisor that does not answer has lost no guest: nothing is told of that.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._hypervisor: Hypervisor | None = None
        self._present: dict[GuestUuid, GuestView] = {}
        self._woken = asyncio.Event()
        self.also_wake: list[Callable[[], None]] = []
        """Others who look at guests anew when something has happened to one."""
        self.also_look: list[Callable[[], Awaitable[None]]] = []
        """What is looked at together with the guests."""

    def look_at(self, hypervisor: Hypervisor) -> None:
        """Say whose guests these are; the hypervisor itself is made with :meth:`lifecycle`, and so comes later."""
        self._hypervisor = hypervisor

    def lifecycle(self, *_event: object) -> None:
        """Take note that something happened to a guest; what it was is looked up."""
        self.wake()

    def wake(self) -> None:
        """Look soon."""
        self._woken.set()
        for wake in self.also_wake:
            wake()

    async def run(self) -> None:
        """Look whenever woken, until cancelled."""
        while True:
            pause_s = LOOK_S
            try:
                await self.look()
                for look in self.also_look:
                    await look()
            except HvsnapError as error:
                log.info("guests cannot be listed: %s", error.message)
                pause_s = RETRY_S
            try:
                async with asyncio.timeout(pause_s):
                    await self._woken.wait()
                await asyncio.sleep(GATHER_S)
            except TimeoutError:
                pass
            self._woken.clear()

    async def look(self) -> None:
        """Look once, and tell what changed."""
        if self._hypervisor is None:
            return
        census = await self._hypervisor.census()
        seen = {guest.uuid: guest for guest in census.guests}
        if census.silent:  # whoever does not answer has lost no guest
            seen = self._present | seen
        come = [guest for uuid, guest in seen.items() if uuid not in self._present]
        gone = [guest for uuid, guest in self._present.items() if uuid not in seen]
        if come or gone:
            async with self._catalog.write() as tx:
                for guest in come:
                    await tx.emit(EventType.GUEST_ATTACHED, _payload(guest))
                for guest in gone:
                    await tx.emit(EventType.GUEST_LOST, _payload(guest))
        self._present = seen


def _payload(guest: GuestView) -> dict[str, object]:
    return {"guest": guest.name, "guest_uuid": guest.uuid}

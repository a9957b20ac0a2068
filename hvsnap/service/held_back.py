"""Guests that libvirt's hook has kept from starting, and that are started once nothing keeps them (SERVICE 6.5).

libvirt starts a guest that is marked ``autostart`` once, with the host, and does not try again: whoever was held back
then would stay off until somebody notices. So a guest that was refused, is marked so, and is still off, is started as
soon as its rollback has ended. Any other guest is its owner's affair.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError
from hvsnap.guard import StartGuard
from hvsnap.happenings import EventType
from hvsnap.model import GuestView
from hvsnap.ports import Hypervisor

log = logging.getLogger(__name__)

LOOK_S = 30.0


class HeldBack:
    """Remembers who was refused, durably, and starts them."""

    def __init__(self, guard: StartGuard, hypervisor: Hypervisor, catalog: Catalog) -> None:
        self._guard = guard
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._woken = asyncio.Event()
        guard.on_lift.append(self._woken.set)

    async def refused(self, guest: str) -> None:
        """Take note that a guest of this name was kept from starting."""
        await self._guard.note_refused(guest)
        self._woken.set()

    async def run(self) -> None:
        """Start whom nothing keeps any more, until cancelled."""
        while True:
            self._woken.clear()
            try:
                await self.settle()
            except HvsnapError as error:
                log.warning("guests that were held back: %s; it is tried again", error.message)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._woken.wait()

    async def settle(self) -> None:
        """Look once at everybody who was refused."""
        names = await self._guard.refused()
        if not names:
            return
        census = await self._hypervisor.census()
        guests = {guest.name: guest for guest in census.guests}
        barred = {marker.partition(".")[0] for marker in await self._guard.barred()}
        for name in names:
            guest = guests.get(name)
            if guest is None and census.silent:
                continue  # it may belong to whoever does not answer
            if guest is not None and not guest.active and guest.uuid in barred:
                continue
            if guest is not None and not guest.active:
                await self._start(guest)
            await self._guard.forget_refused(name)

    async def _start(self, guest: GuestView) -> None:
        if not guest.autostart:
            log.info("guest %s can start again; it is not marked autostart, and is left off", guest.name)
            return
        payload: dict[str, object] = {"guest": guest.name, "guest_uuid": guest.uuid}
        kind = EventType.GUEST_STARTED
        try:
            await self._hypervisor.start(guest.uuid)
        except HvsnapError as error:
            if (await self._hypervisor.guest(guest.uuid)).active:
                return  # somebody else was faster
            kind, payload["error"] = EventType.GUEST_START_FAILED, error.message
        log.info("guest %s, which was kept from starting: %s", guest.name, kind)
        async with self._catalog.write() as tx:
            await tx.emit(kind, payload)

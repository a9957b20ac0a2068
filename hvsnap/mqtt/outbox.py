"""The way of the events: from the catalog to the broker, in order, each until the broker has taken it.

One event is under way at a time. What a subscriber sees thus never runs ahead of an event that is still to come; after
a lost connection it may see the last event once more, and after a crash of the daemon the last :data:`BATCH`. An end in
good order repeats none: the event that is under way then is waited for.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError
from hvsnap.model import Event
from hvsnap.mqtt.connection import Connection
from hvsnap.mqtt.messages import PublishedEvent
from hvsnap.service.views import when

log = logging.getLogger(__name__)

BATCH = 100
"""Events that are noted as published together: each note is a transaction that waits for the disk."""

CATALOG_RETRY_S = 5.0


class Outbox:
    """The unpublished events. ``told`` is called with each event that the broker has taken."""

    def __init__(self, catalog: Catalog, host_id: str, topic: str, told: Callable[[Event], None]) -> None:
        self._catalog = catalog
        self._host_id = host_id
        self._topic = topic
        self._told = told
        self._woken = asyncio.Event()
        self._taken = 0
        self._noted = 0
        self._sending: tuple[Event, asyncio.Task[None]] | None = None
        self.pending = 0

    def wake(self) -> None:
        """Take note that there is one more event."""
        self.pending += 1
        self._woken.set()

    async def count(self) -> None:
        """Learn how many events wait: some may have been forgotten, if there were too many."""
        self.pending = await self._catalog.unpublished_count()

    async def run(self, connection: Connection) -> None:
        """Publish what is there and what comes, until cancelled. Raises :class:`BrokerFailed`."""
        while True:
            self._woken.clear()
            try:
                await self.empty(connection)
            except HvsnapError as error:
                # A full device, for one. Nothing goes out that cannot be noted: it would go out again and again.
                log.warning("events cannot be published: %s", error.message)
                await asyncio.sleep(CATALOG_RETRY_S)
                continue
            await self._woken.wait()

    async def empty(self, connection: Connection) -> None:
        """Publish all that is there. Raises :class:`BrokerFailed`, and what the catalog raises.

        Cancelled, it may be called again on the same connection, and goes on with the event that was under way.
        """
        await self._sent()
        await self._note()
        while events := await self._catalog.unpublished(BATCH):
            try:
                for event in events:
                    sending = asyncio.create_task(connection.publish(self._topic, self._message(event)))
                    sending.add_done_callback(_looked_at)
                    self._sending = event, sending
                    await self._sent()
            finally:
                await self._note()
        await self.count()

    def give_up(self) -> None:
        """Forget what is under way: its connection is no more."""
        if self._sending is not None:
            self._sending[1].cancel()
            self._sending = None

    async def _sent(self) -> None:
        """Wait until the broker has taken the event that is under way, if one is."""
        if self._sending is None:
            return
        event, sending = self._sending
        await asyncio.shield(sending)
        self._sending = None
        self._taken = event.sequence
        self._told(event)

    async def _note(self) -> None:
        """Note in the catalog what the broker has taken."""
        if self._taken > self._noted:
            async with self._catalog.write() as tx:
                await tx.mark_published(self._taken)
            self._noted = self._taken
            await self.count()

    def _message(self, event: Event) -> bytes:
        return PublishedEvent(
            host=self._host_id,
            sequence=event.sequence,
            id=event.id,
            at=when(event.at),
            type=event.type,
            payload=event.payload,
        ).to_json()


def _looked_at(sending: asyncio.Task[None]) -> None:
    if not sending.cancelled():
        sending.exception()  # the one who waited for it has it, if one did

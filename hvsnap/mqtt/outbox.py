"""The way of the events: from the catalog to the broker, in order, each until the broker has taken it.

One event is under way at a time. What a subscriber sees thus never runs ahead of an event that is still to come; after
a lost connection it may see the last event once more, and after a crash of the daemon the last :data:`BATCH`.
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
        """Publish all that is there. Raises :class:`BrokerFailed`, and what the catalog raises."""
        await self._note()
        while events := await self._catalog.unpublished(BATCH):
            try:
                for event in events:
                    await connection.publish(self._topic, self._message(event))
                    self._taken = event.sequence
                    self._told(event)
            finally:
                await self._note()
        await self.count()

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

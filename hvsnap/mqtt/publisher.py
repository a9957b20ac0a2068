"""The publisher: keeps a connection to the broker, and everything on it going. Nothing that it meets there ends it.

It only ever publishes. Captures do not wait for it: :meth:`MqttPublisher.event` and :meth:`MqttPublisher.progress` take
a note, all else happens in the publisher's own task, and what blocks (name resolution, TLS, files) in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterable
from typing import Any

from hvsnap import __version__, config, wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import ConfigInvalid, HvsnapError
from hvsnap.model import Event, Progress
from hvsnap.mqtt import credentials
from hvsnap.mqtt.backoff import Backoff
from hvsnap.mqtt.connection import BrokerFailed, Connection, Timings, Will, connect
from hvsnap.mqtt.messages import Absence, HostStatus, Presence
from hvsnap.mqtt.outbox import Outbox
from hvsnap.mqtt.progress import ProgressBoard
from hvsnap.mqtt.states import DiskStates
from hvsnap.mqtt.topics import Topics, level
from hvsnap.ports import Clock
from hvsnap.service.views import when

log = logging.getLogger(__name__)

CUT_SHORT_MAX = 3
"""Connections that end soon after they were accepted, in a row, before that looks like more than chance."""

CANCEL_AGAIN_S = 0.1


class MqttPublisher:
    """Implements :class:`hvsnap.ports.Publisher`; ``settings.url`` is not empty."""

    def __init__(
        self, settings: config.Mqtt, host_id: str, catalog: Catalog, clock: Clock, timings: Timings | None = None
    ) -> None:
        self._settings = settings
        self._host_id = host_id
        self._clock = clock
        self._timings = timings or Timings()
        self._topics = topics = Topics(settings.topic_prefix, host_id)
        # Always the same: a broker that has not yet missed our last connection ends that one, and publishes its will
        # before it accepts this one, not at any time after it.
        self._identifier = f"{level(settings.topic_prefix.replace('/', '-'))}-{level(host_id)}"
        self._progress = ProgressBoard(catalog, clock, host_id, topics, self._timings.progress_s)
        self._states = DiskStates(catalog, clock, host_id, topics, settings.discovery_prefix)
        self._outbox = Outbox(catalog, host_id, topics.event, self._told)
        self._backoff = Backoff(self._timings.pause_min_s, self._timings.pause_max_s)
        self._connected = False
        self._accepted = False
        self._cut_short = 0
        self._error = ""

    # -- the daemon's side ------------------------------------------------------------------------

    async def check(self) -> None:
        """Raise :class:`ConfigInvalid` if the settings, or the files that they name, cannot be right."""
        await asyncio.to_thread(credentials.load, self._settings)

    def event(self, event: Event) -> None:
        """Take note of a committed event; it is read from the catalog when its turn comes."""
        self._outbox.wake()

    def progress(self, progress: Progress) -> None:
        """Take progress; the latest is published, unless there is no connection."""
        self._progress.put(progress)

    def status(self) -> wire.MqttStatus:
        """Return whether the broker is connected, how many events wait for it, and what is wrong."""
        return wire.MqttStatus(
            configured=True, connected=self._connected, pending=self._outbox.pending, error=self._error
        )

    async def run(self) -> None:
        """Publish until cancelled; then publish what is still waiting and ``offline``, within a few seconds.

        Raises :class:`ConfigInvalid` at once as :meth:`check` does, and nothing else: what goes wrong later is shown
        by :meth:`status` and tried again.
        """
        await self.check()
        while True:
            await self._count()
            await asyncio.sleep(await self._attempt())

    # -- one connection ---------------------------------------------------------------------------

    async def _attempt(self) -> float:
        """Connect, and publish as long as the connection holds. Return after how many seconds to try again."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._accepted = False
        try:
            await self._session(await self._connect())
        except BrokerFailed as error:
            why, lasting = str(error), error.lasting
        except ConfigInvalid as error:
            why, lasting = error.message, True
        except OSError as error:
            why, lasting = f"{error.strerror or error}", False
        except Exception as error:
            # A fault in here or in a library must not take the daemon and its captures with it.
            log.exception("the MQTT publisher failed; it goes on")
            why, lasting = f"a fault in hvsnap: {error!r}", True
        else:
            why, lasting = "", False
        if self._accepted and loop.time() - began > self._timings.pause_max_s:
            # Only after a connection that lasted: one that is accepted and dropped at once would be tried without end.
            self._backoff.reset()
            self._cut_short = 0
        elif self._accepted:
            self._cut_short += 1
            if self._cut_short >= CUT_SHORT_MAX:
                # A broker need not say why it drops the older of two clients with the same id; mosquitto 2.0 does not.
                why += f", again and again soon after it was made: does another host use host_id {self._host_id}, too?"
        self._failed(why)
        return self._backoff.long_pause_s() if lasting else self._backoff.pause_s()

    async def _connect(self) -> Connection:
        known = await asyncio.to_thread(credentials.load, self._settings)
        will = Will(self._topics.status, self._status(Presence.OFFLINE, Absence.LOST))
        return await connect(known, self._identifier, will, self._timings)

    async def _session(self, connection: Connection) -> None:
        """Publish everything until the connection is lost (:class:`BrokerFailed`) or this is cancelled."""
        try:
            await _first_failure({"mqtt-lost": connection.lost(), "mqtt-publish": self._publish(connection)})
        except asyncio.CancelledError:
            with contextlib.suppress(BrokerFailed, HvsnapError, TimeoutError):
                async with asyncio.timeout(self._timings.farewell_s):
                    await self._farewell(connection)
            raise
        finally:
            self._connected = False
            self._outbox.give_up()
            # Without a goodbye unless there was one: the broker is to tell that we are gone.
            connection.cut()

    async def _publish(self, connection: Connection) -> None:
        await self._announce(connection)
        self._accepted = True
        await _first_failure(
            {
                "mqtt-events": self._outbox.run(connection),
                "mqtt-progress": self._progress.run(connection),
                "mqtt-states": self._states.run(connection),
                "mqtt-status": self._keep_announcing(connection),
            }
        )

    async def _announce(self, connection: Connection) -> None:
        await connection.publish(self._topics.status, self._status(Presence.ONLINE), retain=True)
        self._connected = True
        if self._error:
            log.info("MQTT: connected to %s", self._settings.url)
        self._error = ""

    async def _keep_announcing(self, connection: Connection) -> None:
        """Publish the status now and then: a sign of life, and a look whether the broker still takes messages."""
        while True:
            await asyncio.sleep(self._timings.status_s)
            await self._announce(connection)

    async def _farewell(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(self._timings.farewell_s / 2):
                await self._outbox.empty(connection)
        except TimeoutError:
            log.info("MQTT: %d events wait for the next start", self._outbox.pending)
        await connection.publish(self._topics.status, self._status(Presence.OFFLINE, Absence.STOPPED), retain=True)
        await connection.close()

    # -- small things -----------------------------------------------------------------------------

    def _status(self, state: Presence, reason: Absence | None = None) -> bytes:
        at = None if reason is Absence.LOST else when(self._clock.now())
        return HostStatus(host=self._host_id, state=state, reason=reason, at=at, hvsnap=__version__).to_json()

    def _told(self, event: Event) -> None:
        self._progress.drop(event)
        self._states.changed(event)

    async def _count(self) -> None:
        with contextlib.suppress(HvsnapError):
            await self._outbox.count()

    def _failed(self, why: str) -> None:
        if why and why != self._error:
            log.warning("MQTT: %s; %d events wait", why, self._outbox.pending)
        self._error = why


async def _first_failure(parts: dict[str, Coroutine[Any, Any, None]]) -> None:
    """Run parts that never return until one fails, and raise that; the earlier one of several that fail together.

    A TaskGroup would do, but that of Python 3.11 may lose a cancellation that comes at the moment of a failure, and
    leaves its task marked as being cancelled.
    """
    tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await _cancel(tasks)
    for task in tasks:
        if not task.cancelled():
            task.result()


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for their ends.

    More than once, if need be: the wait_for() of Python 3.11, which aiomqtt uses, swallows a cancellation that comes
    together with what it waits for (python/cpython#86296).
    """
    tasks = list(tasks)
    left = {task for task in tasks if not task.done()}
    interrupted: asyncio.CancelledError | None = None
    while left:
        for task in left:
            task.cancel()
        try:
            _done, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
        except asyncio.CancelledError as error:
            interrupted = error
            left = {task for task in left if not task.done()}
    for task in tasks:
        if not task.cancelled():
            task.exception()  # several may have failed, and one is told
    if interrupted is not None:
        raise interrupted

"""The daemon: its life, from the start to the end, around the parts that :mod:`hvsnap.house` puts together.

Its start: open the catalog (which locks the state directory) and the store, settle what the journal shows against what
the hypervisor really shows, attach to guests, answer on the socket, tell systemd. Its end: refuse new work, bring open
captures to a safe state within :data:`SHUTDOWN_S`, say so to whoever listens, close everything in reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path

from hvsnap import __version__, wire
from hvsnap.api.app import create_app
from hvsnap.api.peers import Access, Doorkeeper
from hvsnap.api.server import HttpServer, listen, listen_tcp
from hvsnap.config import Settings
from hvsnap.errors import Failed, HvsnapError
from hvsnap.happenings import EventType
from hvsnap.house import House, SystemClock, assembled
from hvsnap.metrics import Metrics, Sources
from hvsnap.reloading import Reloader
from hvsnap.systemd import keep_alive, notify, set_up_logging

log = logging.getLogger(__name__)

SHUTDOWN_S = 25.0
"""Open captures get this long to bring their guests back; the rest of the end needs a few seconds more."""


def run(settings: Settings, read: Callable[[], Settings] | None = None) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT; SIGHUP lets it ``read`` its configuration again.

    Raises :class:`HvsnapError` when it cannot start.
    """
    set_up_logging()
    asyncio.run(_run_until_signal(settings, read or (lambda: settings)))


def recover(settings: Settings) -> wire.Recovery:
    """Settle what a crash left open, without a daemon. Raises :class:`StoreBusy` when one is running."""

    async def work() -> wire.Recovery:
        async with assembled(settings) as house:
            answer = await house.service.recovery.recover()
            await house.service.hooks.read_spool()
            try:
                await house.held_back.settle()
            except HvsnapError as error:
                log.warning("guests that were held back are not started yet: %s", error.message)
            return answer

    return asyncio.run(work())


async def _run_until_signal(settings: Settings, read: Callable[[], Settings]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    doorkeeper = Doorkeeper(Access.of(settings.api))
    reloader = Reloader(read, settings, doorkeeper)
    loop.add_signal_handler(signal.SIGHUP, reloader.ask)
    await serve(settings, stop, doorkeeper, reloader.run)


async def serve(
    settings: Settings, stop: asyncio.Event, doorkeeper: Doorkeeper, reload: Callable[[], Coroutine[None, None, None]]
) -> None:
    """Run until ``stop`` is set; ``reload`` is the loop that reads the configuration again."""
    async with assembled(settings) as house:
        if house.mqtt is not None:
            await house.mqtt.check()
        measured = await _measured(house)
        await house.server.start()
        house.instants.start_serving()
        await _settle_at_start(house)
        listening = await asyncio.to_thread(listen, Path(settings.socket), settings.socket_group)
        server = HttpServer(create_app(house.service, doorkeeper, read_only=settings.store.read_only), listening)
        loops = [
            asyncio.create_task(house.service.recovery.run(), name="recovery"),
            asyncio.create_task(house.captures.thaw_loop(), name="thaw"),
            asyncio.create_task(house.attendance.run(), name="attendance"),
            asyncio.create_task(house.hypervisor.run(), name="hypervisors"),
            asyncio.create_task(house.lease.keep(), name="lease"),
            asyncio.create_task(house.service.hooks.run(), name="hooks"),
            asyncio.create_task(house.held_back.run(), name="held back"),
            asyncio.create_task(keep_alive(), name="watchdog"),
            asyncio.create_task(reload(), name="reload"),
            *_of_a_writer(house),
            *measured,
        ]
        # Not among the loops, which end first: the broker is told of what the end brings.
        mqtt = [] if house.mqtt is None else [asyncio.create_task(house.mqtt.run(), name="mqtt")]
        serving = asyncio.create_task(server.serve(), name="http")
        try:
            await server.started()
            async with house.catalog.write() as tx:
                await tx.emit(EventType.DAEMON_ONLINE, {"host": settings.host_id, "version": __version__})
            notify("READY=1")
            log.info("hvsnap %s answers at %s", __version__, settings.socket)
            await _until_stopped(stop, serving, [*loops, *mqtt])
        finally:
            notify("STOPPING=1")
            await asyncio.shield(_end(house, server, serving, loops, mqtt))


def _of_a_writer(house: House) -> list[asyncio.Task[None]]:
    """Begin what keeps the store in order and makes automatic snapshots, unless the store is another host's."""
    if house.settings.store.read_only:
        log.info("the store %s is only read: another host writes to it", house.settings.store.url)
        return []
    return [
        asyncio.create_task(house.housekeeping.run(), name="housekeeping"),
        asyncio.create_task(house.scheduler.run(), name="scheduler"),
        asyncio.create_task(house.service.drills.run(), name="drills"),
    ]


async def _measured(house: House) -> list[asyncio.Task[None]]:
    """Listen for Prometheus, if it is to come."""
    settings = house.settings
    if not settings.metrics.listen:
        return []
    metrics = Metrics(Sources(house.catalog, house.service, house.mqtt, settings, SystemClock()))
    house.catalog.on_event.append(metrics.event)
    server = HttpServer(metrics, await asyncio.to_thread(listen_tcp, *settings.metrics.address))
    return [asyncio.create_task(server.serve_until_cancelled(), name="metrics")]


async def _settle_at_start(house: House) -> None:
    """Settle what a crash left open; what cannot be settled yet is tried again, and does not keep the daemon away."""
    answer = await house.service.recovery.recover()
    for one in answer.operations:
        log.info("%s %s of %s: %s (%s)", one.kind, one.id, one.guest, one.outcome, one.detail)


async def _until_stopped(stop: asyncio.Event, serving: asyncio.Task[None], loops: list[asyncio.Task[None]]) -> None:
    """Wait for the signal; a loop that dies is a fault, and ends the daemon rather than leaving it half alive."""
    stopping = asyncio.create_task(stop.wait(), name="stop")
    try:
        done, _rest = await asyncio.wait([stopping, serving, *loops], return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
    for task in done - {stopping}:
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error
        raise Failed(f"the daemon's part {task.get_name()} ended by itself")


async def _end(
    house: House,
    server: HttpServer,
    serving: asyncio.Task[None],
    loops: list[asyncio.Task[None]],
    mqtt: list[asyncio.Task[None]],
) -> None:
    """Refuse new work, make guests safe, tell the listeners, stop answering."""
    service = house.service
    service.status.stopping = True
    for task in loops:
        task.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
    await asyncio.gather(house.captures.shutdown(SHUTDOWN_S), service.tasks.shutdown(SHUTDOWN_S))
    await service.serving.close()
    await house.server.close()
    with contextlib.suppress(HvsnapError):
        async with house.catalog.write() as tx:
            await tx.emit(EventType.DAEMON_OFFLINE, {"host": house.settings.host_id, "version": __version__})
    service.feed.close()
    server.stop()
    for task in mqtt:
        task.cancel()
    await asyncio.gather(serving, *mqtt, return_exceptions=True)
    log.info("hvsnap has ended")

"""The daemon: the only place that knows every room, and puts them together.

Its start: open the catalog (which locks the state directory) and the store, settle what the journal shows against what
the hypervisor really shows, attach to guests, answer on the socket, tell systemd. Its end: refuse new work, bring open
captures to a safe state within :data:`SHUTDOWN_S`, say so to whoever listens, close everything in reverse.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from hvsnap import __version__, wire
from hvsnap.api import create_app
from hvsnap.capture.space import SpaceLimits
from hvsnap.catalog.catalog import Catalog
from hvsnap.config import Settings
from hvsnap.errors import Failed, HvsnapError
from hvsnap.guard import StartGuard
from hvsnap.happenings import EventType
from hvsnap.hypervisor import images
from hvsnap.hypervisor.fleet import Fleet, Member
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.hypervisor.qmp import BareGuest, QmpHypervisor
from hvsnap.metrics import Metrics, Sources
from hvsnap.model import Layer
from hvsnap.mqtt.publisher import MqttPublisher
from hvsnap.restore.disk import DiskMaker
from hvsnap.restore.rollback import Rollback
from hvsnap.server import HttpServer, listen, listen_tcp
from hvsnap.service.announcer import Announcer
from hvsnap.service.attendance import Attendance
from hvsnap.service.captures import Captures, CaptureSettings
from hvsnap.service.chains import Chains
from hvsnap.service.disks import Disks
from hvsnap.service.doctor import Doctor, places
from hvsnap.service.feed import Feed, newest_sequence
from hvsnap.service.guests import Guests
from hvsnap.service.hooks import Hooks
from hvsnap.service.housekeeping import Housekeeping, VerifySettings
from hvsnap.service.inventory import Inventory
from hvsnap.service.policies import Policies
from hvsnap.service.recovery import Recovery, RestoreRecovery
from hvsnap.service.scheduler import Scheduler, ScheduleSettings
from hvsnap.service.service import Service
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.status import StatusBoard
from hvsnap.service.store import Store
from hvsnap.service.tasks import Tasks
from hvsnap.service.uses import Uses
from hvsnap.store.blocks import PackedBlocks, open_store
from hvsnap.store.lease import WriterLease
from hvsnap.store.opening import open_key, open_objects, writer_id
from hvsnap.systemd import keep_alive, notify, set_up_logging
from hvsnap.upkeep.bond import Bond

log = logging.getLogger(__name__)

SHUTDOWN_S = 25.0
"""Open captures get this long to bring their guests back; the rest of the end needs a few seconds more."""

CLOSE_S = 5.0


class SystemClock:
    """Tells the time of the host."""

    def now(self) -> float:
        """Return seconds since the epoch, UTC."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds since the host was started."""
        return time.monotonic()


@dataclass(frozen=True)
class House:
    """Everything that runs, put together."""

    settings: Settings
    catalog: Catalog
    lease: WriterLease
    hypervisor: Fleet
    attendance: Attendance
    captures: Captures
    restores: RestoreRecovery
    housekeeping: Housekeeping
    scheduler: Scheduler
    service: Service
    mqtt: MqttPublisher | None


# -- putting together -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def assembled(settings: Settings) -> AsyncIterator[House]:
    """Open catalog and store, and put the rooms together; all is closed again at the end.

    Raises :class:`StoreBusy` when another process has the state directory, and what opening catalog and store raises.
    """
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        catalog = await Catalog.open(Path(settings.state_dir), clock)
        stack.push_async_callback(catalog.close)
        objects = await asyncio.to_thread(open_objects, settings.store, Path(settings.state_dir))
        stack.callback(objects.close)
        key = await open_key(settings.store, objects)
        holder = await asyncio.to_thread(writer_id, Path(settings.state_dir))
        lease = WriterLease(objects, holder, settings.host_id)
        await lease.acquire()
        bond = Bond(catalog, lease)
        stack.push_async_callback(bond.release)
        store = await open_store(
            objects, catalog, create=await bond.is_new(), key=key, compression=settings.capture.compression
        )
        stack.push_async_callback(store.close)
        await bond.check(store)
        await objects.clean_temporaries()
        private = await asyncio.to_thread(private_directory, settings.run_dir)
        attendance = Attendance(catalog)
        hypervisor = Fleet(members(settings, catalog, attendance.lifecycle, str(private)))
        stack.push_async_callback(close_in_time, hypervisor)
        try:
            async with asyncio.TaskGroup() as group:
                yield await _furnish(
                    settings, group, clock, catalog, lease, store, hypervisor, attendance, str(private)
                )
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from errors


async def _furnish(
    settings: Settings,
    group: asyncio.TaskGroup,
    clock: SystemClock,
    catalog: Catalog,
    lease: WriterLease,
    store: PackedBlocks,
    hypervisor: Fleet,
    attendance: Attendance,
    private: str,
) -> House:
    announcer = Announcer()
    catalog.on_event.append(announcer.event)
    uses = Uses()
    inventory = Inventory(hypervisor, catalog, clock)
    attendance.look_at(hypervisor)
    tasks = Tasks(group, clock, announcer)
    feed = Feed(catalog, tasks, await newest_sequence(catalog))
    announcer.listeners.append(feed)
    guard, capture = StartGuard(Path(settings.state_dir)), _capture_settings(settings, private)
    captures = Captures(group, hypervisor, catalog, store, inventory, uses, announcer, clock, capture, guard)
    maker, roller = DiskMaker(catalog, store, private), Rollback(hypervisor, catalog, store, private, guard)
    restores = RestoreRecovery(catalog, maker, roller, uses, guard)
    recovery = Recovery(catalog, [captures.recover, restores.recover], captures.give_way)
    attendance.also_wake.append(recovery.wake)
    snapshots = Snapshots(catalog, inventory, captures, uses, clock)
    guests = Guests(inventory, hypervisor, catalog, captures, images.image_info)
    limit = settings.limits.snapshots_per_disk
    own = [place for place in (settings.state_dir, str(settings.store.path or ""), str(settings.run_dir)) if place]
    mqtt = MqttPublisher(settings.mqtt, settings.host_id, catalog, clock) if settings.mqtt.url else None
    if mqtt is not None:
        announcer.listeners.append(mqtt)
    mqtt_status = _no_mqtt if mqtt is None else mqtt.status
    housekeeping = Housekeeping(
        catalog,
        store,
        clock,
        lambda: lease.certain,
        VerifySettings(settings.store.verify_days, settings.store.verify_bytes_per_s),
        settings.store.path,
    )
    catalog.on_event.append(housekeeping.listen)
    schedule = ScheduleSettings(settings.policies.late_max_s, settings.policies.workers, limit)
    scheduler = Scheduler(catalog, captures, snapshots, clock, schedule)
    service = Service(
        guests=guests,
        snapshots=snapshots,
        captures=captures,
        chains=Chains(catalog, inventory, captures, snapshots_max=limit),
        disks=Disks(
            hypervisor,
            catalog,
            inventory,
            snapshots,
            captures,
            tasks,
            uses,
            maker,
            roller,
            snapshots_max=limit,
            own_directories=own,
        ),
        policies=Policies(catalog, inventory, clock, policies_max=settings.limits.policies),
        store=Store(
            catalog, store, snapshots, tasks, housekeeping, url=settings.store.url, directory=settings.store.path
        ),
        tasks=tasks,
        doctor=Doctor(
            places(settings),
            settings.hypervisor.libvirt_uri,
            hypervisor,
            catalog,
            inventory,
            guests,
            captures.busy_disks,
            mqtt_status,
        ),
        recovery=recovery,
        status=StatusBoard(settings.host_id, hypervisor, catalog, captures, tasks, mqtt_status, clock),
        feed=feed,
        hooks=Hooks(Path(settings.state_dir), attendance.wake),
    )
    return House(
        settings, catalog, lease, hypervisor, attendance, captures, restores, housekeeping, scheduler, service, mqtt
    )


def members(settings: Settings, catalog: Catalog, on_change: Callable[..., None], private: str) -> list[Member]:
    """Return libvirt, unless it is switched off, and every bare guest of the configuration.

    ``on_change`` is called, with whatever is known of it, when something happened to a guest.
    """
    found = []
    if settings.hypervisor.libvirt_uri:
        libvirt = LibvirtHypervisor(settings.hypervisor.libvirt_uri, on_change, on_change)
        found.append(Member("libvirt", libvirt))
    for name, table in settings.hypervisor.qmp.items():
        disks = {target: Layer(disk.path, disk.format) for target, disk in table.disks.items()}
        guest = BareGuest(name, table.socket, table.agent, table.capture == "fleece", disks)
        hypervisor = QmpHypervisor(guest, settings.host_id, catalog, private, on_change)
        found.append(Member(name, hypervisor))
    return found


def _capture_settings(settings: Settings, private: str) -> CaptureSettings:
    capture = settings.capture
    return CaptureSettings(
        run_dir=private,
        overlay_dir=capture.overlay_dir,
        parallel=capture.parallel,
        snapshots_per_disk=settings.limits.snapshots_per_disk,
        freeze_timeout_s=capture.freeze_timeout_s,
        space=SpaceLimits(capture.space_reserve_bytes, capture.overlay_limit_bytes),
    )


def _no_mqtt() -> wire.MqttStatus:
    return wire.MqttStatus(configured=False, connected=False, pending=0, error="")


def private_directory(run_dir: Path) -> Path:
    """Make the directory of the NBD sockets: whoever could connect there would read disks. Blocking."""
    private = run_dir / "nbd"
    try:
        run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        private.mkdir(mode=0o700, exist_ok=True)
        private.chmod(0o700)
        for stale in private.glob("nbd-*.sock"):
            stale.unlink(missing_ok=True)
    except OSError as error:
        hint = "check `socket` in the configuration, and the permissions of its directory"
        raise Failed(f"cannot use {private}: {error.strerror}", hint=hint) from error
    return private


async def close_in_time(hypervisor: Fleet) -> None:
    """Close the connections; a libvirtd that hangs is not waited for."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(hypervisor.close(), CLOSE_S)


# -- running --------------------------------------------------------------------------------------


def run(settings: Settings) -> None:
    """Run the daemon in the foreground until SIGTERM or SIGINT. Raises :class:`HvsnapError` when it cannot start."""
    set_up_logging()
    asyncio.run(_run_until_signal(settings))


def recover(settings: Settings) -> wire.Recovery:
    """Settle what a crash left open, without a daemon. Raises :class:`StoreBusy` when one is running."""

    async def work() -> wire.Recovery:
        async with assembled(settings) as house:
            return await house.service.recovery.recover()

    return asyncio.run(work())


async def _run_until_signal(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve(settings, stop)


async def serve(settings: Settings, stop: asyncio.Event, ready: Callable[[], None] = lambda: None) -> None:
    """Run until ``stop`` is set; ``ready`` is called once the socket answers."""
    async with assembled(settings) as house:
        if house.mqtt is not None:
            await house.mqtt.check()
        measured = await _measured(house)
        await _settle_at_start(house)
        listening = await asyncio.to_thread(listen, Path(settings.socket), settings.socket_group)
        server = HttpServer(create_app(house.service), listening)
        loops = [
            asyncio.create_task(house.service.recovery.run(), name="recovery"),
            asyncio.create_task(house.captures.thaw_loop(), name="thaw"),
            asyncio.create_task(house.attendance.run(), name="attendance"),
            asyncio.create_task(house.hypervisor.run(), name="hypervisors"),
            asyncio.create_task(house.lease.keep(), name="lease"),
            asyncio.create_task(house.housekeeping.run(), name="housekeeping"),
            asyncio.create_task(house.scheduler.run(), name="scheduler"),
            asyncio.create_task(house.service.hooks.run(), name="hooks"),
            asyncio.create_task(keep_alive(), name="watchdog"),
            *measured,
        ]
        # Not among the loops, which end first: the broker is told of what the end brings.
        mqtt = [] if house.mqtt is None else [asyncio.create_task(house.mqtt.run(), name="mqtt")]
        serving = asyncio.create_task(server.serve(), name="http")
        try:
            await server.started()
            async with house.catalog.write() as tx:
                await tx.emit(EventType.DAEMON_ONLINE, {"host": settings.host_id, "version": __version__})
            ready()
            notify("READY=1")
            log.info("hvsnap %s answers at %s", __version__, settings.socket)
            await _until_stopped(stop, serving, [*loops, *mqtt])
        finally:
            notify("STOPPING=1")
            await asyncio.shield(_end(house, server, serving, loops, mqtt))


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
    with contextlib.suppress(HvsnapError):
        async with house.catalog.write() as tx:
            await tx.emit(EventType.DAEMON_OFFLINE, {"host": house.settings.host_id, "version": __version__})
    service.feed.close()
    server.stop()
    for task in mqtt:
        task.cancel()
    await asyncio.gather(serving, *mqtt, return_exceptions=True)
    log.info("hvsnap has ended")

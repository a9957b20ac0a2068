"""The house: every room's parts, made and handed to one another. :mod:`hvsnap.daemon` runs it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from grp import getgrnam
from pathlib import Path
from pwd import getpwnam

from hvsnap import wire
from hvsnap.capture.space import SpaceLimits
from hvsnap.capture.unusual import Rules
from hvsnap.catalog.catalog import Catalog
from hvsnap.config import Settings
from hvsnap.errors import Failed
from hvsnap.guard import StartGuard
from hvsnap.hypervisor import images
from hvsnap.hypervisor.fleet import Fleet, Member
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.hypervisor.libvirt_disks import LibvirtDisks
from hvsnap.hypervisor.qmp import BareGuest, QmpHypervisor
from hvsnap.model import Layer
from hvsnap.mqtt.publisher import MqttPublisher
from hvsnap.restore import drill
from hvsnap.restore.disk import DiskMaker
from hvsnap.restore.drill import Driller
from hvsnap.restore.export import ImageExporter
from hvsnap.restore.instant import InstantDisks
from hvsnap.restore.occupancy import Occupancy
from hvsnap.restore.rollback import Rollback
from hvsnap.restore.serve import Access as ServedTo
from hvsnap.restore.serve import SnapshotServer, serve_directory
from hvsnap.service.announcer import Announcer
from hvsnap.service.attaching import Attaching
from hvsnap.service.attendance import Attendance
from hvsnap.service.captures import Captures, CaptureSettings
from hvsnap.service.chains import Chains
from hvsnap.service.disks import Disks
from hvsnap.service.doctor import Doctor, premises
from hvsnap.service.doctor_guests import DiskLooks
from hvsnap.service.drills import Drills, DrillSettings
from hvsnap.service.feed import Feed, newest_sequence
from hvsnap.service.guests import Guests
from hvsnap.service.held_back import HeldBack
from hvsnap.service.hooks import Hooks
from hvsnap.service.housekeeping import Housekeeping, VerifySettings
from hvsnap.service.images import ExportRecovery, Images
from hvsnap.service.instants import Instants
from hvsnap.service.inventory import Inventory
from hvsnap.service.known_disks import KnownDisks
from hvsnap.service.origins import Origins
from hvsnap.service.policies import Policies
from hvsnap.service.recovery import Recovery, RestoreRecovery
from hvsnap.service.rollbacks import Rollbacks
from hvsnap.service.scheduler import Scheduler, ScheduleSettings
from hvsnap.service.service import Service
from hvsnap.service.serving import Serving
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.status import StatusBoard
from hvsnap.service.store import Store
from hvsnap.service.tasks import Tasks
from hvsnap.service.usage import Tariff, UsageReports
from hvsnap.service.uses import Uses
from hvsnap.store.blocks import PackedBlocks, open_store
from hvsnap.store.lease import WriterLease
from hvsnap.store.opening import open_key, open_objects, writer_id, writer_lease
from hvsnap.store.reading import STALE, NoLease, ReadOnlyObjects
from hvsnap.upkeep.bond import Bond

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
    lease: WriterLease | NoLease
    hypervisor: Fleet
    attendance: Attendance
    captures: Captures
    restores: RestoreRecovery
    housekeeping: Housekeeping
    scheduler: Scheduler
    server: SnapshotServer
    instants: Instants
    held_back: HeldBack
    service: Service
    mqtt: MqttPublisher | None


@contextlib.asynccontextmanager
async def assembled(settings: Settings) -> AsyncIterator[House]:
    """Open catalog and store, and put the rooms together; all is closed again at the end.

    Raises :class:`StoreBusy` when another process has the state directory, and what opening catalog and store raises.
    """
    clock = SystemClock()
    async with contextlib.AsyncExitStack() as stack:
        catalog = await Catalog.open(Path(settings.state_dir), clock)
        stack.push_async_callback(catalog.close)
        store, lease = await _opened(stack, settings, catalog)
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


async def _opened(
    stack: contextlib.AsyncExitStack, settings: Settings, catalog: Catalog
) -> tuple[PackedBlocks, WriterLease | NoLease]:
    """Open the store, as its one writer unless it is another host's, and see that catalog and store belong together."""
    objects = await asyncio.to_thread(open_objects, settings.store, Path(settings.state_dir))
    stack.callback(objects.close)
    key = await open_key(settings.store, objects)
    if settings.store.read_only:
        store = await open_store(ReadOnlyObjects(objects), catalog, create=False, key=key, hint=STALE)
        stack.push_async_callback(store.close)
        await Bond.check_read(catalog, store)
        return store, NoLease()
    holder = await asyncio.to_thread(writer_id, Path(settings.state_dir))
    lease = writer_lease(settings.store, objects, holder, settings.host_id)
    await lease.acquire()
    bond = Bond(catalog, lease)
    stack.push_async_callback(bond.release)
    store = await open_store(
        objects, catalog, create=await bond.is_new(), key=key, compression=settings.capture.compression
    )
    stack.push_async_callback(store.close)
    await bond.check(store)
    await objects.clean_temporaries()
    return store, lease


async def _furnish(
    settings: Settings,
    group: asyncio.TaskGroup,
    clock: SystemClock,
    catalog: Catalog,
    lease: WriterLease | NoLease,
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
    devices = _devices(hypervisor)
    occupancy = Occupancy(hypervisor, catalog)
    maker = DiskMaker(catalog, store, private, occupancy, devices)
    roller = Rollback(hypervisor, catalog, store, private, guard, occupancy)
    held_back = HeldBack(guard, hypervisor, catalog)
    restores = RestoreRecovery(catalog, maker, roller, uses, guard, clock)
    exporter = ImageExporter(catalog, store, private)
    exports = ExportRecovery(catalog, exporter, uses)
    attaching = Attaching(catalog, inventory, captures, devices)
    server = SnapshotServer(catalog, store, private, str(serve_directory(settings.run_dir)))
    filler = InstantDisks(hypervisor, catalog, store, server, private, _guests_access())
    instants = Instants(catalog, filler, attaching, tasks, uses)
    housekeeping = Housekeeping(
        catalog,
        store,
        clock,
        lambda: lease.certain,
        VerifySettings(settings.store.verify_days, settings.store.verify_bytes_per_s),
        settings.store.path,
    )
    catalog.on_event.append(housekeeping.listen)
    driller = _driller(settings, catalog, store, private, housekeeping)
    drilled = ExportRecovery(catalog, driller, uses, drill.KIND)
    # A disk is served before it is attached.
    recoveries = [captures.recover, restores.recover, instants.recover, attaching.recover, exports.recover]
    recoveries.append(drilled.recover)
    retries = [restores.retry if one == restores.recover else one for one in recoveries]
    recovery = Recovery(catalog, recoveries, captures.give_way, retries)
    attendance.also_wake.append(recovery.wake)
    snapshots = Snapshots(catalog, inventory, captures, uses, clock)
    origins = Origins(catalog, snapshots)
    known = KnownDisks(
        catalog,
        inventory,
        snapshots,
        captures,
        uses,
        clock,
        sealed=store.repository.sealed,
        release_days=settings.policies.release_days,
    )
    attendance.also_look.append(known.look)
    guests = Guests(inventory, hypervisor, catalog, captures, images.image_info)
    limit = settings.limits.snapshots_per_disk
    own = [place for place in (settings.state_dir, str(settings.store.path or ""), str(settings.run_dir)) if place]
    mqtt = MqttPublisher(settings.mqtt, settings.host_id, catalog, clock) if settings.mqtt.url else None
    if mqtt is not None:
        announcer.listeners.append(mqtt)
    mqtt_status = _no_mqtt if mqtt is None else mqtt.status
    price = settings.usage
    tariff = Tariff(price.price_per_gib_month, price.currency, price.prepaid_gib)
    schedule = ScheduleSettings(settings.policies.late_max_s, settings.policies.workers, limit)
    scheduler = Scheduler(catalog, captures, snapshots, clock, schedule)
    scheduler.also_expire.append(known.release_due)
    service = Service(
        guests=guests,
        snapshots=snapshots,
        captures=captures,
        chains=Chains(catalog, inventory, captures, snapshots_max=limit),
        disks=Disks(catalog, origins, attaching, tasks, uses, maker, instants, own_directories=own),
        known_disks=known,
        rollbacks=Rollbacks(
            hypervisor, catalog, inventory, snapshots, origins, captures, tasks, uses, roller, snapshots_max=limit
        ),
        images=Images(catalog, snapshots, housekeeping.images, exporter, tasks, uses, clock, own_directories=own),
        policies=Policies(catalog, inventory, clock, policies_max=settings.limits.policies),
        store=Store(
            catalog, store, snapshots, tasks, housekeeping, url=settings.store.url, directory=settings.store.path
        ),
        drills=Drills(
            catalog,
            inventory,
            snapshots,
            driller,
            tasks,
            uses,
            clock,
            DrillSettings(settings.drill.every_days, settings.drill.bytes_per_s),
            lambda rows: housekeeping.verify_snapshots(rows, _unreported),
        ),
        usage=UsageReports(catalog, housekeeping.sampler, clock, tariff),
        tasks=tasks,
        doctor=Doctor(
            premises(settings),
            hypervisor,
            catalog,
            inventory,
            guests,
            DiskLooks(hypervisor, inventory, images.image_info),
            captures.busy_disks,
            lambda: uses.held() | attaching.at_work() | instants.at_work(),
            mqtt_status,
            housekeeping.sampler.days_to_full,
        ),
        recovery=recovery,
        status=StatusBoard(
            settings.host_id, hypervisor, catalog, captures, tasks, mqtt_status, clock, housekeeping.sampler
        ),
        feed=feed,
        hooks=Hooks(Path(settings.state_dir), attendance.wake, held_back.refused, captures.guest_starts),
        serving=Serving(catalog, snapshots, uses, server, clock, _served_to(settings)),
    )
    return House(
        settings=settings,
        catalog=catalog,
        lease=lease,
        hypervisor=hypervisor,
        attendance=attendance,
        captures=captures,
        restores=restores,
        housekeeping=housekeeping,
        scheduler=scheduler,
        server=server,
        instants=instants,
        held_back=held_back,
        service=service,
        mqtt=mqtt,
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


def _devices(hypervisor: Fleet) -> LibvirtDisks | None:
    """Return what makes volumes and attaches disks, where there is a libvirt."""
    for member in hypervisor.members:
        if isinstance(member.hypervisor, LibvirtHypervisor):
            return LibvirtDisks(member.hypervisor.connection)
    return None


def _capture_settings(settings: Settings, private: str) -> CaptureSettings:
    capture = settings.capture
    return CaptureSettings(
        run_dir=private,
        overlay_dir=capture.overlay_dir,
        parallel=capture.parallel,
        snapshots_per_disk=settings.limits.snapshots_per_disk,
        freeze_timeout_s=capture.freeze_timeout_s,
        space=SpaceLimits(capture.space_reserve_bytes, capture.overlay_limit_bytes),
        impact_budget_pct=capture.impact_budget_pct,
        rate_max_bytes_s=capture.rate_max_bytes_s,
        alarms=Rules(**settings.alarms.model_dump()),
    )


def _driller(
    settings: Settings, catalog: Catalog, store: PackedBlocks, private: str, housekeeping: Housekeeping
) -> Driller:
    """Return what restores for trial, by default into a directory beside the catalog."""
    directory = settings.drill.dir or str(Path(settings.state_dir) / "drill")
    return Driller(catalog, store, private, directory, settings.drill.max_bytes, housekeeping.sweep)


def _unreported(_done_bytes: int, _total_bytes: int) -> None:
    """Take a report that nobody waits for."""


def _served_to(settings: Settings) -> ServedTo:
    """Return who may open what is served: those who may ask for it, and so for any disk's content."""
    group = settings.api.admin_group or settings.socket_group
    return ServedTo((0, getgrnam(group).gr_gid), 0o660) if group else ServedTo()


def _guests_access() -> ServedTo:
    """Return who may open what instant disks are made of: the user that libvirt's QEMU runs as, by the distribution."""
    for name in ("libvirt-qemu", "qemu"):
        with contextlib.suppress(KeyError):
            user = getpwnam(name)
            return ServedTo((user.pw_uid, user.pw_gid), 0o600)
    return ServedTo()


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

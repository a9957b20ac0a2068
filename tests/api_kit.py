"""The whole service over a real catalog and an in-memory hypervisor, served by uvicorn on a real Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from hvsnap.api.app import create_app
from hvsnap.api.peers import Access, Doorkeeper
from hvsnap.api.server import HttpServer, listen
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError, TargetExists
from hvsnap.guard import StartGuard
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.model import DiskId, GuestUuid, GuestView, Layer, Method, Operation, Progress, SnapshotId
from hvsnap.restore import drill
from hvsnap.restore.disk import ATTACH_KIND, NewDisk, Order, Plan
from hvsnap.restore.drill import Driller
from hvsnap.restore.export import ImageExporter
from hvsnap.restore.instant import InstantDisks
from hvsnap.restore.rollback import RollbackPlan
from hvsnap.restore.serve import Access as ServedTo
from hvsnap.restore.serve import SnapshotServer, serve_directory
from hvsnap.restore.target import Manner
from hvsnap.service.attaching import Attaching
from hvsnap.service.chains import Chains
from hvsnap.service.disks import Disks
from hvsnap.service.doctor import Doctor, Premises
from hvsnap.service.doctor_guests import DiskLooks
from hvsnap.service.drills import Drills, DrillSettings
from hvsnap.service.feed import Feed
from hvsnap.service.guests import Guests
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
from hvsnap.service.service import Service
from hvsnap.service.serving import Serving
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.status import StatusBoard
from hvsnap.service.store import Store
from hvsnap.service.tasks import Tasks
from hvsnap.service.usage import Tariff, UsageReports
from hvsnap.service.uses import Uses
from hvsnap.store.blocks import PackedBlocks, open_store
from hvsnap.store.objects import LocalObjects
from hvsnap.wire import MqttStatus
from tests.catalog_kit import StoppedClock
from tests.service_kit import FakeCaptures, FakeHypervisor, a_catalog, a_guest, a_view

Report = Callable[[Progress], None]


class FakeMaker:
    """Makes disks when the test lets it."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.error: HvsnapError | None = None
        self.recovered: list[Operation] = []
        self.taken: set[str] = set()
        self.orders: list[Order] = []

    async def check(self, order: Order) -> Plan:
        if order.path in self.taken and not order.force:
            raise TargetExists(f"{order.path} exists")
        self.orders.append(order)
        path = f"/pools/{order.pool}/{order.path}" if order.pool else order.path
        return Plan(await self.catalog.snapshot(order.snapshot), path, Manner.NEW, 7)

    async def create(self, order: Order, report: Report) -> NewDisk:
        report(Progress(order.snapshot, 1, 2, 10.0, 0.1))
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        path, attaching = (await self.check(order)).path, None
        if order.attach is not None:
            async with self.catalog.write() as tx:
                facts = {"path": path, "format": order.format, "target": order.attach.target, "payload": {"path": path}}
                attaching = (await tx.open_operation(ATTACH_KIND, order.attach.guest, "attaching", facts)).id
        return NewDisk(path, order.format, 2**30, 4096, attaching)

    async def recover(self, operation: Operation) -> None:
        self.recovered.append(operation)
        async with self.catalog.write() as tx:
            await tx.close_operation(operation.id)


class FakeRoller:
    """Rolls back when the test lets it; ``log`` is shared with the hypervisor's."""

    def __init__(self, catalog: Catalog, log: list[str]) -> None:
        self.catalog = catalog
        self.log = log
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.error: HvsnapError | None = None
        self.resumed: list[Operation] = []
        self.resized = False

    def _plan(self, snapshot_id: SnapshotId) -> RollbackPlan:
        return RollbackPlan(snapshot_id, 3 * 65536, 65536, Method.BITMAP, "", self.resized)

    async def plan(
        self, disk_id: DiskId, snapshot_id: SnapshotId, report: Report, *, origin: bool = False
    ) -> RollbackPlan:
        return self._plan(snapshot_id)

    async def run(
        self,
        disk_id: DiskId,
        snapshot_id: SnapshotId,
        report: Report,
        *,
        origin: bool = False,
        begins: Callable[[], None] = lambda: None,
    ) -> RollbackPlan:
        begins()
        self.log.append(f"{'re-initialise' if origin else 'roll back'} {disk_id}")
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        return self._plan(snapshot_id)

    async def resume(self, operation: Operation, report: Report) -> None:
        self.resumed.append(operation)
        if self.error is not None:
            raise self.error
        async with self.catalog.write() as tx:
            await tx.close_operation(operation.id)


class FakeDevices:
    """Attaches disks in memory; ``error`` is what libvirt says."""

    def __init__(self) -> None:
        self.hypervisor: FakeHypervisor | None = None
        self.error: HvsnapError | None = None
        self.silent = False

    def _guest(self, uuid: GuestUuid) -> GuestView:
        assert self.hypervisor is not None
        return self.hypervisor.shown[uuid]

    async def check_attachable(self, uuid: GuestUuid, target: str) -> None:
        if any(view.target == target for view in self._guest(uuid).disks):
            raise TargetExists(f"guest {uuid} has a disk {target} already")

    async def attach(self, uuid: GuestUuid, target: str, layer: Layer, *, block_device: bool) -> None:
        if self.error is not None:
            raise self.error
        guest = self._guest(uuid)
        view = a_view(target, layer.path, system=False)
        assert self.hypervisor is not None
        self.hypervisor.shown[uuid] = replace(guest, disks=(*guest.disks, view))

    async def attached(self, uuid: GuestUuid, target: str, path: str) -> bool:
        if self.silent and self.error is not None:
            raise self.error
        return any((view.target, view.top.path) == (target, path) for view in self._guest(uuid).disks)


@dataclass
class House:
    """Everything that a test may look at or turn."""

    catalog: Catalog
    hypervisor: FakeHypervisor
    captures: FakeCaptures
    maker: FakeMaker
    roller: FakeRoller
    uses: Uses
    tasks: Tasks
    store: PackedBlocks
    service: Service
    mqtt: MqttStatus = field(
        default_factory=lambda: MqttStatus(configured=True, connected=False, pending=2, error="refused")
    )
    devices: FakeDevices = field(default_factory=FakeDevices)


async def _inspect(path: str, image_format: str) -> ImageInfo:
    return ImageInfo(path, image_format, 2**30, (), None, None, encrypted=False, holds_bitmaps=True)


@contextlib.asynccontextmanager
async def a_house(directory: Path) -> AsyncIterator[House]:
    """Put a service together, over one running guest with one disk."""
    clock = StoppedClock()
    async with a_catalog(directory, clock) as catalog, asyncio.TaskGroup() as group:
        hypervisor, captures, uses = FakeHypervisor(a_guest(a_view())), FakeCaptures(catalog), Uses()
        relay = _Relay()
        tasks = Tasks(group, clock, relay)
        relay.feed = feed = Feed(catalog, tasks, 0)
        catalog.on_event.append(feed.event)
        maker, roller = FakeMaker(catalog), FakeRoller(catalog, hypervisor.log)
        inventory = Inventory(hypervisor, catalog, clock)
        snapshots = Snapshots(catalog, inventory, captures, uses, clock)
        origins, devices = Origins(catalog, snapshots), FakeDevices()
        devices.hypervisor = hypervisor
        attaching = Attaching(catalog, inventory, captures, devices)
        guests = Guests(inventory, hypervisor, catalog, captures, _inspect)
        restores = RestoreRecovery(catalog, maker, roller, uses, StartGuard(directory), clock)
        mqtt = MqttStatus(configured=True, connected=False, pending=2, error="refused")
        objects = LocalObjects(directory / "store")
        store = await open_store(objects, catalog)
        server = SnapshotServer(catalog, store, str(directory), str(serve_directory(directory)))
        await server.start()
        filler = InstantDisks(hypervisor, catalog, store, server, str(directory), ServedTo())
        instants = Instants(catalog, filler, attaching, tasks, uses)
        exporter = ImageExporter(catalog, store, str(directory))
        exports = ExportRecovery(catalog, exporter, uses)
        housekeeping = Housekeeping(catalog, store, clock, lambda: True, VerifySettings(0, 0), directory / "store")
        driller = Driller(catalog, store, str(directory), str(directory / "drill"), 2 << 20, housekeeping.sweep)
        drilled = ExportRecovery(catalog, driller, uses, drill.KIND)
        service = Service(
            guests=guests,
            snapshots=snapshots,
            captures=captures,
            images=Images(
                catalog,
                snapshots,
                housekeeping.images,
                exporter,
                tasks,
                uses,
                clock,
                own_directories=["/var/lib/hvsnap"],
            ),
            policies=Policies(catalog, inventory, clock, policies_max=100),
            chains=Chains(catalog, inventory, captures, snapshots_max=64),
            disks=Disks(catalog, origins, attaching, tasks, uses, maker, instants, own_directories=["/var/lib/hvsnap"]),
            known_disks=KnownDisks(catalog, inventory, snapshots, captures, uses, clock, sealed=False, release_days=30),
            rollbacks=Rollbacks(
                hypervisor, catalog, inventory, snapshots, origins, captures, tasks, uses, roller, snapshots_max=64
            ),
            store=Store(
                catalog,
                store,
                snapshots,
                tasks,
                housekeeping,
                url=f"file://{directory / 'store'}",
                directory=directory / "store",
            ),
            drills=Drills(
                catalog,
                inventory,
                snapshots,
                driller,
                tasks,
                uses,
                clock,
                DrillSettings(7, 0),
                lambda rows: housekeeping.verify_snapshots(rows, lambda _done, _total: None),
            ),
            usage=UsageReports(catalog, housekeeping.sampler, clock, Tariff(0.5, "EUR", 1.0)),
            tasks=tasks,
            doctor=Doctor(
                Premises([], "test:///default"),
                hypervisor,
                catalog,
                inventory,
                guests,
                DiskLooks(hypervisor, inventory, _inspect),
                captures.busy_disks,
                uses.held,
                lambda: mqtt,
                housekeeping.sampler.days_to_full,
            ),
            recovery=Recovery(catalog, [restores.recover, attaching.recover, exports.recover, drilled.recover]),
            status=StatusBoard(
                "host-1", hypervisor, catalog, captures, tasks, lambda: mqtt, clock, housekeeping.sampler
            ),
            feed=feed,
            hooks=Hooks(directory, lambda: None),
            serving=Serving(catalog, snapshots, uses, server, clock, ServedTo()),
        )
        try:
            yield House(catalog, hypervisor, captures, maker, roller, uses, tasks, store, service, devices=devices)
        finally:
            feed.close()
            await tasks.shutdown(5)
            await service.serving.close()
            await server.close()
            await store.close()
            objects.close()


class _Relay:
    """Tasks and feed need each other; this stands between them."""

    feed: Feed

    def event(self, event: Any) -> None:
        self.feed.event(event)

    def progress(self, progress: Progress) -> None:
        self.feed.progress(progress)


@contextlib.asynccontextmanager
async def served(
    house: House, socket: Path, group: str = "", access: Access | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """Serve a house on ``socket``, and give a client for it."""
    server = HttpServer(create_app(house.service, Doorkeeper(access)), listen(socket, group))
    serving = asyncio.create_task(server.serve(), name="http")
    try:
        async with asyncio.timeout(10):
            await server.started()
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://hvsnap", timeout=20) as client:
            yield client
    finally:
        house.service.feed.close()
        server.stop()
        await serving

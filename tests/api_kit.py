"""The whole service over a real catalog and an in-memory hypervisor, served by uvicorn on a real Unix socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from hvsnap.api import create_app
from hvsnap.api_peers import Access, Doorkeeper
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError, TargetExists
from hvsnap.guard import StartGuard
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.model import DiskId, Method, Operation, Progress, Snapshot, SnapshotId
from hvsnap.restore.disk import NewDisk
from hvsnap.restore.rollback import RollbackPlan
from hvsnap.server import HttpServer, listen
from hvsnap.service.chains import Chains
from hvsnap.service.disks import Disks
from hvsnap.service.doctor import Doctor
from hvsnap.service.feed import Feed
from hvsnap.service.guests import Guests
from hvsnap.service.hooks import Hooks
from hvsnap.service.housekeeping import Housekeeping, VerifySettings
from hvsnap.service.inventory import Inventory
from hvsnap.service.policies import Policies
from hvsnap.service.recovery import Recovery, RestoreRecovery
from hvsnap.service.rollbacks import Rollbacks
from hvsnap.service.service import Service
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.status import StatusBoard
from hvsnap.service.store import Store
from hvsnap.service.tasks import Tasks
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

    async def check(self, snapshot_id: SnapshotId, path: str, image_format: str) -> tuple[Snapshot, int]:
        if path in self.taken:
            raise TargetExists(f"{path} exists")
        return await self.catalog.snapshot(snapshot_id), 7

    async def create(self, snapshot_id: SnapshotId, path: str, image_format: str, report: Report) -> NewDisk:
        report(Progress(snapshot_id, 1, 2, 10.0, 0.1))
        await self.go_on.wait()
        if self.error is not None:
            raise self.error
        return NewDisk(path, image_format, 2**30, 4096)

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

    async def plan(self, disk_id: DiskId, snapshot_id: SnapshotId, report: Report) -> RollbackPlan:
        return self._plan(snapshot_id)

    async def run(self, disk_id: DiskId, snapshot_id: SnapshotId, report: Report) -> RollbackPlan:
        self.log.append(f"roll back {disk_id}")
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
        guests = Guests(inventory, hypervisor, catalog, captures, _inspect)
        restores = RestoreRecovery(catalog, maker, roller, uses, StartGuard(directory))
        mqtt = MqttStatus(configured=True, connected=False, pending=2, error="refused")
        objects = LocalObjects(directory / "store")
        store = await open_store(objects, catalog)
        housekeeping = Housekeeping(catalog, store, clock, lambda: True, VerifySettings(0, 0), directory / "store")
        service = Service(
            guests=guests,
            snapshots=snapshots,
            captures=captures,
            policies=Policies(catalog, inventory, clock, policies_max=100),
            chains=Chains(catalog, inventory, captures, snapshots_max=64),
            disks=Disks(catalog, snapshots, tasks, uses, maker, own_directories=["/var/lib/hvsnap"]),
            rollbacks=Rollbacks(
                hypervisor, catalog, inventory, snapshots, captures, tasks, uses, roller, snapshots_max=64
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
            tasks=tasks,
            doctor=Doctor(
                [],
                "test:///default",
                hypervisor,
                catalog,
                inventory,
                guests,
                captures.busy_disks,
                lambda: mqtt,
            ),
            recovery=Recovery(catalog, [restores.recover]),
            status=StatusBoard("host-1", hypervisor, catalog, captures, tasks, lambda: mqtt, clock),
            feed=feed,
            hooks=Hooks(directory, lambda: None),
        )
        try:
            yield House(catalog, hypervisor, captures, maker, roller, uses, tasks, store, service)
        finally:
            feed.close()
            await tasks.shutdown(5)
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

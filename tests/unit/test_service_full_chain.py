"""A chain that is kept at its limit for long: the rules of SERVICE 3 over a real store, byte by byte."""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvsnap.model import DiskId, Snapshot, SnapshotId
from hvsnap.policy import Policy, PolicyId
from hvsnap.service.inventory import Inventory
from hvsnap.service.requests import SnapshotRequest
from hvsnap.service.scheduler import Scheduler, ScheduleSettings
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.uses import Uses
from hvsnap.store.objects import LocalObjects
from tests.service_kit import DoneCaptures, FakeHypervisor
from tests.store_kit import BLOCK
from tests.unit.test_service_policies import HOUR_S, START, TurnedClock
from tests.upkeep_kit import Disks, House, a_house, live_bytes, referred_bytes

LIMIT = 64
RUNS = 500
BLOCKS = 40
SEED = 20260601


class StoredCaptures(DoneCaptures):
    """Captures of a disk without a guest: what it holds now goes into the store, in the order of real ones."""

    def __init__(self, house: House, disks: Disks, clock: TurnedClock) -> None:
        super().__init__(house.catalog)
        self.house = house
        self.disks = disks
        self.clock = clock

    async def create(self, request: SnapshotRequest) -> list[Snapshot]:
        automatic = request.automatic
        made = await self.disks.take(
            self.house,
            "vda",
            name=request.name,
            created_at=self.clock.now(),
            automatic=automatic is not None,
            expires_at=automatic.expires_at if automatic else None,
            retention=automatic.retention if automatic else "",
        )
        return await self.wait([made])


@dataclass
class Bench:
    house: House
    disks: Disks
    clock: TurnedClock
    captures: StoredCaptures
    snapshots: Snapshots
    scheduler: Scheduler
    store: Path

    @property
    def disk(self) -> DiskId:
        return self.disks.disks["vda"].id

    async def chain(self) -> list[Snapshot]:
        return sorted(await self.house.catalog.snapshots(self.disk), key=lambda one: one.sequence)

    def forget(self, *gone: SnapshotId) -> None:
        for one in gone:
            del self.disks.expected[one]


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory on a file system without a device: nothing here is killed, and ten thousand syncs cost nothing."""
    with tempfile.TemporaryDirectory(prefix="hv", dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
async def bench(in_memory: Path) -> AsyncIterator[Bench]:
    clock = TurnedClock(START)
    objects = LocalObjects(in_memory / "store")
    async with a_house(in_memory / "state", objects) as house:
        disks = Disks()
        await disks.add(house, "vda", BLOCKS)
        policy = Policy(
            PolicyId("p-often"), "often", tuple(range(24)), timezone="UTC", retain_days=None, created_at=START
        )
        async with house.catalog.write() as tx:
            await tx.put_policy(policy)
            await tx.update_disk(disks.disks["vda"].id, policy=policy.id)
        captures = StoredCaptures(house, disks, clock)
        inventory = Inventory(FakeHypervisor(), house.catalog, clock)
        snapshots = Snapshots(house.catalog, inventory, captures, Uses(), clock)
        scheduler = Scheduler(house.catalog, captures, snapshots, clock, ScheduleSettings(HOUR_S, 2, LIMIT))
        yield Bench(house, disks, clock, captures, snapshots, scheduler, in_memory / "store")
    objects.close()


async def test_s3_1_a_chain_at_its_limit_for_500_runs_evicts_the_right_ones_and_gives_space_back(bench: Bench) -> None:
    rng = random.Random(SEED)
    expected: list[tuple[SnapshotId, bool]] = []  # what the rules leave: id and whether it is automatic, oldest first
    evicted = deleted = 0
    stored_at_most = 0
    await bench.scheduler.look()
    for run in range(RUNS):
        for _ in range(3):
            bench.disks.write("vda", rng.randrange(BLOCKS), rng.choice([bytes(BLOCK), rng.randbytes(BLOCK)]))
        if run % 9 == 4:  # a manual one, for which its owner makes room if there is none
            if len(expected) == LIMIT:
                gone, _automatic = expected.pop(rng.randrange(LIMIT))
                await bench.snapshots.delete([gone], dry_run=False)
                bench.forget(gone)
                deleted += 1
            (made,) = await bench.captures.create(SnapshotRequest("web01", ("vda",), f"by hand {run}"))
            expected.append((made.id, False))
        if len(expected) == LIMIT:
            gone = next(one for one, automatic in expected if automatic)
            expected.remove((gone, True))
            bench.forget(gone)
            evicted += 1
        bench.clock.turn(HOUR_S)
        await bench.scheduler.look()
        await bench.scheduler.drain()
        rows = await bench.chain()
        expected.append((rows[-1].id, True))
        assert [(one.id, one.automatic) for one in rows] == expected, f"after run {run}, seed {SEED}"
        if run % 125 == 124:
            await bench.disks.check_by_catalog(bench.house)
            await bench.house.sweeper.sweep()
            assert await live_bytes(bench.house) == await referred_bytes(bench.house)
            stored_at_most = max(stored_at_most, await live_bytes(bench.house))
    assert len(expected) == LIMIT
    assert sum(not automatic for _one, automatic in expected) > 10
    events: Counter[str] = Counter()
    sequence = 0
    while batch := await bench.house.catalog.events(sequence):
        sequence = batch[-1].sequence
        events.update(event.type for event in batch)
    assert (events["snapshot.evicted"], events["snapshot.deleted"]) == (evicted, deleted)
    assert (events["policy.run"], events["policy.failed"], events["policy.missed"]) == (RUNS, 0, 0)
    await bench.disks.check(bench.house)
    # What is on the device is what the 64 of them refer to, whatever has come and gone since.
    used = sum(file.stat().st_blocks * 512 for file in _packs(bench))
    written = RUNS * 3 // 2 * BLOCK
    assert used < stored_at_most * 1.3 < written
    await bench.snapshots.delete([one for one, _automatic in expected], dry_run=False)
    await bench.house.sweeper.sweep()
    assert _packs(bench) == []


def _packs(bench: Bench) -> list[Path]:
    return [file for file in (bench.store / "packs").rglob("*") if file.is_file()]

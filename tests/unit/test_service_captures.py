"""Who is let in, and what recovery takes for forgotten: captures of a guest that is off, real images, a real store."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvsnap.capture.space import SpaceLimits
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CaptureRunning, ChainFull
from hvsnap.guard import StartGuard
from hvsnap.model import Consistency, Disk, GuestState, Snapshot, State
from hvsnap.service.captures import Captures, CaptureSettings
from hvsnap.service.inventory import Inventory
from hvsnap.service.requests import SnapshotRequest
from hvsnap.service.uses import Uses
from hvsnap.store.blocks import open_store
from tests.catalog_kit import StoppedClock, a_disk, a_snapshot
from tests.service_kit import FakeHypervisor, Heard, a_catalog, a_guest, a_view
from tests.store_kit import MemoryObjects

SNAPSHOTS_MAX = 3
REQUEST = SnapshotRequest(guest="web01", disks=("vda",), consistency=Consistency.CRASH)


@dataclass
class House:
    catalog: Catalog
    captures: Captures

    async def made(self) -> Snapshot:
        (begun,) = await self.captures.create(REQUEST)
        (ended,) = await self.captures.wait([begun.id])
        return ended

    async def disk(self) -> Disk:
        (disk,) = await self.catalog.disks()
        return disk


@pytest.fixture
async def house(workdir: Path) -> AsyncIterator[House]:
    image = workdir / "web.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    clock = StoppedClock()
    settings = CaptureSettings(str(workdir), "", 1, SNAPSHOTS_MAX, 5.0, SpaceLimits(0, 0))
    guard = StartGuard(workdir)
    async with a_catalog(workdir, clock) as catalog:
        hypervisor = FakeHypervisor(a_guest(a_view(path=str(image)), state=GuestState.OFF))
        store = await open_store(MemoryObjects(), catalog, compression="zstd:1")
        async with asyncio.TaskGroup() as group:
            inventory = Inventory(hypervisor, catalog, clock)
            yield House(
                catalog, Captures(group, hypervisor, catalog, store, inventory, Uses(), Heard(), clock, settings, guard)
            )
        await store.close()


async def test_what_is_being_admitted_is_not_taken_for_forgotten(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    add, recovering = house.captures._add, []

    async def add_and_recover(*arguments: Any) -> list[Snapshot]:
        made = await add(*arguments)
        # The rows are there, and nobody is at work on them yet: recovery gets all the time it wants.
        recovering.append(asyncio.create_task(house.captures.recover()))
        await asyncio.wait(recovering, timeout=0.5)
        return made

    monkeypatch.setattr(house.captures, "_add", add_and_recover)
    (begun,) = await house.captures.create(REQUEST)
    await asyncio.gather(*recovering)
    assert (await house.catalog.snapshot(begun.id)).state is not State.FAILED
    (ended,) = await house.captures.wait([begun.id])
    assert (ended.state, ended.error) == (State.ACCOMPLISHED, "")


async def test_what_waited_when_the_daemon_died_has_failed_after_recovery(house: House) -> None:
    await house.made()
    disk = await house.disk()
    async with house.catalog.write() as tx:
        forgotten = a_snapshot(disk.id, await tx.next_sequence(disk.id), disk.head, state=State.PROGRESSING)
        await tx.add_snapshot(forgotten)
    assert await house.captures.recover() == []
    row = await house.catalog.snapshot(forgotten.id)
    assert (row.state, row.error) == (State.FAILED, "the daemon ended before its turn came")


async def test_a_second_request_is_refused_with_the_name_of_the_first(house: House) -> None:
    (begun,) = await house.captures.create(REQUEST)
    with pytest.raises(CaptureRunning, match=begun.id):
        await house.captures.create(REQUEST)
    assert house.captures.busy_disks() == {(await house.disk()).id}
    await house.captures.wait([begun.id])
    assert house.captures.busy_disks() == set()


async def test_whoever_waits_gets_a_turn_after_the_one_that_runs(house: House) -> None:
    (first,) = await house.captures.create(REQUEST)
    (second,) = await house.captures.create(
        SnapshotRequest(guest="web01", disks=("vda",), consistency=Consistency.CRASH, wait=True)
    )
    one, two = await house.captures.wait([first.id, second.id])
    assert (one.state, two.state) == (State.ACCOMPLISHED, State.ACCOMPLISHED)
    assert two.parent == one.id
    assert two.kind == "incremental"


async def test_a_full_chain_is_refused_and_nothing_is_added(house: House) -> None:
    for _ in range(SNAPSHOTS_MAX):
        assert (await house.made()).state is State.ACCOMPLISHED
    with pytest.raises(ChainFull):
        await house.captures.create(REQUEST)
    assert len(await house.catalog.snapshots()) == SNAPSHOTS_MAX


async def test_an_interrupted_operation_of_the_disk_keeps_it_closed(house: House) -> None:
    await house.made()
    disk = await house.disk()
    async with house.catalog.write() as tx:
        await tx.open_operation("rollback", disk.guest_uuid, "writing", {"disk": disk.id})
    with pytest.raises(CaptureRunning, match="rollback"):
        await house.captures.create(REQUEST)


async def test_an_operation_of_another_disk_is_none_of_its_business(house: House) -> None:
    await house.made()
    disk = await house.disk()
    async with house.catalog.write() as tx:
        await tx.open_operation("rollback", disk.guest_uuid, "writing", {"disk": a_disk().id})
    assert (await house.made()).state is State.ACCOMPLISHED

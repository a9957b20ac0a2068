"""Restore drills: real images, real QEMU, a real store; what they prove, what they leave, who is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hvsnap import wire
from hvsnap.catalog.chain import Page
from hvsnap.drill import Drill, Outcome
from hvsnap.errors import Damaged, NoSpace
from hvsnap.hypervisor import images
from hvsnap.model import SnapshotId, State
from hvsnap.restore import drill
from hvsnap.restore.drill import Driller
from hvsnap.restore.writer import NbdWriter
from hvsnap.service.drills import DAY_S, newest_due
from hvsnap.service.findings_snapshots import drills as findings_of_drills
from hvsnap.store.objects import LocalObjects
from tests.api_kit import House, a_house, served
from tests.catalog_kit import a_disk, a_snapshot
from tests.store_kit import BLOCK, a_block, seeded
from tests.upkeep_kit import Disks
from tests.upkeep_kit import House as StoreHouse


class Told:
    """Takes note of what a drill says it does."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, text: str) -> None:
        self.steps.append(text)

    def progress(self, progress: object) -> None:
        return


@pytest.fixture
async def house(workdir: Path) -> AsyncIterator[House]:
    async with a_house(workdir) as one:
        yield one


@pytest.fixture
async def api(house: House, workdir: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served(house, workdir / "run" / "s") as client:
        yield client


@pytest.fixture
async def store(house: House, workdir: Path) -> AsyncIterator[StoreHouse]:
    objects = LocalObjects(workdir / "store")
    yield StoreHouse(house.catalog, house.store, objects)
    objects.close()


@pytest.fixture
async def disks(store: StoreHouse) -> Disks:
    """A disk whose end is within a block, over two pages; its second snapshot zeroes, changes and adds blocks."""
    made, rng = Disks(), seeded()
    await made.add(store, "vda", 4100)
    for number in (0, 1, 2, 7, 8, 4099):
        made.write("vda", number, a_block(rng, "noise"))
    await made.take(store, "vda")
    made.write("vda", 1, bytes(BLOCK))
    made.write("vda", 2, a_block(rng, "noise"))
    made.write("vda", 4096, a_block(rng, "text"))
    await made.take(store, "vda")
    return made


async def ended(api: httpx.AsyncClient, **body: Any) -> wire.Task:
    answer = await api.post("/v1/snapshots/drill", json=body)
    assert answer.status_code == 202, answer.text
    task = wire.Task.model_validate_json(answer.content)
    while task.state is wire.TaskState.RUNNING:
        await asyncio.sleep(0.01)
        task = wire.Task.model_validate_json((await api.get(f"/v1/tasks/{task.id}")).content)
    return task


async def nothing_is_left(house: House, workdir: Path) -> None:
    assert list((workdir / "drill").glob("*")) == []
    assert await house.catalog.operations() == []


async def told_of(house: House) -> list[tuple[str, Any]]:
    return [(one.type, one.payload.get("outcome")) for one in await house.catalog.events(0)]


async def test_s12_a_snapshot_that_restores_passes_and_leaves_nothing(
    house: House, api: httpx.AsyncClient, disks: Disks, workdir: Path
) -> None:
    first, second = disks.expected
    task = await ended(api, snapshot=second)
    assert task.state is wire.TaskState.ACCOMPLISHED, task.error
    assert isinstance(task.result, wire.SnapshotDrilled)
    assert (task.result.written_bytes, task.result.compared_blocks) == (6 * BLOCK, 6)
    assert (await ended(api, snapshot=first)).state is wire.TaskState.ACCOMPLISHED
    await nothing_is_left(house, workdir)
    assert await told_of(house) == [("drill.passed", "passed")] * 2
    shown = wire.Snapshot.model_validate_json((await api.get(f"/v1/snapshots/{second}")).content)
    assert shown.drill is not None
    assert (shown.drill.outcome, shown.drill.written_bytes) == (Outcome.PASSED, 6 * BLOCK)
    info = wire.StoreInfo.model_validate_json((await api.get("/v1/store")).content)
    assert info.drill is not None
    assert (info.drill.snapshot, info.drills_failed) == (first, 0)
    chain = wire.Chain.model_validate_json((await api.get(f"/v1/chains/{disks.disks['vda'].id}")).content)
    assert chain.drill == info.drill


async def test_s12_a_damaged_block_fails_the_drill_and_everybody_is_told(
    house: House, api: httpx.AsyncClient, disks: Disks, workdir: Path
) -> None:
    _first, second = disks.expected
    packs = sorted((workdir / "store" / "packs").rglob("*"), key=lambda path: path.stat().st_mtime)
    pack = [path for path in packs if path.is_file()][-1]
    data = bytearray(pack.read_bytes())
    data[70] ^= 1
    pack.write_bytes(data)
    task = await ended(api, disk=str(disks.disks["vda"].id))  # its newest one
    assert task.state is wire.TaskState.FAILED
    assert task.error is not None
    assert (task.error.code, task.error.exit_status) == ("damaged", 7)
    assert "block" in task.error.message
    await nothing_is_left(house, workdir)
    assert ("drill.failed", "damaged") in await told_of(house)
    assert ("verification.failed", None) in await told_of(house)  # all that is damaged is known now
    newest = await house.catalog.drills.newest()
    (finding,) = findings_of_drills({disk.id: disk for disk in await house.catalog.disks()}, newest)
    assert (finding.severity, second in finding.evidence) == ("error", True)
    (figures,) = (await house.catalog.figures()).disks
    assert (figures.drilled_at, figures.drill_failed) == (None, True)


async def test_s12_a_catalog_that_points_at_another_block_fails_though_every_block_is_whole(
    house: House, disks: Disks, workdir: Path
) -> None:
    """What a verification of blocks cannot find: the catalog and the manifests do not say the same."""
    _first, second = disks.expected
    view = await house.catalog.view(second, 0)
    async with house.catalog.write() as tx:
        # Its own entries of that page: block 1 is zero still, block 2 is what block 0 is.
        await tx.put_page(second, 0, Page(np.array([1, 2], np.uint16), np.array([0, view[0]], np.uint64)))
        await tx.sum_up(second)
    driller = a_driller(house, workdir)
    with pytest.raises(Damaged, match="1 blocks of the restored disk are not what the manifests say: 2"):
        await driller.run(await house.catalog.snapshot(second), Told())
    await nothing_is_left(house, workdir)


def a_driller(house: House, workdir: Path, max_bytes: int = 0) -> Driller:
    async def settle() -> None:
        raise AssertionError("the manifests say what the catalog says")

    return Driller(house.catalog, house.store, str(workdir), str(workdir / "drill"), max_bytes, settle)


@pytest.mark.parametrize("fault", ["lost", "swapped", "stale"])
async def test_s12_a_writer_that_does_not_write_what_it_is_given_is_caught(
    house: House, disks: Disks, workdir: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The restore path itself is what a drill tries: an image that differs in a single block is no restore."""
    real = NbdWriter.write

    async def write(self: NbdWriter, offset: int, data: memoryview) -> None:
        if offset == 7 * BLOCK:
            if fault == "lost":
                return
            other = {"swapped": data[::-1], "stale": memoryview(bytes(1) + bytes(data[1:]))}[fault]
            await real(self, offset, memoryview(bytes(other)))
            return
        await real(self, offset, data)

    monkeypatch.setattr(NbdWriter, "write", write)
    with pytest.raises(Damaged, match="are not what the manifests say: 7"):
        await a_driller(house, workdir).run(await house.catalog.snapshot(list(disks.expected)[1]), Told())
    await nothing_is_left(house, workdir)


async def test_s12_a_deleted_ancestor_changes_nothing_once_the_manifests_are_written(
    house: House, api: httpx.AsyncClient, disks: Disks, store: StoreHouse
) -> None:
    first, second = disks.expected
    await disks.delete(store, first)  # its blocks are the second's now, whose manifest does not say so yet
    assert (await ended(api, snapshot=second)).state is wire.TaskState.ACCOMPLISHED


async def test_s12_what_does_not_fit_is_refused_before_anything_is_touched(
    house: House, api: httpx.AsyncClient, disks: Disks, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = list(disks.expected)[1]
    with pytest.raises(NoSpace, match=r"drill\.max_bytes allows 65536") as caught:
        await a_driller(house, workdir, max_bytes=BLOCK).check(await house.catalog.snapshot(second))
    assert "drill.max_bytes" in caught.value.hint
    monkeypatch.setattr(drill, "RESERVE_BYTES", 1 << 60)
    answer = await api.post("/v1/snapshots/drill", json={"snapshot": second})
    assert (answer.status_code, answer.json()["exit_status"], answer.json()["code"]) == (507, 1, "no-space")
    assert "drill.dir" in answer.json()["hint"]
    for body in ({}, {"snapshot": second, "disk": "vda"}):
        assert (await api.post("/v1/snapshots/drill", json=body)).status_code == 400
    assert (await api.post("/v1/snapshots/drill", json={"snapshot": "s-none"})).status_code == 404
    await nothing_is_left(house, workdir)
    assert await house.catalog.drills.all() == []


async def test_s12_one_that_runs_full_or_is_cancelled_leaves_nothing(
    house: House, api: httpx.AsyncClient, disks: Disks, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = list(disks.expected)[1]
    writing = asyncio.Event()

    async def full(self: NbdWriter, offset: int, data: memoryview) -> None:
        raise NoSpace("the target's file system is full")

    async def hangs(self: NbdWriter, offset: int, data: memoryview) -> None:
        writing.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(NbdWriter, "write", full)
    error = (await ended(api, snapshot=second)).error
    assert error is not None
    assert (error.code, error.message) == ("no-space", "the target's file system is full")
    assert await told_of(house) == [("drill.failed", "failed")]
    await nothing_is_left(house, workdir)
    monkeypatch.setattr(NbdWriter, "write", hangs)
    task = (await api.post("/v1/snapshots/drill", json={"snapshot": second})).json()
    await writing.wait()
    refused = await api.post("/v1/snapshots/delete", json={"ids": [second]})
    assert refused.status_code == 409
    assert "being restored for trial, by a drill" in refused.json()["message"]
    assert len(list((workdir / "drill").glob("*"))) == 2
    assert (await house.service.recovery.recover()).operations == []  # it is at work
    await api.post(f"/v1/tasks/{task['id']}/cancel")
    await house.tasks.wait(task["id"])
    await nothing_is_left(house, workdir)
    assert len(await house.catalog.drills.all()) == 1  # a cancelled one proves nothing, and is nobody's failure


async def test_s12_what_a_crash_left_is_removed(house: House, disks: Disks, workdir: Path) -> None:
    """As a kill leaves it: the files, and the journal's entry."""
    row = await house.catalog.snapshot(list(disks.expected)[1])
    driller = a_driller(house, workdir)
    (workdir / "drill").mkdir()
    for path in (driller.place(row), f"{driller.place(row)}.digests"):
        Path(path).write_bytes(b"half")
    async with house.catalog.write() as tx:
        facts = {"snapshot": row.id, "target": driller.place(row)}
        await tx.open_operation(drill.KIND, disks.disks["vda"].guest_uuid, drill.RESTORING, facts)
    (one,) = (await house.service.recovery.recover()).operations
    assert (one.kind, one.outcome) == ("snapshot-drill", "undone")
    await nothing_is_left(house, workdir)


async def test_s8_the_image_of_an_encrypted_disk_is_encrypted(
    house: House, disks: Disks, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = await house.catalog.snapshot(list(disks.expected)[1])
    async with house.catalog.write() as tx:
        await tx.update_disk(row.disk, encrypted=True)
    seen: list[bool] = []
    real = images.check_image

    async def check(path: str, **how: Any) -> None:
        seen.append((await images.image_info(path, "qcow2")).encrypted)
        content = disks.expected[row.id][7]
        seen.append(content[:64] in Path(path).read_bytes())
        await real(path, **how)

    monkeypatch.setattr(images, "check_image", check)
    told = Told()
    assert (await a_driller(house, workdir).run(row, told)).compared_blocks == 6
    assert seen == [True, False]
    assert told.steps == ["restoring", "checking the image", "comparing every block"]


# -- which one is due -------------------------------------------------------------------------------


def test_s12_the_disk_whose_last_drill_is_the_longest_ago_comes_first() -> None:
    one, two, three = (a_disk(target=f"vd{letter}") for letter in "abc")
    now = 1_800_000_000.0
    rows = [a_snapshot(disk.id, number) for number in (1, 2) for disk in (one, two)]
    rows.append(a_snapshot(two.id, 3, state=State.FAILED))

    def due(drills: dict[str, Drill], every_s: float = 7 * DAY_S) -> SnapshotId | None:
        found = newest_due([one, two, three], rows, drills, now, every_s)
        return None if found is None else found.id

    def made(disk: str, days_ago: float, outcome: Outcome = Outcome.PASSED) -> Drill:
        return Drill(disk, "s-x", now - days_ago * DAY_S, now - days_ago * DAY_S + 1, outcome, 1)

    assert due({}) == rows[2].id  # never: the newest accomplished one, of the first disk
    assert due({one.id: made(one.id, 1)}) == rows[3].id
    both = {one.id: made(one.id, 8), two.id: made(two.id, 9)}
    assert due(both) == rows[3].id
    assert due(both | {two.id: made(two.id, 6.9)}) == rows[2].id
    assert due({one.id: made(one.id, 6), two.id: made(two.id, 5)}) is None
    failed = {one.id: made(one.id, 1.1, Outcome.FAILED), two.id: made(two.id, 5)}
    assert due(failed) == rows[2].id  # what could not be carried out is tried again the next day
    assert due({key: replace(value, outcome=Outcome.DAMAGED) for key, value in failed.items()}) is None


async def test_s12_drills_are_made_by_themselves_one_after_the_other_until_none_is_due(
    house: House, disks: Disks, store: StoreHouse
) -> None:
    await disks.add(store, "vdb", 16)
    disks.write("vdb", 3, b"\1" * BLOCK)
    await disks.take(store, "vdb")
    for _ in range(3):
        await house.service.drills.look()
    assert await told_of(house) == [("drill.passed", "passed")] * 2
    assert {one.disk for one in await house.catalog.drills.all()} == {disk.id for disk in disks.disks.values()}

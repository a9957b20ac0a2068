"""The store over the API: shown, checked, verified, compacted; and what the daemon does to it by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import httpx
import pytest

from hvsnap import wire
from hvsnap.model import State
from hvsnap.service import housekeeping
from hvsnap.service.housekeeping import Housekeeping, VerifySettings
from hvsnap.store.objects import LocalObjects
from tests.api_kit import House, a_house, served
from tests.catalog_kit import StoppedClock, a_snapshot
from tests.store_kit import BLOCK, a_block, seeded
from tests.upkeep_kit import Disks
from tests.upkeep_kit import House as StoreHouse


@pytest.fixture
async def house(workdir: Path) -> AsyncIterator[House]:
    async with a_house(workdir / "state") as made:
        yield made


@pytest.fixture
async def api(house: House, workdir: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served(house, workdir / "run" / "s") as client:
        yield client


@pytest.fixture
async def store(house: House, workdir: Path) -> AsyncIterator[StoreHouse]:
    objects = LocalObjects(workdir / "state" / "store")
    yield StoreHouse(house.catalog, house.store, objects)
    objects.close()


@pytest.fixture
async def disks(store: StoreHouse) -> Disks:
    """One disk, three snapshots: 16 blocks in the first, all of them overwritten in the second."""
    made = Disks()
    rng = seeded()
    await made.add(store, "vda")
    for number in range(16):
        made.write("vda", number, a_block(rng, "noise"))
    await made.take(store, "vda")
    for number in range(16):
        made.write("vda", number, a_block(rng, "noise"))
    await made.take(store, "vda")
    made.write("vda", 20, a_block(rng, "noise"))
    await made.take(store, "vda")
    return made


async def done(api: httpx.AsyncClient, answer: httpx.Response) -> wire.Task:
    """Wait for a task's end."""
    assert answer.status_code == 202, answer.text
    task = wire.Task.model_validate_json(answer.content)
    while task.state is wire.TaskState.RUNNING:
        await asyncio.sleep(0.01)
        task = wire.Task.model_validate_json((await api.get(f"/v1/tasks/{task.id}")).content)
    assert task.state is wire.TaskState.ACCOMPLISHED, task
    return task


async def verified(api: httpx.AsyncClient, **body: object) -> wire.SnapshotsVerified:
    task = await done(api, await api.post("/v1/snapshots/verify", json=body))
    assert isinstance(task.result, wire.SnapshotsVerified)
    return task.result


async def compacted(api: httpx.AsyncClient, *, dry_run: bool) -> wire.StoreCompacted:
    task = await done(api, await api.post("/v1/store/compact", json={"dry_run": dry_run}))
    assert isinstance(task.result, wire.StoreCompacted)
    return task.result


async def info(api: httpx.AsyncClient) -> wire.StoreInfo:
    return wire.StoreInfo.model_validate_json((await api.get("/v1/store")).content)


def disk_usage(directory: Path) -> int:
    """Return what packs really take on the device."""
    return sum(path.stat().st_blocks * 512 for path in (directory / "packs").rglob("*") if path.is_file())


async def test_an_empty_store_is_shown(api: httpx.AsyncClient) -> None:
    shown = await info(api)
    assert (shown.packs, shown.live_bytes, shown.snapshots, shown.damaged_blocks) == (0, 0, 0, 0)
    assert shown.block_size == BLOCK
    assert shown.free_bytes is not None
    assert shown.verified_since is None


async def test_what_is_shown_is_what_is_there(api: httpx.AsyncClient, disks: Disks, store: StoreHouse) -> None:
    shown = await info(api)
    assert (shown.packs, shown.live_blocks, shown.snapshots) == (3, 33, 3)
    assert shown.live_bytes == 33 * BLOCK
    assert shown.size_bytes == sum([item.size_bytes async for item in store.store.packs.list()])
    assert (shown.unverified_packs, shown.swept_at) == (3, None)


async def test_a_dry_run_tells_what_compacting_does(
    api: httpx.AsyncClient, disks: Disks, store: StoreHouse, workdir: Path
) -> None:
    first, *_rest = disks.expected
    await disks.delete(store, first)
    before = disk_usage(workdir / "state" / "store")
    planned = await compacted(api, dry_run=True)
    assert disk_usage(workdir / "state" / "store") == before
    assert (planned.dropped_blocks, planned.freed_bytes, planned.deleted_packs) == (16, 16 * BLOCK, 1)
    assert [fate.fate for fate in planned.packs] == ["delete"]
    really = await compacted(api, dry_run=False)
    assert (really.dropped_blocks, really.freed_bytes, really.deleted_packs) == (16, 16 * BLOCK, 1)
    assert before - disk_usage(workdir / "state" / "store") >= 16 * BLOCK
    assert (await compacted(api, dry_run=True)).dropped_blocks == 0
    await disks.check(store)


async def test_holes_are_punched_into_packs_that_stay(
    api: httpx.AsyncClient, disks: Disks, store: StoreHouse, workdir: Path
) -> None:
    """The space of single blocks is given back at once, and the others are read as before."""
    disks.write("vda", 3, bytes(BLOCK))
    disks.write("vda", 4, bytes(BLOCK))
    await disks.take(store, "vda")
    first, *middle, _last = disks.expected
    await disks.delete(store, first, *middle)
    before = disk_usage(workdir / "state" / "store")
    done_ = await compacted(api, dry_run=False)
    assert (done_.dropped_blocks, done_.punched_packs, done_.deleted_packs) == (18, 1, 1)
    freed = before - disk_usage(workdir / "state" / "store")
    assert freed >= 18 * BLOCK - 4096
    await disks.check(store)
    assert (await verified(api, all=True)).damaged_blocks == 0


async def test_catalog_and_store_are_compared(api: httpx.AsyncClient, disks: Disks, store: StoreHouse) -> None:
    task = await done(api, await api.post("/v1/store/check"))
    assert isinstance(task.result, wire.StoreChecked)
    assert (task.result.sound, task.result.differences) == (True, [])
    assert (task.result.packs, task.result.manifests, task.result.blocks) == (3, 3, 33)
    (pack, *_rest) = [item.name async for item in store.store.packs.list()]
    await store.store.packs.delete(pack)
    task = await done(api, await api.post("/v1/store/check"))
    assert isinstance(task.result, wire.StoreChecked)
    assert not task.result.sound
    assert task.result.difference_count == len(task.result.differences)
    assert ("pack-missing", pack) in {(one.kind, one.subject) for one in task.result.differences}
    assert task.result.affected


async def test_damage_is_named_told_once_and_shown(
    api: httpx.AsyncClient, house: House, disks: Disks, store: StoreHouse, workdir: Path
) -> None:
    first, second, third = disks.expected
    clean = await verified(api, ids=[first, second])
    assert (clean.snapshots, clean.blocks, clean.damaged_blocks, clean.affected) == (2, 32, 0, [])
    block = int((await store.catalog.view(second, 0))[7])
    (place,) = await store.catalog.places([block])
    path = workdir / "state" / "store" / place.pack
    data = bytearray(path.read_bytes())
    data[place.offset + 5] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    found = await verified(api, all=True)
    assert (found.damaged_blocks, [one.block for one in found.damaged]) == (1, [block])
    assert [(one.id, one.blocks) for one in found.affected] == [(second, 1), (third, 1)]
    assert (await verified(api, ids=[first])).damaged_blocks == 0
    assert (await verified(api, ids=[third])).damaged_blocks == 1
    events = [event for event in await house.catalog.events(0) if event.type == "verification.failed"]
    assert [event.payload["snapshots"] for event in events] == [[second, third]]
    shown = await info(api)
    assert (shown.damaged_blocks, [one.id for one in shown.affected]) == (1, [second, third])
    # The next capture reads the block again, although no bitmap names it; its content is the same: it heals.
    carried = await house.catalog.carry(disks.disks["vda"].id)
    assert {page: index.tolist() for page, index in carried.items()} == {0: [7]}


@pytest.mark.parametrize(
    ("body", "status"), [({}, 400), ({"ids": ["s-x"], "all": True}, 400), ({"ids": ["s-x"]}, 404), ({"id": "x"}, 400)]
)
async def test_a_verification_of_nothing_known_is_refused(
    api: httpx.AsyncClient, body: dict[str, object], status: int
) -> None:
    assert (await api.post("/v1/snapshots/verify", json=body)).status_code == status


async def test_a_failed_snapshot_holds_nothing_to_verify(
    api: httpx.AsyncClient, disks: Disks, store: StoreHouse
) -> None:
    async with store.catalog.write() as tx:
        disk = disks.disks["vda"].id
        failed = a_snapshot(disk, await tx.next_sequence(disk), state=State.FAILED)
        await tx.add_snapshot(failed)
    assert (await api.post("/v1/snapshots/verify", json={"ids": [failed.id]})).status_code == 409


# -- by itself ------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def keeping(store: StoreHouse, directory: Path, verify: VerifySettings) -> AsyncIterator[Housekeeping]:
    keeper = Housekeeping(store.catalog, store.store, StoppedClock(10**9), lambda: True, verify, directory)
    store.catalog.on_event.append(keeper.listen)
    task = asyncio.create_task(keeper.run())
    yield keeper
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def until(what: Callable[[], Awaitable[object]]) -> None:
    """Wait until a condition holds."""
    async with asyncio.timeout(10):
        while not await what():  # noqa: ASYNC110 - it is looked for where users look
            await asyncio.sleep(0.01)


async def test_space_is_freed_after_a_deletion_without_being_asked_for(
    disks: Disks, store: StoreHouse, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "SETTLE_S", 0.01)
    async with keeping(store, workdir, VerifySettings(0, 0)) as keeper:
        await until(lambda: asyncio.sleep(0, keeper.swept_at is not None))
        async with store.catalog.write() as tx:
            first = next(iter(disks.expected))
            await tx.delete_snapshot(first)
            await tx.emit("snapshot.deleted", {"snapshot": first})
        del disks.expected[first]

        async def freed() -> bool:
            return sum(pack.live_blocks for pack in await store.catalog.upkeep.packs()) == 17

        await until(freed)
    await disks.check(store)


async def test_everything_is_verified_in_the_background_once_in_so_many_days(
    disks: Disks, store: StoreHouse, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "VERIFY_LOOK_S", 0.01)
    async with keeping(store, workdir, VerifySettings(30, 1 << 30)):

        async def all_verified() -> bool:
            return all(pack.verified_at == 10**9 for pack in await store.catalog.upkeep.packs())

        await until(all_verified)


async def test_an_older_copy_of_the_store_raises_the_alarm_at_the_start(
    disks: Disks, store: StoreHouse, workdir: Path
) -> None:
    """FAULTS 13."""
    newest = list(disks.expected)[-1]
    row = await store.catalog.snapshot(newest)
    (pack,) = [pack for pack in await store.catalog.upkeep.packs() if pack.live_blocks == 1]
    await store.store.packs.delete(pack.name)
    await store.objects.delete(f"manifests/{row.disk}/{row.sequence:08d}-{row.id}")
    async with keeping(store, workdir, VerifySettings(0, 0)):

        async def told() -> bool:
            return any(event.type == "store.incomplete" for event in await store.catalog.events(0))

        await until(told)
    (event,) = [event for event in await store.catalog.events(0) if event.type == "store.incomplete"]
    assert event.payload["count"] == 2
    assert pack.name in event.payload["missing"]  # type: ignore[operator]


async def test_a_nearly_full_device_is_told_of_once(
    disks: Disks, store: StoreHouse, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [4]
    monkeypatch.setattr(housekeeping, "device_space", lambda _directory: (free[0], 100))
    monkeypatch.setattr(housekeeping, "SETTLE_S", 0.01)
    monkeypatch.setattr(housekeeping, "SWEEP_S", 0.01)

    async def told() -> int:
        return len([event for event in await store.catalog.events(0) if event.type == "store.nearly-full"])

    async with keeping(store, workdir, VerifySettings(0, 0)) as keeper:
        await until(told)
        for _ in range(3):
            keeper.swept_at = None
            await until(lambda: asyncio.sleep(0, keeper.swept_at is not None))
        assert await told() == 1
        free[0] = 50
        keeper.swept_at = None
        await until(lambda: asyncio.sleep(0, keeper.swept_at is not None))
        await asyncio.sleep(0.05)
        free[0] = 1

        async def told_again() -> bool:
            return await told() == 2

        await until(told_again)

"""Sweep and capture at once, step by step: the block that is found by one while the other drops it.

Each test stops the sweep before one of its steps, and lets a capture do one of its own there.

FAULTS 28.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from hvsnap.errors import Damaged, StoreFailed
from hvsnap.store.intake import Intake
from hvsnap.upkeep import manifests
from hvsnap.upkeep.sweep import Sweeper
from tests.store_kit import a_block, seeded
from tests.upkeep_kit import Disks, House, PunchedObjects, Taking, a_house, live_bytes, referred_bytes, restored

STEPS = ["guard", "mark", "manifests", "drop", "dropping", "pack", "orphans", "end"]


class At:
    """Does something once, when a sweep comes to a step."""

    def __init__(self, step: str, action: Callable[[], Awaitable[None]]) -> None:
        self._step = step
        self._action = action
        self.done = False

    async def __call__(self, step: str) -> None:
        if step == self._step and not self.done:
            self.done = True
            await self._action()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with a_house(tmp_path, PunchedObjects()) as opened:
        yield opened


@pytest.fixture
async def disks(house: House) -> Disks:
    """Two disks; what was once in a snapshot of the first is dead: no snapshot refers to it."""
    made = Disks()
    rng = seeded()
    for name in ("vda", "vdb"):
        await made.add(house, name)
    old = [a_block(rng, "noise") for _ in range(4)]
    for number, content in enumerate(old):
        made.write("vda", number, content)
    first = await made.take(house, "vda")
    for number in range(4):
        made.write("vda", number, a_block(rng, "text"))
    await made.take(house, "vda")
    await made.delete(house, first)
    for number, content in enumerate(old[:3]):
        made.write("vdb", number, content)  # the other disk holds that content now, but for one block
    return made


async def sweep(house: House, at: At) -> None:
    await Sweeper(house.catalog, house.store, house.clock, step=at).sweep()
    assert at.done


async def exact(house: House, disks: Disks) -> None:
    """All is there, and after one more sweep nothing else."""
    await disks.check(house)
    await house.sweeper.sweep()
    await disks.check(house)
    assert await live_bytes(house) == await referred_bytes(house)


@pytest.mark.parametrize("step", STEPS)
async def test_a_whole_capture_in_the_middle_of_a_sweep_keeps_what_it_found(
    house: House, disks: Disks, step: str
) -> None:
    """It finds dead blocks by deduplication, is accomplished and gone before the sweep drops anything."""

    async def capture() -> None:
        await disks.take(house, "vdb")
        gc.collect()

    await sweep(house, At(step, capture))
    await exact(house, disks)


@pytest.mark.parametrize("step", STEPS)
async def test_a_capture_that_found_its_blocks_before_the_sweep_keeps_them(
    house: House, disks: Disks, step: str
) -> None:
    """Nothing in the catalog refers to them yet: only its lease does. It ends in the middle of the sweep."""
    taking = await Taking.begin(house, disks, "vdb")
    await taking.put()

    async def end() -> None:
        await taking.stage()
        await taking.accomplish()

    await sweep(house, At(step, end))
    await exact(house, disks)


@pytest.mark.parametrize("step", STEPS)
async def test_a_capture_that_begins_in_a_sweep_and_ends_after_it_keeps_its_blocks(
    house: House, disks: Disks, step: str
) -> None:
    taking: list[Taking] = []

    async def begin() -> None:
        taking.append(await Taking.begin(house, disks, "vdb"))
        await taking[0].put()

    await sweep(house, At(step, begin))
    await house.sweeper.sweep()
    await taking[0].stage()
    await taking[0].accomplish()
    await exact(house, disks)


@pytest.mark.parametrize("step", STEPS)
async def test_a_capture_that_fails_in_a_sweep_leaves_nothing(house: House, disks: Disks, step: str) -> None:
    async def fail() -> None:
        taking = await Taking.begin(house, disks, "vdb")
        await taking.put()
        await taking.stage()
        await taking.fail()

    await sweep(house, At(step, fail))
    gc.collect()
    await exact(house, disks)
    again, _packs = await house.sweeper.plan()
    assert again.dropped_blocks == 0


@pytest.mark.parametrize("step", STEPS)
async def test_snapshots_deleted_in_a_sweep_are_swept_by_the_next(house: House, disks: Disks, step: str) -> None:
    """The store alone must tell all the time what there is: manifests of deleted neighbours, too."""
    for _ in range(3):
        disks.write("vda", 1, a_block(seeded(), "noise"))
        await disks.take(house, "vda")

    async def delete() -> None:
        for snapshot in list(disks.expected)[-2:-4:-1]:
            await disks.delete(house, snapshot)
        await disks.check(house)

    await sweep(house, At(step, delete))
    await exact(house, disks)


@pytest.mark.parametrize("look", range(6))
async def test_a_deletion_between_two_looks_at_the_manifests_loses_nothing(
    house: House, disks: Disks, monkeypatch: pytest.MonkeyPatch, look: int
) -> None:
    """What is deleted then has a child whose manifest must be written before its own is removed."""
    for _ in range(2):
        disks.write("vda", 1, a_block(seeded(), "noise"))
        await disks.take(house, "vda")
    doomed = list(disks.expected)[-2]
    looks = 0

    def counting(inner: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
        async def counted(*args: object) -> object:
            nonlocal looks
            result = await inner(*args)
            looks += 1
            if looks == look + 1:
                await disks.delete(house, doomed)
            return result

        return counted

    with monkeypatch.context() as patch:
        patch.setattr(house.catalog, "snapshots", counting(house.catalog.snapshots))
        patch.setattr(house.catalog.upkeep, "manifests", counting(house.catalog.upkeep.manifests))
        await manifests.reconcile(house.catalog, house.store)
    if doomed in disks.expected:
        await disks.delete(house, doomed)
    await disks.check(house)
    await exact(house, disks)


async def test_a_put_waits_while_blocks_are_dropped_and_is_told_nothing_stale(house: House, disks: Disks) -> None:
    """The decision and the drop take turns: a put asked for in the middle of a drop does not find what is dropped."""
    dropping, put_asked = asyncio.Event(), asyncio.Event()
    drop = house.catalog.upkeep.drop

    async def slow_drop(ids: object) -> int:
        dropping.set()
        await put_asked.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        return await drop(ids)  # type: ignore[arg-type]

    house.catalog.upkeep.drop = slow_drop  # type: ignore[method-assign]
    sweeping = asyncio.create_task(house.sweeper.sweep())
    await dropping.wait()
    taking = await Taking.begin(house, disks, "vdb")
    putting = asyncio.create_task(taking.put())
    await asyncio.sleep(0.01)
    put_asked.set()
    await putting
    await sweeping
    house.catalog.upkeep.drop = drop  # type: ignore[method-assign]
    await taking.stage()
    await taking.accomplish()
    await exact(house, disks)


@pytest.mark.parametrize("cut", [False, True])
async def test_a_reader_finds_blocks_that_moved_since_it_looked(
    house: House, disks: Disks, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    """The pack is rewritten and deleted between the look into the catalog and the reading, or while it is read."""
    snapshot = list(disks.expected)[-1]
    packs = await house.catalog.upkeep.packs()
    read = house.objects.get_range
    moved = False

    async def move_first(name: str, start: int, length: int) -> bytes:
        nonlocal moved
        if not moved:
            moved = True
            await house.sweeper.sweep()
            await house.sweeper.rewrite(await house.catalog.upkeep.packs())
            assert {pack.name for pack in packs}.isdisjoint({p.name for p in await house.catalog.upkeep.packs()})
            if cut:
                raise StoreFailed("it was being read, and ended")
        return await read(name, start, length)

    monkeypatch.setattr(house.objects, "get_range", move_first)
    assert await restored(house, snapshot) == disks.expected[snapshot]
    assert moved


@pytest.mark.parametrize("broken", ["no guard", "no lease"])
async def test_the_oracle_catches_a_sweep_without_its_protocol(
    house: House, disks: Disks, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    guard = Intake.guard

    if broken == "no guard":
        # Leases of those who are there are heeded, but not of those who come while the sweep is under way.
        def unlisted(self: Intake) -> object:
            context = guard(self)
            return Unheeded(context, self)

        monkeypatch.setattr(Intake, "guard", unlisted)

        async def capture() -> None:
            await disks.take(house, "vdb")

        await sweep(house, At("manifests", capture))
    else:
        taking = await Taking.begin(house, disks, "vdb")
        await taking.put()
        monkeypatch.setattr(house.store.intake, "_leases", set())

        async def end() -> None:
            await taking.stage()
            await taking.accomplish()

        await sweep(house, At("manifests", end))
    with pytest.raises(Damaged):
        await disks.check(house)


class Unheeded:
    """A guard that is told nothing."""

    def __init__(self, context: object, intake: Intake) -> None:
        self._context = context
        self._intake = intake

    def __enter__(self) -> object:
        guard = self._context.__enter__()  # type: ignore[attr-defined]
        self._guards, self._intake._guards = self._intake._guards, []
        return guard

    def __exit__(self, *error: object) -> None:
        self._intake._guards = self._guards
        self._context.__exit__(*error)  # type: ignore[attr-defined]

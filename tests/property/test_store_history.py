"""Whatever is written, captured, deleted, rolled back, swept and killed in between: bytes, to the byte.

Real blocks in real packs, a real catalog. After every step each snapshot restores byte for byte, by the catalog and
from the store alone; after each sweep what the packs hold live is what the entries of all snapshots refer to, no more.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvsnap.errors import Damaged, HvsnapError
from hvsnap.model import PAGE_BLOCKS, SnapshotId
from hvsnap.service.freeing import plan_deletion
from hvsnap.store.idset import IdSet
from hvsnap.upkeep import manifests
from hvsnap.upkeep.plan import Fate
from tests.store_kit import BLOCK
from tests.upkeep_kit import Disks, Fuse, FusedObjects, House, Killed, Taking, live_bytes, referred_bytes

BLOCKS = [0, 1, 2, PAGE_BLOCKS - 1, PAGE_BLOCKS, 2 * PAGE_BLOCKS + 7]
DISKS = ("vda", "vdb")


def content(number: int) -> bytes:
    """Return one of a few contents, so that blocks are shared within and across disks; 0 is zeroes."""
    if number == 0:
        return bytes(BLOCK)
    rng = random.Random(number)
    return rng.randbytes(BLOCK) if number % 2 else (rng.randbytes(900) * 73)[:BLOCK]


@dataclass(frozen=True)
class Write:
    disk: str
    block: int
    content: int


@dataclass(frozen=True)
class Take:
    disk: str
    fails: bool = False


@dataclass(frozen=True)
class Delete:
    which: int


@dataclass(frozen=True)
class RollBack:
    which: int


@dataclass(frozen=True)
class Sweep:
    """``killed_at``: at the n-th change; -1 is never. ``after``: once that change was made."""

    killed_at: int = -1
    after: bool = False


Step = Write | Take | Delete | RollBack | Sweep
disks = st.sampled_from(DISKS)
picks = st.integers(0, 63)
writes = st.builds(Write, disks, st.sampled_from(BLOCKS), st.integers(0, 9))
steps = st.lists(
    st.one_of(
        writes,
        writes,
        writes,
        st.builds(Take, disks),
        st.builds(Take, disks),
        st.builds(Take, disks, st.just(True)),
        st.builds(Delete, picks),
        st.builds(Delete, picks),
        st.builds(RollBack, picks),
        st.builds(Sweep),
        st.builds(Sweep, st.integers(0, 14), st.booleans()),
    ),
    max_size=30,
)


class History:
    """One run over a store and a catalog of its own."""

    def __init__(self, directory: Path, objects: FusedObjects) -> None:
        self.directory = directory
        self.objects = objects
        self.disks = Disks()
        self.house: House

    async def run(self, sequence: list[Step]) -> None:
        await self.open()
        for name in DISKS:
            await self.disks.add(self.house, name)
        for step in sequence:
            await self.do(step)
            if not isinstance(step, Write):
                await self.disks.check(self.house)
        await self.empty()
        await self.house.close()

    async def open(self) -> None:
        self.house = await House.open(self.directory, self.objects, self.objects.fuse)

    async def do(self, step: Step) -> None:
        match step:
            case Write(disk, block, number):
                self.disks.write(disk, block, content(number))
            case Take(disk, fails):
                await self.take(disk, fails)
            case Delete(which):
                if self.disks.expected:
                    await self.delete(self.pick(which))
            case RollBack(which):
                if self.disks.expected:
                    snapshot = self.pick(which)
                    row = await self.house.catalog.snapshot(snapshot)
                    (name,) = [name for name, disk in self.disks.disks.items() if disk.id == row.disk]
                    await self.disks.roll_back(self.house, name, snapshot)
            case Sweep(killed_at, after):
                await self.sweep(killed_at, after)

    async def delete(self, snapshot: SnapshotId) -> None:
        """Delete, and hold what-if to its word, to the byte."""
        promised = (await plan_deletion(self.house.catalog, [snapshot])).together
        before = await referred_bytes(self.house)
        await self.disks.delete(self.house, snapshot)
        assert before - await referred_bytes(self.house) == promised

    async def take(self, disk: str, fails: bool) -> None:
        if not fails:
            await self.disks.take(self.house, disk)
            return
        taking = await Taking.begin(self.house, self.disks, disk)
        await taking.put()
        await taking.stage()
        await taking.fail()

    async def sweep(self, killed_at: int, after: bool) -> None:
        fuse = self.objects.fuse
        fuse.set(killed_at, after=after)
        try:
            await self.house.sweeper.sweep()
        except (Killed, HvsnapError):
            assert fuse.blown
            self.objects.fuse = Fuse()
            await self.house.close()
            await self.open()
            await self.disks.check(self.house)
            await self.house.sweeper.sweep()
        fuse.left = -1
        await self.exact()

    async def exact(self) -> None:
        """The store's live bytes are the algebra's; another sweep finds nothing; nothing is left lying about."""
        expected = await referred_bytes(self.house)
        assert await live_bytes(self.house) == expected
        again, packs = await self.house.sweeper.plan()
        assert (again.manifests, again.dropped_blocks, again.freed_bytes, again.orphans) == (0, 0, 0, 0)
        assert {one.fate for one in packs} <= {Fate.KEEP}
        names = {pack.pack.name for pack in packs}
        assert names == {name for name in self.objects.objects if name.startswith("packs/")}
        manifest_count = len([name for name in self.objects.objects if name.startswith("manifests/")])
        assert manifest_count == len(self.disks.expected)

    async def empty(self) -> None:
        """After everything was deleted, the store is empty but for its configuration."""
        await self.disks.delete(self.house, *self.disks.expected)
        await self.house.sweeper.sweep()
        assert set(self.objects.objects) == {"hvsnap.json"}
        assert [one async for one in self.house.catalog.blocks.ranges_from(0)] == []
        assert await self.house.catalog.upkeep.packs() == []
        assert await self.house.catalog._db.read("SELECT count(*) FROM digests") == [(0,)]

    def pick(self, which: int) -> SnapshotId:
        names = list(self.disks.expected)
        return names[which % len(names)]


def play(sequence: list[Step], objects: FusedObjects | None = None) -> None:
    directory = Path(tempfile.mkdtemp(prefix="hvsnap-history-"))
    try:
        asyncio.run(History(directory, objects or FusedObjects()).run(sequence))
    finally:
        shutil.rmtree(directory)


@given(steps)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_every_snapshot_restores_and_nothing_else_is_kept(sequence: list[Step]) -> None:
    """FAULTS 28."""
    play(sequence)


THREE: list[Step] = [
    Write("vda", 0, 1),
    Write("vda", 1, 2),
    Write("vda", PAGE_BLOCKS, 3),
    Take("vda"),
    Write("vda", 1, 4),
    Write("vda", 2, 5),
    Take("vda"),
    Write("vda", 1, 6),
    Take("vda"),
    Write("vdb", 0, 3),
    Take("vdb"),
]


def test_the_service_definitions_example_frees_one_block() -> None:
    play([*THREE, Delete(1), Sweep(), Delete(0), Sweep()])


LARGE: list[Step] = [
    *THREE,
    *(Write("vdb", 40 + n, 10 + n) for n in range(24)),
    Take("vdb"),
    *(Write("vdb", 40 + n, 0) for n in range(1, 24)),
    Write("vdb", 5, 9),
    Take("vdb"),
    Write("vdb", 5, 0),
    Take("vdb"),
    Delete(5),
    Delete(4),
    Delete(1),
]
"""What is left to a sweep here: a pack to delete, one to punch, one to rewrite, manifests to write and to remove."""


async def test_a_sweep_deletes_punches_and_rewrites_packs(tmp_path: Path) -> None:
    history = History(tmp_path, FusedObjects())
    await history.open()
    for name in DISKS:
        await history.disks.add(history.house, name)
    for step in LARGE:
        await history.do(step)
    planned, _packs = await history.house.sweeper.plan()
    swept = await history.house.sweeper.sweep()
    assert replace(swept, manifests=0) == replace(planned, manifests=0)
    assert swept.manifests >= planned.manifests >= 5
    assert (swept.deleted_packs, swept.punched_packs, swept.rewritten_packs) == (1, 1, 1)
    await history.exact()
    await history.disks.check(history.house)
    await history.house.close()


async def refuse(_name: str, _holes: object) -> bool:
    return False


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("killed_at", range(-1, 20))
def test_where_no_holes_can_be_had_packs_are_rewritten(killed_at: int, after: bool) -> None:
    """As in a bucket, or on a file system that refuses."""
    objects = FusedObjects()
    objects.punch = refuse  # type: ignore[method-assign,assignment]
    play([*LARGE, Sweep(killed_at, after)], objects)
    assert not objects.holes


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("killed_at", range(20))
def test_a_sweep_killed_at_any_change_loses_nothing_and_is_finished_by_the_next(killed_at: int, after: bool) -> None:
    """FAULTS 28."""
    play([*LARGE, Sweep(killed_at, after)])


@pytest.mark.parametrize(
    "broken",
    ["dead blocks are kept", "live blocks are dropped", "manifests are not written anew", "nothing is deleted"],
)
def test_the_oracle_catches_a_broken_sweep(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    sequence = [*THREE, Delete(1), Sweep()]
    play(sequence)
    match broken:
        case "dead blocks are kept":
            monkeypatch.setattr(IdSet, "count", lambda *_args: 1000)
        case "live blocks are dropped":
            monkeypatch.setattr(IdSet, "has", lambda _self, ids: ids % 2 == 0)
            monkeypatch.setattr(IdSet, "count", lambda *_args: 0)
        case "manifests are not written anew":
            real = manifests.plan
            monkeypatch.setattr(manifests, "plan", lambda *args: manifests.ManifestPlan({}, real(*args).remove))
        case _:
            monkeypatch.setattr(FusedObjects, "delete", lambda *_args: asyncio.sleep(0))
    with pytest.raises((AssertionError, KeyError, Damaged)):
        play(sequence)

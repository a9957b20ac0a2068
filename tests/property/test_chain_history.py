"""Whatever is written, zeroed, captured, deleted and rolled back: every snapshot's view is the disk of its instant.

The oracle is a dict of block number -> content for the disk and a copy of it for each snapshot. The catalog is a
real one, on a file; several blocks hold equal contents, so that ids are shared as deduplication shares them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hvsnap.catalog import chain, deletion
from hvsnap.catalog.catalog import Catalog
from hvsnap.model import PAGE_BLOCKS, Disk, SnapshotId, State
from tests.catalog_kit import StoppedClock, a_disk, a_snapshot

PAGES = (0, 1, 9)
BLOCKS = [page * PAGE_BLOCKS + index for page in PAGES for index in (0, 1, 2, 4095)]

Contents = dict[int, int]


@dataclass(frozen=True)
class Write:
    block: int
    content: int  # 0: zeroes


@dataclass(frozen=True)
class Take:
    fails: bool = False


@dataclass(frozen=True)
class Delete:
    which: int


@dataclass(frozen=True)
class RollBack:
    which: int


Step = Write | Take | Delete | RollBack
picks = st.integers(0, 63)
writes = st.builds(Write, st.sampled_from(BLOCKS), st.integers(0, 4))
steps = st.lists(
    st.one_of(
        writes,
        writes,
        writes,
        st.builds(Take),
        st.builds(Take),
        st.builds(Take, st.just(True)),
        st.builds(Delete, picks),
        st.builds(RollBack, picks),
    ),
    max_size=40,
)


@dataclass
class History:
    """A disk with its dirty bitmap, its snapshots in the catalog, and what each of them must hold."""

    catalog: Catalog
    disk: Disk = field(default_factory=a_disk)
    content: Contents = field(default_factory=dict)
    dirty: set[int] = field(default_factory=set)
    expected: dict[SnapshotId, Contents] = field(default_factory=dict)
    failed: list[SnapshotId] = field(default_factory=list)

    async def run(self, sequence: list[Step]) -> None:
        async with self.catalog.write() as tx:
            await tx.add_disk(self.disk)
        for step in sequence:
            match step:
                case Write(block, content):
                    self.content[block] = content
                    self.dirty.add(block)
                case Take(fails):
                    await self.take(fails)
                case Delete(which):
                    await self.delete(which)
                case RollBack(which):
                    await self.roll_back(which)
            if not isinstance(step, Write):
                await self.check()

    async def take(self, fails: bool) -> None:
        """Capture as the product does: read what is dirty or carried, keep what differs from the parent."""
        head = (await self.catalog.disk(self.disk.id)).head
        carried = await self.catalog.carry(self.disk.id)
        read = set(self.dirty)
        for page, index in carried.items():
            read |= {page * PAGE_BLOCKS + int(i) for i in index}
        if head is None:
            read = {block for block in BLOCKS if self.content.get(block)}
        async with self.catalog.write() as tx:
            sequence = await tx.next_sequence(self.disk.id)
            snapshot = a_snapshot(self.disk.id, sequence, head, state=State.PROGRESSING)
            await tx.add_snapshot(snapshot)
        async with self.catalog.write() as tx:
            for page in sorted({block // PAGE_BLOCKS for block in read}):
                blocks = sorted(block for block in read if block // PAGE_BLOCKS == page)
                parent = await self.catalog.view(head, page) if head else chain.blank()
                index = np.array([block % PAGE_BLOCKS for block in blocks], np.uint16)
                ids = np.array([self.content.get(block, 0) for block in blocks], np.uint64)
                entries = chain.changed(parent, index, ids)
                if len(entries):
                    await tx.put_page(snapshot.id, page, entries)
        async with self.catalog.write() as tx:
            if fails:
                await tx.drop_pages(snapshot.id)
                await tx.update_snapshot(snapshot.id, state=State.FAILED)
                self.failed.append(snapshot.id)
                return
            await tx.update_snapshot(snapshot.id, state=State.ACCOMPLISHED)
            await tx.update_disk(self.disk.id, head=snapshot.id)
            await tx.clear_carry(self.disk.id)
        self.dirty.clear()
        self.expected[snapshot.id] = dict(self.content)

    async def delete(self, which: int) -> None:
        names = [*self.expected, *self.failed]
        if names:
            name = names[which % len(names)]
            async with self.catalog.write() as tx:
                await tx.delete_snapshot(name)
            self.expected.pop(name, None)
            if name in self.failed:
                self.failed.remove(name)

    async def roll_back(self, which: int) -> None:
        """Write the snapshot over the disk; the next snapshot's parent is the one rolled back to."""
        if self.expected:
            name = list(self.expected)[which % len(self.expected)]
            self.content = dict(self.expected[name])
            self.dirty.clear()
            async with self.catalog.write() as tx:
                await tx.update_disk(self.disk.id, head=name)
                await tx.clear_carry(self.disk.id)

    async def check(self) -> None:
        for name, content in self.expected.items():
            seen = {
                page * PAGE_BLOCKS + int(index): int(view[index])
                async for page, view in self.catalog.views(name)
                for index in np.flatnonzero(view)
            }
            assert seen == {block: value for block, value in content.items() if value}
            for page in PAGES:
                view = await self.catalog.view(name, page)
                first = page * PAGE_BLOCKS
                assert {first + int(i): int(view[i]) for i in np.flatnonzero(view)} == {
                    block: value for block, value in content.items() if value and block // PAGE_BLOCKS == page
                }
        for name in self.failed:
            assert [page async for page, _ in self.catalog.own_pages(name)] == []


class Bench:
    """A catalog that stays open over many examples, and the loop it lives in."""

    def __init__(self, directory: Path) -> None:
        self.runner = asyncio.Runner()
        self.catalog = self.runner.run(Catalog.open(directory, StoppedClock()))

    def play(self, sequence: list[Step]) -> None:
        self.runner.run(History(self.catalog).run(sequence))

    def close(self) -> None:
        self.runner.run(self.catalog.close())
        self.runner.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("history"))
    yield made
    made.close()


@given(steps)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
def test_every_view_is_the_disk_of_its_instant(bench: Bench, sequence: list[Step]) -> None:
    """FAULTS 21."""
    bench.play(sequence)


THREE_NODES: list[Step] = [
    Write(0, 1),
    Write(1, 1),
    Write(2, 1),
    Take(),
    Write(1, 2),
    Write(2, 0),
    Take(),
    Write(2, 3),
    Write(4095, 3),
    Take(),
]


def test_the_service_definitions_example_holds(bench: Bench) -> None:
    # SERVICE 4.2: S1 = A B C D, S2 = B1 C1, S3 = B2; after S2 is deleted, S3 still restores to A B2 C1 D.
    sequence: list[Step] = [Write(block, 10 + block) for block in (0, 1, 2, 4095)]
    sequence += [Take(), Write(1, 21), Write(2, 22), Take(), Write(1, 31), Take(), Delete(1)]
    bench.play(sequence)


def test_branches_keep_their_views_when_their_fork_is_deleted(bench: Bench) -> None:
    bench.play([*THREE_NODES, RollBack(1), Write(0, 4), Take(), RollBack(1), Write(1, 3), Take(), Delete(1), Take()])


@pytest.mark.parametrize(
    ("broken", "sequence"),
    [
        pytest.param("the parent's entries win", [*THREE_NODES, Delete(1)], id="parent-wins"),
        pytest.param("entries are dropped", [*THREE_NODES, Delete(0)], id="dropped"),
        pytest.param("nothing is carried", [*THREE_NODES, Delete(2), Take()], id="no-carry"),
        pytest.param(
            "a later deletion forgets what was carried", [*THREE_NODES, Delete(2), Delete(1), Take()], id="lost"
        ),
        pytest.param("zeroes are skipped", THREE_NODES, id="zero-skipped"),
    ],
)
def test_the_oracle_catches_a_broken_algebra(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, broken: str, sequence: list[Step]
) -> None:
    bench.play(sequence)
    real_changed, real_hand_over = chain.changed, chain.hand_over
    match broken:
        case "the parent's entries win":
            monkeypatch.setattr(chain, "hand_over", lambda deleted, child: real_hand_over(child, deleted))
        case "entries are dropped":
            monkeypatch.setattr(chain, "hand_over", lambda deleted, child: child)
        case "nothing is carried":
            monkeypatch.setattr(
                deletion, "_merge_carry", lambda deleted, carry: chain.encode_indexes(chain.EMPTY.index)
            )
        case "a later deletion forgets what was carried":
            monkeypatch.setattr(chain, "join_indexes", lambda one, other: other)
        case "zeroes are skipped":

            def without_zeroes(parent: object, index: object, block: np.ndarray) -> chain.Page:
                page = real_changed(parent, index, block)
                return chain.Page(page.index[page.block != 0], page.block[page.block != 0])

            monkeypatch.setattr(chain, "changed", without_zeroes)
    with pytest.raises(AssertionError):
        bench.play(sequence)

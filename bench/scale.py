"""How the catalog holds a large chain: 64 snapshots of a 1 TiB disk, 16.7 million unique blocks, no byte of them real.

``python -m bench.scale [--part 16]`` (a 16th of it, the default: a minute) or ``--part 1`` (the whole). Everything goes
through the real catalog on a real file; only the blocks' contents and packs are left out. Prints a table of what
docs/architecture.md promises, and what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.chain import Page
from hvsnap.model import (
    PAGE_BLOCKS,
    BlockPlace,
    Consistency,
    Disk,
    DiskId,
    GuestUuid,
    Kind,
    Method,
    Snapshot,
    SnapshotId,
    State,
    new_id,
)
from hvsnap.ports import UInt64Array
from hvsnap.service.freeing import plan_deletion
from hvsnap.upkeep.live import dead_blocks, mark

DISK_BLOCKS = 1 << 24
SNAPSHOTS = 64
PACK_BLOCKS = 1024
PUT_BLOCKS = 32
RUN_BLOCKS_MEAN = 4
PAGES_STAGED = 16


class Now:
    """The host's clock."""

    def now(self) -> float:
        """Return seconds since the epoch."""
        return time.time()

    def monotonic(self) -> float:
        """Return seconds since the host was started."""
        return time.monotonic()


class Watch:
    """Takes the time since it was made: by the clock, and of the processors, which other programs cannot spoil."""

    def __init__(self) -> None:
        self._began = (time.perf_counter(), time.process_time())
        self.seconds = 0.0
        self.cpu_s = 0.0

    def stop(self) -> Watch:
        """Stop it, and return it."""
        self.seconds += time.perf_counter() - self._began[0]
        self.cpu_s += time.process_time() - self._began[1]
        return self

    def go_on(self) -> None:
        """Start it again."""
        self._began = (time.perf_counter(), time.process_time())

    def __str__(self) -> str:
        """Return both times."""
        return f"{self.seconds:.2f} s (CPU {self.cpu_s:.2f})"


@dataclass
class Figures:
    """What was measured, by name."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, what: str, promised: str, measured: str) -> None:
        """Add a line to the table, and print it at once."""
        self.rows.append((what, promised, measured))
        print(f"{what:<44} {promised:>14}   {measured}", flush=True)


class Simulation:
    """One chain, grown snapshot by snapshot as captures do it."""

    def __init__(self, catalog: Catalog, blocks: int) -> None:
        self.catalog = catalog
        self.blocks = blocks
        self.rng = np.random.default_rng(1)
        self.next_id = 1
        self.disk = _disk(blocks)
        self.snapshots: list[SnapshotId] = []

    async def grow(self) -> AsyncIterator[tuple[int, Watch]]:
        """Make all snapshots; yield ``(new blocks, time for their digests)`` of each."""
        async with self.catalog.write() as tx:
            await tx.add_disk(self.disk)
        half = self.blocks // 2
        for number in range(SNAPSHOTS):
            where = np.arange(half) if number == 0 else self._scattered(half // (SNAPSHOTS - 1))
            ids, watch = await self._store(where.size)
            await self._record(where, ids)
            yield where.size, watch

    def _scattered(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return about ``count`` blocks all over the disk, in short runs."""
        starts = self.rng.integers(0, self.blocks, count // RUN_BLOCKS_MEAN)
        lengths = self.rng.geometric(1 / RUN_BLOCKS_MEAN, starts.size)
        offsets = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        found = np.unique(np.repeat(starts, lengths) + offsets)
        return found[found < self.blocks]

    async def _store(self, count: int) -> tuple[UInt64Array, Watch]:
        """Look new digests up as puts do, and add them pack by pack."""
        ids = np.arange(self.next_id, self.next_id + count, dtype=np.uint64)
        watch = Watch().stop()
        for start in range(0, count, PACK_BLOCKS):
            part = ids[start : start + PACK_BLOCKS].tolist()
            raw = self.rng.bytes(32 * len(part))
            digests = [raw[at : at + 32] for at in range(0, len(raw), 32)]
            name = f"packs/{part[0]:x}"
            places = [
                BlockPlace(block, digest, name, 64 + 40_000 * n, 40_000, 1)
                for n, (block, digest) in enumerate(zip(part, digests, strict=True))
            ]
            watch.go_on()
            for at in range(0, len(digests), PUT_BLOCKS):
                if await self.catalog.find(digests[at : at + PUT_BLOCKS]):
                    raise AssertionError("a digest that nobody stored was found")
            await self.catalog.add_pack(name, 64 << 20, places)
            watch.stop()
        self.next_id += count
        return ids, watch

    async def _record(self, where: np.ndarray[tuple[int], np.dtype[np.int64]], ids: UInt64Array) -> None:
        """Write the snapshot's pages as captures stage them, and make it accomplished."""
        parent = self.snapshots[-1] if self.snapshots else None
        async with self.catalog.write() as tx:
            one = _snapshot(self.disk, await tx.next_sequence(self.disk.id), parent)
            await tx.add_snapshot(one)
        pages = where // PAGE_BLOCKS
        starts = np.flatnonzero(np.append(True, pages[1:] != pages[:-1]))
        parts = list(zip(starts.tolist(), [*starts[1:].tolist(), where.size], strict=True))
        for at in range(0, len(parts), PAGES_STAGED):
            async with self.catalog.write() as tx:
                for start, end in parts[at : at + PAGES_STAGED]:
                    page = Page((where[start:end] % PAGE_BLOCKS).astype(np.uint16), ids[start:end])
                    await tx.put_page(one.id, int(pages[start]), page)
        async with self.catalog.write() as tx:
            await tx.update_snapshot(one.id, state=State.ACCOMPLISHED)
            await tx.update_disk(self.disk.id, head=one.id)
        self.snapshots.append(one.id)


def _disk(blocks: int) -> Disk:
    return Disk(
        id=DiskId(new_id("d")),
        guest_uuid=GuestUuid("0b5a1d7e-0000-4000-8000-000000000001"),
        guest_name="large",
        target="vda",
        serial="",
        source="/images/large.qcow2",
        format="qcow2",
        size_bytes=blocks << 16,
        system=False,
        created_at=1.0,
    )


def _snapshot(disk: Disk, sequence: int, parent: SnapshotId | None) -> Snapshot:
    return Snapshot(
        id=SnapshotId(new_id("s")),
        disk=disk.id,
        sequence=sequence,
        parent=parent,
        name=f"number {sequence}",
        description="",
        kind=Kind.INCREMENTAL if parent else Kind.FULL,
        method=Method.BITMAP if parent else Method.FULL,
        reason="",
        consistency=Consistency.CRASH,
        state=State.PROGRESSING,
        size_bytes=disk.size_bytes,
        created_at=float(sequence),
    )


def memory_mib() -> int:
    """Return the most memory that this process has used, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def size_bytes(directory: Path) -> int:
    """Return the bytes of the catalog's file."""
    return (directory / "catalog.db").stat().st_size


async def measure(directory: Path, part: int) -> None:
    """Grow the chain, and measure it."""
    blocks = DISK_BLOCKS // part
    figures = Figures()
    before_mib = memory_mib()
    catalog = await Catalog.open(directory, Now())
    simulation = Simulation(catalog, blocks)
    total = 0
    done: list[tuple[int, Watch]] = []
    async for count, watch in simulation.grow():
        total += count
        done.append((count, watch))
        print(f"  snapshot {len(done):>2}: {total:>10} blocks, {rate([(count, watch)])}", file=sys.stderr, flush=True)
    figures.add("unique blocks", "", f"{total}")
    figures.add("new digests, in all", ">= 30000 /s", rate(done))
    figures.add("new digests, last 8 snapshots", ">= 30000 /s", rate(done[-8:]))
    figures.add("memory while growing", "<= 400 MiB", f"{memory_mib()} MiB (at first {before_mib})")
    await views(catalog, simulation, figures)
    await catalog.blocks.merge()
    figures.add("catalog, a unique block", "<= 150 bytes", f"{size_bytes(directory) / total:.1f} bytes")
    await deletions(catalog, simulation, figures, directory)
    await sweep(catalog, figures)
    figures.add("memory in all", "<= 400 MiB", f"{memory_mib()} MiB")
    await catalog.close()


def rate(done: Sequence[tuple[int, Watch]]) -> str:
    """Return digests per second, by the clock and of processor time."""
    count, seconds, cpu_s = (sum(column) for column in zip(*((n, w.seconds, w.cpu_s) for n, w in done), strict=True))
    return f"{count / seconds:.0f} /s (CPU {count / cpu_s:.0f} /s)"


async def views(catalog: Catalog, simulation: Simulation, figures: Figures) -> None:
    """Measure the view of the newest snapshot: the one with the longest lineage."""
    watch = Watch()
    used = 0
    async for _page, view in catalog.views(simulation.snapshots[-1]):
        used += int(np.count_nonzero(view))
    figures.add(f"view of the newest snapshot ({used} blocks)", "<= 10 s", str(watch.stop()))


async def deletions(catalog: Catalog, simulation: Simulation, figures: Figures, directory: Path) -> None:
    """Measure the deletion of the newest, a middle and the first snapshot: what it would free, and doing it."""
    chosen = [("newest", -1), ("middle", SNAPSHOTS // 2), ("first", 0)]
    for what, snapshot in [(what, simulation.snapshots[at]) for what, at in chosen]:
        whole, part = Watch(), Watch()
        plan = await plan_deletion(catalog, [snapshot])
        whole.stop()
        print(f"  what-if {part.stop()}", file=sys.stderr)
        await asyncio.to_thread(empty_log, directory)
        whole.go_on()
        part = Watch()
        async with catalog.write() as tx:
            await tx.delete_snapshot(snapshot)
        log_mib = (directory / "catalog.db-wal").stat().st_size / 2**20
        print(f"  deletion {part.stop()}, log {log_mib:.1f} MiB", file=sys.stderr)
        freed = f"frees {plan.together >> 20} MiB"
        figures.add(f"delete the {what} snapshot ({freed})", "<= 10 s", str(whole.stop()))


def empty_log(directory: Path) -> None:
    """Write SQLite's log back, so that what is in it afterwards is of one transaction."""
    with contextlib.closing(sqlite3.connect(directory / "catalog.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


async def sweep(catalog: Catalog, figures: Figures) -> None:
    """Measure marking and dropping: a sweep's part in the catalog."""
    watch, part = Watch(), Watch()
    live = await mark(catalog)
    print(f"  mark {part.stop()}", file=sys.stderr)
    part = Watch()
    dropped = 0
    async for dead in dead_blocks(catalog, live):
        await catalog.upkeep.drop(dead.ids)
        dropped += dead.ids.size
    print(f"  drop {part.stop()}", file=sys.stderr)
    part = Watch()
    tidied = await catalog.upkeep.tidy()
    print(f"  {tidied} index entries removed {part.stop()}", file=sys.stderr)
    figures.add(f"sweep ({len(live)} blocks live, {dropped} dropped)", "<= 20 s", str(watch.stop()))


def main() -> None:
    """Measure in a directory of its own, and remove it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", type=int, default=16, help="simulate a disk of a part of 1 TiB (default: a 16th)")
    parser.add_argument("--directory", type=Path, default=None, help="where to put the catalog (default: TMPDIR)")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="hvsnap-scale-", dir=arguments.directory))
    try:
        asyncio.run(measure(directory, arguments.part))
    finally:
        shutil.rmtree(directory)
    os.sync()


if __name__ == "__main__":
    main()

"""A store in a bucket: restores with so many reads in flight, and a store of many objects listed and checked.

``python -m bench.bucket [--mib N] [--rounds N] [--distance MS]`` starts a real Ceph with its S3 gateway on loopback,
and reads what it stored there with 1, 4 and 12 reads at once, as a restore does; once as it is, and once with so many
milliseconds added to every request, as between two sites. Beside it the processor time of both sides, and the same
ranges read by the client library alone. ``--objects N`` makes a store of N packs in a local directory (``--ceph``: in
the bucket) and its catalog, lists and checks it, and prints the memory that took.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from blake3 import blake3

from bench.stage import memory_bytes, processor_s
from hvsnap.catalog.catalog import Catalog
from hvsnap.model import BlockPlace
from hvsnap.ports import ObjectStore
from hvsnap.store import pack as packs
from hvsnap.store.blocks import PackedBlocks, open_store
from hvsnap.store.objects import LocalObjects
from hvsnap.store.pack import HEADER_BYTES, PackId
from hvsnap.store.s3 import Place, S3Objects
from hvsnap.upkeep.check import Checker
from tests.catalog_kit import StoppedClock
from tests.ceph import Ceph, make_bucket
from tests.store_kit import BLOCK, MemoryIndex

MIB = 1 << 20
PUT_BYTES = 2 * MIB
PUTS_AT_ONCE = 16


class Far(S3Objects):
    """A bucket further away; counts the ranges that are read."""

    distance_s = 0.0

    def __init__(self, place: Place, spool: Path) -> None:
        super().__init__(place, spool)
        self.ranges: list[tuple[str, int, int]] = []

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        """Return a part of an object, some time later."""
        self.ranges.append((name, start, length))
        await asyncio.sleep(self.distance_s)
        return await super().get_range(name, start, length)


def content(mib: int) -> bytes:
    """Return half-compressible blocks, all different."""
    rng = random.Random(1)
    return b"".join(rng.randbytes(BLOCK // 2) + rng.randbytes(BLOCK // 16) * 8 for _ in range(mib * MIB // BLOCK))


async def filled(store: PackedBlocks, data: bytes) -> list[int]:
    session = store.session()
    ids: list[int] = []
    for at in range(0, len(data), PUT_BYTES):
        ids += (await session.put(memoryview(data)[at : at + PUT_BYTES])).ids.tolist()
    await session.flush()
    return ids


async def fetched(store: PackedBlocks, ids: list[int]) -> float:
    """Return how long it takes to read all of the blocks."""
    began = time.monotonic()
    count = 0
    async for _position, _block in store.get(ids):
        count += 1
    assert count == len(ids)
    return time.monotonic() - began


async def alone(objects: Far, ranges: list[tuple[str, int, int]]) -> float:
    """Return how long it takes to read ranges and do nothing with them."""
    turns = asyncio.Semaphore(objects.reads_at_once)

    async def one(name: str, start: int, length: int) -> None:
        async with turns:
            await objects.get_range(name, start, length)

    began = time.monotonic()
    await asyncio.gather(*(one(*wanted) for wanted in ranges))
    return time.monotonic() - began


@dataclass
class Took:
    """Seconds by the clock, and of the processors: ours, and the cluster's."""

    clock: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    async def add(self, ceph: Ceph, work: Awaitable[float]) -> None:
        ours, theirs = time.process_time(), cluster_s(ceph)
        self.clock.append(await work)
        self.ours.append(time.process_time() - ours)
        self.theirs.append(cluster_s(ceph) - theirs)


def cluster_s(ceph: Ceph) -> float:
    """Return the processor time of the cluster's programs so far."""
    return sum(processor_s(process.pid) for process in ceph._processes.values())


async def restores(ceph: Ceph, mib: int, rounds: int, distance_s: float) -> None:
    with TemporaryDirectory(prefix="hvb") as directory:
        objects = Far(ceph.place("bench", "store"), Path(directory))
        store = await open_store(objects, MemoryIndex())
        ids = await filled(store, content(mib))
        for distance in (0.0, distance_s):
            objects.distance_s = distance
            for what in ("restored", "read alone"):
                took = {1: Took(), 4: Took(), 12: Took()}
                for _ in range(rounds):
                    for reads, one in took.items():
                        objects.reads_at_once = reads
                        ranges, objects.ranges = objects.ranges, []
                        await one.add(ceph, fetched(store, ids) if what == "restored" else alone(objects, ranges))
                print(f"{what}, {distance * 1000:.0f} ms added to each of {len(objects.ranges)} reads, {mib} MiB:")
                tell(took, mib)
        await store.close()


def tell(took: dict[int, Took], mib: int) -> None:
    for reads, one in took.items():
        seconds, times = median(one.clock), median(took[1].clock) / median(one.clock)
        processors = f"processors {median(one.ours):.2f} s here, {median(one.theirs):.2f} s in the cluster"
        print(f"  {reads:2} at once: {mib / seconds:6.0f} MiB/s, {times:.1f} times as fast as one; {processors}")


class Quick(LocalObjects):
    """Objects in a directory that are not made durable: what is measured comes later."""

    async def put(self, name: str, data: bytes) -> None:
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


async def put_pack(store: PackedBlocks, catalog: Catalog, objects: ObjectStore, number: int) -> None:
    """Store a pack of one block, and enter it."""
    repository = store.repository
    pack = PackId.new(repository.id, BLOCK)
    digest = blake3(number.to_bytes(8, "little")).digest()
    entries = packs.index_entries([digest], [HEADER_BYTES], [1], [packs.FLAG_ZSTD])
    tail = packs.encode_tail(pack, HEADER_BYTES + 1, entries, repository.keys.pack)
    await objects.put(pack.name, packs.encode_header(pack) + b"x" + tail)
    place = BlockPlace(number, digest, pack.name, HEADER_BYTES, 1, packs.FLAG_ZSTD)
    await catalog.add_pack(pack.name, HEADER_BYTES + 1 + len(tail), [place])


async def many_objects(count: int, objects: LocalObjects | S3Objects, directory: Path) -> None:
    """List and check a store of so many packs."""
    catalog = await Catalog.open(directory / "state", StoppedClock())
    await catalog._db._writer.execute_fetchall("PRAGMA synchronous = OFF")
    store = await open_store(objects, catalog)
    for start in range(1, count + 1, PUTS_AT_ONCE):
        some = range(start, min(count + 1, start + PUTS_AT_ONCE))
        await asyncio.gather(*(put_pack(store, catalog, objects, number) for number in some))
    await asyncio.to_thread(Path("/proc/self/clear_refs").write_text, "5")  # the peak begins anew
    before = memory_bytes(os.getpid(), "VmHWM")
    began = time.monotonic()
    listed = 0
    async for _item in store.packs.list():
        listed += 1
    print(f"{listed} objects listed in {time.monotonic() - began:.1f} s, ", end="")
    print(f"{(memory_bytes(os.getpid(), 'VmHWM') - before) / MIB:.0f} MiB more memory")
    began = time.monotonic()
    found = await Checker(catalog, store, StoppedClock()).check()
    assert (found.packs, found.differences) == (count, []), found.differences[:3]
    print(f"{found.packs} packs checked in {time.monotonic() - began:.1f} s, ", end="")
    print(f"{(memory_bytes(os.getpid(), 'VmHWM') - before) / MIB:.0f} MiB more memory")
    await store.close()
    objects.close()
    await catalog.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bucket", description=__doc__)
    parser.add_argument("--objects", type=int, default=0, help="packs of a store that is listed and checked")
    parser.add_argument("--ceph", action="store_true", help="these packs are in the bucket")
    parser.add_argument("--mib", type=int, default=256, help="what is stored in the bucket")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--distance", type=float, default=30.0, help="milliseconds that are added to each request")
    options = parser.parse_args()
    if options.objects:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="hvb", dir="/var/tmp")))
            objects: LocalObjects | S3Objects = Quick(directory / "store")
            if options.ceph:
                ceph = stack.enter_context(
                    Ceph(Path(stack.enter_context(TemporaryDirectory(prefix="hvc", dir="/tmp"))))
                )
                make_bucket(ceph, "bench")
                objects = S3Objects(ceph.place("bench", "store"), directory)
            asyncio.run(many_objects(options.objects, objects, directory))
        return 0
    with TemporaryDirectory(prefix="hvc", dir="/tmp") as directory, Ceph(Path(directory)) as ceph:
        make_bucket(ceph, "bench")
        asyncio.run(restores(ceph, options.mib, options.rounds, options.distance / 1000))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A store in a bucket: restores with so many reads in flight, and a store of many objects listed and checked.

``python -m bench.bucket [--mib N] [--rounds N] [--distance MS]`` starts a real Ceph with its S3 gateway on loopback,
and reads what it stored there with 1, 4 and 12 reads at once, as a restore does; once as it is, and once with so many
milliseconds added to every request, as between two sites. ``python -m bench.bucket --objects N`` makes a store of N
packs in a local directory and its catalog, lists and checks it, and prints the memory that took.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from blake3 import blake3

from bench.stage import memory_bytes
from hvsnap.catalog.catalog import Catalog
from hvsnap.model import BlockPlace
from hvsnap.store import pack as packs
from hvsnap.store.blocks import PackedBlocks, open_store
from hvsnap.store.objects import LocalObjects
from hvsnap.store.pack import HEADER_BYTES, PackId
from hvsnap.store.s3 import S3Objects
from hvsnap.upkeep.check import Checker
from tests.catalog_kit import StoppedClock
from tests.ceph import Ceph, make_bucket
from tests.store_kit import BLOCK, MemoryIndex

MIB = 1 << 20
PUT_BYTES = 2 * MIB


class Far(S3Objects):
    """A bucket further away; counts the ranges that are read."""

    distance_s = 0.0
    requests = 0

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        """Return a part of an object, some time later."""
        self.requests += 1
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


async def restores(endpoint: Callable[[Path], Far], mib: int, rounds: int, distance_s: float) -> None:
    with TemporaryDirectory(prefix="hvb") as directory:
        objects = endpoint(Path(directory))
        store = await open_store(objects, MemoryIndex())
        ids = await filled(store, content(mib))
        for distance in (0.0, distance_s):
            objects.distance_s = distance
            took: dict[int, list[float]] = {1: [], 4: [], 12: []}
            for _ in range(rounds):
                for reads, seconds in took.items():
                    objects.reads_at_once = reads
                    objects.requests = 0
                    seconds.append(await fetched(store, ids))
            one = median(took[1])
            print(f"{distance * 1000:.0f} ms added to each of {objects.requests} reads of {len(ids)} blocks:")
            for reads, seconds in took.items():
                speed = mib / median(seconds)
                print(f"  {reads:2} at once: {speed:6.0f} MiB/s, {one / median(seconds):.1f} times as fast as one")
        await store.close()


async def many_objects(count: int, directory: Path) -> None:
    """List and check a store of so many packs, of one block each."""
    catalog = await Catalog.open(directory / "state", StoppedClock())
    await catalog._db._writer.execute_fetchall("PRAGMA synchronous = OFF")  # what is measured comes later
    objects = LocalObjects(directory / "store")
    store = await open_store(objects, catalog)
    repository = store.repository
    for number in range(1, count + 1):
        pack = PackId.new(repository.id, BLOCK)
        digest = blake3(number.to_bytes(8, "little")).digest()
        entries = packs.index_entries([digest], [HEADER_BYTES], [1], [packs.FLAG_ZSTD])
        path = directory / "store" / pack.name
        path.parent.mkdir(parents=True, exist_ok=True)
        tail = packs.encode_tail(pack, HEADER_BYTES + 1, entries, repository.keys.pack)
        path.write_bytes(packs.encode_header(pack) + b"x" + tail)
        place = BlockPlace(number, digest, pack.name, HEADER_BYTES, 1, packs.FLAG_ZSTD)
        await catalog.add_pack(pack.name, HEADER_BYTES + 1 + len(tail), [place])
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
    parser.add_argument("--mib", type=int, default=256, help="what is stored in the bucket")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--distance", type=float, default=30.0, help="milliseconds that are added to each request")
    options = parser.parse_args()
    if options.objects:
        with TemporaryDirectory(prefix="hvb", dir="/var/tmp") as directory:
            asyncio.run(many_objects(options.objects, Path(directory)))
        return 0
    with TemporaryDirectory(prefix="hvc", dir="/tmp") as directory, Ceph(Path(directory)) as ceph:
        make_bucket(ceph, "bench")
        place = ceph.place("bench", "store")
        asyncio.run(restores(lambda spool: Far(place, spool), options.mib, options.rounds, options.distance / 1000))
    return 0


if __name__ == "__main__":
    sys.exit(main())

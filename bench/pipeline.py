"""What a full snapshot and a restore cost, without a guest.

``python -m bench.pipeline [--rounds N] [--mib N] [--encrypted]``

An image is read into a store, and a disk made of it, in this very process: for profilers, too (``perf record -g
python -m bench.pipeline``). Processor time hardly depends on what else the machine does; wall time does. With
``--encrypted`` each round is done twice, plain and encrypted in turns, and the ratios of processor times are told.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.disk import BenchDisk, build
from bench.stage import memory_bytes, run, settle_disk
from hvsnap.capture.pipeline import Pipeline
from hvsnap.capture.plan import Selection
from hvsnap.capture.reader import scan
from hvsnap.capture.record import CatalogStage
from hvsnap.catalog.catalog import Catalog
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import SnapshotId, State
from hvsnap.restore.disk import DiskMaker, Order
from hvsnap.store.blocks import PackedBlocks, open_store
from hvsnap.store.keyring import StoreKey
from hvsnap.store.objects import LocalObjects
from tests.catalog_kit import StoppedClock, a_disk, a_snapshot

MIB = 1 << 20


@contextmanager
def told(name: str, spent: dict[str, list[float]]) -> Iterator[None]:
    """Tell what the block took: of this process, and of QEMU's programs that ended in it; note the sum in ``spent``."""
    settle_disk()
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    began = time.monotonic()
    yield
    wall_s = time.monotonic() - began
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    used = [
        f"{a.ru_utime - b.ru_utime:.2f} + {a.ru_stime - b.ru_stime:.2f}" for a, b in zip(after, before, strict=True)
    ]
    spent.setdefault(name, []).append(
        sum(a.ru_utime + a.ru_stime - b.ru_utime - b.ru_stime for a, b in zip(after, before, strict=True))
    )
    print(f"{name:<10} {wall_s:5.1f} s; processor s (user + system): hvsnap {used[0]}, QEMU's programs {used[1]}")


async def capture(disk: BenchDisk, catalog: Catalog, store: PackedBlocks, run_dir: str) -> SnapshotId:
    """Read the image into the store; returns the snapshot."""
    of_guest = a_disk(source=str(disk.path), size_bytes=disk.size_bytes)
    snapshot = a_snapshot(of_guest.id, 1, size_bytes=disk.size_bytes, state=State.PROGRESSING)
    async with catalog.write() as tx:
        await tx.add_disk(of_guest)
        await tx.add_snapshot(snapshot)
    session = store.session()
    async with serve_image(str(disk.path), "qcow2", run_dir=run_dir) as export:
        found = await asyncio.to_thread(scan, export, store.block_size)
        pipeline = Pipeline(snapshot.id, session, CatalogStage(catalog, snapshot), lambda _progress: None)
        totals = await pipeline.run(export, disk.size_bytes, Selection(found.data, None))
    await session.flush()
    async with catalog.write() as tx:
        await tx.update_snapshot(snapshot.id, state=State.ACCOMPLISHED)
    print(f"           {totals.read_bytes // MIB} MiB read, {totals.new_bytes // MIB} MiB stored")
    return snapshot.id


async def round_trip(disk: BenchDisk, directory: Path, key: StoreKey | None, spent: dict[str, list[float]]) -> None:
    """Capture and restore once, in a new store, encrypted with a key."""
    (directory / "state").mkdir()
    catalog = await Catalog.open(directory / "state", StoppedClock())
    objects = LocalObjects(directory / "store")
    store = await open_store(objects, catalog, key=key)
    target = directory / "restored.qcow2"
    try:
        with told("capture", spent):
            snapshot = await capture(disk, catalog, store, str(directory))
        with told("restore", spent):
            maker = DiskMaker(catalog, store, str(directory))
            await maker.create(Order(snapshot, str(target)), lambda _progress: None)
    finally:
        await store.close()
        objects.close()
        await catalog.close()
    run(["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", str(disk.path), str(target)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.pipeline", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--encrypted", action="store_true", help="compare with an encrypted store")
    parser.add_argument("--mib", type=int, default=2000, help="real file data on the disk")
    options = parser.parse_args()
    disk = build(max(8 << 30, options.mib << 22), options.mib << 20)
    idle_bytes = memory_bytes(os.getpid(), "VmRSS")
    keys = {"plain": None, "encrypted": StoreKey("bench", raw=bytes(32))} if options.encrypted else {"plain": None}
    spent: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.rounds):
        for name, key in keys.items():
            print(f"{name}:")
            with TemporaryDirectory(prefix="hvp", dir="/var/tmp") as directory:
                asyncio.run(round_trip(disk, Path(directory), key, spent.setdefault(name, {})))
    for step in ("capture", "restore") if options.encrypted else ():
        ratio = median(spent["encrypted"][step]) / median(spent["plain"][step])
        print(f"{step}: encrypted takes {ratio:.2f} times the processor time of plain")
    more_bytes = memory_bytes(os.getpid(), "VmHWM") - idle_bytes
    print(f"memory: at most {more_bytes // MIB} MiB more than before the first capture")
    return 0


if __name__ == "__main__":
    sys.exit(main())

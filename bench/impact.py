"""What a guest feels: 4 KiB random writes, four at a time, at rest and while a snapshot or backup is open or copied.

*Open* is the mechanism alone: an instant is held and nobody reads it. *Copied* is all of it, one incremental after
another without a pause, the daemon, its compression and the program that reads included: where the guest has no
KVM, it shares the host's processors with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from statistics import median
from typing import Any

from bench.disk import cache
from bench.peers import Virtnbdbackup
from bench.stage import Stage, run, stage
from bench.weight import low_weight
from hvsnap.hypervisor import images
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.model import GuestUuid
from tests.guest.domain import Guest

DISK_MIB = 4096
"""Large enough that in each measurement most writes are the first ones to their cluster, as on any disk that is larger
than what is written in a moment: that is when copy before write has to copy.
"""
PLAIN = "cluster_size=64k"
"""What qemu-img makes by default."""

POLL_S = 0.02

Sample = tuple[int, int]
"""IOPS, and the 99th percentile of the latency in microseconds."""


class Impact:
    """Measures each way of holding an instant against the same guest at rest just before."""

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._say = say
        self.ratios: dict[str, list[tuple[float, float]]] = {}

    def rounds(self, count: int) -> None:
        """Run rounds of pairs: the guest at rest, and the same guest with something open right after."""
        # Every block is there before anything is measured: the first write to a cluster is another thing.
        with stage(full_disk()) as one:
            self._measure(one.guest)
            asyncio.run(self._rounds(one, count))

    def summary(self) -> dict[str, tuple[float, float]]:
        """Return for each way the median share of the IOPS at rest, and how many times the p99."""
        return {
            name: (median(r[0] for r in ratios), median(r[1] for r in ratios)) for name, ratios in self.ratios.items()
        }

    async def _rounds(self, one: Stage, count: int) -> None:
        hypervisor = LibvirtHypervisor(one.libvirtd.uri)
        guest = one.guest
        try:
            for number in range(count):
                self._say(f"round {number + 1} of {count}")
                await self._compare("redirect", guest, self._redirected(hypervisor, guest, one.disk))
                plain = self._redirected(hypervisor, guest, one.disk, options=PLAIN)
                await self._compare("redirect, overlay of plain clusters", guest, plain)
                await self._compare("libvirt pull backup", guest, self._pulled(guest, one.disk))
                await self._compare("hvsnap, copying", guest, self._hvsnap(one))
                with low_weight(one.daemon.pid) as is_low:
                    if is_low:
                        await self._compare("hvsnap, copying, CPUWeight=20", guest, self._hvsnap(one))
                await self._compare("virtnbdbackup, copying", guest, self._virtnbdbackup(one))
        finally:
            await hypervisor.close()

    async def _compare(
        self, name: str, guest: Guest, holding: contextlib.AbstractAsyncContextManager[None]
    ) -> None:  # fmt: skip
        rest = await asyncio.to_thread(self._measure, guest)
        async with holding:
            held = await asyncio.to_thread(self._measure, guest)
        self.ratios.setdefault(name, []).append((held[0] / rest[0], held[1] / rest[1]))
        self._say(
            f"  at rest {rest[0]} IOPS, p99 {rest[1] / 1000:.1f} ms; "
            f"{name}: {held[0]} IOPS, p99 {held[1] / 1000:.1f} ms"
        )  # fmt: skip

    def _measure(self, guest: Guest) -> Sample:
        found = dict(re.findall(r"(\w+)=(\d+)", guest.run(f"stress latency /dev/vda {self._seconds:.0f} 4")))
        return int(found["iops"]), int(found["p99"])

    @contextlib.asynccontextmanager
    async def _redirected(
        self, hypervisor: LibvirtHypervisor, guest: Guest, disk: Path, *, options: str = ""
    ) -> AsyncIterator[None]:
        """Hold the instant as hvsnap does, with its own parts; ``options`` instead of those of its overlay."""
        uuid, overlay = GuestUuid(guest.uuid), str(disk) + ".overlay"
        await images.create_overlay(overlay, str(disk), "qcow2")
        if options:
            made = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", str(disk), "-F", "qcow2", overlay]
            await asyncio.to_thread(run, made)
        await hypervisor.switch_to_overlays(uuid, {"vda": overlay})
        try:
            yield
        finally:
            await hypervisor.commit_start(uuid, "vda", str(disk))
            while True:
                job = await hypervisor.job(uuid, "vda")
                if job is not None and job.ready:
                    break
                await asyncio.sleep(POLL_S)
            await hypervisor.commit_pivot(uuid, "vda")
            await images.remove(overlay)

    @contextlib.asynccontextmanager
    async def _pulled(self, guest: Guest, disk: Path) -> AsyncIterator[None]:
        """Hold it as libvirt's backup API does: copy-before-write into a scratch image."""
        domain = guest.domain()
        await asyncio.to_thread(_begin_backup, domain, disk.parent / "pull")
        try:
            yield
        finally:
            await asyncio.to_thread(_end_backup, domain)

    @contextlib.asynccontextmanager
    async def _hvsnap(self, one: Stage) -> AsyncIterator[None]:
        """Take incremental snapshots all the time."""
        await asyncio.to_thread(one.daemon.snapshot, one.guest.name)
        async with again_and_again(lambda: one.daemon.snapshot(one.guest.name)):
            yield

    @contextlib.asynccontextmanager
    async def _virtnbdbackup(self, one: Stage) -> AsyncIterator[None]:
        """Take incremental backups all the time."""
        backup, out = Virtnbdbackup(one), one.directory / "vnb"
        await asyncio.to_thread(backup, "full", out)
        async with again_and_again(lambda: backup("inc", out)):
            yield
        await asyncio.to_thread(backup.clear)
        await asyncio.to_thread(shutil.rmtree, out)


@contextlib.asynccontextmanager
async def again_and_again(work: Callable[[], object]) -> AsyncIterator[None]:
    """Do something over and over in a thread for as long as the context lasts; its errors are raised at the end."""
    enough = threading.Event()

    def loop() -> None:
        while not enough.is_set():
            work()

    task = asyncio.create_task(asyncio.to_thread(loop), name="again and again")
    try:
        yield
    finally:
        enough.set()
        await task


def _begin_backup(domain: Any, directory: Path) -> None:
    """Begin a backup job in a directory that QEMU's user may write."""
    directory.mkdir(exist_ok=True)
    directory.chmod(0o777)
    domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{directory}/socket'/><disks>"
        f"<disk name='vda' type='file'><scratch file='{directory}/scratch.qcow2'/></disk></disks></domainbackup>",
        None,
        0,
    )


def _end_backup(domain: Any) -> None:
    """End it, and return when nothing of it is left."""
    domain.abortJob()
    while domain.jobInfo()[0]:
        time.sleep(POLL_S)


def full_disk() -> Path:
    """Return an image of bytes that nothing compresses, every cluster allocated; made once and kept."""
    path = cache() / f"full-{DISK_MIB}.qcow2"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as work:
            raw, made = Path(work) / "raw", Path(work) / "made"
            with raw.open("wb") as out:
                for _ in range(DISK_MIB):
                    out.write(os.urandom(1 << 20))
            run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(made)])
            made.rename(path)
    return path

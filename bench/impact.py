"""What a guest feels: 4 KiB random writes, four at a time, at rest and while a snapshot or backup is open."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from statistics import median
from typing import Any

from hvsnap.hypervisor import images
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.model import GuestUuid
from tests.conftest import short_directory
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import build as build_guest
from tests.guest.libvirtd import Libvirtd

DISK = "1G"
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
        """Run rounds: rest, redirect, rest, pull backup."""
        directory = short_directory()
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            libvirtd = stack.enter_context(Libvirtd(directory / "libvirt"))
            disk = make_image(directory / "disk.qcow2", DISK)
            guest = Guest(libvirtd, directory, "impact", [DiskSpec(disk)], build_guest()).define().start()
            stack.callback(guest.destroy)
            # Every block is there before anything is measured: the first write to a cluster is another thing.
            guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=1024 2>/dev/null; sync", timeout_s=600)
            self._measure(guest)
            asyncio.run(self._rounds(libvirtd, guest, disk, count))

    def summary(self) -> dict[str, tuple[float, float]]:
        """Return for each way the median share of the IOPS at rest, and how many times the p99."""
        return {
            name: (median(r[0] for r in ratios), median(r[1] for r in ratios)) for name, ratios in self.ratios.items()
        }

    async def _rounds(self, libvirtd: Libvirtd, guest: Guest, disk: Path, count: int) -> None:
        hypervisor = LibvirtHypervisor(libvirtd.uri)
        try:
            for number in range(count):
                self._say(f"round {number + 1} of {count}")
                await self._compare("redirect", guest, self._redirected(hypervisor, guest, disk))
                await self._compare("libvirt pull backup", guest, self._pulled(guest, disk))
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
    async def _redirected(self, hypervisor: LibvirtHypervisor, guest: Guest, disk: Path) -> AsyncIterator[None]:
        """Hold the instant as hvsnap does, with its own parts."""
        uuid, overlay = GuestUuid(guest.uuid), str(disk) + ".overlay"
        await images.create_overlay(overlay, str(disk), "qcow2")
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

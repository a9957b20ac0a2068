"""What a bare guest feels: ``python -m bench.bare [--rounds N] [--seconds S]``: fleece beside redirect and beside rest.

4 KiB random writes, four at a time, as in :mod:`bench.impact`, while an instant is held and nobody reads it. *fleece,
full* is the first snapshot of a disk: every block that the guest overwrites is copied before. *fleece, 5 % changed* is
an incremental one, whose other blocks were given back. *blockdev-backup job* is the way of other tools.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hvsnap.capture.blockset import BlockSet
from hvsnap.capture.giveback import give_back
from hvsnap.capture.plan import Selection
from hvsnap.hypervisor import images
from hvsnap.hypervisor.qmp import BareGuest as Configured
from hvsnap.hypervisor.qmp import QmpHypervisor
from hvsnap.model import PAGE_BLOCKS, GuestUuid, SnapshotId
from hvsnap.ports import FleecedDisk
from tests.conftest import short_directory
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.domain import make_image
from tests.guest.image import build
from tests.guest.libvirtd import wait_for

SIZE = 1 << 30
BLOCK = 65536
CHANGED_SHARE = 0.05
POLL_S = 0.02


class Forgetful:
    """No memory: the guest is not off in a bench."""

    async def recall(self, guest: str) -> dict[str, Any] | None:
        return None

    async def remember(self, guest: str, seen: dict[str, Any]) -> None:
        return


class Bench:
    """One guest, held in several ways."""

    def __init__(self, directory: Path, guest: BareGuest, seconds: float) -> None:
        self._directory = directory
        self._guest = guest
        self._seconds = seconds
        self._image = str(guest.disks[0].path)
        self._uuid = GuestUuid(str(guest.uuid))
        configured = Configured(guest.name, str(guest.qmp_socket))
        self._hypervisor = QmpHypervisor(configured, "bench", Forgetful(), str(directory), lambda: None)
        self.ratios: dict[str, list[tuple[float, float]]] = {}

    async def rounds(self, count: int) -> None:
        try:
            for _ in range(count):
                await self._compare("redirect", self._redirected())
                await self._compare("fleece, full", self._fleeced(changed=None))
                await self._compare("fleece, 5 % changed", self._fleeced(changed=CHANGED_SHARE))
                await self._compare("blockdev-backup job", self._job())
        finally:
            await self._hypervisor.close()

    async def _compare(self, name: str, holding: contextlib.AbstractAsyncContextManager[None]) -> None:
        rest = await asyncio.to_thread(self._measure)
        async with holding:
            held = await asyncio.to_thread(self._measure)
        self.ratios.setdefault(name, []).append((held[0] / rest[0], held[1] / rest[1]))
        print(f"{name}: at rest {rest}, held {held} (IOPS, p99 in us)", file=sys.stderr, flush=True)

    def _measure(self) -> tuple[int, int]:
        found = dict(re.findall(r"(\w+)=(\d+)", self._guest.run(f"stress latency /dev/vda {self._seconds:.0f} 4")))
        return int(found["iops"]), int(found["p99"])

    @contextlib.asynccontextmanager
    async def _redirected(self) -> AsyncIterator[None]:
        overlay = f"{self._image}.overlay"
        await images.create_overlay(overlay, self._image, "qcow2")
        await self._hypervisor.switch_to_overlays(self._uuid, {"vda": overlay})
        try:
            yield
        finally:
            await self._hypervisor.commit_start(self._uuid, "vda", self._image)
            while True:
                job = await self._hypervisor.job(self._uuid, "vda")
                if job is not None and job.ready:
                    break
                await asyncio.sleep(POLL_S)
            await self._hypervisor.commit_pivot(self._uuid, "vda")
            await images.remove(overlay)

    @contextlib.asynccontextmanager
    async def _fleeced(self, changed: float | None) -> AsyncIterator[None]:
        fleecer = await self._hypervisor.fleecer(self._uuid)
        disks = [FleecedDisk("vda", SnapshotId("s-aaaaaaaaaaaa"), f"{self._image}.scratch", None)]
        await images.create_image(disks[0].scratch, "qcow2", SIZE, like=self._image)
        await fleecer.fleece_prepare(self._uuid, disks)
        await fleecer.fleece_hold(self._uuid, disks)
        try:
            export = (await fleecer.fleece_export(self._uuid, disks))["vda"]
            if changed is not None:
                await asyncio.to_thread(give_back, export, a_selection(changed), SIZE, BLOCK)
            yield
        finally:
            await fleecer.fleece_undo(self._uuid, disks)
            await images.remove(disks[0].scratch)

    @contextlib.asynccontextmanager
    async def _job(self) -> AsyncIterator[None]:
        scratch = f"{self._image}.scratch"
        await images.create_image(scratch, "qcow2", SIZE, like=self._image)
        file = {"driver": "file", "filename": scratch}
        node = {"driver": "qcow2", "node-name": "scratch", "backing": "vda-drive", "file": file}
        self._guest.qmp("blockdev-add", **node)
        arguments = {"job-id": "job", "device": "vda-drive", "target": "scratch", "sync": "none"}
        self._guest.qmp("blockdev-backup", **arguments)
        try:
            yield
        finally:
            self._guest.qmp("block-job-cancel", device="job")
            await asyncio.to_thread(wait_for, lambda: not self._guest.qmp("query-block-jobs"), "the job's end")
            self._guest.qmp("blockdev-del", **{"node-name": "scratch"})
            await images.remove(scratch)


def a_selection(share: float) -> Selection:
    """Return a selection that reads a share of the disk's blocks, here and there."""
    data, blocks = BlockSet(SIZE // BLOCK), SIZE // BLOCK
    chosen = np.random.default_rng(1).choice(blocks, int(blocks * share), replace=False)
    for page in range(data.pages):
        mine = chosen[chosen // PAGE_BLOCKS == page] % PAGE_BLOCKS
        data.add_index(page, np.sort(mine).astype(np.uint16))
    return Selection(data, data)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bare", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    directory = short_directory()
    guest = BareGuest(directory, "bare", [BareDisk(make_image(directory / "disk.qcow2", str(SIZE)))], build()).start()
    try:
        guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=1024 2>/dev/null; sync", timeout_s=600)

        async def run() -> Bench:
            bench = Bench(directory, guest, options.seconds)
            await bench.rounds(options.rounds)
            return bench

        bench = asyncio.run(run())
    finally:
        guest.remove()
        shutil.rmtree(directory, ignore_errors=True)
    print(
        f"{'while the instant is held':<28} {'IOPS':>6} {'p99':>7}   against the same guest at rest just before, median"
    )
    for name, ratios in bench.ratios.items():
        print(f"{name:<28} {median(r[0] for r in ratios):6.2f} {median(r[1] for r in ratios):6.2f}x")


if __name__ == "__main__":
    main()

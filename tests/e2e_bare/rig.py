"""A bare guest, its disks, a real daemon, and for every disk a replica that the same operations were applied to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hvsnap import wire
from hvsnap.hypervisor.qemu_nodes import OURS
from tests.daemon_kit import Daemon
from tests.e2e.oracle import Replica, read_image
from tests.e2e.rig import DoctoredDaemon, Rig, TestDisk
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.domain import make_image

QUICK = "space_reserve_bytes = 1000000\nparallel = 8"


def table(guest: BareGuest, **keys: object) -> dict[str, str]:
    """Return a guest's table of the configuration, as :class:`Daemon` takes it."""
    return {f"hypervisor.qmp.{guest.name}": guest.table(**keys).partition("\n")[2]}


def a_disk(
    workdir: Path, name: str = "vda", size: str = "8M", image_format: str = "qcow2", **spec: object
) -> BareDisk:  # fmt: skip
    """Make an image and the disk on it."""
    path = make_image(workdir / f"{name}.{image_format}", size, image_format)
    return BareDisk(path, image_format, id=name, **spec)  # type: ignore[arg-type]


def guests(daemon: Daemon) -> list[wire.Guest]:
    """Return the guests that the daemon sees."""
    with daemon.client() as client:
        return client.get("/guests", wire.GuestList).guests


class BareRig(Rig):
    """Drives one bare guest without an operating system."""

    guest: BareGuest  # type: ignore[assignment]

    def __init__(self, guest: BareGuest, daemon: Daemon, scratch: Path) -> None:
        self.guest = guest
        self.daemon = daemon  # type: ignore[assignment]
        self.scratch = scratch
        self.settle_timeout_s = 60.0
        self.disks = [self._test_disk(spec) for spec in guest.disks]
        self._patterns = 0

    def _test_disk(self, spec: BareDisk) -> TestDisk:
        data = read_image(*spec.opened, self.scratch / f"{spec.path.name}.converted")
        return TestDisk(spec.id, spec, Replica(data))  # type: ignore[arg-type]

    def qmp(self, command: str, **arguments: object) -> Any:
        return self.guest.qmp(command, **arguments)

    def _device(self, disk: TestDisk) -> str:
        for entry in self.qmp("query-block"):
            if f"/{disk.target}/" in f"{entry.get('qdev', '')}/" or entry.get("qdev") == disk.target:
                return str(entry["qdev"])
        raise LookupError(disk.target)

    def sources(self) -> list[str]:
        """Return the files that the devices' nodes are on, or the nodes that the test itself has made."""
        made = {disk.spec.node for disk in self.disks}  # type: ignore[attr-defined]
        shown = [entry["inserted"] for entry in self.qmp("query-block") if "inserted" in entry]
        return [str(one["node-name"] if one["node-name"] in made else _path(one["file"])) for one in shown]

    def left_behind(self) -> list[str]:
        """Return what is there of captures: files beside the images; nodes, jobs and exports in QEMU."""
        directories = {disk.spec.path.parent for disk in self.disks}
        names = [name for directory in directories for name in os.listdir(directory)]
        found = [name for name in names if name.endswith((".overlay", ".scratch"))]
        if self.guest.active:
            found += [n["node-name"] for n in self.qmp("query-named-block-nodes", flat=True) if OURS in n["node-name"]]
            found += [one["device"] for one in self.qmp("query-block-jobs")]
            found += [one["id"] for one in self.qmp("query-block-exports")]
        return found

    def check_on_images(self) -> None:
        if self.left_behind():
            raise AssertionError(f"left behind: {self.left_behind()}")
        if self.guest.active:
            images = sorted(disk.spec.node or str(disk.spec.path) for disk in self.disks)  # type: ignore[attr-defined]
            if sorted(self.sources()) != images:
                raise AssertionError(f"the guest is on {self.sources()} instead of {images}")

    def failed(self, made: list[wire.Snapshot]) -> wire.Snapshot:
        """Return a snapshot that ended as failed, everything settled."""
        (ended,) = self.daemon.ended(made)
        self.daemon.settled()
        if ended.state != "failed":
            raise AssertionError(f"{ended.id} is {ended.state}")
        return ended

    def our_bitmaps(self, disk: TestDisk) -> list[str]:
        """Return the bitmaps of hvsnap on a running guest's image."""
        return [name for name in self.bitmaps(disk) if name.startswith(OURS)]


def _path(file: str) -> str:
    """Return the file that QEMU names, which it does by all options where a plain name would not be enough."""
    return str(json.loads(file[5:])["file"]["filename"]) if file.startswith("json:") else file


__all__ = ["QUICK", "BareRig", "DoctoredDaemon", "a_disk", "guests", "table"]

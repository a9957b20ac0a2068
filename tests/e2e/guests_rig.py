"""Several guests of all kinds under one daemon: of libvirt, running and off, and bare ones, fleeced and redirected."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from random import Random
from typing import Any

from hvsnap import wire
from tests.conftest import short_directory
from tests.e2e.oracle import Bytes, check_same
from tests.e2e.rig import DoctoredDaemon, Rig, TestDisk
from tests.e2e_bare.rig import QUICK, BareRig, a_disk, table
from tests.guest.bare import BareGuest
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd


class GuestsRig:
    """``virt`` (two disks) and ``off`` of libvirt, bare ``fleeced`` and ``redirected``; none has an operating system.

    ``daemon_class`` is given its directory, libvirt's URI, no fault, and the tables of its configuration.
    """

    def __init__(self, libvirtd: Libvirtd, daemon_class: type[DoctoredDaemon] = DoctoredDaemon) -> None:
        self.directory = directory = short_directory()
        virt = [
            DiskSpec(make_image(directory / "virt.qcow2", "3M")),
            DiskSpec(make_image(directory / "virt.raw", "2M", "raw"), "raw"),
        ]
        off = [DiskSpec(make_image(directory / "off.qcow2", "2M"))]
        self._virt = Guest(libvirtd, directory, f"{directory.name}-virt", virt).define().start()
        self._off = Guest(libvirtd, directory, f"{directory.name}-off", off).define()
        bare = [
            BareGuest(directory, name, [a_disk(directory, f"{name}-vda", size)]).start()
            for name, size in (("fleeced", "3M"), ("redirected", "2M"))
        ]
        tables = table(bare[0], capture="fleece") | table(bare[1], capture="redirect")
        (directory / "daemon").mkdir()
        self.daemon = daemon_class(directory / "daemon", libvirtd.uri, "", capture=QUICK, **tables)
        self.daemon.start()
        self.virt = Rig(self._virt, self.daemon, directory)
        self.off = Rig(self._off, self.daemon, directory)
        self.fleeced = BareRig(bare[0], self.daemon, directory)
        self.redirected = BareRig(bare[1], self.daemon, directory)
        self.rigs: Sequence[Rig] = (self.virt, self.off, self.fleeced, self.redirected)

    def close(self) -> None:
        """End everything."""
        self._virt.remove()
        self._off.remove()
        for rig in (self.fleeced, self.redirected):
            rig.guest.remove()
        self.daemon.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- what is done -----------------------------------------------------------------------------

    def disks(self) -> list[tuple[Rig, TestDisk]]:
        return [(rig, disk) for rig in self.rigs for disk in rig.disks]

    def write(self, random: Random, rigs: Sequence[Rig] = ()) -> None:
        """Write to disks, of all guests if none is named; what was written can be seen in the images."""
        for rig in rigs or self.rigs:
            for disk in rig.disks:
                rig.random_operations(random, disk, 3)
                rig.flush(disk)

    def begin(self, rigs: Sequence[Rig] = (), **options: Any) -> list[wire.Snapshot]:
        """Ask for a group of guests, all of them if none is named, and do not wait for it."""
        first, *others = rigs or self.rigs
        asked = [wire.GuestDisks(guest=rig.guest.name) for rig in others]
        return self.daemon.begin(first.guest.name, others=asked, **{"consistency": "crash", **options})

    def group(self, rigs: Sequence[Rig] = (), **options: Any) -> list[wire.Snapshot]:
        """Make a group of guests, and return it accomplished, all guests back on their images."""
        ended = self.daemon.ended(self.begin(rigs, **options))
        bad = [one for one in ended if one.state != "accomplished"]
        if bad:
            raise RuntimeError(f"{bad[0].guest}: {bad[0].error}\n{self.daemon.log.read_text()[-3000:]}")
        self.daemon.settled()
        return ended

    # -- what must hold ---------------------------------------------------------------------------

    def present(self) -> dict[tuple[str, str], Bytes]:
        """Return what all disks hold, by guest and target."""
        return {(rig.guest.name, disk.target): rig.present(disk) for rig, disk in self.disks()}

    def check_restored(self, snapshots: Sequence[wire.Snapshot], expected: dict[tuple[str, str], Bytes]) -> None:
        """Compare what snapshots restore to."""
        for one in snapshots:
            got = self.virt.restored(one.id)
            check_same(got, expected[one.guest, one.target], f"{one.id} of {one.guest}/{one.target}")

    def check_guests(self, what: str) -> None:
        """All guests are on their own images, which hold what was written to them, and nothing is left of captures."""
        for rig in self.rigs:
            rig.check_on_images()
            for disk in rig.disks:
                rig.check_disk(disk, what)

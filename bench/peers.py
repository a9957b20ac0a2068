"""The program that hvsnap is measured against: Debian's virtnbdbackup, run as its manual says."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from bench.stage import run
from tests.guest.domain import Guest
from tests.guest.libvirtd import Libvirtd


class Place(Protocol):
    """Where it runs: a guest, its libvirtd, a directory."""

    @property
    def directory(self) -> Path: ...

    @property
    def libvirtd(self) -> Libvirtd: ...

    @property
    def guest(self) -> Guest: ...


class Virtnbdbackup:
    """Backs the guest of a place up by libvirt's pull backup: libnbd reads what QEMU exports."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._scratch = place.directory / "scratch"
        self._scratch.mkdir(mode=0o777, exist_ok=True)
        self._scratch.chmod(0o777)
        # It takes a URI with a socket for a remote one: in libvirtd's own namespace the plain one serves.
        self._inside = ["nsenter", "--target", str(place.libvirtd.pids()[0]), "--mount", "--"]

    def __call__(self, level: str, out: Path, *options: str) -> None:
        """Back up to ``out``; ``full`` wants it empty."""
        command = ["virtnbdbackup", "-d", self._place.guest.name, "-o", str(out), "-S", str(self._scratch), "-n"]
        run([*self._inside, *command, "-f", str(self._scratch / "socket"), "-l", level, *options])

    def restore(self, out: Path, target: Path) -> None:
        """Restore all disks of a backup into a directory."""
        log = ["-L", str(self._scratch / "restore.log")]
        run([*self._inside, "virtnbdrestore", "-i", str(out), "-o", str(target), "-n", *log])

    def clear(self) -> None:
        """Remove its checkpoints from the guest."""
        for checkpoint in self._place.guest.domain().listAllCheckpoints():
            checkpoint.delete()

"""How long a guest takes to boot from an instant disk beside a local copy, and how fast what is served is read.

The guest's root is an ext4 file system of real files, of which its boot reads 200 MiB: the files of a directory here,
and of one there. Both disks are made of the same snapshot, in turns; neither they nor the store are in the page cache
when the guest is started.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.disk import BenchDisk, build
from bench.stage import HVSNAP, run
from tests.conftest import short_directory
from tests.daemon_kit import Daemon
from tests.guest.bare import host_cpu_s
from tests.guest.domain import DiskSpec, Guest
from tests.guest.image import INIT, GuestImage
from tests.guest.image import build as build_guest
from tests.guest.libvirtd import Libvirtd, host_pids, wait_for

MIB = 1 << 20
SIZE = 1 << 30
FILES_BYTES = 600 * MIB
READ_BYTES = 200 * MIB
BOOT_MAX = 1.5
"""Times the boot from a local copy (docs/service.md)."""

BOOT_RATIO = "boot from an instant disk / from a local copy"

FILL_TIMEOUT_S = 300.0

_BEFORE, _AFTER = INIT.split("mkdir -p /dev/virtio-ports\n")
FROM_DISK = f"{_BEFORE}mount -t ext4 -o ro /dev/vda /mnt && exec switch_root /mnt /sbin/boot\n"
"""What the initramfs does instead of being the system itself."""

BOOT = f"""#!/bin/sh
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
mount -t tmpfs run /run; mount -t tmpfs tmp /tmp
xargs -n 100 cat < /etc/boot.list > /dev/null
mkdir -p /dev/virtio-ports
{_AFTER}"""
"""The disk's own start, in the place of services: it reads what /etc/boot.list names, then its shell answers."""


def root_disk(plain: GuestImage) -> BenchDisk:
    """Return the disk with the root file system, building it if the cache has none."""

    def add(tree: Path) -> None:
        subprocess.run(["cpio", "-idu", "--quiet", "-F", str(plain.initramfs)], cwd=tree, check=True)
        directories = sorted(path for path in (tree / "usr").rglob("*") if path.is_dir())
        random.Random(1).shuffle(directories)
        taken, left = [], READ_BYTES
        for path in (one for directory in directories for one in sorted(directory.iterdir())):
            if not path.is_file() or set(" '\"\\") & set(str(path)):
                continue
            left -= path.stat().st_size
            if left < 0:
                break
            taken.append(f"/{path.relative_to(tree)}\n")
        (tree / "etc/boot.list").write_text("".join(taken))
        (tree / "sbin/boot").write_text(BOOT)
        (tree / "sbin/boot").chmod(0o755)

    return build(SIZE, FILES_BYTES, f"root 2 {READ_BYTES} {BOOT} {plain.initramfs.parent.name}", add)


def forget(path: Path) -> None:
    """Let the page cache forget a file, or all below a directory."""
    for one in path.rglob("*") if path.is_dir() else [path]:
        if one.is_file():
            with one.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Instant:
    """Runs rounds, each with both disks, and keeps the figures."""

    say: Callable[[str], None]
    figures: dict[str, list[float]] = field(default_factory=dict)

    def rounds(self, count: int) -> None:
        """Run rounds; which disk goes first alternates."""
        plain = build_guest()
        disk, booting = root_disk(plain), build_guest(("ext4",), FROM_DISK)
        self.say(
            f"{disk.files} files of {disk.file_bytes >> 20} MiB, {READ_BYTES >> 20} MiB of them read while it boots"
        )
        with contextlib.ExitStack() as stack:
            stage = stack.enter_context(_stage(disk))
            for number in range(count):
                self.say(f"round {number + 1} of {count}")
                kinds = [self._local, self._instant]
                for kind in kinds if number % 2 == 0 else reversed(kinds):
                    kind(stage, booting)
                self._served(stage)

    def summary(self) -> dict[str, float]:
        """Return the median of each figure, and the ratios, taken round by round."""
        found = {name: median(values) for name, values in self.figures.items()}
        for name, (ours, theirs) in {
            BOOT_RATIO: ("instant boot s", "local boot s"),
            "ordered to booted, instant / copied before": ("instant ordered to booted s", "local ordered to booted s"),
            "nbdcopy of a served snapshot / of a local copy": ("nbdcopy served s", "nbdcopy local s"),
        }.items():
            pairs = zip(self.figures[ours], self.figures[theirs], strict=True)
            found[name] = median(one / other for one, other in pairs)
        return found

    def _note(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)
        self.say(f"  {name:<36} {value:8.2f}")

    def _local(self, stage: Stage, image: GuestImage) -> None:
        path = stage.directory / "local.qcow2"
        path.unlink(missing_ok=True)
        began = time.monotonic()
        stage.hvsnap("disk-create", stage.snapshot, str(path))
        copied = time.monotonic() - began
        booted = self._boot("local", stage, path, image)
        self._note("local ordered to booted s", copied + booted)

    def _instant(self, stage: Stage, image: GuestImage) -> None:
        path = stage.directory / "instant.qcow2"
        path.unlink(missing_ok=True)
        forget(stage.daemon.store)
        began = time.monotonic()
        stage.hvsnap("disk-create", stage.snapshot, str(path), "--instant")
        made = time.monotonic() - began
        before = host_cpu_s(stage.daemon.pid)
        booted = self._boot("instant", stage, path, image, lambda: self._filled(stage, path, before))
        self._note("instant ordered to booted s", made + booted)
        run(["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", str(path), str(stage.source)])

    def _filled(self, stage: Stage, path: Path, before: float) -> None:
        """Note what has happened by the time that the guest is up, and wait for the disk to be whole."""
        self._note("instant: the daemon's processor s", host_cpu_s(stage.daemon.pid) - before)
        open_still = "backing file:" in run(["qemu-img", "info", "-U", "-f", "qcow2", str(path)])
        self._note("instant: filled when it was up, %", 100 * path.stat().st_blocks * 512 / stage.data_bytes)
        self._note("instant: used before it was whole", float(open_still))
        began = time.monotonic()
        wait_for(lambda: stage.daemon.status().open_operations == 0, "a whole disk", FILL_TIMEOUT_S)
        self._note("instant: whole after s more", time.monotonic() - began)

    def _boot(
        self, name: str, stage: Stage, path: Path, image: GuestImage, then: Callable[[], None] = lambda: None
    ) -> float:
        """Boot a guest from a disk and return the seconds until it is up; ``then`` is called while it runs."""
        guest = Guest(stage.libvirtd, stage.directory, f"bench-{name}", [DiskSpec(path)], image, agent=False).define()
        try:
            os.sync()
            forget(path)
            began = time.monotonic()
            guest.start()
            booted = time.monotonic() - began
            self._note(f"{name} boot s", booted)
            self._note(f"{name}: QEMU's processor s", host_cpu_s(guest.pid))
            then()
        finally:
            guest.remove()
        return booted

    def _served(self, stage: Stage) -> None:
        """Read the whole snapshot as it is served, and a local copy of it, with the same client."""
        socket = stage.hvsnap("snapshot-serve", stage.snapshot, "--detach").strip()
        forget(stage.daemon.store)
        self._timed("nbdcopy served s", ["nbdcopy", socket, "null:"])
        stage.hvsnap("snapshot-unserve", stage.snapshot)
        local = stage.directory / "local.qcow2"
        forget(local)
        self._timed(
            "nbdcopy local s", ["nbdcopy", "--", "[", "qemu-nbd", "-r", "-f", "qcow2", str(local), "]", "null:"]
        )

    def _timed(self, name: str, argv: list[str]) -> None:
        began = time.monotonic()
        run(argv)
        self._note(name, time.monotonic() - began)


@dataclass
class Stage:
    """A daemon with one snapshot of the disk."""

    directory: Path
    libvirtd: Libvirtd
    daemon: Daemon
    source: Path
    data_bytes: int
    snapshot: str = ""

    def hvsnap(self, *words: str) -> str:
        """Run a command and return what it prints."""
        return run([HVSNAP, "--config", str(self.daemon.config), "--quiet", *words])


@contextlib.contextmanager
def _stage(disk: BenchDisk) -> Iterator[Stage]:
    directory = short_directory()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        source = directory / "source.qcow2"
        shutil.copyfile(disk.path, source)
        libvirtd = stack.enter_context(Libvirtd(directory / "libvirt"))
        guest = Guest(libvirtd, directory, "source", [DiskSpec(source)]).define()
        stack.callback(guest.remove)
        daemon = Daemon(directory, libvirtd.uri).start()
        stack.callback(_end, daemon, directory)
        stage = Stage(directory, libvirtd, daemon, source, disk.data_bytes)
        (made,) = daemon.snapshot(guest.name)
        stage.snapshot = made.id
        yield stage


def _end(daemon: Daemon, directory: Path) -> None:
    daemon.stop()
    for pid in host_pids("nbdkit", str(directory)):  # of a disk that was not whole when the bench was left
        os.kill(pid, 15)

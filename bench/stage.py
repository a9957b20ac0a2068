"""The stage: a private libvirtd, a guest with the measured disk, hvsnap's daemon, and how a command is timed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvsnap.config import Settings
from tests.conftest import short_directory
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest
from tests.guest.image import build as build_guest
from tests.guest.libvirtd import Libvirtd

HVSNAP = str(Path(sys.executable).parent / "hvsnap")
COMMAND_TIMEOUT_S = 600
BUDGET_PCT = Settings().capture.impact_budget_pct
"""As users have it, where the tests' daemons have none."""


@dataclass
class Stage:
    """A fresh copy of the measured disk under a running guest, and a daemon with an empty store."""

    directory: Path
    libvirtd: Libvirtd
    guest: Guest
    daemon: Daemon
    disk: Path

    def hvsnap(self, *words: str) -> str:
        """Run a command to its end, the guest back on its image."""
        out = run([HVSNAP, "--config", str(self.daemon.config), "--quiet", *words])
        self.daemon.settled()
        return out

    def stored_bytes(self) -> int:
        """Return what hvsnap's store takes."""
        return tree_bytes(self.daemon.store)


@contextlib.contextmanager
def stage(image: Path) -> Iterator[Stage]:
    """Set the stage with a copy of ``image``, and clear it."""
    directory = short_directory()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        disk = directory / "disk.qcow2"
        shutil.copyfile(image, disk)
        libvirtd = stack.enter_context(Libvirtd(directory / "libvirt"))
        guest = Guest(libvirtd, directory, "bench", [DiskSpec(disk)], build_guest()).define().start()
        stack.callback(guest.destroy)
        # Snapshots are taken one after another here, for as long as something is measured.
        tables = {"limits": "snapshots_per_disk = 1000", "capture": f"impact_budget_pct = {BUDGET_PCT}"}
        daemon = Daemon(directory, libvirtd.uri, **tables).start()
        stack.callback(daemon.stop)
        settle_disk()
        yield Stage(directory, libvirtd, guest, daemon, disk)


def run(argv: list[str]) -> str:
    """Run a command; a failing one ends the bench with its words."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{argv[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-800:]}")
    return done.stdout


@contextlib.contextmanager
def clock() -> Iterator[list[float]]:
    """Give a list that holds the seconds of the block once it has ended."""
    seconds: list[float] = []
    began = time.monotonic()
    yield seconds
    seconds.append(time.monotonic() - began)


def settle_disk() -> None:
    """Write out what others have left in the page cache, so that nobody pays for it but them."""
    os.sync()


def tree_bytes(path: Path) -> int:
    """Return the bytes of all files below a directory."""
    return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())


def memory_bytes(pid: int, key: str) -> int:
    """Return a figure of /proc/PID/status: ``VmRSS`` (memory now) or ``VmHWM`` (the most there ever was)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} shows no {key}")


def processor_s(pid: int) -> float:
    """Return the processor time that a process has taken, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

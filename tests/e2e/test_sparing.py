"""A guest under load is spared: its capture is slowed down by what it feels, within the budget that it is given."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import libvirt
import pytest

from hvsnap.capture.governor import FLOOR_BYTES_S, MIB
from tests.e2e.rig import DoctoredDaemon
from tests.guest.domain import DiskSpec, Guest
from tests.guest.image import GuestImage
from tests.guest.libvirtd import wait_for

DISK_BYTES = 48 * MIB
LIMIT_BYTES_S = 2 * FLOOR_BYTES_S
"""So slow that the capture takes some looks, and fast enough to be slowed down."""

LANES = 32
REST_IOPS, HELD_IOPS = 200, 80


class Load:
    """32 writes at a time in the guest, which QEMU lets through at a rate: how long each takes is no accident."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._stop = threading.Event()
        self._mib = 0
        self._rounds = 0
        self._thread = threading.Thread(target=self._run, name="load")

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._mib:
                self._guest.run(f"dd if=/dev/zero of=/dev/vda bs=1M count={self._mib} conv=fsync 2>/dev/null")
                self._mib = 0
            self._guest.run(f"stress latency /dev/vda 1 {LANES}")
            self._rounds += 1

    def fill(self, mib: int) -> None:
        """Write the disk's first MiBs, once."""
        self._mib = mib
        wait_for(lambda: not self._mib, "the MiBs")

    def let_through(self, iops: int) -> None:
        """Let QEMU do so many requests a second; 0: all."""
        self._guest.domain().setBlockIoTune("vda", {"total_iops_sec": iops}, libvirt.VIR_DOMAIN_AFFECT_LIVE)

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        self.let_through(REST_IOPS)
        self._thread.start()
        try:
            wait_for(lambda: self._rounds > 0, "the load")
            yield self
        finally:
            self.let_through(0)
            self._stop.set()
            self._thread.join()


@pytest.fixture
def guest(make_guest: Callable[..., Guest], guest_image: GuestImage, workdir: Path) -> Guest:
    """A booted guest with a disk full of bytes that nothing compresses."""
    (workdir / "disk.raw").write_bytes(Random(1).randbytes(DISK_BYTES))
    return make_guest([DiskSpec(workdir / "disk.raw", "raw")], guest_image, agent=False).start()


def test_a_guest_that_suffers_slows_its_capture_down_by_its_budget_while_there_is_space(
    make_daemon: Callable[..., DoctoredDaemon], guest: Guest
) -> None:
    """The same guest suffers the same: beyond a tight budget, within a loose one. Without space, neither counts."""
    for budget_pct, slowed in ((5, True), (1000, False)):
        daemon = make_daemon(capture=f"impact_budget_pct = {budget_pct}\nrate_max_bytes_s = {LIMIT_BYTES_S}")
        with Load(guest).running() as load, daemon.gate("switch") as gate:
            begun = daemon.begin(guest.name)
            gate.reached()  # what is at rest has been seen
            load.let_through(HELD_IOPS)
            gate.open()
            (made,) = daemon.ended(begun)
        assert made.state == "accomplished", made.error
        assert made.read_bytes == DISK_BYTES
        assert made.impact is not None
        print(f"{budget_pct} %: {made.impact}")
        assert 1.5 < made.impact.slowdown < 10
        assert made.impact.rest_write_us is not None
        if slowed:
            assert made.impact.rate_low_bytes_s is not None
            assert FLOOR_BYTES_S <= made.impact.rate_low_bytes_s < LIMIT_BYTES_S
        else:
            assert made.impact.rate_low_bytes_s is None
        shown = hvsnap(daemon, "snapshot-info", made.id)
        assert f"requests took {made.impact.slowdown:.2f} times as long" in shown
        assert ("slowed down to" in shown) == slowed
        daemon.settled()
        daemon.stop()
    check_short_of_space(make_daemon, guest)


def check_short_of_space(make_daemon: Callable[..., DoctoredDaemon], guest: Guest) -> None:
    """The guest has used more than half of what its overlay may have before its disk is read."""
    limits = f"impact_budget_pct = 5\nrate_max_bytes_s = {LIMIT_BYTES_S}\noverlay_limit_bytes = {64 * MIB}"
    daemon = make_daemon(capture=limits)
    with Load(guest).running() as load, daemon.gate("read") as gate:
        begun = daemon.begin(guest.name)
        gate.reached()
        load.fill(40)
        load.let_through(HELD_IOPS)
        gate.open()
        (made,) = daemon.ended(begun)
    assert made.state == "accomplished", made.error
    assert made.impact is not None
    assert made.impact.rate_low_bytes_s is None
    assert "space for its writes runs short" in daemon.log.read_text()


def hvsnap(daemon: DoctoredDaemon, *words: str) -> str:
    command = [str(Path(sys.executable).parent / "hvsnap"), "--config", str(daemon.config), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

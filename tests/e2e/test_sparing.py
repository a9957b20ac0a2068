"""A guest under load is spared: its capture is slowed down by what it feels, within the budget that it is given."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from hvsnap.capture.governor import FLOOR_BYTES_S, MIB
from tests.e2e.rig import DoctoredDaemon
from tests.guest.domain import DiskSpec, Guest
from tests.guest.image import GuestImage
from tests.guest.libvirtd import wait_for

DISK_BYTES = 48 * MIB
LIMIT_BYTES_S = 2 * FLOOR_BYTES_S
"""So slow that the capture takes some looks, and fast enough to be slowed down."""


class Load:
    """Random writes in the guest: one at a time until :meth:`rise`, then many."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._stop = threading.Event()
        self._lanes = 1
        self._rounds: list[int] = []
        self._thread = threading.Thread(target=self._run, name="load")

    def _run(self) -> None:
        while not self._stop.is_set():
            lanes = self._lanes
            self._rounds.append(lanes)
            self._guest.run(f"stress latency /dev/vda 1 {lanes}")

    def rise(self) -> None:
        """Let 32 writes compete, and return when they do: each takes many times as long."""
        self._lanes = 32
        wait_for(lambda: 32 in self._rounds, "the load")

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        self._thread.start()
        try:
            wait_for(lambda: len(self._rounds) > 1, "the load")
            yield self
        finally:
            self._stop.set()
            self._thread.join()


def test_a_guest_that_suffers_slows_its_capture_down_by_its_budget(
    make_daemon: Callable[..., DoctoredDaemon],
    make_guest: Callable[..., Guest],
    guest_image: GuestImage,
    workdir: Path,
) -> None:
    """The same guest with the same load: a tight budget is exceeded, a loose one is not, and both are measured."""
    (workdir / "disk.raw").write_bytes(Random(1).randbytes(DISK_BYTES))
    guest = make_guest([DiskSpec(workdir / "disk.raw", "raw")], guest_image, agent=False).start()
    for budget_pct, slowed in ((5, True), (1000, False)):
        limits = f"impact_budget_pct = {budget_pct}\nrate_max_bytes_s = {LIMIT_BYTES_S}"
        daemon = make_daemon(capture=limits)
        with Load(guest).running() as load, daemon.gate("switch") as gate:
            begun = daemon.begin(guest.name)
            gate.reached()  # what is at rest has been seen
            if slowed:
                load.rise()
            gate.open()
            (made,) = daemon.ended(begun)
        assert made.state == "accomplished", made.error
        assert made.read_bytes == DISK_BYTES
        assert made.impact is not None
        print(f"{budget_pct} %: {made.impact}")
        assert made.impact.rest_iops > 0
        assert made.impact.rest_write_us is not None
        if slowed:
            assert made.impact.slowdown > 1 + budget_pct / 100
            assert made.impact.rate_low_bytes_s is not None
            assert FLOOR_BYTES_S <= made.impact.rate_low_bytes_s < LIMIT_BYTES_S
        else:
            assert made.impact.rate_low_bytes_s is None
        shown = subprocess.run(
            [Path(sys.executable).parent / "hvsnap", "--config", daemon.config, "snapshot-info", made.id],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert f"requests took {made.impact.slowdown:.2f} times as long" in shown
        assert ("slowed down to" in shown) == slowed
        daemon.settled()
        daemon.stop()

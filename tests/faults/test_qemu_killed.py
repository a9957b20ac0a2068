"""A guest's QEMU is killed in a capture: it starts again with every write that was acknowledged, whoever is first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from random import Random

import pytest

from tests.faults.crash_rig import CrashRig, Rigs
from tests.faults.killing_daemon import Order
from tests.faults.rounds import share, told
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd

Note = Callable[[str, object], None]
SEED = int(os.environ.get("E2E_SEED", "20260714"))
PART = "libvirt redirect, QEMU"
MOMENTS = {
    # name: where the daemon is, and how the next capture finds its blocks
    "bitmaps-added": ("image.create_overlay", "before", "rescan"),
    "frozen": ("freeze", "after", "rescan"),
    "reading": ("nbd.start", "after", "bitmap"),
    "accomplished": ("commit_start", "before", "bitmap"),
    "committing": ("commit_start", "after", "rescan"),
    "ready": ("commit_pivot", "before", "rescan"),
    "pivoted": ("commit_pivot", "after", "rescan"),
    "overlay-removed": ("bitmap_remove", "before", "rescan"),
}


@pytest.fixture(scope="module")
def rigs(libvirtd: Libvirtd, guest_image: GuestImage) -> Iterator[Rigs]:
    made = Rigs(lambda: CrashRig(libvirtd, guest_image, formats=("qcow2",), cache="writethrough"))
    yield made
    made.close()


WORST = ("reading", "committing", "ready", "pivoted")
WAYS = [(daemon, first) for daemon in ("lives", "dies") for first in ("guest", "daemon")]


def cases() -> list[tuple[str, str, str]]:
    """Return the rounds: the worst moments first, each in another way."""
    ways = Random(SEED).sample(WAYS, len(WAYS))
    moments = dict.fromkeys((*WORST, *MOMENTS))
    turns = [(one, *ways[(n + turn) % len(ways)]) for turn in range(len(ways)) for n, one in enumerate(moments)]
    return turns[: share(PART)]


@pytest.mark.parametrize(("moment", "daemon", "first"), cases())
def test_qemu_killed_in_a_capture(rigs: Rigs, moment: str, daemon: str, first: str, record_property: Note) -> None:
    """FAULTS 5."""
    with rigs.lent() as rig:
        point, side, method = MOMENTS[moment]
        known = set(rig.snapshots())
        rig.write_on()
        with rig.held_at(point, side) as held:
            with rig.slow_commits() if moment == "committing" else contextlib.nullcontext():
                rig.begin(rig.disks)
                rig.reached(held)
            if moment == "committing":
                rig.committing()
            rig.written(20)
            rig.guest.kill()
            rig.lost_writing()
            if daemon == "dies":
                rig.daemon.kill()
            # What libvirt starts it from holds what was acknowledged, before anybody repairs anything.
            rig.check_disks()
            if first == "guest":
                rig.boot()
                rig.write_on()
        if daemon == "dies":
            rig.restart()
        rig.daemon.settled(60)
        if first == "daemon":
            rig.boot()
            rig.write_on()
        rig.stop_writing()
        rig.check([one for one in rig.snapshots() if one not in known], method=method)
    told(record_property, PART, 1)


def test_qemu_killed_between_captures(rigs: Rigs) -> None:
    """The bitmap is lost, so the next snapshot rescans, says why, and stores only what differs. FAULTS 6."""
    with rigs.lent() as rig:
        rig.write_on()
        rig.written(40)
        rig.guest.kill()
        rig.lost_writing()
        (disk,) = rig.disks
        done = list(disk.eras[-1][1])
        rig.check_disks()
        rig.boot()
        rig.check([], method="rescan")
        last = rig.daemon.info(rig.snapshots()[-1])
        assert "inconsistent" in last.reason
        touched = {number for one in done for number in range(one.offset // 65536, -(-one.stop // 65536))}
        assert 0 < last.changed_bytes <= len(touched) * 65536


def test_killed_again_and_again(rigs: Rigs) -> None:
    """QEMU dies each time that its overlay is being merged: no endless loop, and nothing is lost. FAULTS 5."""
    with rigs.lent() as rig:
        known = set(rig.snapshots())
        order = Order("hold", "commit_start", side="after")
        held = rig.order(order)
        with rig.slow_commits():
            rig.begin(rig.disks)
            for _ in range(2):
                rig.write_on()
                rig.reached(held)
                rig.committing()
                rig.written(10)
                rig.guest.kill()
                rig.lost_writing()
                rig.check_disks()
                rig.boot()
                before, held = held, rig.order(order)
                rig.let_go(before)
            rig.write_on()
            rig.reached(held)
        rig.disarm()
        rig.let_go(held)
        rig.guest.kill()
        rig.lost_writing()
        rig.check_disks()
        rig.daemon.settled(60)
        rig.boot()
        rig.check([one for one in rig.snapshots() if one not in known], method="rescan")

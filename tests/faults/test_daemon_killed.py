"""The daemon is killed at every point of its captures: afterwards all is as if nothing had happened, or nothing had.

FAULTS 1.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from random import Random

import pytest

from hvsnap import wire
from tests.faults.crash_rig import CrashRig, chosen, some, with_during
from tests.faults.killing_daemon import Order
from tests.faults.rounds import ORDINARY, ROUNDS, share, told
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, wait_for

Note = Callable[[str, object], None]
pytestmark = pytest.mark.timeout(900 if ROUNDS == ORDINARY else 0)
SEED = int(os.environ.get("E2E_SEED", "20260714"))


def cycle(rig: CrashRig, order: Order, disks: int, *, fresh: bool = False) -> bool:
    """Kill the daemon once, and look at everything; False if it did not come by the point (a directory was there)."""
    if fresh:
        rig.fresh_daemon()
        known: set[str] = set()
    else:
        known = set(rig.snapshots())
    rig.write_on()
    died = rig.crash_at(order, lambda: rig.capture(rig.disks[:disks]))
    if died:
        rig.written(4)  # the guest is not held up by a daemon that is no more
        rig.restart()
    rig.daemon.settled()
    rig.stop_writing()
    rig.check([one for one in rig.snapshots() if one not in known])
    return died


def sweep(libvirtd: Libvirtd, image: GuestImage, disks: int, count: int, *, fresh: bool = False, **config: str) -> int:
    """Kill at all points of a capture, or at ``count`` of them, and report every one that went wrong.

    Return how many kills came about.
    """
    random = Random(f"{SEED} {disks} {fresh}")
    wrong: list[str] = []
    rig: CrashRig | None = None
    orders: Sequence[Order] | None = None
    done = died = 0
    try:
        # A point that was passed once need not be passed again (how often a job is polled is a matter of time): others
        # of the sample stand in for it.
        while orders is None or (done < len(orders) and died < count):
            if rig is None:
                rig = CrashRig(libvirtd, image, formats=("qcow2", "raw")[:disks], **config).__enter__()
                if not fresh:
                    rig.capture(rig.disks)
            if orders is None:
                rig.write_on()
                points = rig.trace(lambda: rig.capture(rig.disks))  # noqa: B023
                rig.stop_writing()
                rig.check([])
                orders = chosen(with_during(points, random), 3 * count, random)
                print(f"seed {SEED}: {len(points)} points, {min(count, len(orders))} kills")
            order = orders[done]
            done += 1
            try:
                died += cycle(rig, order, disks, fresh=fresh)
            except Exception as error:
                tail = rig.daemon.log.read_text()[-1500:]
                wrong.append(f"{order}: {type(error).__name__}: {error}\n{tail}")
                print(wrong[-1])
                rig.__exit__()
                rig = None
        if rig is not None:
            rig.check_all_unchanged()
    finally:
        if rig is not None:
            rig.__exit__()
    print(f"{died} of {done} kills came about")
    if died < min(count, 0.7 * done):
        wrong.append("too few points were passed for what this is to prove")
    if wrong:
        pytest.fail(f"seed {SEED}: {len(wrong)} of {done} kills went wrong:\n" + "\n".join(wrong))
    return died


def test_killed_anywhere_in_a_full_capture(libvirtd: Libvirtd, guest_image: GuestImage, record_property: Note) -> None:
    part = "libvirt redirect, daemon, first capture"
    told(record_property, part, sweep(libvirtd, guest_image, 1, share(part), fresh=True))


def test_killed_anywhere_in_an_incremental_capture(
    libvirtd: Libvirtd, guest_image: GuestImage, record_property: Note
) -> None:
    part = "libvirt redirect, daemon, next capture"
    told(record_property, part, sweep(libvirtd, guest_image, 1, share(part)))


def test_killed_anywhere_in_a_capture_of_a_group(
    libvirtd: Libvirtd, guest_image: GuestImage, record_property: Note
) -> None:
    part = "libvirt redirect, daemon, group"
    told(record_property, part, sweep(libvirtd, guest_image, 2, share(part)))


def test_killed_around_its_commit_a_capture_costs_garbage_or_a_second_reading(
    libvirtd: Libvirtd, guest_image: GuestImage
) -> None:
    """Before it, what is in the store already belongs to nobody, and is swept; after it, the snapshot is there.

    FAULTS 2, 3.
    """
    with CrashRig(libvirtd, guest_image, formats=("qcow2",)) as rig:
        rig.capture(rig.disks)
        rig.write_on()
        points = rig.trace(lambda: rig.capture(rig.disks))
        rig.stop_writing()
        rig.check([])
        (commit,) = {name for name, _nth, _side in points if "snapshot.accomplished" in name}
        for side, state in (("before", "failed"), ("after", "accomplished")):
            known, stored = set(rig.snapshots()), objects(rig)
            rig.write_on()
            assert rig.crash_at(Order("kill", commit, side=side), lambda: rig.capture(rig.disks))
            rig.written(10)
            made = objects(rig) - stored
            assert {kind for kind, _name in made} == {"packs", "manifests"}
            rig.restart()
            rig.stop_writing()
            (snapshot,) = [one for one in rig.snapshots() if one not in known]
            assert rig.daemon.info(snapshot).state == state
            with rig.daemon.client() as client:
                swept = rig.daemon.task(client.post("/store/compact", wire.Task, wire.StoreCompact(dry_run=False)))
            assert swept.state == "accomplished"
            assert made & objects(rig) == (made if state == "accomplished" else set())
            rig.check([snapshot])


def objects(rig: CrashRig) -> set[tuple[str, str]]:
    """Return kind and name of the packs and manifests that are in the store."""
    kinds = ("packs", "manifests")
    return {(kind, path.name) for kind in kinds for path in (rig.daemon.store / kind).rglob("*") if path.is_file()}


@pytest.mark.parametrize("first", some(["commit_start", "switch_to_overlays", "commit_pivot"], 1))
def test_killed_again_in_its_recovery(
    libvirtd: Libvirtd, guest_image: GuestImage, first: str, record_property: Note
) -> None:
    """What recovers can be killed anywhere, too, and the next start goes on where it was."""
    random = Random(f"{SEED} {first}")
    part = "libvirt redirect, daemon, recovery"
    count = share(part)
    crash = Order("kill", first, side="after")
    with CrashRig(libvirtd, guest_image, formats=("qcow2",)) as rig:
        rig.capture(rig.disks)
        orders: list[Order] = []
        died = done = 0
        while not orders or (done < len(orders) and died < count):
            known = set(rig.snapshots())
            rig.write_on()
            assert rig.crash_at(crash, lambda: rig.capture(rig.disks))
            if not orders:
                points = rig.trace(rig.restart)
                orders = chosen(with_during(points, random), 3 * count, random)
                print(f"seed {SEED}: {len(points)} points, {min(count, len(orders))} kills")
            else:
                rig.order(orders[done])
                done += 1
                rig.daemon.start(str(rig.control), wait=False)
                with contextlib.suppress(RuntimeError):
                    wait_for(rig.daemon.answers, "the daemon's start or death")
                if not rig.daemon.alive():
                    died += 1
                    rig.disarm()
                    rig.restart()
                rig.disarm()
            rig.daemon.settled()
            rig.stop_writing()
            rig.check([one for one in rig.snapshots() if one not in known])
        print(f"{died} of {done} kills came about")
        assert died >= min(count, 0.7 * done)
    told(record_property, part, died)

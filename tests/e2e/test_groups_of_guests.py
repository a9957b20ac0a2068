"""Disks of several guests at one instant: bytes, the order of writes in different guests, and all or nothing."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hvsnap import wire
from hvsnap.errors import BadRequest, CaptureRunning, GuestUnknown, HvsnapError
from tests.e2e.guests_rig import GuestsRig
from tests.e2e.oracle import Operation
from tests.e2e.rig import DoctoredDaemon, Rig
from tests.guest.domain import DiskSpec, Guest
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, wait_for

SEED = 20260812


@pytest.fixture(scope="module")
def rig(libvirtd: Libvirtd) -> Iterator[GuestsRig]:
    one = GuestsRig(libvirtd)
    yield one
    one.close()


def test_guests_of_all_kinds_are_one_group(rig: GuestsRig) -> None:
    """Full, then incremental; what the guests write while they are read does not enter, and is not lost."""
    random = Random(SEED)
    for method in ("full", "bitmap"):
        rig.write(random)
        before = rig.present()
        with rig.daemon.gate("read") as gate:
            made = rig.begin(consistency="auto")
            gate.reached(made[0].id)
            rig.write(random, [rig.virt, rig.fleeced, rig.redirected])
            gate.open()
            ended = rig.daemon.ended(made)
            rig.daemon.settled()
        assert [one.state for one in ended] == ["accomplished"] * 5, [one.error for one in ended]
        assert len({one.group for one in ended}) == 1
        assert {one.method for one in ended if one.target != "vdb"} == {method}
        rig.check_restored(ended, before)
        rig.check_guests(method)
        # Nobody's agent runs, and each snapshot says so of itself; the guest that is off needs none.
        assert {one.guest: one.consistency for one in ended} == {
            one.guest.name: "app" if one is rig.off else "crash" for one in rig.rigs
        }
        assert all("agent" in one.reason for one in ended if one.consistency == "crash")
        (skew_ms,) = {one.skew_ms for one in ended}
        assert skew_ms is not None
        assert 0 < skew_ms < 30_000


def test_a_guest_that_is_off_has_the_instant_of_the_one_that_runs(rig: GuestsRig) -> None:
    together = rig.group([rig.off, rig.fleeced])
    assert [one.skew_ms for one in together] == [0.0, 0.0]
    (alone,) = rig.daemon.snapshot(rig.fleeced.guest.name, group=True, consistency="crash")
    assert (alone.group is not None, alone.skew_ms) == (True, None)


# -- writes in an order that spans guests ---------------------------------------------------------


def counted(number: int) -> Operation:
    return Operation("write", 0, 512, np.resize(np.frombuffer(number.to_bytes(8, "little"), np.uint8), 512))


@dataclass
class Relay:
    """Writes 1 to the first guest, then to the second one, then 2 to the first …, each after the last was acknowledged.

    ``times`` has for each write the monotonic clock's readings before it was asked for, and after it was acknowledged.
    """

    rigs: tuple[Rig | Files, Rig | Files]
    times: tuple[dict[int, tuple[float, float]], ...] = field(default_factory=lambda: ({}, {}))

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._failure: list[BaseException] = []
        self._thread = threading.Thread(target=self._work, name="relay")

    def __enter__(self) -> Relay:
        self._thread.start()
        self.passed(5)
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure:
            raise self._failure[0]

    def passed(self, more: int) -> None:
        """Return when so many more rounds are done."""
        goal = len(self.times[1]) + more
        wait_for(lambda: len(self.times[1]) >= goal or bool(self._failure), "the writes", 60)

    def _work(self) -> None:
        try:
            number = 0
            while not self._stop.is_set():
                number += 1
                for rig, times in zip(self.rigs, self.times, strict=True):
                    asked = time.monotonic()
                    rig.do(rig.disks[0], counted(number))  # type: ignore[arg-type]
                    times[number] = (asked, time.monotonic())
        except BaseException as error:
            self._failure.append(error)

    def apart_ms(self, first: int, second: int) -> float:
        """Return how far apart the two instants must have been at least, for the guests to be at these numbers.

        A write that is there was asked for before its guest's instant; one that is not was acknowledged after it.
        """
        (one, other), at_least = self.times, 0.0
        if second > first:  # an effect without its cause: the second guest's instant was later
            at_least = other[second][0] - one[first + 1][1]
        elif first > second + 1:
            at_least = one[first][0] - other[second + 1][1]
        return at_least * 1000


def number_of(rig: Rig, snapshot: wire.Snapshot) -> int:
    return int.from_bytes(rig.restored(snapshot.id)[:8].tobytes(), "little")


def alone(rig: GuestsRig, one: Rig) -> wire.Snapshot:
    (made,) = rig.daemon.snapshot(one.guest.name, [one.disks[0].target], consistency="crash")
    return made


def test_no_effect_is_further_from_its_cause_than_the_skew_says(rig: GuestsRig) -> None:
    """One guest of libvirt, one bare: nothing is frozen, so an effect may come alone, but for no longer than that."""
    pair = (rig.fleeced, rig.virt)
    groups: list[list[wire.Snapshot]] = []
    with Relay(pair) as relay:
        for _ in range(3):
            groups.append(rig.group(pair))
            relay.passed(3)
        # The broken way: one after the other. The same sum must tell.
        apart = [alone(rig, one) for one in pair]
        relay.passed(3)
    seen = []
    for group in groups:
        by_guest = {one.guest: one for one in group if one.target != "vdb"}
        first, second = (number_of(one, by_guest[one.guest.name]) for one in pair)
        skew_ms = group[0].skew_ms
        assert skew_ms is not None
        assert relay.apart_ms(first, second) <= skew_ms, (first, second)
        seen.append(first)
    assert 0 < seen[0] < seen[1] < seen[2]
    first, second = (number_of(one, snapshot) for one, snapshot in zip(pair, apart, strict=True))
    assert relay.apart_ms(first, second) > max(group[0].skew_ms or 0.0 for group in groups)
    rig.check_guests("after the relay")


class Files:
    """A guest with a file system, in which its ``number`` is written and synced."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.disks = [self]

    def do(self, _disk: object, operation: Operation) -> None:
        assert operation.data is not None
        number = int.from_bytes(operation.data[:8].tobytes(), "little")
        self.guest.run(f"echo {number} > /mnt/new && mv /mnt/new /mnt/number && sync")


def test_frozen_guests_hold_no_effect_without_its_cause(
    make_guest: Callable[..., Guest], make_daemon: Callable[..., DoctoredDaemon], guest_image: GuestImage, workdir: Path
) -> None:
    """A number goes from one guest's file system to the other's: frozen together, the first is as far, or one ahead."""
    guests = []
    for number in range(2):
        image = workdir / f"{number}.raw"
        subprocess.run(["mke2fs", "-q", "-t", "ext4", str(image), "8M"], check=True)
        guests.append(make_guest([DiskSpec(image, "raw")], guest_image).start(wait=False))
    daemon = make_daemon()
    for guest in guests:
        guest.start()
        guest.run("mount -t ext4 /dev/vda /mnt")
    first, second = guests
    groups = []
    with Relay((Files(first), Files(second))) as relay:
        for _ in range(2):
            asked = [wire.GuestDisks(guest=second.name)]
            groups.append(daemon.snapshot(first.name, others=asked, consistency="app"))
            relay.passed(2)  # both are thawed
        # The broken way: one after the other, frozen each by itself. The same sum must tell.
        apart = []
        for guest in guests:
            apart += daemon.snapshot(guest.name, consistency="app")
            relay.passed(2)
    seen = [tuple(number_in(daemon, one, workdir) for one in group) for group in groups]
    assert all(one.consistency == "app" and one.skew_ms for group in groups for one in group)
    assert all(cause - effect in (0, 1) for cause, effect in seen), seen
    assert 0 < seen[0][0] < seen[1][0]
    cause, effect = (number_in(daemon, one, workdir) for one in apart)
    assert cause < effect
    # The daemon dies while both are frozen: the next one thaws them, and nobody was switched.
    with daemon.gate("switch") as gate:
        made = daemon.begin(first.name, others=[wire.GuestDisks(guest=second.name)], consistency="app")
        gate.reached(first.uuid, second.uuid)
        daemon.kill()
    daemon.start()
    daemon.settled()
    for guest in guests:
        guest.run("echo thawed > /mnt/thawed && sync", 30)
    assert [daemon.info(one.id).state for one in made] == ["failed", "failed"]


def number_in(daemon: DoctoredDaemon, snapshot: wire.Snapshot, workdir: Path) -> int:
    restored = workdir / "restored.ext4"
    restored.write_bytes(daemon.restored(snapshot.id, workdir))
    shown = subprocess.run(["debugfs", "-R", "cat number", str(restored)], check=True, capture_output=True, text=True)
    return int(shown.stdout)


# -- all or nothing -------------------------------------------------------------------------------


def test_what_cannot_be_is_refused_before_anything_is_touched(rig: GuestsRig) -> None:
    virt, fleeced = rig.virt.guest.name, rig.fleeced.guest.name
    rows = len(listed(rig))
    wrong: list[tuple[Sequence[wire.GuestDisks], type[HvsnapError], str]] = [
        ([wire.GuestDisks(guest="nobody")], GuestUnknown, "nobody"),
        ([wire.GuestDisks(guest=rig.virt.guest.uuid)], BadRequest, "asked for twice"),
        ([wire.GuestDisks(guest=fleeced), wire.GuestDisks(guest=fleeced)], BadRequest, "asked for twice"),
        ([wire.GuestDisks(guest=fleeced, disks=["vdz"])], HvsnapError, "no disk vdz"),
    ]
    for others, kind, why in wrong:
        with pytest.raises(HvsnapError, match=why) as refused:
            rig.daemon.begin(virt, others=list(others))
        assert refused.value.as_dict()["code"] == kind.code or kind is HvsnapError
    assert len(listed(rig)) == rows
    rig.check_guests("refused")


def listed(rig: GuestsRig) -> list[wire.Snapshot]:
    with rig.daemon.client() as client:
        return client.get("/snapshots", wire.SnapshotList).snapshots


def test_one_busy_disk_refuses_the_whole_group_or_lets_it_wait(rig: GuestsRig) -> None:
    rig.write(Random(SEED + 1))
    before = rig.present()
    with rig.daemon.gate("read") as gate:
        (first,) = rig.daemon.begin(rig.redirected.guest.name, consistency="crash")
        gate.reached(first.id)
        rows = len(listed(rig))
        with pytest.raises(HvsnapError, match=first.id) as refused:
            rig.begin()
        assert refused.value.as_dict()["code"] == CaptureRunning.code
        assert len(listed(rig)) == rows
        # Two groups that overlap, in other orders: both come to their end.
        waiting = [*rig.begin(wait=True), *rig.begin(rig.rigs[::-1], wait=True)]
        gate.open()
        ended = rig.daemon.ended([first, *waiting])
        rig.daemon.settled()
    assert [one.state for one in ended] == ["accomplished"] * 11, [one.error for one in ended]
    rig.check_restored(ended, before)
    rig.check_guests("after waiting")


def failed_together(rig: GuestsRig, made: Sequence[wire.Snapshot], why: str) -> None:
    ended = rig.daemon.ended(made)
    rig.daemon.settled()
    assert [one.state for one in ended] == ["failed"] * len(made)
    assert all(why in one.error for one in ended), ended[0].error
    assert {one.skew_ms for one in ended} == {None}


def test_app_consistency_that_one_guest_cannot_give_fails_the_group(rig: GuestsRig) -> None:
    failed_together(rig, rig.begin([rig.off, rig.virt], consistency="app"), f"guest {rig.virt.guest.name}: ")
    rig.check_guests("nobody was switched")


def test_a_guest_that_dies_while_the_group_is_read_gives_all_of_it_up(rig: GuestsRig) -> None:
    """A fleeced guest's instant is held in its QEMU; the others go back to their images with all that they wrote."""
    random = Random(SEED + 2)
    with rig.daemon.gate("read") as gate:
        made = rig.begin([rig.virt, rig.fleeced, rig.redirected, rig.off])
        gate.reached(made[0].id)
        rig.write(random, [rig.virt, rig.redirected])
        rig.fleeced.guest.kill()
        gate.open()
        failed_together(rig, made, "fleeced")
    rig.fleeced.guest.start()
    rig.check_guests("after the death of one guest")
    rig.write(random)
    before = rig.present()
    rig.check_restored(rig.group(), before)

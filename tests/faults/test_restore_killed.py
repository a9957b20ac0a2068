"""The daemon is killed at every point of a new disk and of a rollback: whole or not there, resumed or never begun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hvsnap import wire
from tests.e2e.oracle import Bytes, check_same, converted, random_operation
from tests.faults import power_cut
from tests.faults.crash_rig import EVERY, MIB, CrashDisk, CrashRig, chosen, thinned, with_during
from tests.faults.killing_daemon import Order
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd
from tests.hooks.kit import SCRIPT

pytestmark = pytest.mark.timeout(0 if EVERY else 300)
SEED = int(os.environ.get("E2E_SEED", "20260714"))


class OffRig(CrashRig):
    """A guest that was shut down after two snapshots of its disks, which are changed from outside from then on."""

    def __enter__(self) -> OffRig:
        super().__enter__()
        self.random = Random(SEED)
        self.disk: CrashDisk = self.disks[0]  # the one that is dealt with
        self.states: dict[str, dict[str, Bytes]] = {disk.target: {} for disk in self.disks}
        for _ in range(2):
            self.write_on()
            self.written(60)
            self.stop_writing()
            self.check_disks()
            before = set(self.snapshots())
            self.capture(self.disks)
            for made in set(self.snapshots()) - before:
                disk = next(one for one in self.disks if one.target == self.daemon.info(made).target)
                self.states[disk.target][made] = disk.replica.data.copy()
        self.guest.shutdown()
        return self

    def deal_with(self, image_format: str) -> None:
        """Choose the disk of this format."""
        self.disk = next(one for one in self.disks if one.format == image_format)

    @property
    def wanted(self) -> dict[str, Bytes]:
        return self.states[self.disk.target]

    def present(self) -> Bytes:
        return converted(self.disk.path, self.disk.format, self.directory)

    def barred(self) -> bool:
        """Whether libvirt's hook, which no daemon helps, keeps the guest from starting."""
        hooks = self.directory / "hooks"
        (hooks / "qemu.d").mkdir(parents=True, exist_ok=True)
        script = shutil.copy(SCRIPT, hooks / "qemu.d")
        (hooks / "hvsnap.json").write_text(json.dumps({"state_dir": str(self.daemon.directory / "state")}))
        xml = self.guest.domain().XMLDesc().encode()
        words = [str(script), self.guest.name, "prepare", "begin", "-"]
        return subprocess.run(words, input=xml, capture_output=True, timeout=20).returncode == 1

    def change(self) -> Bytes:
        """Change the image as a guest would have, and return what it holds then."""
        words = []
        for _ in range(8):
            one = random_operation(self.random, self.disk.replica.data.size)
            pattern = self.random.randrange(1, 256)
            verb = {"write": f"write -P {pattern}", "zero": "write -z", "unmap": "write -z -u", "discard": "discard"}
            words += ["-c", f"{verb[one.kind]} {one.offset} {one.length}"]
        subprocess.run(
            ["qemu-io", "-f", self.disk.format, "-d", "unmap", *words, str(self.disk.path)],
            check=True,
            capture_output=True,
        )
        return self.present()

    def bitmaps(self) -> dict[str, Sequence[str]]:
        """Return the image's bitmaps and their flags."""
        out = subprocess.run(
            ["qemu-img", "info", "--output=json", str(self.disk.path)], check=True, capture_output=True
        )
        found = json.loads(out.stdout)["format-specific"]["data"].get("bitmaps", [])
        return {one["name"]: one["flags"] for one in found}

    def check_off(self, *, consistent: bool = True) -> None:
        """Nothing is left of anything, and the image has the one bitmap that the catalog expects.

        It is whole, unless a qemu-nbd died that had the image open for writing.
        """
        left = [name for name in os.listdir(self.directory) if name.endswith((".overlay", ".scratch", ".hvsnap"))]
        assert not left
        assert not self.query("SELECT * FROM operations")
        assert not self.barred()
        if self.disk.format == "qcow2":
            assert set(self.bitmaps()) <= {self.bitmap_of(self.disk)}
            assert not consistent or all("in-use" not in flags for flags in self.bitmaps().values())
        self.check_definitions()


@pytest.fixture(scope="module")
def rig(libvirtd: Libvirtd, guest_image: GuestImage) -> Iterator[OffRig]:
    with OffRig(libvirtd, guest_image, formats=("qcow2", "raw")) as made:
        yield made


def sweep(
    rig: OffRig, action: Callable[[], None], count: int, cycle: Callable[[Order], bool], *, spread: bool = False
) -> None:
    """Kill at all points of an action, or at some of them: taken by chance, or with ``spread`` all along its way."""
    random = Random(SEED)
    points = rig.trace(action)
    orders = chosen(with_during(points, random), count, random)
    if spread and not EVERY:
        along = thinned(points)
        orders = [Order("kill", *along[int((at + random.random()) * len(along) / count)]) for at in range(count)]
    print(f"seed {SEED}: {len(points)} points, {len(orders)} kills")
    died = 0
    wrong = []
    for order in orders:
        try:
            # The point may come less often than when it was counted; it does come once.
            died += cycle(order) or (spread and cycle(replace(order, nth=1)))
        except Exception as error:
            wrong.append(f"{order}: {type(error).__name__}: {error}")
            print(wrong[-1], rig.daemon.log.read_text()[-1500:])
            if not rig.daemon.alive():
                rig.daemon.start(str(rig.control))
    assert not wrong, f"seed {SEED}:\n" + "\n".join(wrong)
    print(f"{died} of {len(orders)} kills came about")
    assert died >= len(orders) * (1.0 if spread and not EVERY else 0.7)


def test_killed_anywhere_in_a_new_disk(rig: OffRig) -> None:
    """FAULTS 29."""
    rig.deal_with("qcow2")
    snapshot, wanted = next(iter(rig.wanted.items()))
    made = 0

    def path() -> Path:
        return rig.directory / f"new-{made}.qcow2"

    def action() -> None:
        assert rig.daemon.create_disk(snapshot, path()).state == "accomplished"

    def cycle(order: Order) -> bool:
        nonlocal made
        made += 1
        died = rig.crash_at(order, action)
        begun = rig.query("SELECT 1 FROM operations WHERE kind = 'disk-create'") != []
        if died:
            rig.restart()
        rig.check_off()
        told = rig.events("path", str(path()))
        there = path().exists()
        if there:
            check_same(converted(path(), "qcow2", rig.directory), wanted, "the new disk")
            assert told == ["disk.created"]
        else:
            assert told == (["disk.create-failed"] if begun else [])
            action()
        path().unlink()
        return died

    sweep(rig, action, 6, cycle)


def rollback_action(rig: OffRig, snapshot: str, **options: bool) -> Callable[[], None]:
    def action() -> None:
        task = rig.daemon.roll_back(f"{rig.guest.name}/{rig.disk.target}", snapshot, **options)
        assert task.state == "accomplished", task.error

    return action


@pytest.mark.parametrize(
    ("image_format", "safety"),
    [("raw", False), ("qcow2", False), ("qcow2", True)],
    ids=["raw", "qcow2", "qcow2-with-safety-snapshot"],
)
def test_killed_anywhere_in_a_rollback(rig: OffRig, image_format: str, safety: bool) -> None:
    """FAULTS 26: ten times, all along its way, it ends right, and until then the guest does not start."""
    rig.deal_with(image_format)
    targets = list(rig.wanted)
    turns = 0

    def cycle(order: Order) -> bool:
        nonlocal turns
        turns += 1
        target = targets[turns % len(targets)]
        before = rig.change()
        seen = set(rig.snapshots())
        counts = [len(rig.events("snapshot", target))]
        died = rig.crash_at(order, rollback_action(rig, target, safety_snapshot=safety))
        if died:
            if rig.query("SELECT 1 FROM operations WHERE kind = 'rollback'"):
                assert rig.barred()
            rig.restart()
        rig.check_off(consistent=not died)
        told = rig.events("snapshot", target)[counts[0] :]
        assert told in ([], ["rollback.started", "rollback.finished"])
        wanted = rig.wanted[target] if told else before
        check_same(rig.present(), wanted, f"the disk after {told}")
        for snapshot in set(rig.snapshots()) - seen:  # the safety snapshot
            info = rig.daemon.info(snapshot)
            kinds = rig.events("snapshot", snapshot)
            assert kinds == ["snapshot.created", f"snapshot.{info.state}"], kinds
            assert info.state in ("accomplished", "failed")
            if info.state == "accomplished":
                restored = np.frombuffer(rig.daemon.restored(snapshot, rig.directory), np.uint8)
                check_same(restored, before, "the safety snapshot")
        now = rig.change()
        (made,) = rig.daemon.snapshot(rig.guest.name, [rig.disk.target])
        assert made.method in ("bitmap", "rescan")
        assert died or image_format == "raw" or made.method == "bitmap"
        restored = np.frombuffer(rig.daemon.restored(made.id, rig.directory), np.uint8)
        check_same(restored, now, "the next snapshot")
        return died

    rig.change()
    action = rollback_action(rig, targets[0], safety_snapshot=safety)
    sweep(rig, action, 4 if safety else 10, cycle, spread=not safety)
    rig.disk.replica.data[:] = rig.present()
    rig.disk.forget()
    if not safety:
        return
    rig.boot()
    rig.write_on()
    rig.written(20)
    rig.stop_writing()
    rig.check([])
    rig.guest.shutdown()


# -- the power is cut -----------------------------------------------------------------------------

CUTS = 3


def change_much(rig: OffRig) -> Bytes:
    """Change a place of each two MiB, so that a rollback has as many writes each time."""
    pattern = rig.random.randrange(1, 256)
    words = [word for at in range(6) for word in ("-c", f"write -P {pattern} {at * 2 * MIB + 300_000} 200k")]
    subprocess.run(["qemu-io", "-f", "qcow2", *words, str(rig.disk.path)], check=True, capture_output=True)
    return rig.present()


def cut_in_a_rollback(rig: OffRig, target: str, order: Order, chance: Random | None) -> None:
    """Roll back, cut the power at a point, and leave of the image what :func:`power_cut.left` says."""
    log, base = rig.control.with_suffix(".writes"), rig.directory / "base"
    shutil.copyfile(rig.disk.path, base)
    log.write_bytes(b"")
    with rig.held_at(order.name, order.side, order.nth) as held:
        with rig.daemon.client() as client:
            body = wire.Rollback(snapshot=target, safety_snapshot=False)
            client.post(f"/disks/{rig.guest.name}/vda/rollback", wire.RollbackAnswer, body)
        rig.reached(held)
        writes = power_cut.logged(log)
        rig.daemon.kill()
    log.unlink()
    assert writes
    shutil.copyfile(base, rig.disk.path)
    power_cut.replay(rig.disk.path, power_cut.left(writes, chance))


def test_a_power_cut_anywhere_in_a_rollback_is_made_good(rig: OffRig) -> None:
    """FAULTS 26: half of it is finished by the next start, and what was told to be finished is on the device."""
    rig.deal_with("qcow2")
    random = Random(SEED)
    target = next(iter(rig.wanted))
    action = rollback_action(rig, target, safety_snapshot=False)
    action()
    change_much(rig)
    points = rig.trace(action)
    writing = [Order("hold", *one) for one in points if one[0].startswith("nbd.") and one[2] == "after"]
    writing = [one for one in writing if one.name in ("nbd.write", "nbd.zero", "nbd.finish")]
    assert len(writing) > CUTS
    (finished,) = {name for name, _nth, _side in points if "rollback.finished" in name}
    for order in [*random.sample(writing, CUTS), Order("hold", finished)]:
        change_much(rig)
        told = len(rig.events("snapshot", target))
        cut_in_a_rollback(rig, target, order, None if order.name == finished else random)
        if order.name == finished:
            check_same(rig.present(), rig.wanted[target], "the disk after a cut just before the end")
        rig.restart()
        assert rig.events("snapshot", target)[told:] == ["rollback.started", "rollback.finished"]
        check_same(rig.present(), rig.wanted[target], f"the disk after a cut at {order}")
        rig.check_off(consistent=False)
        now = change_much(rig)
        (made,) = rig.daemon.snapshot(rig.guest.name, ["vda"])
        restored = np.frombuffer(rig.daemon.restored(made.id, rig.directory), np.uint8)
        check_same(restored, now, "the next snapshot")

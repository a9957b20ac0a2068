"""kill -9 of the daemon and of QEMU at the acts of a capture of a bare guest: FAULTS 1, 2, 3, 5, 6.

After each: nothing is lost, nothing stale, nothing left behind, and the next snapshot is whole. How many acts are
taken, and of which seed, is said in ``tests/faults/rounds.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from hvsnap import wire
from hvsnap.errors import DaemonUnreachable
from tests import support_table
from tests.e2e.oracle import Bytes, check_same
from tests.e2e.rig import TestDisk
from tests.e2e_bare.rig import QUICK, BareRig, DoctoredDaemon, a_disk, table
from tests.faults.rounds import ORDINARY, ROUNDS, share, told
from tests.guest.bare import BareDisk, BareGuest
from tests.guest.libvirtd import host_pids, wait_for

SEED = int(os.environ.get("E2E_SEED", "1"))
ACTS_MAX = 120
NOBODY = "nobody died: this capture had fewer acts"


class KillingDaemon(DoctoredDaemon):
    """A daemon that kills at an act."""

    module = "tests.e2e_bare.killing_daemon"

    def start(self, *arguments: str, wait: bool = True, environment: dict[str, str] | None = None) -> KillingDaemon:
        super().start(*arguments, wait=wait, environment={**(environment or {}), "KILL_DIR": str(self.directory)})
        return self

    @contextlib.contextmanager
    def armed(self, at: int | str = 0, victim: int = 0) -> Iterator[None]:
        """Count acts, and kill at one of them."""
        (self.directory / "acts").unlink(missing_ok=True)
        (self.directory / "armed").write_text(f"{at}\n{victim}\n")
        try:
            yield
        finally:
            (self.directory / "armed").unlink(missing_ok=True)

    @property
    def active(self) -> bool:
        return self.alive()

    def acts(self) -> list[str]:
        acts = self.directory / "acts"
        return acts.read_text().splitlines() if acts.exists() else []


class Kills:
    """One guest that lives through many kills."""

    def __init__(self, guest: BareGuest, daemon: KillingDaemon, workdir: Path, random: Random) -> None:
        self.guest, self.daemon, self.random = guest, daemon, random
        self.rig = BareRig(guest, daemon, workdir)
        self.write()
        self.rig.capture(self.rig.disks, group=True)

    def write(self) -> None:
        for disk in self.rig.disks:
            self.rig.random_operations(self.random, disk, 4)
            self.rig.flush(disk)

    def count(self) -> int:
        """Return how many acts a capture has."""
        self.write()
        with self.daemon.armed():
            self.rig.capture(self.rig.disks, group=True)
        return len(self.daemon.acts())

    def kill(self, at: int, *, qemu: bool) -> str:
        """Kill at an act of a capture; return which it was."""
        self.write()
        before = {disk.target: self.rig.present(disk) for disk in self.rig.disks}
        with self.daemon.armed(at, self.guest.pid if qemu else 0):
            made: list[wire.Snapshot] = []
            with contextlib.suppress(DaemonUnreachable):  # it may die before it has answered
                made = self.daemon.begin(self.guest.name, group=True, consistency="crash")
            victim = self.guest if qemu else self.daemon
            wait_for(lambda: not victim.active or self.settled(), "an end")
        act = NOBODY if victim.active else self.daemon.acts()[-1]
        if not qemu:
            self.write()  # the guest goes on without the daemon
            self.daemon.stop()
            self.daemon.start()
        self.daemon.settled()
        if qemu:
            if self.guest.active:
                self.guest.quit()
            self.guest.gone()
            for disk in self.rig.disks:
                self.rig.check_disk(disk, f"{act}: before the start")
            self.guest.start()
        self.check(made, before, act)
        return act

    def check(self, made: list[wire.Snapshot], before: dict[str, Bytes], act: str) -> None:
        """Check all that must be right after any kill."""
        assert self.rig.left_behind() == []
        assert not host_pids("qemu-nbd", str(self.daemon.directory))
        # The daemon itself may be writing something: its lease, or what it removes of a failed snapshot.
        wait_for(lambda: not list(self.daemon.directory.glob("state/store/.tmp/*")), "the last temporary file's end")
        assert self.rig.qmp("query-status")["status"] == "running"
        for disk in self.rig.disks:
            self.rig.check_disk(disk, act)
        for (known,) in self.daemon.query("SELECT id FROM snapshots"):  # those, too, whose request had no answer
            self.daemon.check_told(self.daemon.info(known))
        for snapshot in (self.daemon.info(one.id) for one in made):
            assert snapshot.state in ("accomplished", "failed"), act
            if snapshot.state == "accomplished":
                got = self.rig.restored(snapshot.id)
                check_same(got, before[snapshot.target], f"{act}: {snapshot.id} of {snapshot.target}")
        self.write()
        self.rig.capture(self.rig.disks, group=True)
        for disk in self.rig.disks:
            self.rig.check_snapshots(disk, list(disk.states)[-1])
            if disk.spec.format == "qcow2":
                assert len(self.rig.our_bitmaps(disk)) == 1, act

    def settled(self) -> bool:
        """Whether nothing is at work; a daemon that has just been killed has no more to say."""
        try:
            status = self.daemon.status()
        except DaemonUnreachable:
            return False
        return status.captures == 0 and status.open_operations == 0


@pytest.fixture
def make_kills(make_bare: Callable[..., BareGuest], workdir: Path) -> Iterator[Callable[..., Kills]]:
    made: list[KillingDaemon] = []

    def make(mode: str, random: Random, *, data_file: bool = False) -> Kills:
        disks = [a_disk(workdir, "vda", "3M"), a_disk(workdir, "vdb", "2M", "raw")]
        if data_file:
            disks[0] = BareDisk(support_table.data_file_image(workdir / "vda.qcow2", 3 << 20), id="vda")
        guest = make_bare(disks).start()
        directory = workdir / "daemon"
        directory.mkdir()
        daemon = KillingDaemon(directory, "", "", capture=QUICK, **table(guest, capture=mode))
        made.append(daemon)
        return Kills(guest, daemon.start(), workdir, random)

    yield make
    for daemon in made:
        daemon.stop()


def spread(random: Random, count: int, rounds: int) -> list[int]:
    """Return so many of the acts 1 to ``count``, one at random of each stretch of the capture: no phase is left out."""
    if rounds >= count:
        return list(range(1, count + 1))
    borders = [1 + count * part // rounds for part in range(rounds + 1)]
    return [random.randrange(start, stop) for start, stop in itertools.pairwise(borders)]


@pytest.mark.timeout(600 if ROUNDS == ORDINARY else 0)
@pytest.mark.parametrize("victim", ["daemon", "QEMU"])
@pytest.mark.parametrize("mode", ["fleece", "redirect"])
def test_a_kill_at_any_act_of_a_capture_loses_nothing(
    make_kills: Callable[..., Kills], mode: str, victim: str, record_property: Callable[[str, object], None]
) -> None:
    random = Random(f"{mode} {victim} {SEED}")
    kills = make_kills(mode, random, data_file=victim == "QEMU")
    count = kills.count()
    assert 20 < count < ACTS_MAX
    part = f"bare {mode}, {victim}"
    acts = spread(random, count, share(part))
    print(f"seed {SEED}: acts {acts} of {count}")
    for at in acts:
        act = NOBODY
        while act == NOBODY:  # two captures need not have the same number of acts: a job may be looked at once more
            act = kills.kill(at, qemu=victim == "QEMU")
            print(f"act {at}: {act}")
            at = at * 9 // 10  # noqa: PLW2901
    told(record_property, part, len(acts))


# -- a pivot that nobody saw the end of -----------------------------------------------------------


@pytest.mark.parametrize("end", ["kill", "quit"])
@pytest.mark.parametrize("moment", ["before job-complete", "after job-complete"])
def test_a_guest_that_went_on_without_the_daemon_at_its_pivot_loses_nothing(
    make_kills: Callable[..., Kills], moment: str, end: str
) -> None:
    """The daemon dies at the pivot and stays away; the guest goes on, on its overlay or its image, and ends.

    Which of the two is newer must be told by the files alone; and where it cannot be, nobody guesses.
    """
    kills = make_kills("redirect", Random(f"{moment} {end}"))
    rig, daemon, guest = kills.rig, kills.daemon, kills.guest
    kills.write()
    with daemon.armed(moment):
        daemon.begin(guest.name, group=True, consistency="crash")
        wait_for(lambda: not daemon.alive(), "the daemon's end")
    kills.write()  # to overlays, or to the image of the disk whose pivot was asked for
    pivoted = [overlay for disk in rig.disks for overlay in overlays(disk) if str(overlay) not in rig.sources()]
    assert len(pivoted) == (moment == "after job-complete")
    for overlay in pivoted:
        seen = overlay.stat()
        os.utime(overlay, (seen.st_atime, seen.st_mtime - 3600))  # the guest went on for an hour
    getattr(guest, end)()
    daemon.start()
    if daemon.status().open_operations:
        with daemon.client() as client:
            (left,) = client.post("/recover", wire.Recovery).operations
        assert "it cannot be told" in left.detail, left.detail
        assert (moment, end) == ("before job-complete", "quit")  # both files were closed in good order, at one time
        for disk in rig.disks:
            for overlay in overlays(disk):
                commit = ["qemu-img", "commit", "-q", "-b", str(disk.spec.path), str(overlay)]
                subprocess.run(commit, check=True)
                overlay.unlink()
        with daemon.client() as client:
            client.post("/recover", wire.Recovery)
    daemon.settled()
    assert rig.left_behind() == []
    for disk in rig.disks:
        rig.check_disk(disk, f"{moment}, {end}")
    guest.start()
    rig.capture(rig.disks, group=True)
    for disk in rig.disks:
        rig.check_snapshots(disk)


def overlays(disk: TestDisk) -> list[Path]:
    return list(disk.spec.path.parent.glob(f"{disk.spec.path.name}.*.overlay"))

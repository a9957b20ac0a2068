"""kill -9 of the daemon, or of one guest's QEMU, at the acts of a capture of several guests' disks as one group.

After each: all snapshots of the group are there or none is, every guest has its newest data and is on its own images,
nothing is left behind, and the next group is whole. HVSNAP_TEST_ALL kills the daemon at every act.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from random import Random

import pytest

from hvsnap import wire
from hvsnap.errors import DaemonUnreachable
from hvsnap.model import State
from tests.e2e.guests_rig import GuestsRig
from tests.e2e.oracle import Bytes
from tests.e2e_bare.test_bare_kills import KillingDaemon
from tests.faults.crash_rig import EVERY
from tests.guest.libvirtd import Libvirtd, wait_for

pytestmark = pytest.mark.timeout(0 if EVERY else 600)
SEED = int(os.environ.get("E2E_SEED", "20260813"))
SAMPLE = 3
ALWAYS = ("after switch_to_overlays",)
"""An act at which one guest is switched, and others perhaps are not."""


class Kills:
    """Guests that live through many kills."""

    def __init__(self, libvirtd: Libvirtd) -> None:
        self.random = Random(SEED)
        self.rig = GuestsRig(libvirtd, KillingDaemon)
        daemon = self.rig.daemon
        assert isinstance(daemon, KillingDaemon)
        self.daemon = daemon
        self.rig.write(self.random)
        self.rig.group()

    def acts(self) -> list[str]:
        """Return the acts of a group, in their order."""
        self.rig.write(self.random)
        with self.daemon.armed():
            self.rig.group()
        return self.daemon.acts()

    def begin(self) -> list[wire.Snapshot]:
        with contextlib.suppress(DaemonUnreachable):  # it may die before it has answered
            return self.rig.begin()
        return []

    def kill_daemon(self, at: int | str) -> str:
        """Kill the daemon at an act of a group, and check all that must hold; return which it was."""
        self.rig.write(self.random)
        before = self.rig.present()
        known = {one.id for one in self.listed()}
        with self.daemon.armed(at):
            self.begin()
            wait_for(lambda: not self.daemon.alive() or self.settled(), "an end")
        act = "none: this group had fewer" if self.daemon.alive() else self.daemon.acts()[-1]
        self.rig.write(self.random, [self.rig.virt, self.rig.fleeced, self.rig.redirected])  # without the daemon
        self.daemon.stop()
        self.daemon.start()
        self.daemon.settled()
        self.check([one for one in self.listed() if one.id not in known], before, act)
        return act

    def listed(self) -> list[wire.Snapshot]:
        with self.daemon.client() as client:
            return client.get("/snapshots", wire.SnapshotList).snapshots

    def check(self, made: list[wire.Snapshot], before: dict[tuple[str, str], Bytes], act: str) -> None:
        self.rig.check_guests(act)
        # It may have died before there was any.
        states = {one.state for one in made}
        assert len(made) in (0, 5), act
        assert states in (set(), {State.ACCOMPLISHED}, {State.FAILED}), act
        if states == {State.ACCOMPLISHED}:
            assert len({one.skew_ms for one in made}) == 1, act
            self.rig.check_restored(made, before)
        self.rig.write(self.random)
        now = self.rig.present()
        self.rig.check_restored(self.rig.group(), now)

    def settled(self) -> bool:
        """Whether nothing is at work; a daemon that has just been killed has no more to say."""
        try:
            status = self.daemon.status()
        except DaemonUnreachable:
            return False
        return status.captures == 0 and status.open_operations == 0


@pytest.fixture(scope="module")
def kills(libvirtd: Libvirtd) -> Iterator[Kills]:
    one = Kills(libvirtd)
    yield one
    print(one.daemon.log.read_text()[-3000:])
    one.rig.close()


def test_the_daemon_is_killed_anywhere_in_a_group_of_guests(kills: Kills) -> None:
    acts = kills.acts()
    assert len(acts) > 60
    assert set(ALWAYS) <= set(acts)
    others = sorted(kills.random.sample(range(1, len(acts) + 1), SAMPLE))
    chosen: list[int | str] = list(range(1, len(acts) + 1)) if EVERY else [*ALWAYS, *others]
    print(f"seed {SEED}: acts {chosen} of {len(acts)}")
    died = 0
    for at in chosen:
        act = kills.kill_daemon(at)
        died += not act.startswith("none")
        print(f"act {at}: {act}")
    assert died >= len(chosen) * 0.7


def test_a_qemu_that_is_killed_as_the_group_is_switched_takes_all_of_it_or_nothing(kills: Kills) -> None:
    """The redirected guest dies when libvirt's one has been switched: that one goes back with all that it wrote."""
    rig = kills.rig
    rig.write(kills.random)
    before = rig.present()
    with kills.daemon.armed("after switch_to_overlays", rig.redirected.guest.pid):
        made = kills.begin()
        rig.redirected.guest.gone()
        ended = kills.daemon.ended(made)
    kills.daemon.settled()
    assert len(ended) == 5
    (state,) = {one.state for one in ended}
    assert state in ("accomplished", "failed")  # it may have been switched by then, and what was frozen is whole
    rig.redirected.guest.start()
    rig.check_guests("death of a guest")
    if state == "accomplished":
        rig.check_restored(ended, before)
    rig.write(kills.random)
    now = rig.present()
    rig.check_restored(rig.group(), now)

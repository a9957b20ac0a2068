"""A policy on a real guest, with a real daemon whose clock is turned to the hour."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hvsnap import wire
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd, wait_for

HOUR_S = 3600
MIB = 1 << 20
HALF_PAST = time.time() // HOUR_S * HOUR_S + HOUR_S / 2
"""No full hour comes by itself while a test goes on."""


class TurnedDaemon(Daemon):
    module = "tests.e2e.turned_clock_daemon"

    def turn(self, moment: float) -> None:
        """Let its clock go on from a moment, in seconds since the epoch."""
        new = self.directory / "clock.new"
        new.write_text(str(moment - time.time()))
        new.rename(self.directory / "clock")

    def snapshots(self) -> list[wire.Snapshot]:
        with self.client() as client:
            return client.get("/snapshots", wire.SnapshotList).snapshots


@pytest.fixture
def daemon(libvirtd: Libvirtd, workdir: Path) -> Iterator[TurnedDaemon]:
    one = TurnedDaemon(workdir, libvirtd.uri, limits="snapshots_per_disk = 2")
    one.turn(HALF_PAST)
    one.start()
    yield one
    one.stop()


def test_a_policy_makes_snapshots_at_its_hours_and_room_in_a_full_chain(
    daemon: TurnedDaemon, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    disk = make_image(workdir / "a.qcow2", "16M")
    guest = make_guest([DiskSpec(disk)]).start()
    with daemon.client() as client:
        body = wire.PolicyCreate(name="hourly", hours=list(range(24)), timezone="UTC", retain_days=7)
        client.post("/policies", wire.Policy, body)
        applied = wire.PolicyDisks(disks=[f"{guest.name}/vda"])
        client.post("/policies/hourly/apply", wire.PolicyApplied, applied)
    kept: dict[str, int] = {}
    for number in range(1, 4):
        guest.qemu_io(0, f"write -P {number} 0 1M")
        moment = HALF_PAST + (number - 0.5) * HOUR_S + 120  # a few minutes behind the next full hour
        daemon.turn(moment)
        wait_for(lambda number=number: _made(daemon) == number, f"the automatic snapshot {number}", 60)  # type: ignore[misc]
        daemon.settled()
        newest = daemon.snapshots()[0]
        assert newest.state == "accomplished"
        assert newest.automatic
        day = datetime.fromtimestamp(moment, UTC).strftime("%Y%m%d")
        assert newest.name.startswith(f"auto_{day}_")
        assert newest.expires_at is not None
        assert abs((newest.expires_at - newest.created_at).total_seconds() - 7 * 86_400) < 60
        kept[newest.id] = number
    left = daemon.snapshots()
    assert len(left) == 2, "the oldest made room"
    for snapshot in left:
        assert daemon.restored(snapshot.id, workdir)[:MIB] == bytes([kept[snapshot.id]]) * MIB


def _made(daemon: TurnedDaemon) -> int:
    """Return how many automatic snapshots have ended, evicted ones included."""
    return max((one.sequence for one in daemon.snapshots() if one.state == "accomplished"), default=0)

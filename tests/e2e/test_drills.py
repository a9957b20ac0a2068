"""Restore drills of a real daemon: passed, killed in the middle, of a damaged store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from hvsnap import wire
from tests.daemon_kit import Daemon
from tests.e2e.test_command_line import write
from tests.e2e.test_store_upkeep import noise
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd, wait_for

MIB = 1 << 20


def drill(daemon: Daemon, **what: str) -> wire.Task:
    """Begin a drill."""
    with daemon.client() as client:
        return client.post("/snapshots/drill", wire.Task, wire.SnapshotDrill(**what))


def test_s12_a_drill_passes_leaves_nothing_when_it_is_killed_and_finds_a_damaged_block(
    libvirtd: Libvirtd, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    disk = make_image(workdir / "a.qcow2", "128M")
    guest = make_guest([DiskSpec(disk)])
    scratch = workdir / "scratch"
    daemon = Daemon(workdir, libvirtd.uri, drill=f"dir = {json.dumps(str(scratch))}").start()
    try:
        write(disk, f"write -s {noise(workdir, 1, 48 * MIB)} 0 48M")
        daemon.snapshot(guest.name)
        write(disk, f"write -s {noise(workdir, 2, 8 * MIB)} 20M 8M", "write -z 4M 4M")
        (snapshot,) = daemon.snapshot(guest.name)
        task = daemon.task(drill(daemon, disk=f"{guest.name}/vda"))
        assert isinstance(task.result, wire.SnapshotDrilled), task.error
        assert (task.result.snapshot, task.result.written_bytes) == (snapshot.id, 44 * MIB)
        assert list(scratch.iterdir()) == []

        drill(daemon, snapshot=snapshot.id)
        wait_for(lambda: any(scratch.glob("*.qcow2")), "the drill to write")
        daemon.kill()
        assert any(scratch.iterdir())
        daemon.start()
        assert (list(scratch.iterdir()), daemon.status().open_operations) == ([], 0)

        pack = max((daemon.store / "packs").rglob("*"), key=lambda path: path.stat().st_size)
        data = bytearray(pack.read_bytes())
        data[len(data) * 15 // 16] ^= 1  # beyond what the second snapshot has of its own
        pack.write_bytes(data)
        error = daemon.task(drill(daemon, snapshot=snapshot.id)).error
        assert error is not None
        assert (error.exit_status, "is not what was stored" in error.message) == (7, True), error
        assert list(scratch.iterdir()) == []
        last = daemon.info(snapshot.id).drill
        assert last is not None
        assert (last.outcome, last.error) == ("damaged", error.message)
        with daemon.client() as client:
            # A verification has found all snapshots that it affects, by itself.
            affected = [one.id for one in client.get("/store", wire.StoreInfo).affected]
        assert snapshot.id in affected
    finally:
        daemon.stop()

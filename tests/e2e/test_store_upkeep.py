"""The store kept in order by a real daemon under real captures: by commands alone, and under kills."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from hvsnap import wire
from tests.daemon_kit import Daemon
from tests.e2e.test_command_line import CommandLine, raw, write
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd, wait_for

MIB = 1 << 20


@pytest.fixture
def hvsnap(libvirtd: Libvirtd, workdir: Path) -> CommandLine:
    return CommandLine(workdir, libvirtd.uri)


def usage(store: Path) -> int:
    """Return what packs take on the device, in bytes."""
    return sum(path.stat().st_blocks * 512 for path in (store / "packs").rglob("*") if path.is_file())


def noise(scratch: Path, seed: int, size: int) -> str:
    """Return a file of bytes that do not compress, for qemu-io's `write -s`."""
    path = scratch / f"noise-{seed}"
    path.write_bytes(Random(seed).randbytes(size))
    return str(path)


def test_space_comes_back_and_damage_is_found_and_healed_by_commands(
    hvsnap: CommandLine, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    """FAULTS 12."""
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)])
    store = workdir / "state" / "store"
    write(disk, f"write -s {noise(workdir, 1, 16 * MIB)} 0 16M")
    hvsnap.start_daemon()
    first = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
    write(disk, f"write -s {noise(workdir, 2, 12 * MIB)} 0 12M")
    second = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
    second_bytes = raw(disk, workdir / "raw")
    assert "sound" in hvsnap.ok("store-check")
    assert "none damaged" in hvsnap.ok("snapshot-verify", "--all")
    assert "2" in hvsnap.ok("store-info")

    before = usage(store)
    told = json.loads(hvsnap.ok("snapshot-delete", first, "--json"))
    assert told["freed_bytes"] >= 12 * MIB - 65536
    wait_for(lambda: before - usage(store) >= 12 * MIB - 65536, "the space to come back", 20)
    assert "0 B in 0 blocks would be freed" in hvsnap.ok("store-compact", "--dry-run")
    assert "sound" in hvsnap.ok("store-check")

    pack = max((store / "packs").rglob("*"), key=lambda path: path.stat().st_blocks * path.is_file())
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1  # in the second snapshot's own blocks
    pack.write_bytes(data)
    damaged = hvsnap("snapshot-verify", second)
    assert (damaged.status, second in damaged.err) == (7, True), damaged
    again = hvsnap("snapshot-verify", "--all", "--json")
    answer = json.loads(again.out)
    assert (again.status, answer["code"]) == (7, "damaged")
    assert [one["id"] for one in answer["task"]["result"]["affected"]] == [second]
    assert hvsnap("disk-create", second, str(workdir / "bad.raw")).status == 7
    assert second in hvsnap.ok("store-info")

    third = hvsnap.ok("snapshot-create", guest.name, "-q").strip()  # nothing was written: it heals all the same
    assert "1 blocks" not in hvsnap.ok("store-info")
    assert "none damaged" in hvsnap.ok("snapshot-verify", "--all")
    for snapshot in (second, third):
        hvsnap.ok("disk-create", snapshot, str(workdir / f"{snapshot}.raw"), "--format", "raw")
        assert (workdir / f"{snapshot}.raw").read_bytes() == second_bytes
    hvsnap.ok("snapshot-delete", second, third)
    wait_for(lambda: usage(store) == 0, "an empty store", 20)
    assert not any(path.is_file() for path in (store / "manifests").rglob("*"))
    assert "not found" not in hvsnap.ok("store-compact")
    assert hvsnap("snapshot-verify", second).status == 3
    assert hvsnap("snapshot-verify").status == 2
    assert hvsnap.end_daemon() == 0
    hvsnap.close()


SECONDS = float(os.environ.get("HVSNAP_STRESS_S", "20"))


def test_captures_deletions_sweeps_and_verification_at_once_under_kills(
    libvirtd: Libvirtd, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    """Every accomplished snapshot restores byte for byte, whatever was killed when; nothing is left at the end.

    FAULTS 28.
    """
    seed = int(os.environ.get("E2E_SEED", Random().randrange(2**31)))
    print(f"E2E_SEED={seed}")
    rng = Random(seed)
    disk = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(disk)])
    daemon = Daemon(workdir, libvirtd.uri).start()
    pool = [Random(n).randbytes(65536) for n in range(40)]  # so that blocks come back that were deleted
    content = np.zeros((1024, 65536), np.uint8)
    states: dict[str, np.ndarray] = {}
    stop = threading.Event()
    threads = [threading.Thread(target=_pester, args=(daemon, path, stop)) for path in ("compact", "verify", "check")]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + SECONDS
    kills = 0
    while time.monotonic() < deadline:
        commands = []
        for number in rng.sample(range(1024), 12):
            block = rng.choice(pool)
            content[number] = np.frombuffer(block, np.uint8)
            path = workdir / f"block-{len(commands)}"
            path.write_bytes(block)
            commands.append(f"write -s {path} {number * 65536} 64k")
        write(disk, *commands)
        (made,) = daemon.begin(guest.name)
        if rng.random() < 0.25:
            time.sleep(rng.random() * 0.5)
            daemon.kill()
            kills += 1
            daemon.start()
        (ended,) = daemon.ended([made])
        daemon.settled()
        if ended.state == "accomplished":
            states[ended.id] = content.copy()
        if len(states) > 3:
            doomed = rng.sample(list(states), rng.randint(1, 2))
            _delete(daemon, doomed)
            for name in doomed:
                del states[name]
    stop.set()
    for thread in threads:
        thread.join()
    _check_end(daemon, states, workdir)
    print(f"{kills} kills")
    assert daemon.stop() == 0


def _check_end(daemon: Daemon, states: dict[str, np.ndarray], workdir: Path) -> None:
    """Everything restores, is sound, and nothing is left once it is deleted."""
    assert states
    for name, state in states.items():
        assert np.array_equal(np.frombuffer(daemon.restored(name, workdir), np.uint8), state.reshape(-1)), name
    checked = _task(daemon, "/store/check").result
    assert isinstance(checked, wire.StoreChecked)
    assert checked.sound, checked
    verified = _task(daemon, "/snapshots/verify", wire.SnapshotVerify(all=True)).result
    assert isinstance(verified, wire.SnapshotsVerified)
    assert verified.damaged_blocks == 0, verified
    _delete(daemon, list(states))
    _task(daemon, "/store/compact", wire.StoreCompact(dry_run=False))
    assert usage(daemon.store) == 0


def _task(daemon: Daemon, path: str, body: wire.Request | None = None) -> wire.Task:
    with daemon.client() as client:
        return daemon.task(client.post(path, wire.Task, body))


def _delete(daemon: Daemon, names: list[str]) -> None:
    with daemon.client() as client:
        client.post("/snapshots/delete", wire.Deletion, wire.SnapshotDelete(ids=names, dry_run=False))


def _pester(daemon: Daemon, what: str, stop: threading.Event) -> None:
    """Ask for upkeep all the time; a daemon that is just being killed does not answer."""
    bodies = {"compact": wire.StoreCompact(dry_run=False), "verify": wire.SnapshotVerify(all=True), "check": None}
    path = "/snapshots/verify" if what == "verify" else f"/store/{what}"
    while not stop.wait(0.05):
        try:
            _task(daemon, path, bodies[what])
        except Exception:
            time.sleep(0.2)

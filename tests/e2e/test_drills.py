"""Restore drills of a real daemon, by commands alone: passed, killed in the middle, of a damaged store."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cli_kit import HVSNAP
from tests.e2e.test_command_line import CommandLine, write
from tests.e2e.test_store_upkeep import noise
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd, wait_for

MIB = 1 << 20


def test_s12_a_drill_passes_leaves_nothing_when_it_is_killed_and_finds_a_damaged_block(
    libvirtd: Libvirtd, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    disk = make_image(workdir / "a.qcow2", "128M")
    guest = make_guest([DiskSpec(disk)])
    scratch = workdir / "scratch"
    hvsnap = CommandLine(workdir, libvirtd.uri, drill=f"dir = {json.dumps(str(scratch))}")
    hvsnap.start_daemon()
    try:
        write(disk, f"write -s {noise(workdir, 1, 48 * MIB)} 0 48M")
        hvsnap.ok("snapshot-create", guest.name)
        write(disk, f"write -s {noise(workdir, 2, 8 * MIB)} 20M 8M", "write -z 4M 4M")
        snapshot = hvsnap.ok("snapshot-create", guest.name, "-q").strip()
        assert "44.0 MiB written, checked and compared" in hvsnap.ok("snapshot-drill", "--disk", f"{guest.name}/vda")
        assert list(scratch.iterdir()) == []
        assert f"({snapshot}: 44.0 MiB in" in hvsnap.ok("snapshot-info", snapshot)
        assert "Last drill:" in hvsnap.ok("chain-info", "vda")
        assert "Last drill:" in hvsnap.ok("store-info")

        _killed_in_the_middle(hvsnap, snapshot, scratch, workdir)
        assert list(scratch.iterdir()) == []
        assert "nothing was open" in hvsnap.ok("recover")

        pack = max((workdir / "state" / "store" / "packs").rglob("*"), key=lambda path: path.stat().st_size)
        data = bytearray(pack.read_bytes())
        data[len(data) * 15 // 16] ^= 1  # beyond what the second snapshot has of its own
        pack.write_bytes(data)
        ran = hvsnap("snapshot-drill", snapshot)
        assert (ran.status, "is not what was stored" in ran.err) == (7, True), ran
        assert list(scratch.iterdir()) == []
        shown = json.loads(hvsnap.ok("snapshot-info", snapshot, "--json"))["drill"]
        assert (shown["outcome"], "block" in shown["error"]) == ("damaged", True)
        assert "restore-drill" in hvsnap("doctor").out
        assert snapshot in hvsnap.ok("store-info")  # a verification has found all snapshots that it affects
        assert hvsnap.end_daemon() == 0
    finally:
        hvsnap.close()


def _killed_in_the_middle(hvsnap: CommandLine, snapshot: str, scratch: Path, workdir: Path) -> None:
    """Kill the daemon as soon as a drill writes, and start it again."""
    argv = [HVSNAP, "--config", str(workdir / "hvsnap.toml"), "snapshot-drill", snapshot]
    asking = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: any(scratch.glob("*.qcow2")), "the drill to write")
        assert hvsnap.end_daemon(signal.SIGKILL) == -signal.SIGKILL
    finally:
        asking.wait(60)
    assert any(scratch.iterdir())
    hvsnap.start_daemon()

"""The whole way by the command line alone: its daemon, its commands, and the bytes that come back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli_kit import HVSNAP, Ran
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd, wait_for

MIB = 1 << 20


class CommandLine:
    """``hvsnap`` with a configuration, and ``hvsnap daemon`` beside it."""

    def __init__(self, directory: Path, uri: str, **tables: str) -> None:
        self.directory = directory
        self._rig = Daemon(directory, uri, **tables)
        self._log = (directory / "out.log").open("ab")
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, *arguments: str) -> Ran:
        done = subprocess.run(
            [HVSNAP, "--config", str(self._rig.config), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.directory,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str) -> str:
        ran = self(*arguments)
        assert ran.status == 0, ran
        return ran.out

    def start_daemon(self) -> None:
        self._process = subprocess.Popen(
            [HVSNAP, "daemon", "--config", str(self._rig.config)], stdout=self._log, stderr=self._log
        )
        wait_for(self._rig.answers, "the start of the daemon", 60)

    def end_daemon(self, number: int = signal.SIGTERM) -> int:
        assert self._process is not None
        self._process.send_signal(number)
        return self._process.wait(60)

    def close(self) -> None:
        self._log.close()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def hvsnap(libvirtd: Libvirtd, workdir: Path) -> Iterator[CommandLine]:
    one = CommandLine(workdir, libvirtd.uri)
    yield one
    one.close()


def raw(image: Path, scratch: Path) -> bytes:
    subprocess.run(["qemu-img", "convert", "-U", "-O", "raw", str(image), str(scratch)], check=True)
    return scratch.read_bytes()


def write(image: Path, *commands: str) -> None:
    options = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *options, str(image)], check=True, stdout=subprocess.DEVNULL)


def test_snapshots_new_disks_and_rollbacks_by_commands_bring_the_bytes_back(
    hvsnap: CommandLine, make_guest: Callable[..., Guest], workdir: Path
) -> None:
    disk = make_image(workdir / "a.qcow2", "16M")
    guest = make_guest([DiskSpec(disk)])
    write(disk, "write -P 1 0 4M", "write -P 2 8M 1M")
    first_bytes = raw(disk, workdir / "raw")
    hvsnap.start_daemon()
    first = hvsnap.ok("snapshot-create", guest.name, "--name", "first", "--quiet").strip()
    write(disk, "write -P 3 1M 1M", "write -z 8M 1M", "write -P 4 12M 64k")
    second_bytes = raw(disk, workdir / "raw")
    told = hvsnap.ok("snapshot-create", guest.name, "vda", "--name", "second")
    second = told.split()[0]
    assert "incremental snapshot" in told

    hvsnap.ok("disk-create", first, "first.raw", "--format", "raw")
    assert (workdir / "first.raw").read_bytes() == first_bytes
    hvsnap.ok("disk-create", second, "second.qcow2")
    assert raw(workdir / "second.qcow2", workdir / "raw") == second_bytes
    again = hvsnap("disk-create", first, "first.raw", "--format", "raw")
    assert (again.status, "exists" in again.err) == (4, True)

    assert "safety snapshot" in hvsnap.ok("disk-rollback", "vda", first, "--dry-run")
    assert raw(disk, workdir / "raw") == second_bytes
    told = hvsnap.ok("disk-rollback", f"{guest.name}/vda", first)
    assert raw(disk, workdir / "raw") == first_bytes
    saved = told.rpartition("the state before it is ")[2].split(",")[0].strip()
    hvsnap.ok("snapshot-delete", second)
    hvsnap.ok("disk-create", saved, "saved.raw", "--format", "raw")
    assert (workdir / "saved.raw").read_bytes() == second_bytes
    assert second not in hvsnap.ok("snapshot-list", guest.name)
    assert saved in hvsnap.ok("chain-info", "vda")
    assert hvsnap.end_daemon() == 0


def test_one_daemon_at_a_time_and_it_ends_by_sigterm_and_ctrl_c(hvsnap: CommandLine) -> None:
    """FAULTS 15."""
    hvsnap.start_daemon()
    second = hvsnap("daemon")
    assert second.status == 5
    assert second.err.splitlines()[-2].startswith("hvsnap: daemon: ")
    assert hvsnap.ok("recover") == "nothing was open\n"
    assert hvsnap.end_daemon() == 0
    assert hvsnap("status").status == 6
    assert hvsnap.ok("recover") == "nothing was open\n"
    assert hvsnap("doctor", "--quiet").out.startswith("ERROR    daemon: ")
    hvsnap.start_daemon()
    assert hvsnap.end_daemon(signal.SIGINT) == 0


def test_systemd_is_told_when_the_daemon_is_ready(
    hvsnap: CommandLine, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(workdir / "notify"))
        systemd.settimeout(60)
        monkeypatch.setitem(os.environ, "NOTIFY_SOCKET", str(workdir / "notify"))
        hvsnap.start_daemon()
        assert systemd.recv(100) == b"READY=1"
        begun = time.monotonic()
        assert hvsnap.end_daemon() == 0
        assert systemd.recv(100) == b"STOPPING=1"
        assert time.monotonic() - begun < 30

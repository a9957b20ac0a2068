"""What the daemon tells systemd, on a real datagram socket; its work with no more rights than the unit leaves it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hvsnap import systemd
from hvsnap.cli.installing import UNITS
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd


class Systemd:
    """The receiving end of NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind("\0" + address[1:] if address.startswith("@") else address)
        self.socket.settimeout(30)
        self.environment = {"NOTIFY_SOCKET": address}

    def heard(self) -> str:
        return self.socket.recv(4096).decode()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, workdir: Path) -> Iterator[Systemd]:
    one = Systemd(str(workdir / "notify") if request.param == "path" else f"@{workdir.name}")
    yield one
    one.socket.close()


def five_pings_s(manager: Systemd) -> float:
    """Return how long five come after another one."""
    assert manager.heard() == "WATCHDOG=1"
    began = time.monotonic()
    for _ in range(5):
        assert manager.heard() == "WATCHDOG=1"
    return time.monotonic() - began


def test_the_daemon_tells_that_it_is_ready_alive_and_ending(manager: Systemd, workdir: Path) -> None:
    daemon = Daemon(workdir, "")
    daemon.start(wait=False, environment=manager.environment | {"WATCHDOG_USEC": "600000"})
    first = manager.heard()
    before_ready = [first]
    while first != "READY=1":  # the first pings may come while its socket is being opened
        assert first == "WATCHDOG=1"
        first = manager.heard()
        before_ready.append(first)
    assert daemon.answers(), "ready means that it answers"
    assert any(five_pings_s(manager) / 5 < 0.6 for _ in range(10))
    daemon.terminate()
    told = [manager.heard()]
    while told[-1] == "WATCHDOG=1":
        told.append(manager.heard())
    assert told[-1] == "STOPPING=1"
    assert daemon.wait_dead() == 0


def test_a_loop_that_stands_still_does_not_ping(manager: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (manager.environment | {"WATCHDOG_USEC": "60000"}).items():
        monkeypatch.setenv(name, value)

    async def stuck() -> None:
        pinging = asyncio.create_task(systemd.keep_alive())
        await asyncio.sleep(0.1)
        time.sleep(0.5)  # noqa: ASYNC251 - the fault that the watchdog is for
        pinging.cancel()

    asyncio.run(stuck())
    manager.socket.setblocking(False)
    pings = 0
    with contextlib.suppress(BlockingIOError):
        while manager.heard() == "WATCHDOG=1":
            pings += 1
    assert 1 <= pings <= 7, "half a second of standing still would have been 25"


@pytest.mark.parametrize(
    ("environment", "interval_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 1.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": ""}, None),
    ],
)
def test_pings_are_as_systemd_asks_for_them(environment: dict[str, str], interval_s: float | None) -> None:
    assert systemd.ping_interval_s(environment, 7) == interval_s


@pytest.mark.parametrize("address", ["", "/no/such/socket", "@no-such-socket", "relative"])
def test_nobody_who_listens_is_no_fault(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1")


def test_a_manager_that_does_not_read_is_not_waited_for(manager: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.environment["NOTIFY_SOCKET"])
    began = time.monotonic()
    for _ in range(2000):
        systemd.notify("WATCHDOG=1")
    assert time.monotonic() - began < 10


def test_every_line_of_the_log_has_its_priority() -> None:
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(systemd.JournalFormatter())
    log = logging.Logger("hvsnap.test")
    log.addHandler(handler)
    log.info("one\ntwo")
    log.warning("three")
    try:
        raise ValueError("four")
    except ValueError:
        log.exception("failed")
    log.debug("five")
    lines = out.getvalue().splitlines()
    assert lines[:3] == ["<6>hvsnap.test: one", "<6>two", "<4>hvsnap.test: three"]
    assert {line[:3] for line in lines[3:-1]} == {"<3>"}
    assert lines[-1] == "<7>hvsnap.test: five"


def test_the_journal_is_known_by_its_device_and_inode() -> None:
    reading, writing = os.pipe()
    seen = os.fstat(writing)
    assert systemd.logs_to_journal({"JOURNAL_STREAM": f"{seen.st_dev}:{seen.st_ino}"}, writing)
    # Inherited, but standard error goes elsewhere.
    assert not systemd.logs_to_journal({"JOURNAL_STREAM": "1:1"}, writing)
    assert not systemd.logs_to_journal({}, writing)
    os.close(reading)
    os.close(writing)


class Bounded(Daemon):
    """A daemon with the capabilities of the unit, and none that a program could give it back."""

    def start(self, *arguments: str, wait: bool = True, environment: dict[str, str] | None = None) -> Daemon:
        (kept,) = re.findall(r"^CapabilityBoundingSet=(.*)$", (UNITS / "hvsnapd.service").read_text(), re.M)
        allowed = ",".join(f"+{name.removeprefix('CAP_').lower()}" for name in kept.split())
        bounds = ["setpriv", "--no-new-privs", f"--bounding-set=-all,{allowed}", f"--inh-caps=-all,{allowed}"]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [*bounds, sys.executable, "-m", self.module, str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 60
        while not self.answers():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_capabilities_of_the_unit_are_enough(
    workdir: Path, libvirtd: Libvirtd, make_guest: Callable[..., Guest]
) -> None:
    """A capture of a running guest, one of a guest that is off, a new disk and a rollback: images are QEMU's user's."""
    image = make_image(workdir / "a.qcow2", "64M")
    guest = make_guest([DiskSpec(image)])
    daemon = Bounded(workdir, libvirtd.uri)
    try:
        guest.start()
        daemon.start()
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        # CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SYS_PTRACE
        assert re.search(r"^CapBnd:\s+0*8001f$", status, re.M), status
        (one,) = daemon.snapshot(guest.name)
        guest.qemu_io(0, "write -P 7 1M 1M")
        (two,) = daemon.snapshot(guest.name)
        assert (one.kind, two.method) == ("full", "bitmap")
        assert daemon.restored(two.id, workdir)[1 << 20 : 2 << 20] == bytes([7]) * (1 << 20)
        guest.destroy()
        assert daemon.create_disk(one.id, workdir / "b.qcow2").state == "accomplished"
        task = daemon.roll_back(f"{guest.name}/vda", one.id)
        assert task.state == "accomplished", task.error
        guest.start()
        (three,) = daemon.snapshot(guest.name)
        assert not any(daemon.restored(three.id, workdir))
    finally:
        daemon.stop()

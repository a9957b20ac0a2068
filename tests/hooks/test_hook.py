"""libvirt's hook by itself: what it lets through, what it bars, and that nothing makes it fail or wait.

FAULTS 25.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from hvsnap.guard import OVERLAY, ROLLBACK, Bar, StartGuard
from hvsnap.model import DiskId, GuestUuid
from tests.hooks.kit import SCRIPT, WEB, Hook, domain_xml

IMAGE, OVERLAY_PATH = "/images/web.qcow2", "/images/web.s-1.overlay"
SLOW_S = 1.0
"""The promise, whatever the daemon does."""


@pytest.fixture
def hook(workdir: Path) -> Hook:
    return Hook(workdir)


def a_bar(why: str, **changes: str) -> Bar:
    told = {"guest_uuid": GuestUuid(WEB), "guest": "web01", "disk": DiskId("d-aaaaaaaaaaaa"), "target": "vda"}
    told |= {"image": IMAGE, "why": why, "snapshot": "s-mfrggzdfmztw"}
    if why == OVERLAY:
        told |= {"overlay": OVERLAY_PATH}
    return Bar(**(told | changes))  # type: ignore[arg-type]


# -- the guard ------------------------------------------------------------------------------------


async def test_a_guest_with_an_open_rollback_does_not_start_and_is_told_why(hook: Hook) -> None:
    """FAULTS 26."""
    guard = StartGuard(hook.state)
    await guard.bar(a_bar(ROLLBACK))
    ran = hook.prepare(domain_xml(IMAGE))
    assert ran.status == 1
    assert "web01 is kept from starting: the rollback of disk vda to snapshot s-mfrggzdfmztw is not finished" in ran.err
    assert "hint: start hvsnapd (or run `hvsnap recover`)" in ran.err
    await guard.lift(DiskId("d-aaaaaaaaaaaa"), ROLLBACK)
    assert hook.prepare(domain_xml(IMAGE)).status == 0
    assert await guard.barred() == []


@pytest.mark.parametrize("operation", ["start", "started", "stopped", "release", "migrate", "reconnect", "attach", "x"])
async def test_no_other_operation_is_ever_refused(hook: Hook, operation: str) -> None:
    await StartGuard(hook.state).bar(a_bar(ROLLBACK))
    assert hook.run("web01", operation, "begin", "-", xml=domain_xml(IMAGE)).status == 0


async def test_other_guests_start(hook: Hook) -> None:
    await StartGuard(hook.state).bar(a_bar(ROLLBACK))
    other = domain_xml("/images/mail.qcow2", uuid=WEB[:-1] + "2", name="mail")
    assert hook.prepare(other, "mail").status == 0
    # A guest that has taken over the name is another guest.
    assert hook.prepare(domain_xml("/images/mail.qcow2", uuid=WEB[:-1] + "2")).status == 0


async def test_a_guest_starts_from_its_overlay_and_not_from_below_it(hook: Hook) -> None:
    await StartGuard(hook.state).bar(a_bar(OVERLAY))
    assert hook.prepare(domain_xml(OVERLAY_PATH)).status == 0
    assert hook.prepare(domain_xml("/images/another.qcow2")).status == 0
    ran = hook.prepare(domain_xml(IMAGE))
    assert ran.status == 1
    assert f"the newest data of disk vda is in {OVERLAY_PATH}, which the guest's definition does not name" in ran.err


async def test_a_damaged_marker_bars_by_its_name_and_a_file_that_is_none_does_not(hook: Hook) -> None:
    guard = StartGuard(hook.state)
    await guard.bar(a_bar(ROLLBACK))
    (marker,) = (hook.state / "guard").iterdir()
    for content in (b"", b"\xff\xfe", b"[]", b'{"guest": 1}', b"{" * 100_000, b"[" * 60_000):
        marker.write_bytes(content)
        ran = hook.prepare(domain_xml(IMAGE))
        assert ran.status == 1, content
        assert "kept from starting" in ran.err
        assert "Traceback" not in ran.err
    marker.rename(marker.with_name(f".{marker.name}.new"))  # what a crash leaves of one that was never there
    assert hook.prepare(domain_xml(IMAGE)).status == 0


async def test_the_guard_keeps_what_is_open_and_lifts_what_is_over(hook: Hook) -> None:
    guard = StartGuard(hook.state)
    one, two = DiskId("d-aaaaaaaaaaaa"), DiskId("d-bbbbbbbbbbbb")
    for disk in (one, two):
        await guard.bar(a_bar(ROLLBACK, disk=disk))
    await guard.bar(a_bar(OVERLAY, disk=two))
    await guard.lift_all_but({two}, ROLLBACK)
    await guard.lift_all_but({two}, ROLLBACK)
    assert await guard.barred() == [f"{WEB}.{two}.overlay", f"{WEB}.{two}.rollback"]


async def test_a_marker_holds_when_the_xml_cannot_be_read(hook: Hook) -> None:
    await StartGuard(hook.state).bar(a_bar(ROLLBACK))
    assert hook.prepare(b"<domain><na").status == 1
    assert hook.prepare(b"", "another").status == 0


# -- whatever comes -------------------------------------------------------------------------------

HOSTILE = {
    "nothing": b"",
    "no XML": b"\x00\xff\xfe" * 1000,
    "entities": b'<!DOCTYPE d [<!ENTITY a "x"><!ENTITY b "&a;&a;">]><domain><uuid>&b;</uuid></domain>',
    "a file": b'<!DOCTYPE d [<!ENTITY a SYSTEM "file:///etc/shadow">]><domain><uuid>&a;</uuid></domain>',
    "deep": b"<a>" * 300_000,
    "large": domain_xml(IMAGE)[:-9] + b"<!-- " + b'"\\\x01' * (3 << 20),
    "long text": b"<domain><uuid>" + b"a" * (2 << 20),
    "another encoding": "<?xml version='1.0' encoding='utf-16'?><domain/>".encode("utf-16"),
    "an unknown encoding": b"<?xml version='1.0' encoding='klingon'?><domain/>",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_xml_is_let_through_and_spooled(hook: Hook, kind: str) -> None:
    for operation in ("prepare", "started"):
        ran = hook.run("web01", operation, "begin", "-", xml=HOSTILE[kind])
        assert (ran.status, ran.err) == (0, ""), kind
    told = hook.spooled()
    assert [one["operation"] for one in told] == ["prepare", "started"]
    for path in (hook.state / "spool" / "hooks").glob("*.json"):
        assert path.stat().st_size <= 1 << 20


def test_random_bytes_are_let_through(hook: Hook) -> None:
    seed = int.from_bytes(os.urandom(4))
    random = Random(seed)
    good = domain_xml(IMAGE)
    for _ in range(15):
        broken = bytearray(good)
        for _ in range(random.randrange(1, 6)):
            broken[random.randrange(len(broken))] = random.randrange(256)
        ran = hook.prepare(bytes(broken[: random.randrange(len(broken) + 1)]))
        assert (ran.status, ran.err) == (0, ""), f"seed {seed}"


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["web01"],
        ["", "", "", ""],
        [b"\xff\xfe", b"started", b"\x80", b"-"],
        ["x" * 100_000, "started", "begin", "-"],
        ["../../etc/passwd", "prepare", "begin", "-"],
        ["web\x1b[2J\n", "prepare", "begin", "-"],
        ["web01", "prepare", "begin", "-", "more", "and more"],
    ],
)
def test_hostile_arguments_are_let_through(hook: Hook, words: list[str | bytes]) -> None:
    ran = hook.run(*words, xml=domain_xml(IMAGE))
    assert (ran.status, ran.err) == (0, "")


async def test_a_hostile_marker_does_not_reach_the_terminal(hook: Hook) -> None:
    await StartGuard(hook.state).bar(a_bar(ROLLBACK, guest="web\x1b[2J\n01", target="vd\u202ea"))
    ran = hook.prepare(domain_xml(IMAGE))
    assert ran.status == 1
    assert "\x1b" not in ran.err
    assert len(ran.err.splitlines()) == 2


def test_streams_that_are_closed_do_no_harm(hook: Hook) -> None:
    for redirect in ("<&-", "2>&-", "<&- >&- 2>&-", "</dev/zero"):
        done = subprocess.run(["bash", "-c", f'"{hook.script}" web01 prepare begin - {redirect}'], timeout=20)
        assert done.returncode == 0, redirect


def test_an_input_that_never_ends_or_never_comes_is_not_waited_for(hook: Hook) -> None:
    def once() -> float:
        began = time.monotonic()
        with subprocess.Popen([hook.script, "web01", "prepare", "begin", "-"], stdin=subprocess.PIPE) as silent:
            assert silent.wait(20) == 0
        return time.monotonic() - began

    assert at_best(once, lambda: SLOW_S + start_s())


def test_without_a_state_directory_nothing_happens(hook: Hook) -> None:
    (hook.state).rmdir()
    assert hook.prepare(domain_xml(IMAGE)).status == 0
    assert not hook.state.exists()


def test_a_configuration_that_is_none_does_no_harm(hook: Hook) -> None:
    for content in ("", "[]", "{", '{"state_dir": 1, "socket": null}'):
        (hook.hooks / "hvsnap.json").write_text(content)
        ran = hook.prepare(domain_xml(IMAGE))
        assert (ran.status, ran.err) == (0, "")


# -- the daemon's absence -------------------------------------------------------------------------


def start_s() -> float:
    """Return how long the interpreter alone takes to start here and now: no hook can be quicker."""

    def one() -> float:
        began = time.monotonic()
        subprocess.run(["/usr/bin/python3", "-IS", "-c", "import json"], check=True)
        return time.monotonic() - began

    return statistics.median(one() for _ in range(5))


def at_best(once: Callable[[], float], limit_s: Callable[[], float]) -> bool:
    """Whether something is done in time, in seconds, at least once: a machine that is busy for a moment hides it."""
    return any(once() < limit_s() for _ in range(10))


@contextlib.contextmanager
def deaf(path: Path) -> Iterator[None]:
    """A daemon that takes connections and never answers."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(8)
        yield


def test_a_dead_daemon_finds_everything_in_its_spool(hook: Hook) -> None:
    with deaf(hook.socket):
        pass  # its socket is still there
    for operation in ("prepare", "start", "started"):
        ran = hook.run("web01", operation, "begin", "-", xml=domain_xml(IMAGE))
        assert ran.status == 0
    told = hook.spooled()
    assert [one["operation"] for one in told] == ["prepare", "start", "started"]
    assert told[0]["xml"] == domain_xml(IMAGE).decode()
    assert len({one["id"] for one in told}) == 3


def test_a_hung_daemon_is_waited_for_once_and_briefly(hook: Hook) -> None:
    def once() -> float:
        hook.forget()
        runs = [hook.run("web01", one, "begin", "-", xml=domain_xml(IMAGE)) for one in ("prepare", "start", "started")]
        assert [run.status for run in runs] == [0, 0, 0]
        assert len(hook.spooled()) == 3
        return sum(run.took_s for run in runs)

    with deaf(hook.socket):
        assert at_best(once, lambda: SLOW_S + 3 * start_s())


def test_a_full_queue_of_connections_is_a_hung_daemon(hook: Hook) -> None:
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as stack:
        listening.bind(str(hook.socket))
        listening.listen(0)
        for _ in range(2):
            waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(str(hook.socket))

        def once() -> float:
            hook.forget()
            ran = hook.prepare(domain_xml(IMAGE))
            assert ran.status == 0
            assert len(hook.spooled()) == 1
            return ran.took_s

        assert at_best(once, lambda: SLOW_S + start_s())


@pytest.mark.parametrize("answer", [b"HTTP/1.1 500 No\r\n\r\n", b"HTTP/1.1 503 No\r\n\r\n", b"", b"what?\n" * 10])
def test_what_the_daemon_did_not_take_is_spooled(hook: Hook, answer: bytes) -> None:
    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(answer)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(hook.socket))
        listening.listen(8)
        thread = threading.Thread(target=serve, args=(listening,))
        thread.start()
        assert hook.run("web01", "started", "begin", "-", xml=domain_xml(IMAGE)).status == 0
        thread.join()
    assert len(hook.spooled()) == 1


def test_the_spool_is_bounded_and_keeps_the_newest(hook: Hook) -> None:
    spool = hook.state / "spool" / "hooks"
    spool.mkdir(parents=True)
    for number in range(300):
        (spool / f"{number}-1.json").write_text("{}")
    assert hook.run("web01", "started", "begin", "-", xml=domain_xml(IMAGE)).status == 0
    left = sorted(path.name for path in spool.glob("*.json"))
    assert len(left) == 256
    newest = max((spool / name for name in left), key=lambda path: path.stat().st_mtime)
    assert json.loads(newest.read_text())["guest"] == "web01"


def test_a_full_device_keeps_no_guest_from_starting(hook: Hook) -> None:
    """Here: a spool that cannot be made."""
    (hook.state / "spool").write_text("a file")
    ran = hook.prepare(domain_xml(IMAGE))
    assert (ran.status, ran.err) == (0, "")


# -- what it is made of ---------------------------------------------------------------------------


def test_it_needs_nothing_but_the_standard_library_and_never_libvirt() -> None:
    text = SCRIPT.read_text()
    assert text.startswith("#!/usr/bin/python3 -IS\n")
    assert SCRIPT.stat().st_mode & 0o111
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        assert not isinstance(node, ast.ImportFrom)
    assert names <= sys.stdlib_module_names
    assert "libvirt" not in names

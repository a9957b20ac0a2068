"""Refusals and failures: every exit status, one form for people and one for programs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from hvsnap import daemon, wire
from hvsnap.cli.complaints import complain
from hvsnap.errors import (
    CaptureRunning,
    ChainFull,
    DaemonUnreachable,
    Damaged,
    Failed,
    HvsnapError,
    StoreBusy,
)
from hvsnap.model import Snapshot
from hvsnap.service.requests import SnapshotRequest
from tests.cli_kit import Desk, Ran, a_desk, in_process, two_snapshots
from tests.guest.libvirtd import Libvirtd


@pytest.fixture
async def desk(workdir: Path) -> AsyncIterator[Desk]:
    async with a_desk(workdir) as one:
        yield one


@pytest.fixture
def no_daemon(workdir: Path) -> Path:
    """Return a configuration whose daemon does not run."""
    path = workdir / "hvsnap.toml"
    path.write_text(
        f'socket = "{workdir}/run/hvsnap.sock"\nstate_dir = "{workdir}/state"\nhost_id = "host-1"\n'
        f'[hypervisor]\nlibvirt_uri = "test:///default"\n[store]\nurl = "file://{workdir}/state/store"\n'
    )
    return path


def told(ran: Ran, status: int, what: str) -> tuple[str, str]:
    """Return message and hint of an error that was told in the form for people."""
    assert ran.status == status, ran
    lines = ran.err.splitlines()
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"hvsnap: {what}: ")
    assert lines[1].startswith("hint: ")
    return lines[0].removeprefix(f"hvsnap: {what}: "), lines[1].removeprefix("hint: ")


def refuse_with(desk: Desk, error: HvsnapError) -> None:
    async def refuse(_request: SnapshotRequest) -> list[Snapshot]:
        raise error

    desk.house.captures.create_with = refuse


# -- one for each exit status ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Failed("it did not work", hint="try again"), 1, "failed"),
        (ChainFull("the chain holds 64 snapshots already"), 4, "chain-full"),
        (CaptureRunning("disk vda of web01 is being captured (snapshot s-aaaaaaaaaaaa)"), 5, "capture-running"),
        (Damaged("block 7 is not what was stored", hint="hvsnap snapshot-info names it"), 7, "damaged"),
    ],
)
async def test_what_the_daemon_refuses_keeps_its_words_and_its_exit_status(
    desk: Desk, error: HvsnapError, status: int, code: str
) -> None:
    refuse_with(desk, error)
    ran = await desk.hvsnap("snapshot-create", "web01")
    assert told(ran, status, "snapshot-create") == (error.message, error.hint)
    assert ran.out == ""
    ran = await desk.hvsnap("snapshot-create", "web01", "--json")
    assert (ran.status, ran.err) == (status, "")
    assert ran.object == {"code": code, "message": error.message, "hint": error.hint}


async def test_damage_found_by_a_task_exits_with_7(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    desk.house.maker.error = Damaged("block 7 is not what was stored", hint="it is in snapshot s-a")
    told(await desk.hvsnap("disk-create", one, "/images/x"), 7, "disk-create")


@pytest.mark.parametrize(
    ("arguments", "what", "word"),
    [
        (["snapshot-info", "s-aaaaaaaaaaaa"], "snapshot-info", "s-aaaaaaaaaaaa"),
        (["snapshot-info", ".."], "snapshot-info", "there is no snapshot .."),
        (["snapshot-info", "a/b?c#d%2F"], "snapshot-info", "a/b"),
        (["snapshot-info", "x" * 4000], "snapshot-info", "there is no snapshot xxx"),
        (["snapshot-list", "nobody"], "snapshot-list", "there is no guest nobody"),
        (["snapshot-list", "web01", "vdz"], "snapshot-list", "vdz"),
        (["snapshot-delete", "s-aaaaaaaaaaaa"], "snapshot-delete", "s-aaaaaaaaaaaa"),
        (["chain-info", "vdz"], "chain-info", "vdz"),
        (["chain-info", "../../etc/passwd"], "chain-info", "../../etc/passwd"),
        (["disk-create", "s-aaaaaaaaaaaa", "/images/x"], "disk-create", "s-aaaaaaaaaaaa"),
        (["disk-rollback", "vdz", "s-aaaaaaaaaaaa"], "disk-rollback", "s-aaaaaaaaaaaa"),
        (["watch", "nobody"], "watch", "there is no guest nobody"),
    ],
)
async def test_what_is_not_there_exits_with_3(desk: Desk, arguments: list[str], what: str, word: str) -> None:
    message, _hint = told(await desk.hvsnap(*arguments), 3, what)
    assert word in message
    assert (await desk.hvsnap(*arguments, "--json")).object["code"].endswith(("unknown", "not-found"))


async def test_refusals_by_a_rule_exit_with_4(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    message, hint = told(await desk.hvsnap("disk-rollback", "vda", one), 4, "disk-rollback")
    assert message == "guest web01 is running"
    assert "--stop" in hint
    desk.house.maker.taken = {"/images/taken"}
    told(await desk.hvsnap("disk-create", one, "/images/taken"), 4, "disk-create")
    assert desk.house.tasks.all() == []


WRONG = [
    ([], "usage", "Missing command"),
    (["bla"], "usage", "No such command 'bla'"),
    (["--bla"], "usage", "No such option: --bla"),
    (["snapshot-unify", "s-a"], "usage", "No such command"),
    (["snapshot-create"], "snapshot-create", "Missing argument 'GUEST'"),
    (["snapshot-create", "g", "--consistency", "b"], "snapshot-create", "'b' is not one of 'auto', 'app', 'crash'"),
    (["snapshot-create", "g", "--name"], "snapshot-create", "requires an argument"),
    (["snapshot-create", "g", "--bla"], "snapshot-create", "No such option: --bla"),
    (["snapshot-delete"], "snapshot-delete", "Missing argument 'SNAPSHOT'"),
    (["disk-create", "s-a", "/x", "--format", "vmdk"], "disk-create", "'vmdk' is not one of"),
    (["disk-create", "s-a", "/x", "/y"], "disk-create", "unexpected extra argument"),
    (["list", "more"], "list", "unexpected extra argument"),
    (["snapshot-info", ""], "snapshot-info", "1 to 4096 characters"),
    (["snapshot-info", "x" * 4097], "snapshot-info", "1 to 4096 characters"),
    (["snapshot-create", "g", *["vda"] * 300], "snapshot-create", "disks"),
    (["snapshot-create", "g", "--description", "x" * 70_000], "snapshot-create", "description"),
    (["snapshot-create", "g\udcff"], "usage", "is not UTF-8"),
    (["list", "--config", "/none.toml"], "list", "there is no such file"),
]


@pytest.mark.parametrize(("arguments", "what", "word"), WRONG[1:], ids=[" ".join(w[0])[:40] for w in WRONG[1:]])
async def test_wrong_usage_exits_with_2_in_the_same_form(
    desk: Desk, arguments: list[str], what: str, word: str
) -> None:
    message, _hint = told(await desk.hvsnap(*arguments), 2, what)
    assert word in message
    ran = await desk.hvsnap("--json", *arguments)
    assert (ran.status, ran.err) == (2, "")
    assert set(ran.object) == {"code", "message", "hint"}
    assert desk.house.captures.requests == []


async def test_a_name_that_the_service_refuses_is_wrong_usage(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    for arguments in (["disk-create", one, "/dev/sda"], ["disk-create", one, ""]):
        told(await desk.hvsnap(*arguments), 2, "disk-create")


async def test_without_a_command_and_a_terminal_the_help_is_shown(desk: Desk) -> None:
    ran = await desk.process()
    assert (ran.status, ran.out) == (2, "")
    assert "snapshot-create" in ran.err
    ran = await desk.process("--json")
    assert (ran.status, ran.object["code"]) == (2, "bad-request")


def test_a_wrong_configuration_names_file_and_key(workdir: Path) -> None:
    """FAULTS 23."""
    path = workdir / "wrong.toml"
    path.write_text("[capture]\nparalel = 2\n")
    for command in ("list", "daemon", "recover"):  # to the doctor it is a finding
        message, hint = told(in_process("--config", str(path), command), 2, command)
        assert f"{path}: capture.paralel" in message
        assert hint == "did you mean capture.parallel?"


# -- the daemon is away ---------------------------------------------------------------------------

ASKING = [
    ["list"],
    ["status"],
    ["watch"],
    ["snapshot-list"],
    ["snapshot-info", "s-a"],
    ["snapshot-create", "web01"],
    ["snapshot-delete", "s-a"],
    ["chain-list"],
    ["chain-info", "vda"],
    ["disk-create", "s-a", "/x"],
    ["disk-rollback", "vda", "s-a"],
]


@pytest.mark.parametrize("arguments", ASKING, ids=[asking[0] for asking in ASKING])
def test_an_unreachable_daemon_exits_with_6(no_daemon: Path, arguments: list[str]) -> None:
    message, hint = told(in_process("--config", str(no_daemon), *arguments), 6, arguments[0])
    assert "there is no such socket" in message
    assert "hvsnap daemon" in hint
    ran = in_process("--config", str(no_daemon), *arguments, "--json")
    assert ran.object["code"] == "daemon-unreachable"


def test_a_socket_that_a_dead_daemon_left_is_told_apart(no_daemon: Path) -> None:
    path = no_daemon.parent / "run" / "hvsnap.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    message, _hint = told(in_process("--config", str(no_daemon), "list"), 6, "list")
    assert "nobody listens there" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="another user is needed, which only root can become")
def test_a_socket_that_is_not_for_us_says_who_may_use_it(no_daemon: Path, workdir: Path) -> None:
    path = workdir / "run" / "hvsnap.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.chmod(0o600)
        code = "import os, sys; from hvsnap.cli.main import run; os.setuid(65534); sys.exit(run(sys.argv[1:]))"
        for command in ("list", "recover"):
            ran = subprocess.run(
                [sys.executable, "-c", code, "--config", str(no_daemon), command],
                capture_output=True,
                text=True,
                timeout=60,
            )
            message, hint = told(Ran(ran.returncode, ran.stdout, ran.stderr), 6, command)
            assert message.endswith("permission denied")
            assert "socket_group" in hint
    assert not (workdir / "state").exists()  # recover did not take the daemon for dead


@pytest.fixture
def answering(no_daemon: Path) -> Iterator[dict[str, bytes]]:
    """Give a server that answers every connection with bytes of the test's choice."""
    path = no_daemon.parent / "run" / "hvsnap.sock"
    path.parent.mkdir()
    answer = {"bytes": b""}
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer["bytes"])

        thread = threading.Thread(target=serve)
        thread.start()
        yield answer
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (b"", "went away in the middle"),
        (b"SSH-2.0-OpenSSH\r\n", "went away in the middle"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "not as a daemon of this release"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "not as a daemon of this release"),
        (b"HTTP/1.1 307 Go\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", "not as a daemon of this release"),
        (b"HTTP/1.1 500 No\r\nContent-Length: 4\r\n\r\noops", "not as a daemon of this release"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{}", "went away in the middle"),
    ],
)
def test_another_program_at_the_socket_is_told_as_such(
    no_daemon: Path, answering: dict[str, bytes], answer: bytes, word: str
) -> None:
    answering["bytes"] = answer
    message, _hint = told(in_process("--config", str(no_daemon), "status"), 6, "status")
    assert word in message


# -- what works without a daemon ------------------------------------------------------------------


def test_the_doctor_looks_without_a_daemon(no_daemon: Path, libvirtd: Libvirtd) -> None:
    ran = in_process("--config", str(no_daemon), "doctor", "--json", "--connect", libvirtd.uri)
    assert ran.status == 1
    report = wire.DoctorReport.model_validate(ran.object)
    found = {finding.check: finding for finding in report.findings}
    assert found["daemon"].severity is wire.Severity.ERROR
    assert "there is no such socket" in found["daemon"].evidence
    assert found["qemu-nbd"].severity is wire.Severity.OK
    assert found["libvirt"].severity is wire.Severity.OK
    assert libvirtd.uri in found["libvirt"].evidence
    assert found["state-dir"].severity is wire.Severity.ERROR


def test_connect_overrides_the_uri_where_no_daemon_runs(no_daemon: Path) -> None:
    ran = in_process("--config", str(no_daemon), "doctor", "-c", "nothing:///here", "--json")
    found = {finding["check"]: finding for finding in ran.object["findings"]}
    assert found["libvirt"]["severity"] == "error"
    assert "nothing:///here" in found["libvirt"]["evidence"]


def test_recover_works_without_a_daemon(no_daemon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = in_process("--config", str(no_daemon), "recover")
    assert (ran.status, ran.out, ran.err) == (0, "nothing was open\n", "")
    assert in_process("--config", str(no_daemon), "recover", "--json").object == {"operations": []}
    operation = wire.RecoveredOperation(
        id="o-1", kind="capture", guest="web01", step="overlay", outcome="still-open", detail="libvirt does not answer"
    )
    uris = []

    def left(settings: daemon.Settings) -> wire.Recovery:
        uris.append(settings.hypervisor.libvirt_uri)
        return wire.Recovery(operations=[operation])

    monkeypatch.setattr(daemon, "recover", left)
    told(in_process("--config", str(no_daemon), "recover", "-c", "qemu:///x"), 1, "recover")
    assert uris == ["qemu:///x"]


def test_recover_says_that_somebody_else_is_at_work(no_daemon: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(_settings: object) -> wire.Recovery:
        raise StoreBusy("another process has the state directory", hint="wait for it")

    monkeypatch.setattr(daemon, "recover", busy)
    told(in_process("--config", str(no_daemon), "recover"), 5, "recover")


def test_the_daemon_that_cannot_start_says_why(no_daemon: Path, workdir: Path) -> None:
    (workdir / "state").write_text("a file in its place")
    ran = in_process("--config", str(no_daemon), "daemon")
    told(ran, 1, "daemon")


# -- the form -------------------------------------------------------------------------------------


async def test_names_of_guests_cannot_speak_to_the_terminal(desk: Desk) -> None:
    evil = "\x1b[2J\x07\u202eevil\nline"
    ran = await desk.hvsnap("snapshot-list", evil)
    assert ran.status == 3
    for character in "\x1b\x07\u202e":
        assert character not in ran.err
    assert len(ran.err.splitlines()) == 2
    ran = await desk.hvsnap("snapshot-list", evil, "--json")
    assert ran.out.isascii()
    assert evil[:4] in ran.object["message"]


def test_an_error_without_a_hint_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert complain(Failed("it\n did  not"), "list", as_json=False) == 1
    assert capsys.readouterr().err == "hvsnap: list: it did not\n"
    assert complain(DaemonUnreachable("away", hint="h"), "list", as_json=True, also={"x": 1}) == 6
    assert capsys.readouterr().out.count('"x": 1') == 1


async def test_a_locale_without_a_guest_s_letters_is_no_failure(desk: Desk) -> None:
    refuse_with(desk, Failed("файл", hint="ü"))
    ran = await desk.process("snapshot-create", "web01", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert ran.status == 1
    assert "\\u0444" in ran.err

"""Completion in real shells, with names from the daemon; silence where it does not answer."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pexpect
import pytest

from hvsnap.cli.words import plain
from hvsnap.model import Image, ImageId
from hvsnap.service.requests import SnapshotRequest
from tests.cli_kit import HVSNAP, Desk, Ran, a_desk, a_making, two_snapshots
from tests.service_kit import MAIL, a_guest, a_view

BIN = str(Path(HVSNAP).parent)
EVIL = [
    "$(touch PWNED)",
    "`touch PWNED`",
    "\\$(touch PWNED)",
    "a;touch PWNED",
    "a b",
    "'",
    '"',
    "-rf",
    "~root",
    "a*",
    "\x1b[2J",
]


@pytest.fixture
async def desk(workdir: Path) -> AsyncIterator[Desk]:
    async with a_desk(workdir) as one:
        yield one


def test_only_words_that_no_shell_interprets_are_offered() -> None:
    fine = ["web01", "d-aaaaaaaaaaaa", "web01/vda", "/images/a.qcow2", "машина", "a_b+c@d%e:f,g", "web-01"]
    assert [word for word, _note in plain([(word, "") for word in fine + EVIL], "")] == fine
    assert plain([("web01", "$(x)"), ("web02", "before upgrade"), ("web01", "again")], "web0") == [
        ("web01", "again"),
        ("web02", "before upgrade"),
    ]
    assert plain([("web01", "")], "db") == []


async def completed(desk: Desk, line: str, **env: str) -> Ran:
    """Ask as bash does for what may stand at the end of ``line``."""
    words = line.split(" ")
    asked = {"_HVSNAP_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    return await desk.process(**(asked | env))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("hvsnap snapshot-i", ["snapshot-info"]),
        ("hvsnap disk-rollback --st", ["--stop", "--start"]),
        ("hvsnap snapshot-create --consistency a", ["auto", "app"]),
        ("hvsnap snapshot-create ", ["web01"]),
        ("hvsnap snapshot-create web01 ", ["vda"]),
        ("hvsnap snapshot-create web01 vda ", []),
        ("hvsnap snapshot-create db01 --with ", ["web01", "web01/vda"]),
        ("hvsnap snapshot-create db01 --with web01/", ["web01/vda"]),
        ("hvsnap snapshot-list w", ["web01"]),
        ("hvsnap watch web", ["web01"]),
        ("hvsnap chain-info web01/", ["web01/vda"]),
        ("hvsnap snapshot-delete s-nothing", []),
        ("hvsnap disk-reinit web01/", ["web01/vda"]),
        ("hvsnap disk-release web01/", ["web01/vda"]),
        ("hvsnap disk-create --attach w", ["web01"]),
        ("hvsnap snapshot-info s-aaaaaaaaaaaa more ", []),
    ],
)
async def test_what_can_stand_there_is_offered(desk: Desk, line: str, found: list[str]) -> None:
    await two_snapshots(desk.house)
    ran = await completed(desk, line)
    assert (ran.status, ran.out.split(), ran.err) == (0, found, "")


async def test_work_that_can_be_followed_or_cancelled_is_offered(desk: Desk) -> None:
    making = await a_making(desk.house)
    assert (await completed(desk, "hvsnap task-wait ")).out.split() == []
    (made,) = await making.create(SnapshotRequest(guest="web01"))
    assert (await completed(desk, "hvsnap task-cancel ")).out.split() == [made.id]


async def test_snapshots_are_offered_newest_first_and_those_of_the_disk(desk: Desk) -> None:
    one, two = await two_snapshots(desk.house)
    for line in ("hvsnap snapshot-info ", "hvsnap snapshot-delete ", "hvsnap disk-rollback web01/vda "):
        assert (await completed(desk, line)).out.split() == [two, one], line
    assert (await completed(desk, "hvsnap disk-rollback web01/vdz ")).out.split() == []


async def test_disks_can_be_made_of_images_and_snapshots(desk: Desk) -> None:
    one, two = await two_snapshots(desk.house)
    async with desk.house.catalog.write() as tx:
        await tx.add_image(Image(ImageId("i-aaaaaaaaaaaa"), "debian", "", one, 1.0))
    assert (await completed(desk, "hvsnap disk-create ")).out.split() == ["debian", "i-aaaaaaaaaaaa", two, one]


async def test_the_configuration_that_was_typed_names_the_daemon(desk: Desk) -> None:
    for line in (f"hvsnap --config {desk.config} watch ", f"hvsnap watch --config {desk.config} "):
        assert (await completed(desk, line, HVSNAP_CONFIG="/none.toml")).out.split() == ["web01"], line
    ran = await completed(desk, "hvsnap watch ", HVSNAP_CONFIG="/none.toml")
    assert (ran.status, ran.out.strip(), ran.err) == (0, "", "")


async def test_a_daemon_that_is_away_or_hangs_is_silence_within_two_seconds(desk: Desk, workdir: Path) -> None:
    config = workdir / "other.toml"
    config.write_text(f'socket = "{workdir}/other.sock"\n')
    ran = await completed(desk, "hvsnap watch ", HVSNAP_CONFIG=str(config))
    assert (ran.status, ran.out.strip(), ran.err) == (0, "", "")
    with socket.socket(socket.AF_UNIX) as deaf:
        deaf.bind(str(workdir / "other.sock"))
        deaf.listen()
        begun = time.monotonic()
        ran = await completed(desk, "hvsnap watch ", HVSNAP_CONFIG=str(config))
        took_s = time.monotonic() - begun
    assert (ran.status, ran.out.strip(), ran.err) == (0, "", "")
    assert 1.0 <= took_s < 5.0  # a second for the daemon, the rest for a busy machine to start Python


async def with_evil_guests(desk: Desk) -> list[str]:
    """Add guests whose names would do something in a shell; return the snapshots of the good one."""
    for number, name in enumerate(EVIL):
        guest = a_guest(a_view(), uuid=MAIL.replace("0002", f"1{number:03}"), name=name)
        desk.house.hypervisor.shown[guest.uuid] = guest
    desk.environment = {"PATH": f"{BIN}:/usr/bin:/bin", "PS1": "> ", "HOME": str(desk.directory), "TERM": "dumb"}
    return [str(name) for name in await two_snapshots(desk.house)]


SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], 'eval "$(_HVSNAP_COMPLETE=source_bash hvsnap)"'),
    "zsh": (["-f", "-i"], 'autoload -Uz compinit; compinit -u -D; eval "$(_HVSNAP_COMPLETE=source_zsh hvsnap)"'),
}
KILL_LINE = "\x15"


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"{shell} is not here")


@pytest.mark.parametrize("shell", [pytest.param(name, marks=needs(name)) for name in SHELLS])
async def test_a_real_shell_completes_and_does_nothing_that_names_say(desk: Desk, shell: str) -> None:
    _one, two = await with_evil_guests(desk)
    options, source = SHELLS[shell]

    def talk() -> None:
        terminal = pexpect.spawn(
            shell, options, env=desk.env, encoding="utf-8", timeout=20, cwd=str(desk.directory), dimensions=(40, 200)
        )
        terminal.sendline(source)
        terminal.sendline("echo rea''dy")
        terminal.expect("ready")
        for typed, found in [
            ("hvsnap snapshot-inf", "snapshot-info"),
            ("hvsnap snapshot-create ", "snapshot-create web01"),
            (f"hvsnap snapshot-info {two[:9]}", two),
        ]:
            terminal.send(f"{typed}\t")
            terminal.expect_exact(found)
            terminal.send(KILL_LINE)
        terminal.close(force=True)

    await asyncio.to_thread(talk)
    assert not list(desk.directory.rglob("PWNED"))


@needs("fish")
async def test_fish_completes_with_the_names_of_snapshots_beside_their_ids(desk: Desk) -> None:
    one, two = await with_evil_guests(desk)

    def complete(line: str) -> list[str]:
        script = f"_HVSNAP_COMPLETE=source_fish hvsnap | source; complete -C '{line}'"
        return subprocess.run(
            ["fish", "--no-config", "-c", script],
            env=desk.env,
            capture_output=True,
            text=True,
            timeout=20,
            cwd=desk.directory,
        ).stdout.splitlines()

    assert await asyncio.to_thread(complete, "hvsnap snapshot-create ") == ["web01\trunning"]
    found = await asyncio.to_thread(complete, "hvsnap snapshot-info s-")
    assert sorted(found) == sorted([f"{one}\tnumber 1", f"{two}\tnumber 2"])
    assert not list(desk.directory.rglob("PWNED"))


async def test_completion_is_shown_and_installed(desk: Desk) -> None:
    desk.environment = {"PATH": f"{BIN}:/usr/bin:/bin", "HOME": str(desk.directory)}

    def in_bash(command: str) -> str:
        # One more command behind it: bash would replace itself by a single one, and not be found as the parent.
        return subprocess.run(
            ["bash", "--norc", "-c", f"{command}; true"], env=desk.env, capture_output=True, text=True, timeout=20
        ).stdout

    shown = await asyncio.to_thread(in_bash, "hvsnap --show-completion")
    assert "_HVSNAP_COMPLETE=complete_bash" in shown
    assert "bash completion installed" in await asyncio.to_thread(in_bash, "hvsnap --install-completion")
    assert "hvsnap" in (desk.directory / ".bashrc").read_text()

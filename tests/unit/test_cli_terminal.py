"""At a terminal: the progress bar, Ctrl-C, the interactive shell. Through a pseudo-terminal, with real processes."""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TypeVar

import pexpect
import pytest

from hvsnap.model import State
from hvsnap.service.requests import SnapshotRequest
from tests.cli_kit import MOVES_AND_COLOURS, Desk, a_desk, a_making, two_snapshots
from tests.service_kit import a_guest, a_view

T = TypeVar("T")
PROMPT = "hvsnap> "
TAB = "\t"


@pytest.fixture
async def desk(workdir: Path) -> AsyncIterator[Desk]:
    async with a_desk(workdir) as one:
        yield one


async def away(work: Callable[..., T], *arguments: object) -> T:
    """Do what waits for the terminal in a thread, so that the service goes on."""
    return await asyncio.to_thread(work, *arguments)


def plain(text: str | None) -> str:
    """Return output without colours and movements of the cursor."""
    return re.sub(MOVES_AND_COLOURS, "", text or "")


def ended(terminal: pexpect.spawn[str]) -> tuple[int | None, str]:
    """Return exit status and the rest of the output."""
    terminal.expect(pexpect.EOF)
    rest = plain(terminal.before)
    terminal.close()
    return terminal.exitstatus, rest


# -- progress -------------------------------------------------------------------------------------


async def test_a_bar_shows_bytes_rate_and_time_left_and_then_the_outcome(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await away(desk.terminal, "snapshot-create", "web01")
    await making.asked.wait()
    making.progress(1 << 30, 4 << 30)
    await away(terminal.expect, r"web01/vda s-[a-z2-7]{12}.*━.*25 %.*1\.0 GiB of 4\.0 GiB, 95\.4 MiB/s, 3 s left")
    making.progress(2 << 30, 4 << 30)
    await away(terminal.expect, r"50 %.*2\.0 GiB of 4\.0 GiB, 95\.4 MiB/s, 3 s left")
    await making.end()
    status, rest = await away(ended, terminal)
    assert status == 0
    assert "100 %" in rest
    assert rest.splitlines()[-1].startswith(f"{making.made[0].id}  full snapshot of web01/vda")


async def test_several_snapshots_have_a_bar_each(desk: Desk) -> None:
    making = await a_making(desk.house, 2)
    terminal = await away(desk.terminal, "snapshot-create", "web01")
    await making.asked.wait()
    making.progress(1 << 30, 4 << 30, 0)
    making.progress(3 << 30, 4 << 30, 1)
    one, two = (row.id for row in making.made)
    await away(terminal.expect, rf"{one}.*25 %[^%]*{two}.*75 %")
    await making.end(0)
    await making.end(1)
    assert (await away(ended, terminal))[0] == 0


async def test_quiet_shows_no_bar(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await away(desk.terminal, "snapshot-create", "web01", "--quiet")
    await making.end_at_once()
    assert await away(ended, terminal) == (0, f"{making.made[0].id}\r\n")


async def test_a_task_tells_its_step_and_its_bytes(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    desk.house.maker.go_on.clear()
    terminal = await away(desk.terminal, "disk-create", one, "/images/new")
    await away(terminal.expect, rf"{one} to /images/new: writing the disk.*50 %.*1 B of 2 B")
    desk.house.maker.go_on.set()
    status, rest = await away(ended, terminal)
    assert status == 0
    assert "/images/new  qcow2 of 1.0 GiB" in rest


async def test_a_guest_s_name_cannot_speak_to_the_terminal(desk: Desk) -> None:
    desk.house.hypervisor.shown = {g.uuid: g for g in [a_guest(a_view(), name="\x1b]0;evil\x07[red]x")]}
    terminal = await away(desk.terminal, "list")
    status, rest = await away(ended, terminal)
    assert status == 0
    assert "\\x1b]0;evil\\x07[red]x" in rest
    assert "\x1b" not in rest


# -- Ctrl-C ---------------------------------------------------------------------------------------


async def test_ctrl_c_asks_and_leaves_it_running(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await away(desk.terminal, "snapshot-create", "web01")
    await making.asked.wait()
    making.progress(1 << 30, 4 << 30)
    await away(terminal.expect, "25 %")
    terminal.sendintr()
    await away(terminal.expect, re.escape("Cancel it? It goes on in the daemon otherwise. [y/N] "))
    terminal.sendline("n")
    await away(terminal.expect, f"it goes on in the daemon: `hvsnap task-wait {making.made[0].id}` follows it again")
    status, _rest = await away(ended, terminal)
    assert status == 130
    assert desk.house.captures.cancelled == []


async def test_ctrl_c_twice_leaves_it_running(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await away(desk.terminal, "snapshot-create", "web01")
    await making.asked.wait()
    making.progress(1 << 30, 4 << 30)
    await away(terminal.expect, "25 %")
    terminal.sendintr()
    await away(terminal.expect, re.escape("[y/N] "))
    terminal.sendintr()
    await away(terminal.expect, "it goes on in the daemon")
    assert (await away(ended, terminal))[0] == 130
    assert desk.house.captures.cancelled == []


async def test_ctrl_c_and_yes_cancels_and_tells_how_it_ended(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await away(desk.terminal, "snapshot-create", "web01")
    await making.asked.wait()
    making.progress(1 << 30, 4 << 30)
    await away(terminal.expect, "25 %")
    terminal.sendintr()
    await away(terminal.expect, re.escape("[y/N] "))
    terminal.sendline("y")
    status, rest = await away(ended, terminal)
    assert status == 1
    assert "failed: it was cancelled" in rest
    assert desk.house.captures.cancelled == [making.made[0].id]


async def test_what_ended_while_the_question_stood_is_no_error(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await away(desk.terminal, "snapshot-create", "web01")
    await making.asked.wait()
    making.progress(1 << 30, 4 << 30)
    await away(terminal.expect, "25 %")
    terminal.sendintr()
    await away(terminal.expect, re.escape("[y/N] "))
    await making.end()
    terminal.sendline("y")
    status, rest = await away(ended, terminal)
    assert status == 0
    assert f"{making.made[0].id}  full snapshot" in rest
    assert desk.house.captures.cancelled == []


async def test_a_task_is_cancelled_in_the_same_way(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    desk.house.maker.go_on.clear()
    terminal = await away(desk.terminal, "disk-create", one, "/images/new")
    await away(terminal.expect, "50 %")
    terminal.sendintr()
    await away(terminal.expect, re.escape("[y/N] "))
    terminal.sendline("yes")
    status, rest = await away(ended, terminal)
    assert status == 1
    assert "hvsnap: disk-create: it was cancelled" in rest


# -- watching -------------------------------------------------------------------------------------


async def test_watch_shows_progress_in_place(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await away(desk.terminal, "watch")
    await away(terminal.expect, "watching; Ctrl-C ends it")
    made = await making.create(SnapshotRequest(guest="web01"))
    making.progress(1 << 30, 4 << 30)
    await away(terminal.expect, rf"\r\x1b\[K{made[0].id}: 25 % of 4\.0 GiB, 95\.4 MiB/s, 3 s left")
    await making.end()
    await away(terminal.expect, r"\r\x1b\[K[0-9: -]+snapshot\.accomplished guest=web01")
    terminal.sendintr()
    assert (await away(ended, terminal))[0] == 130


# -- the shell ------------------------------------------------------------------------------------


async def shell(desk: Desk, *arguments: str) -> pexpect.spawn[str]:
    terminal = await away(desk.terminal, *arguments)
    await away(terminal.expect_exact, PROMPT)
    return terminal


async def answer(terminal: pexpect.spawn[str], line: str) -> str:
    """Type a line, and return what it printed."""
    terminal.sendline(line)
    await away(terminal.expect_exact, PROMPT)
    return plain(terminal.before).partition("\n")[2]


async def test_the_shell_begins_with_its_welcome_and_nothing_else(desk: Desk) -> None:
    terminal = await shell(desk)
    welcome = "Welcome to hvsnap. `help` lists the commands, `help COMMAND` explains one, `quit` ends."
    assert plain(terminal.before).strip() == welcome
    terminal.sendline("quit")
    assert (await away(ended, terminal))[0] == 0


async def test_without_a_terminal_there_is_help_and_with_json_an_object_alone(desk: Desk) -> None:
    ran = await desk.process()
    assert (ran.status, ran.out) == (2, "")
    assert "Usage: hvsnap" in ran.err
    ran = await desk.process("--json")
    assert (ran.status, ran.object["code"], ran.err) == (2, "bad-request", "")


async def test_the_shell_runs_commands_until_quit(desk: Desk) -> None:
    one, two = await two_snapshots(desk.house)
    terminal = await shell(desk)
    assert "web01" in await answer(terminal, "list")
    assert two in await answer(terminal, "snapshot-list web01 vda")
    assert await answer(terminal, "") == ""
    assert await answer(terminal, "# only a remark") == ""
    assert f"{one}: would free" in await answer(terminal, f"snapshot-delete {one} --dry-run")
    terminal.sendline("quit")
    assert (await away(ended, terminal))[0] == 0


async def test_an_error_does_not_end_the_shell(desk: Desk) -> None:
    terminal = await shell(desk)
    assert "No such command 'bla'" in await answer(terminal, "bla")
    assert "there is no snapshot s-a" in await answer(terminal, "snapshot-info s-a")
    assert "no closing quotation" in await answer(terminal, "list 'open")
    assert "hvsnap 0" in await answer(terminal, "--version")
    desk.house.hypervisor.unreachable = True
    assert "libvirt does not answer" in await answer(terminal, "list")
    desk.house.hypervisor.unreachable = False
    assert "web01" in await answer(terminal, "list")
    terminal.sendline("exit")
    assert (await away(ended, terminal))[0] == 0


async def test_the_shell_explains_commands(desk: Desk) -> None:
    terminal = await shell(desk)
    assert "snapshot-create" in await answer(terminal, "help")
    assert "--no-safety-snapshot" in await answer(terminal, "help disk-rollback")
    assert "No such command" in await answer(terminal, "help bla")


async def test_options_of_the_shell_hold_for_every_line(desk: Desk) -> None:
    terminal = await shell(desk, "--json")
    assert '"guests"' in await answer(terminal, "list")
    assert '"code": "snapshot-unknown"' in await answer(terminal, "snapshot-info s-a")
    assert '"code": "bad-request"' in await answer(terminal, "bla")


async def test_ctrl_c_drops_the_line_and_ctrl_d_ends(desk: Desk) -> None:
    terminal = await shell(desk)
    terminal.send("snapshot-del")
    await away(terminal.expect_exact, "snapshot-del")
    terminal.sendintr()
    await away(terminal.expect_exact, PROMPT)
    assert "web01" in await answer(terminal, "list")
    terminal.sendeof()
    assert (await away(ended, terminal))[0] == 0


async def test_ctrl_c_in_a_command_of_the_shell_ends_only_the_command(desk: Desk) -> None:
    terminal = await shell(desk)
    terminal.sendline("watch")
    await away(terminal.expect, "watching")
    terminal.sendintr()
    await away(terminal.expect_exact, PROMPT)
    assert "web01" in await answer(terminal, "list")


async def test_long_work_in_the_shell_leaves_no_stream_open(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await shell(desk)
    for _ in range(3):
        making.asked.clear()
        terminal.sendline("snapshot-create web01")
        await making.end_at_once()
        await away(terminal.expect_exact, PROMPT)
    async with asyncio.timeout(20):
        while desk.house.service.feed._readers:
            async with desk.house.catalog.write() as tx:
                await tx.emit("guest.attached", {"guest": "web01"})
            await asyncio.sleep(0.05)


async def test_tab_completes_commands_options_and_names(desk: Desk) -> None:
    _one, two = await two_snapshots(desk.house)
    terminal = await shell(desk)
    for typed, completed in [
        ("snapshot-cr", "snapshot-create "),
        ("help disk-ro", "help disk-rollback "),
        ("snapshot-create we", "snapshot-create web01 "),
        ("snapshot-create web01 v", "snapshot-create web01 vda "),
        ("chain-info web01/", "chain-info web01/vda "),
        (f"snapshot-info {two[:9]}", f"snapshot-info {two} "),
        ("snapshot-create --consistency cr", "snapshot-create --consistency crash "),
        ("disk-rollback --no-sa", "disk-rollback --no-safety-snapshot "),
    ]:
        terminal.send(typed + TAB)
        await away(terminal.expect_exact, completed)
        terminal.sendintr()
        await away(terminal.expect_exact, PROMPT)


async def test_the_history_is_kept_for_its_owner_alone(desk: Desk) -> None:
    terminal = await shell(desk)
    await answer(terminal, "snapshot-list web01")
    terminal.sendline("quit")
    await away(ended, terminal)
    path = desk.directory / "home" / "hvsnap" / "history"
    assert path.read_text().splitlines() == ["snapshot-list web01", "quit"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    terminal = await shell(desk)
    terminal.send("\x1b[A\x1b[A")  # the key "up", twice
    await away(terminal.expect_exact, "snapshot-list web01")


async def test_a_failed_snapshot_in_the_shell_is_told_and_the_shell_goes_on(desk: Desk) -> None:
    making = await a_making(desk.house)
    terminal = await shell(desk)
    terminal.sendline("snapshot-create web01")
    await making.end_at_once(state=State.FAILED, error="the device is full")
    await away(terminal.expect_exact, PROMPT)
    assert "failed: the device is full" in (terminal.before or "")
    assert "failed" in await answer(terminal, "snapshot-list")

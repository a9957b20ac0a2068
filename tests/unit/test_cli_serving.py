"""`snapshot-serve` in the foreground: served as long as the command runs, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hvsnap import wire
from tests.cli_kit import HVSNAP, Desk, a_desk, two_snapshots


@pytest.fixture
async def desk(workdir: Path) -> AsyncIterator[Desk]:
    async with a_desk(workdir) as one:
        yield one


async def foreground(desk: Desk, snapshot: str, *options: str) -> tuple[asyncio.subprocess.Process, str]:
    """Start the command, and return it and the URI that it printed."""
    process = await asyncio.create_subprocess_exec(
        HVSNAP, "snapshot-serve", snapshot, *options,
        env=desk.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    return process, (await asyncio.wait_for(process.stdout.readline(), 20)).decode().strip()


async def served(desk: Desk) -> list[wire.Served]:
    return wire.ServedList.model_validate((await desk.hvsnap("snapshot-serve", "--json")).object).served


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_when_the_command_has_ended_the_snapshot_is_free(desk: Desk, number: signal.Signals) -> None:
    one, _two = await two_snapshots(desk.house)
    process, uri = await foreground(desk, one)
    (now,) = await served(desk)
    assert (now.uri, now.stays, now.lookers) == (uri, False, 1)
    assert "being served" in (await desk.hvsnap("snapshot-delete", one)).err
    process.send_signal(number)
    _out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, err) == (0, b"hvsnap: Ctrl-C ends it\n")
    assert (await desk.hvsnap("snapshot-delete", one)).status == 0


async def test_a_command_that_is_killed_leaves_nothing_served(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    process, uri = await foreground(desk, one, "--writable")
    assert (await served(desk))[0].writable
    process.kill()
    await process.wait()
    async with asyncio.timeout(20):
        while await served(desk):  # noqa: ASYNC110 - the daemon's doing
            await asyncio.sleep(0.05)
    assert not os.path.lexists(uri.partition("socket=")[2])


async def test_what_stays_served_outlives_the_command_and_its_end_is_told(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    assert (await desk.hvsnap("snapshot-serve", one, "--detach")).status == 0
    process, _uri = await foreground(desk, one)
    process.send_signal(signal.SIGINT)
    _out, err = await asyncio.wait_for(process.communicate(), 20)
    assert "stays so" in err.decode()
    (now,) = await served(desk)
    assert (now.stays, now.lookers) == (True, 0)
    process, _uri = await foreground(desk, one)
    await desk.hvsnap("snapshot-unserve", one)
    _out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, f"{one} is not served any more" in err.decode()) == (1, True)

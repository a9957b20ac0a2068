"""`task-list`, `task-wait`, `task-cancel`: what goes on in the daemon, whoever asked for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hvsnap.errors import Refused
from hvsnap.model import SnapshotId, State
from hvsnap.service.requests import SnapshotRequest
from tests.cli_kit import Desk, a_desk, a_making, two_snapshots
from tests.unit.test_cli_commands import followed


@pytest.fixture
async def desk(workdir: Path) -> AsyncIterator[Desk]:
    async with a_desk(workdir) as one:
        yield one


async def a_task(desk: Desk, path: str = "/images/new") -> str:
    """Begin a disk, whose end the test decides; return the task's id."""
    (snapshot,) = [one.id for one in await desk.house.catalog.snapshots(state=State.ACCOMPLISHED)][:1]
    desk.house.maker.go_on.clear()
    begun = await desk.hvsnap("disk-create", snapshot, path, "--detach")
    assert (begun.status, begun.err) == (0, "")
    return begun.out.strip()


async def test_what_is_under_way_is_listed_and_what_has_ended_when_asked(desk: Desk) -> None:
    making = await a_making(desk.house)
    assert (await desk.hvsnap("task-list", "--quiet")).out == ""
    (made,) = await making.create(SnapshotRequest(guest="web01"))
    making.progress(1 << 30, 4 << 30)
    task = await a_task(desk)
    ran = await desk.hvsnap("task-list")
    header, *rows = ran.out.splitlines()
    assert header.split() == ["ID", "WORK", "ON", "STATE", "DONE", "LEFT", "SINCE"]
    by_id = {row.split()[0]: row.split()[1:] for row in rows}
    assert by_id[made.id][:5] == ["snapshot-create", "web01/vda", "progressing", "25", "%"]
    assert by_id[task][0] == "disk-create"
    shown = (await desk.hvsnap("task-list", "--json")).object
    assert [one["id"] for one in shown["snapshots"]] == [made.id]
    assert [one["id"] for one in shown["tasks"]] == [task]
    desk.house.maker.go_on.set()
    await making.end()
    assert (await desk.hvsnap("task-wait", task)).status == 0
    assert (await desk.hvsnap("task-list", "--quiet")).out == ""
    assert "accomplished" in (await desk.hvsnap("task-list", "--all", "--quiet")).out


async def test_waiting_tells_what_the_command_itself_would_have_told(desk: Desk) -> None:
    making = await a_making(desk.house)
    (made,) = await making.create(SnapshotRequest(guest="web01"))
    task = await a_task(desk)
    running = asyncio.create_task(desk.hvsnap("task-wait", made.id, task, made.id))
    await followed(desk)
    assert not running.done()
    desk.house.maker.go_on.set()
    await making.end()
    ran = await running
    assert ran.status == 0
    first, second = ran.out.splitlines()
    assert first.startswith(f"{made.id}  full snapshot of web01/vda, 5.0 MiB read")
    assert second.startswith("/images/new  qcow2 of 1.0 GiB made of ")
    ran = await desk.hvsnap("task-wait", task, "--json")  # it has ended
    assert [one["state"] for one in ran.object["tasks"]] == ["accomplished"]


async def test_waiting_for_what_fails_says_why_and_what_succeeded_beside_it(desk: Desk) -> None:
    making = await a_making(desk.house, count=2)
    first, second = await making.create(SnapshotRequest(guest="web01"))
    await making.end(0)
    await making.end(1, state=State.FAILED, error="the disk is full")
    ran = await desk.hvsnap("task-wait", first.id, second.id)
    assert ran.status == 1
    assert ran.out.startswith(f"{first.id}  full snapshot")
    assert ran.err.startswith(f"hvsnap: task-wait: {second.id} of web01/vda failed: the disk is full\nhint: ")
    ran = await desk.hvsnap("task-wait", second.id, "--json")
    assert (ran.object["code"], ran.object["snapshots"][0]["id"]) == ("failed", second.id)


async def test_cancelled_work_is_waited_for_until_it_is_undone(desk: Desk) -> None:
    making = await a_making(desk.house)
    (made,) = await making.create(SnapshotRequest(guest="web01"))
    task = await a_task(desk)
    ran = await desk.hvsnap("task-cancel", task, made.id)
    assert (ran.status, ran.err) == (0, "")
    assert desk.house.captures.cancelled == [made.id]
    assert (await desk.house.catalog.snapshot(made.id)).state is State.FAILED
    assert ran.out.splitlines()[0].startswith(f"{task}  cancelled: disk-create ")
    assert ran.out.splitlines()[1] == f"{made.id}  cancelled: snapshot-create web01/vda"


async def test_what_ends_well_before_it_is_cancelled_is_told_so(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    making = await a_making(desk.house)
    (made,) = await making.create(SnapshotRequest(guest="web01"))

    async def too_late(_snapshot: SnapshotId) -> None:
        await making.end()

    monkeypatch.setattr(desk.house.captures, "cancel", too_late)
    ran = await desk.hvsnap("task-cancel", made.id)
    assert (ran.status, ran.out) == (Refused.exit_status, "")
    assert "accomplished before it could be cancelled" in ran.err


async def test_what_cannot_be_cancelled_is_refused_and_the_others_are(desk: Desk) -> None:
    await two_snapshots(desk.house)
    task = await a_task(desk)
    other = (await desk.hvsnap("disk-create", "--detach", *await source_and(desk, "/images/other"))).out.strip()
    desk.house.service.tasks._running[other].final("it is written already")
    ran = await desk.hvsnap("task-cancel", task, other)
    assert ran.status == Refused.exit_status
    assert ran.out.startswith(f"{task}  cancelled: ")
    assert ran.err == f"hvsnap: task-cancel: task {other} cannot be cancelled any more\nhint: it is written already\n"
    desk.house.maker.go_on.set()
    assert (await desk.hvsnap("task-wait", other)).status == 0
    ran = await desk.hvsnap("task-cancel", task, other)
    assert (ran.status, ran.out) == (1, "")
    assert f"{task}: task {task} is cancelled already; {other}: task {other} is accomplished already" in ran.err


async def source_and(desk: Desk, path: str) -> tuple[str, str]:
    (snapshot, *_) = await desk.house.catalog.snapshots(state=State.ACCOMPLISHED)
    return snapshot.id, path


@pytest.mark.parametrize("command", ["task-wait", "task-cancel"])
async def test_nothing_is_done_where_an_id_is_wrong(desk: Desk, command: str) -> None:
    making = await a_making(desk.house)
    (made,) = await making.create(SnapshotRequest(guest="web01"))
    for wrong, status, word in (
        ("vda", 2, "no id of work"),
        ("t-aaaaaaaaaaaa", 3, "no task"),
        ("s-aaaaaaaaaaaa", 3, ""),
    ):
        ran = await desk.hvsnap(command, made.id, wrong)
        assert (ran.status, ran.out) == (status, ""), wrong
        assert word in ran.err
    assert desk.house.captures.cancelled == []

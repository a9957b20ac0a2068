"""Every command, for people and as JSON, against the real API on a real socket."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hvsnap import wire
from hvsnap.cli import grammar
from hvsnap.errors import NoSpace
from hvsnap.model import Consistency, Progress, Snapshot, State
from hvsnap.service.requests import SnapshotRequest
from tests.cli_kit import HVSNAP, Desk, a_desk, a_making, in_process, two_snapshots
from tests.guest.libvirtd import wait_for
from tests.service_kit import WEB

COMMANDS = {
    "chain-info",
    "chain-list",
    "daemon",
    "disk-create",
    "disk-edit",
    "disk-reinit",
    "disk-release",
    "disk-rollback",
    "doctor",
    "hook-install",
    "hook-remove",
    "hook-status",
    "image-create",
    "image-delete",
    "image-export",
    "image-list",
    "install",
    "list",
    "policy-apply",
    "policy-cancel",
    "policy-create",
    "policy-delete",
    "policy-edit",
    "policy-list",
    "recover",
    "snapshot-cp",
    "snapshot-create",
    "snapshot-delete",
    "snapshot-drill",
    "snapshot-edit",
    "snapshot-info",
    "snapshot-list",
    "snapshot-lock",
    "snapshot-ls",
    "snapshot-serve",
    "snapshot-unserve",
    "snapshot-verify",
    "status",
    "store-check",
    "store-compact",
    "store-info",
    "store-rebuild",
    "store-rekey",
    "task-cancel",
    "task-list",
    "task-wait",
    "usage",
    "watch",
}


@pytest.fixture
async def desk(workdir: Path) -> AsyncIterator[Desk]:
    async with a_desk(workdir) as one:
        yield one


# -- what can be typed ----------------------------------------------------------------------------


def test_the_commands_are_those_of_this_release() -> None:
    assert set(grammar.names()) == COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    ran = in_process(command, "--help")
    assert (ran.status, ran.err) == (0, "")
    assert f"$ hvsnap {command}" in ran.out
    for option in ("--json", "--quiet", "--config", "--connect"):
        assert option in ran.out


def test_the_help_lists_every_command_and_the_version_is_told() -> None:
    ran = in_process("--help")
    assert ran.status == 0
    assert all(command in ran.out for command in COMMANDS)
    ran = in_process("--version")
    assert (ran.status, ran.out.split()[0]) == (0, "hvsnap")


# -- looking --------------------------------------------------------------------------------------


async def test_list_shows_guests_and_disks(desk: Desk) -> None:
    ids = await two_snapshots(desk.house)
    ran = await desk.hvsnap("list")
    header, row = ran.out.splitlines()
    assert header.split()[:4] == ["GUEST", "STATE", "DISK", "ID"]
    assert row.split()[:3] == ["web01", "running", "vda*"]
    assert "protected" in row
    quiet = await desk.hvsnap("list", "--quiet")
    assert quiet.out.split() == row.split()
    answer = wire.GuestList.model_validate((await desk.hvsnap("list", "--json")).object)
    assert answer.guests[0].disks[0].last_snapshot == ids[1]


async def test_options_before_and_after_the_command_mean_the_same(desk: Desk) -> None:
    before, after = await desk.hvsnap("--json", "list"), await desk.hvsnap("list", "--json")
    assert before == after
    assert before.object["guests"][0]["name"] == "web01"
    assert (await desk.hvsnap("-q", "list")).out == (await desk.hvsnap("list", "-q")).out


async def test_snapshots_are_listed_all_of_a_guest_and_of_a_disk(desk: Desk) -> None:
    one, two = await two_snapshots(desk.house)
    for where in ((), ("web01",), ("web01", "vda"), (WEB, "vda")):
        ran = await desk.hvsnap("snapshot-list", *where)
        assert [line.split()[0] for line in ran.out.splitlines()] == ["ID", two, one], where
    assert (await desk.hvsnap("snapshot-list", "--json")).object["snapshots"][0]["id"] == two


async def test_an_empty_list_is_its_header_or_nothing(desk: Desk) -> None:
    assert (await desk.hvsnap("snapshot-list")).out.split()[:2] == ["ID", "NAME"]
    assert (await desk.hvsnap("snapshot-list", "--quiet")).out == ""
    assert (await desk.hvsnap("chain-list", "--json")).object == {"chains": []}


async def test_a_snapshot_is_shown(desk: Desk) -> None:
    one, two = await two_snapshots(desk.house)
    ran = await desk.hvsnap("snapshot-info", two)
    shown = dict(line.split(":", 1) for line in ran.out.splitlines())
    assert (shown["Id"].strip(), shown["Parent"].strip(), shown["State"].strip()) == (two, one, "accomplished")
    assert wire.Snapshot.model_validate((await desk.hvsnap("snapshot-info", one, "--json")).object).id == one


async def test_chains_are_listed_and_shown_by_any_name_of_the_disk(desk: Desk) -> None:
    one, two = await two_snapshots(desk.house)
    disk = (await desk.hvsnap("chain-list", "--json")).object["chains"][0]["disk"]
    assert (await desk.hvsnap("chain-list")).out.splitlines()[1].split()[0] == disk
    for name in ("vda", "web01/vda", "/images/web.qcow2", disk):
        ran = await desk.hvsnap("chain-info", name)
        assert ran.status == 0, ran
        assert [line.split()[0] for line in ran.out.splitlines() if "number" in line] == [one, "*"], name
    chain = wire.Chain.model_validate((await desk.hvsnap("chain-info", "vda", "--json")).object)
    assert [node.snapshot.id for node in chain.nodes] == [one, two]


async def test_status_is_shown(desk: Desk) -> None:
    await two_snapshots(desk.house)
    ran = await desk.hvsnap("status")
    shown = dict(line.split(":", 1) for line in ran.out.splitlines())
    assert (shown["Host"].strip(), shown["Guests"].strip(), shown["Snapshots"].strip()) == ("host-1", "1", "2")
    assert shown["MQTT"].strip() == "not connected (refused), 2 events wait"
    desk.house.hypervisor.unreachable = True
    assert "the hypervisor does not answer" in (await desk.hvsnap("status")).out
    assert (await desk.hvsnap("status", "--json")).object["guests"] is None


# -- making snapshots -----------------------------------------------------------------------------


async def test_a_snapshot_is_followed_to_its_end(desk: Desk) -> None:
    making = await a_making(desk.house)
    ran, _ = await asyncio.gather(
        desk.hvsnap("snapshot-create", "web01", "--name", "before upgrade"),
        making.end_at_once(reason="the agent does not answer"),
    )
    (row,) = making.made
    words = "full snapshot of web01/vda, 5.0 MiB read, 3.0 MiB stored, crash-consistent (the agent does not answer)"
    assert (ran.status, ran.out, ran.err) == (0, f"{row.id}  {words}\n", "")


async def test_what_was_typed_reaches_the_daemon_whole(desk: Desk) -> None:
    making = await a_making(desk.house)
    typed = ["web01", "vda", "web01/vda", "--name", "before", "--description", "ü d", "--consistency", "app"]
    typed += ["--tag", "a=b=c", "--tag", "x=", "--group", "--wait"]
    ran = await desk.hvsnap("snapshot-create", *typed, "--detach")
    assert (ran.status, ran.out) == (0, f"{making.made[0].id}\n")
    (asked,) = desk.house.captures.requests
    assert (asked.guest, asked.disks, asked.name) == ("web01", ("vda", "web01/vda"), "before")
    assert (asked.description, asked.tags) == ("ü d", {"a": "b=c", "x": ""})
    assert (asked.consistency, asked.group, asked.wait) == (Consistency.APP, True, True)


async def test_detached_the_ids_are_told_at_once(desk: Desk) -> None:
    making = await a_making(desk.house, 2)
    ran = await desk.hvsnap("snapshot-create", "web01", "--detach")
    assert ran.out.split() == [row.id for row in making.made]
    ran = await desk.hvsnap("snapshot-create", "web01", "--detach", "--json")
    assert [row["state"] for row in ran.object["snapshots"]] == ["progressing", "progressing"]


async def test_quiet_tells_only_the_ids_and_json_the_whole(desk: Desk) -> None:
    making = await a_making(desk.house)
    ran, _ = await asyncio.gather(desk.hvsnap("snapshot-create", "web01", "-q"), making.end_at_once())
    assert ran.out == f"{making.made[0].id}\n"
    making.asked.clear()
    ran, _ = await asyncio.gather(desk.hvsnap("snapshot-create", "web01", "--json"), making.end_at_once())
    assert [row["state"] for row in ran.object["snapshots"]] == ["accomplished"]


async def test_a_snapshot_that_failed_is_an_error_with_its_reason(desk: Desk) -> None:
    making = await a_making(desk.house)
    failed = {"state": State.FAILED, "error": "the device is full"}
    ran, _ = await asyncio.gather(desk.hvsnap("snapshot-create", "web01"), making.end_at_once(**failed))
    what, hint = ran.err.splitlines()
    name = making.made[0].id
    assert (ran.status, ran.out) == (1, "")
    assert what == f"hvsnap: snapshot-create: {name} of web01/vda failed: the device is full"
    assert hint.startswith("hint: ")
    making.asked.clear()
    ran, _ = await asyncio.gather(desk.hvsnap("snapshot-create", "web01", "--json"), making.end_at_once(**failed))
    assert (ran.status, ran.object["code"], ran.object["snapshots"][0]["state"]) == (1, "failed", "failed")
    assert "the device is full" in ran.object["message"]


async def test_of_several_snapshots_each_is_told_and_one_failure_is_a_failure(desk: Desk) -> None:
    making = await a_making(desk.house, 2)

    async def end() -> None:
        await making.asked.wait()
        await making.end(0)
        await making.end(1, state=State.FAILED, error="the disk could not be read")

    ran, _ = await asyncio.gather(desk.hvsnap("snapshot-create", "web01"), end())
    assert ran.status == 1
    assert ran.out.startswith(f"{making.made[0].id}  full snapshot")
    assert making.made[1].id in ran.err
    assert making.made[0].id not in ran.err


async def test_plain_lines_tell_the_progress_of_what_takes_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hvsnap.cli.follow.LINE_INTERVAL_S", 0.1)
    making = await a_making(desk.house)

    async def go_on() -> None:
        await making.asked.wait()
        for done in (1, 2, 3):
            making.progress(done << 30, 4 << 30)
            await asyncio.sleep(0.7)
        await making.end()

    ran, _ = await asyncio.gather(desk.hvsnap("snapshot-create", "web01"), go_on())
    lines = ran.err.splitlines()
    form = re.compile(rf"web01/vda {making.made[0].id}: (25|50|75) % of 4\.0 GiB, 95\.4 MiB/s, 3 s left")
    assert lines
    assert all(form.fullmatch(line) for line in lines)
    assert len(lines) == len(set(lines))
    assert "\x1b" not in ran.err
    making.asked.clear()
    ran, _ = await asyncio.gather(desk.hvsnap("snapshot-create", "web01", "--quiet"), go_on())
    assert ran.err == ""


@pytest.mark.parametrize(("tags", "word"), [(["novalue"], "no value"), (["a=1", "a=2"], "twice")])
async def test_a_wrong_tag_is_refused_before_anything_is_asked(desk: Desk, tags: list[str], word: str) -> None:
    options = [part for tag in tags for part in ("--tag", tag)]
    ran = await desk.hvsnap("snapshot-create", "web01", *options)
    assert ran.status == 2
    assert word in ran.err
    assert desk.house.captures.requests == []


async def followed(desk: Desk) -> None:
    """Return when a process listens to the events: it watches, or follows what it asked for."""
    feed = desk.house.service.feed
    await asyncio.to_thread(wait_for, lambda: bool(feed._readers), "a reader of the feed", 20)


async def interrupted(desk: Desk, *arguments: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        HVSNAP, *arguments, env=desk.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    await followed(desk)
    process.send_signal(signal.SIGINT)
    out, err = await asyncio.wait_for(process.communicate(), 20)
    return process.returncode or 0, out.decode(), err.decode()


async def test_without_a_terminal_sigint_leaves_the_work_to_the_daemon(desk: Desk) -> None:
    making = await a_making(desk.house)
    status, out, err = await interrupted(desk, "snapshot-create", "web01")
    assert (status, out) == (130, "")
    assert f"it goes on in the daemon: `hvsnap task-wait {making.made[0].id}` follows it again" in err
    assert desk.house.captures.cancelled == []


# -- deleting -------------------------------------------------------------------------------------


async def test_snapshots_are_deleted_as_the_dry_run_told(desk: Desk) -> None:
    one, two = await two_snapshots(desk.house)
    ran = await desk.hvsnap("snapshot-delete", one, two, "--dry-run")
    assert ran.out.splitlines() == [
        f"{one}: would free 100 B",
        f"{two}: would free 200 B",
        "all together: would free 300 B",
    ]
    assert len(await desk.house.catalog.snapshots()) == 2
    ran = await desk.hvsnap("snapshot-delete", one, "--json")
    assert (ran.object["dry_run"], ran.object["freed_bytes"]) == (False, 100)
    ran = await desk.hvsnap("snapshot-delete", two, "--quiet")
    assert (ran.status, ran.out) == (0, "")
    assert await desk.house.catalog.snapshots() == []


# -- disks ----------------------------------------------------------------------------------------


async def test_a_disk_is_made_and_told(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    ran = await desk.hvsnap("disk-create", one, "/images/new.raw", "--format", "raw")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out == f"/images/new.raw  raw of 1.0 GiB made of {one}, 4.0 KiB written\n"
    ran = await desk.hvsnap("disk-create", one, "/images/b", "--quiet")
    assert ran.out == "/images/b\n"
    task = wire.Task.model_validate((await desk.hvsnap("disk-create", one, "/images/c", "--json")).object)
    assert (task.state, task.progress) == (wire.TaskState.ACCOMPLISHED, 100)
    assert isinstance(task.result, wire.DiskCreated)
    assert task.result.format == "qcow2"


async def test_a_relative_target_lies_where_the_command_runs(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    ran = await desk.process("disk-create", one, "below/new.qcow2", "--quiet")
    assert ran.out == f"{desk.directory}/below/new.qcow2\n"


async def test_a_disk_that_could_not_be_made_is_an_error(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    desk.house.maker.error = NoSpace("the device is full")
    ran = await desk.hvsnap("disk-create", one, "/images/new")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.splitlines()[0] == "hvsnap: disk-create: the device is full"
    ran = await desk.hvsnap("disk-create", one, "/images/new", "--json")
    assert (ran.object["code"], ran.object["task"]["state"]) == ("no-space", "failed")


async def test_a_detached_disk_is_made_by_the_daemon(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    desk.house.maker.go_on.clear()
    ran = await desk.hvsnap("disk-create", one, "/images/new", "--detach")
    assert ran.status == 0
    assert desk.house.tasks.get(ran.out.strip()).state is wire.TaskState.RUNNING
    desk.house.maker.go_on.set()
    assert (await desk.house.tasks.wait(ran.out.strip())).state is wire.TaskState.ACCOMPLISHED


async def test_a_rollback_is_planned_and_done(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    arguments = ("disk-rollback", "web01/vda", one, "--stop", "--start", "--no-safety-snapshot")
    ran = await desk.hvsnap(*arguments, "--dry-run")
    assert ran.status == 0
    assert "shut the guest down, write what differs, start the guest" in ran.out
    assert desk.house.hypervisor.log == []
    ran = await desk.hvsnap(*arguments)
    disk = (await desk.hvsnap("chain-list", "--json")).object["chains"][0]["disk"]
    assert ran.out == f"{disk}  set back to {one}, 256 KiB written, no safety snapshot, guest started\n"
    assert desk.house.hypervisor.log == ["shutdown web01", f"roll back {disk}", "start web01"]
    desk.house.roller.resized = True
    ran = await desk.hvsnap(*arguments)
    assert ran.out.splitlines()[1].startswith("note: the disk's size is not the snapshot's")
    answer = wire.RollbackAnswer.model_validate((await desk.hvsnap(*arguments, "--json")).object)
    assert answer.task is not None
    assert isinstance(answer.task.result, wire.RolledBack)
    ran = await desk.hvsnap(*arguments, "--detach")
    assert ran.out.startswith("t-")
    await desk.house.tasks.wait(ran.out.strip())


async def test_the_safety_snapshot_is_the_default_and_is_named(desk: Desk) -> None:
    making = await a_making(desk.house)
    one = (await desk.house.catalog.snapshots())[0].id

    async def create_and_end(request: SnapshotRequest) -> list[Snapshot]:
        made = await making.create(request)
        await making.end()
        return made

    desk.house.captures.create_with = create_and_end
    ran = await desk.hvsnap("disk-rollback", "vda", one, "--stop")
    assert ran.status == 0, ran
    assert f"the state before it is {making.made[0].id}" in ran.out
    assert desk.house.captures.requests[0].name.startswith("before rollback to")


async def test_a_failed_rollback_tells_why_and_what_was_planned(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    desk.house.roller.error = NoSpace("the device is full")
    arguments = ("disk-rollback", "vda", one, "--stop", "--no-safety-snapshot")
    ran = await desk.hvsnap(*arguments)
    assert (ran.status, ran.err.splitlines()[0]) == (1, "hvsnap: disk-rollback: the device is full")
    ran = await desk.hvsnap(*arguments, "--json")
    assert (ran.object["code"], ran.object["plan"]["snapshot"], ran.object["task"]["state"]) == (
        "no-space",
        one,
        "failed",
    )


# -- the daemon and the host ----------------------------------------------------------------------


async def test_the_doctor_of_the_daemon_is_asked(desk: Desk) -> None:
    ran = await desk.hvsnap("doctor")
    assert "the catalog answers" in ran.out
    assert "daemon: " not in ran.out
    report = wire.DoctorReport.model_validate((await desk.hvsnap("doctor", "--json")).object)
    assert ran.status == (1 if report.worst == "error" else 0)
    quiet = (await desk.hvsnap("doctor", "-q")).out
    assert "WARNING  mqtt" in quiet
    assert "OK " not in quiet
    desk.house.hypervisor.unreachable = True
    assert (await desk.hvsnap("doctor")).status == 1


async def test_recover_is_done_by_the_running_daemon(desk: Desk) -> None:
    assert (await desk.hvsnap("recover")).out == "nothing was open\n"
    one, _two = await two_snapshots(desk.house)
    row = await desk.house.catalog.snapshot(one)
    async with desk.house.catalog.write() as tx:
        await tx.open_operation("disk-create", WEB, "writing", {"target": "/images/x", "temporary": "/images/.x"})
        await tx.open_operation("rollback", WEB, "writing", {"disk": row.disk, "snapshot": one})
    desk.house.roller.error = NoSpace("the device is full")
    ran = await desk.hvsnap("recover")
    assert ran.status == 1
    assert "undone" in ran.out.splitlines()[0]
    assert "still-open" in ran.out.splitlines()[1]
    assert ran.err.startswith("hvsnap: recover: 1 of 2 open operations cannot be settled yet: the device is full")
    ran = await desk.hvsnap("recover", "--json")
    assert (ran.status, ran.object["code"], len(ran.object["operations"])) == (1, "failed", 1)
    desk.house.roller.error = None
    ran = await desk.hvsnap("recover", "--json")
    assert (ran.status, ran.object["operations"][0]["outcome"]) == (0, "finished")


async def test_connect_is_told_to_have_no_effect_where_the_daemon_answers(desk: Desk) -> None:
    for command in ("list", "recover", "doctor"):
        ran = await desk.hvsnap("-c", "qemu:///session", command)
        assert "--connect has no effect here" in ran.err, command
        assert (await desk.hvsnap(command, "-q", "-c", "qemu:///session")).err == ""


# -- watching -------------------------------------------------------------------------------------


async def watched(desk: Desk, *arguments: str) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        HVSNAP, "watch", *arguments, env=desk.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    await followed(desk)
    return process


async def test_watch_shows_events_until_it_is_interrupted(desk: Desk) -> None:
    making = await a_making(desk.house)
    process = await watched(desk)
    assert process.stdout is not None
    await making.create(SnapshotRequest(guest="web01"))
    making.progress(1 << 30, 4 << 30)  # too quick to be told
    async with asyncio.timeout(20):
        await making.end()
        line = (await process.stdout.readline()).decode()
    assert "snapshot.accomplished guest=web01" in line
    process.send_signal(signal.SIGINT)
    _out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, err) == (130, b"")


async def test_watch_of_one_guest_as_json_lines_ends_with_the_daemon(desk: Desk) -> None:
    ids = await two_snapshots(desk.house)
    process = await watched(desk, "web01", "--json")
    async with desk.house.catalog.write() as tx:
        await tx.emit("guest.attached", {"guest": "mail"})
        await tx.emit("guest.attached", {"guest": "web01"})
    assert process.stdout is not None
    first = json.loads(await asyncio.wait_for(process.stdout.readline(), 20))
    assert first["event"]["payload"] == {"guest": "web01"}
    desk.house.service.feed.progress(Progress(ids[0], 1, 4, 100.0, 0.5))
    second = json.loads(await asyncio.wait_for(process.stdout.readline(), 20))
    assert (second["progress"]["id"], second["progress"]["progress"]) == (ids[0], 25)
    desk.house.service.feed.close()
    out, _err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, json.loads(out)["code"]) == (6, "daemon-unreachable")


async def test_a_reader_that_goes_away_ends_watch_without_a_word(desk: Desk) -> None:
    process = await watched(desk, "-q")
    assert process.stdout is not None
    process._transport.get_pipe_transport(1).close()  # type: ignore[attr-defined]
    async with asyncio.timeout(20):
        while process.returncode is None:
            async with desk.house.catalog.write() as tx:
                await tx.emit("guest.attached", {"guest": "web01"})
            await asyncio.sleep(0.1)
        assert process.stderr is not None
        assert await process.stderr.read() == b""


# -- speed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["snapshot-create", "--help"], ["list"]])
async def test_commands_of_a_client_load_nothing_of_the_daemon(desk: Desk, arguments: list[str]) -> None:
    code = (
        "import sys; from hvsnap.cli.main import run; status = run(sys.argv[1:]); "
        "heavy = {'numpy', 'fastapi', 'uvicorn', 'libvirt', 'nbd', 'obstore', 'aiosqlite', 'hvsnap.daemon'}; "
        "sys.stderr.write(','.join(sorted(heavy & set(sys.modules)))); sys.exit(status)"
    )
    python = os.path.join(os.path.dirname(HVSNAP), "python")
    process = await asyncio.create_subprocess_exec(
        python, "-c", code, *arguments, env=desk.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    _out, err = await asyncio.wait_for(process.communicate(), 20)
    assert (process.returncode, err) == (0, b"")

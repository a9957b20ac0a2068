"""The API over its real socket: every endpoint's answer, every endpoint's refusals."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from hvsnap import wire
from hvsnap.errors import ChainFull, NoSpace
from hvsnap.model import Consistency, Progress, Snapshot, SnapshotId, State
from hvsnap.service.requests import GuestDisks, SnapshotRequest
from tests.api_kit import House, a_house, served
from tests.catalog_kit import a_block, a_disk, a_snapshot, add_chain
from tests.service_kit import WEB, a_guest, a_view, known


@pytest.fixture
async def house(workdir: Path) -> AsyncIterator[House]:
    async with a_house(workdir / "state") as made:
        yield made


@pytest.fixture
async def api(house: House, workdir: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served(house, workdir / "run" / "s") as client:
        yield client


async def two_snapshots(house: House) -> list[SnapshotId]:
    await house.catalog.add_pack("p", 10**6, [a_block(1, 100), a_block(2, 200)])
    disk = a_disk(**known(a_view(), a_guest()))
    return await add_chain(house.catalog, disk, {0: {0: 1}}, {0: {0: 2}})


def refused(answer: httpx.Response, status: int, code: str) -> wire.Error:
    assert answer.status_code == status, answer.text
    error = wire.Error.model_validate_json(answer.content, strict=True)
    assert error.code == code
    assert error.message
    assert "\n" not in error.message
    return error


async def test_the_status_tells_what_there_is(house: House, api: httpx.AsyncClient) -> None:
    await two_snapshots(house)
    status = wire.Status.model_validate_json((await api.get("/v1/status")).content)
    assert (status.host_id, status.guests, status.disks, status.snapshots) == ("host-1", 1, 1, 2)
    assert (status.mqtt.pending, status.stopping) == (2, False)
    house.hypervisor.unreachable = True
    assert (await api.get("/v1/status")).json()["guests"] is None


async def test_guests_are_listed(house: House, api: httpx.AsyncClient) -> None:
    ids = await two_snapshots(house)
    answer = await api.get("/v1/guests")
    (guest,) = wire.GuestList.model_validate_json(answer.content).guests
    assert (guest.name, guest.disks[0].last_snapshot) == ("web01", ids[-1])
    house.hypervisor.unreachable = True
    error = refused(await api.get("/v1/guests"), 500, "hypervisor-unreachable")
    assert error.exit_status == 1


async def test_snapshots_are_listed_and_shown(house: House, api: httpx.AsyncClient) -> None:
    one, two = await two_snapshots(house)
    listing = wire.SnapshotList.model_validate_json((await api.get("/v1/snapshots?guest=web01&disk=vda")).content)
    assert [row.id for row in listing.snapshots] == [two, one]
    shown = (await api.get(f"/v1/snapshots/{one}")).json()
    assert shown["created_at"] == "1970-01-01T00:00:01Z"
    assert wire.Snapshot.model_validate(shown).id == one
    assert (await api.get("/v1/snapshots?state=failed")).json() == {"snapshots": []}


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/snapshots/s-aaaaaaaaaaaa", 404, "snapshot-unknown"),
        ("/v1/snapshots/%00%ff%2e%2e", 404, "snapshot-unknown"),
        ("/v1/snapshots?guest=db99", 404, "guest-unknown"),
        ("/v1/snapshots?disk=vdz", 404, "disk-unknown"),
        ("/v1/snapshots?state=half", 400, "bad-request"),
        ("/v1/snapshots?limit=0", 400, "bad-request"),
        ("/v1/snapshots?limit=many", 400, "bad-request"),
        ("/v1/snapshots?guest=" + "x" * 5000, 400, "bad-request"),
        ("/v1/chains/vdz", 404, "disk-unknown"),
        ("/v1/chains//images/none.qcow2", 404, "disk-unknown"),
        ("/v1/tasks/t-aaaaaaaaaaaa", 404, "not-found"),
        ("/v1/events?since=-1", 400, "bad-request"),
        ("/v1/events?since=99999999999999999999999", 400, "bad-request"),
        ("/v1/nothing", 404, "not-found"),
        ("/", 404, "not-found"),
        ("/docs", 404, "not-found"),
    ],
)
async def test_a_get_that_is_wrong_is_refused_in_one_form(
    api: httpx.AsyncClient, path: str, status: int, code: str
) -> None:
    error = refused(await api.get(path), status, code)
    assert error.exit_status == {400: 2, 404: 3}[status]


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/v1/snapshots", {}, "guest"),
        ("/v1/snapshots", {"guest": 7}, "guest"),
        ("/v1/snapshots", {"guest": "web01", "disk": "vda"}, "disk"),
        ("/v1/snapshots", {"guest": "web01", "consistency": "perfect"}, "consistency"),
        ("/v1/snapshots", {"guest": "web01", "tags": {"a": 1}}, "tags"),
        ("/v1/snapshots", {"guest": "web01", "disks": ["vda"] * 300}, "disks"),
        ("/v1/snapshots", [], "dictionary"),
        ("/v1/snapshots/delete", {"ids": []}, "ids"),
        ("/v1/snapshots/delete", {"ids": "s-1"}, "ids"),
        ("/v1/disks", {"snapshot": "s-1"}, "path"),
        ("/v1/disks", {"snapshot": "s-1", "path": "/x", "format": "vmdk"}, "format"),
        ("/v1/disks/vda/rollback", {}, "snapshot"),
        ("/v1/disks/vda/rollback", {"snapshot": "s-1", "force": True}, "force"),
    ],
)
async def test_a_body_that_is_wrong_is_refused_and_names_the_part(
    house: House, api: httpx.AsyncClient, path: str, body: Any, word: str
) -> None:
    error = refused(await api.post(path, json=body), 400, "bad-request")
    assert word in error.message
    assert house.captures.requests == []


async def test_a_wrong_method_is_refused(api: httpx.AsyncClient) -> None:
    assert refused(await api.delete("/v1/snapshots"), 405, "bad-request").exit_status == 2
    assert refused(await api.post("/v1/status"), 405, "bad-request").exit_status == 2


async def test_a_snapshot_request_reaches_the_captures_whole(house: House, api: httpx.AsyncClient) -> None:
    disk = a_disk(**known(a_view(), a_guest()))
    await add_chain(house.catalog, disk)

    async def create(_request: SnapshotRequest) -> list[Snapshot]:
        async with house.catalog.write() as tx:
            row = a_snapshot(disk.id, await tx.next_sequence(disk.id), state=State.PROGRESSING)
            await tx.add_snapshot(row)
        house.captures.progresses[row.id] = Progress(row.id, 1, 4, 10.0, 0.3)
        return [row]

    house.captures.create_with = create
    body = {
        "guest": "web01",
        "disks": ["vda"],
        "name": "before",
        "description": "ü",
        "tags": {"a": "b"},
        "consistency": "app",
        "group": True,
        "others": [{"guest": "db01"}, {"guest": "app01", "disks": ["vda", "vdb"]}],
        "wait": True,
    }
    answer = await api.post("/v1/snapshots", json=body)
    assert answer.status_code == 202
    (row,) = wire.SnapshotList.model_validate_json(answer.content).snapshots
    assert (row.state, row.progress, row.eta_s) == (State.PROGRESSING, 25, 0.3)
    others = (GuestDisks("db01"), GuestDisks("app01", ("vda", "vdb")))
    expected = SnapshotRequest(
        "web01", ("vda",), "before", "ü", {"a": "b"}, Consistency.APP, group=True, others=others, wait=True
    )
    assert house.captures.requests == [expected]
    cancelled = await api.post(f"/v1/snapshots/{row.id}/cancel")
    assert (cancelled.status_code, cancelled.json()["state"]) == (202, "failed")
    refused(await api.post(f"/v1/snapshots/{row.id}/cancel"), 409, "refused")
    refused(await api.post("/v1/snapshots/s-aaaaaaaaaaaa/cancel"), 404, "snapshot-unknown")


async def test_a_rule_s_refusal_has_its_own_code_hint_and_status(house: House, api: httpx.AsyncClient) -> None:
    async def full(_request: SnapshotRequest) -> list[Snapshot]:
        raise ChainFull("the chain holds 64 snapshots already")

    async def no_space(_request: SnapshotRequest) -> list[Snapshot]:
        raise NoSpace("the device is full")

    house.captures.create_with = full
    error = refused(await api.post("/v1/snapshots", json={"guest": "web01"}), 409, "chain-full")
    assert (error.exit_status, "snapshot-delete" in error.hint) == (4, True)
    house.captures.create_with = no_space
    refused(await api.post("/v1/snapshots", json={"guest": "web01"}), 507, "no-space")


async def test_a_fault_of_ours_is_told_in_the_same_form_without_its_details(
    house: House, api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    async def fault(_request: SnapshotRequest) -> list[Snapshot]:
        raise ZeroDivisionError("a secret")

    house.captures.create_with = fault
    answer = await api.post("/v1/snapshots", json={"guest": "web01"})
    error = refused(answer, 500, "failed")
    assert "secret" not in answer.text
    assert error.hint
    assert "ZeroDivisionError: a secret" in caplog.text
    assert (await api.get("/v1/status")).status_code == 200


async def test_snapshots_are_deleted_as_the_dry_run_told(house: House, api: httpx.AsyncClient) -> None:
    one, two = await two_snapshots(house)
    body = {"ids": [one, two], "dry_run": True}
    plan = wire.Deletion.model_validate_json((await api.post("/v1/snapshots/delete", json=body)).content)
    assert (plan.dry_run, plan.freed_bytes, [row.freed_bytes for row in plan.snapshots]) == (True, 300, [100, 200])
    assert len(await house.catalog.snapshots()) == 2
    answer = await api.post("/v1/snapshots/delete", json=body | {"dry_run": False})
    assert (answer.status_code, answer.json()["freed_bytes"]) == (200, 300)
    assert await house.catalog.snapshots() == []
    refused(await api.post("/v1/snapshots/delete", json=body), 404, "snapshot-unknown")


@pytest.mark.parametrize("name", ["vda", "web01/vda", "web01%2Fvda", "%2Fimages%2Fweb.qcow2", "/images/web.qcow2"])
async def test_a_chain_is_found_by_any_name_of_its_disk(house: House, api: httpx.AsyncClient, name: str) -> None:
    ids = await two_snapshots(house)
    chain = wire.Chain.model_validate_json((await api.get(f"/v1/chains/{name}")).content)
    assert [node.snapshot.id for node in chain.nodes] == ids
    (listed,) = wire.ChainList.model_validate_json((await api.get("/v1/chains")).content).chains
    assert listed.disk == chain.disk


async def test_a_disk_is_made_by_a_task_that_tells_its_progress(house: House, api: httpx.AsyncClient) -> None:
    one, _two = await two_snapshots(house)
    house.maker.go_on.clear()
    answer = await api.post("/v1/disks", json={"snapshot": one, "path": "/images//new/../made.qcow2"})
    assert answer.status_code == 202
    task = wire.Task.model_validate_json(answer.content)
    await asyncio.sleep(0)
    shown = wire.Task.model_validate_json((await api.get(f"/v1/tasks/{task.id}")).content)
    assert (shown.state, shown.progress, shown.step) == (wire.TaskState.RUNNING, 50, "writing the disk")
    refused(await api.post("/v1/snapshots/delete", json={"ids": [one]}), 409, "snapshot-in-use")
    house.maker.go_on.set()
    await house.tasks.wait(task.id)
    ended = wire.Task.model_validate_json((await api.get(f"/v1/tasks/{task.id}")).content)
    assert (ended.state, ended.progress) == (wire.TaskState.ACCOMPLISHED, 100)
    assert isinstance(ended.result, wire.DiskCreated)
    assert (ended.result.path, ended.result.written_bytes) == ("/images/made.qcow2", 4096)
    assert [row.id for row in wire.TaskList.model_validate_json((await api.get("/v1/tasks")).content).tasks] == [
        task.id
    ]
    refused(await api.post(f"/v1/tasks/{task.id}/cancel"), 409, "refused")


async def test_a_task_that_failed_carries_the_error_that_the_command_line_exits_with(
    house: House, api: httpx.AsyncClient
) -> None:
    one, _two = await two_snapshots(house)
    house.maker.error = NoSpace("the device is full")
    task = (await api.post("/v1/disks", json={"snapshot": one, "path": "/images/x"})).json()
    await house.tasks.wait(task["id"])
    ended = wire.Task.model_validate_json((await api.get(f"/v1/tasks/{task['id']}")).content)
    assert ended.state is wire.TaskState.FAILED
    assert ended.error is not None
    assert (ended.error.code, ended.error.exit_status) == ("no-space", 1)


async def test_a_task_can_be_cancelled(house: House, api: httpx.AsyncClient) -> None:
    one, _two = await two_snapshots(house)
    house.maker.go_on.clear()
    task = (await api.post("/v1/disks", json={"snapshot": one, "path": "/images/x"})).json()
    assert (await api.post(f"/v1/tasks/{task['id']}/cancel")).status_code == 202
    await house.tasks.wait(task["id"])
    assert (await api.get(f"/v1/tasks/{task['id']}")).json()["state"] == "cancelled"


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("relative.qcow2", 400, "bad-request"),
        ("/dev/sda", 400, "bad-request"),
        ("/images/../dev/sda", 400, "bad-request"),
        ("/var/lib/hvsnap/catalog.db", 400, "bad-request"),
        ("/images/taken", 409, "target-exists"),
        ("/images/\0", 400, "bad-request"),
    ],
)
async def test_a_target_that_is_no_place_for_a_disk_is_refused(
    house: House, api: httpx.AsyncClient, path: str, status: int, code: str
) -> None:
    one, _two = await two_snapshots(house)
    house.maker.taken = {"/images/taken"}
    refused(await api.post("/v1/disks", json={"snapshot": one, "path": path}), status, code)
    assert house.tasks.all() == []


async def test_a_rollback_is_planned_and_then_done(house: House, api: httpx.AsyncClient) -> None:
    one, _two = await two_snapshots(house)
    body = {"snapshot": one, "safety_snapshot": False}
    refused(await api.post("/v1/disks/vda/rollback", json=body), 409, "guest-running")
    await house.hypervisor.shutdown(WEB, 1)
    answer = await api.post("/v1/disks/web01%2Fvda/rollback", json=body | {"dry_run": True})
    assert answer.status_code == 200
    plan = wire.RollbackAnswer.model_validate_json(answer.content)
    assert plan.task is None
    assert (plan.plan.write_bytes, plan.plan.method) == (4 * 65536, "bitmap")
    assert "roll back" not in " ".join(house.hypervisor.log)
    answer = await api.post("/v1/disks/vda/rollback", json=body)
    assert answer.status_code == 202
    started = wire.RollbackAnswer.model_validate_json(answer.content)
    assert started.task is not None
    await house.tasks.wait(started.task.id)
    ended = wire.Task.model_validate_json((await api.get(f"/v1/tasks/{started.task.id}")).content)
    assert isinstance(ended.result, wire.RolledBack)
    assert (ended.result.snapshot, ended.result.safety_snapshot) == (one, None)


async def test_the_doctor_answers_with_findings(api: httpx.AsyncClient) -> None:
    report = wire.DoctorReport.model_validate_json((await api.get("/v1/doctor")).content)
    found = {one.check: one.severity for one in report.findings}
    assert found["mqtt"] is wire.Severity.WARNING
    assert found["libvirt"] is wire.Severity.OK
    assert found["catalog"] is wire.Severity.OK


async def test_recover_tells_what_became_of_what_was_open(house: House, api: httpx.AsyncClient) -> None:
    assert (await api.post("/v1/recover")).json() == {"operations": []}
    (one, _two) = await two_snapshots(house)
    row = await house.catalog.snapshot(one)
    async with house.catalog.write() as tx:
        await tx.open_operation("disk-create", WEB, "writing", {"target": "/images/x", "temporary": "/images/.x"})
        await tx.open_operation("rollback", WEB, "writing", {"disk": row.disk, "snapshot": one})
    house.roller.error = NoSpace("the device is full")
    answer = wire.Recovery.model_validate_json((await api.post("/v1/recover")).content)
    assert [(row.kind, row.guest, row.outcome) for row in answer.operations] == [
        ("disk-create", "web01", "undone"),
        ("rollback", "web01", "still-open"),
    ]
    assert "the device is full" in answer.operations[1].detail
    refused(await api.post("/v1/snapshots/delete", json={"ids": [one]}), 409, "snapshot-in-use")
    house.roller.error = None
    answer = wire.Recovery.model_validate_json((await api.post("/v1/recover")).content)
    assert [(row.kind, row.outcome) for row in answer.operations] == [("rollback", "finished")]

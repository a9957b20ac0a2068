"""What becomes of disks: made where they are wanted, back to their origin, changed, gone, released (SERVICE 5.6, 7)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvsnap import wire
from hvsnap.errors import Busy, HvsnapError, HypervisorFailed, HypervisorUnreachable
from hvsnap.hypervisor import images
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.model import Disk, GuestState, Image, ImageId, Origin, SnapshotId
from hvsnap.policy import DAY_S
from hvsnap.service.scheduler import Scheduler, ScheduleSettings
from tests.api_kit import House
from tests.catalog_kit import StoppedClock, a_disk, add_chain
from tests.cli_kit import Desk, a_desk, two_snapshots
from tests.service_kit import a_guest, a_view, known

DATA = a_view("vdb", "/images/data.qcow2", system=False)


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    async def inspect(path: str, image_format: str) -> ImageInfo:
        return ImageInfo(path, image_format, 2**30, (), None, None, encrypted=False, holds_bitmaps=True)

    monkeypatch.setattr(images, "image_info", inspect)
    async with a_desk(tmp_path) as one:
        yield one


def put_off(house: House, *disks: Any) -> None:
    """Let the guest be off, with these disks beside its first."""
    guest = a_guest(a_view(), *disks, state=GuestState.OFF)
    house.hypervisor.shown[guest.uuid] = guest


async def made_of(house: House, origin: str, path: str = DATA.top.path) -> None:
    async with house.catalog.write() as tx:
        await tx.put_origin(Origin(path, None, origin, 1.0))


async def events(house: House) -> list[str]:
    return [event.type for event in await house.catalog.events(0)]


# -- new disks ------------------------------------------------------------------------------------


async def test_s7_1_a_volume_is_made_and_attached_and_known_from_then_on(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    ran = await desk.hvsnap("disk-create", one, "new", "--pool", "default", "--attach", "web01", "vdb")
    assert (ran.status, ran.out) == (
        0,
        f"/pools/default/new  qcow2 of 1.0 GiB made of {one}, 4.0 KiB written, attached as web01/vdb\n",
    ), ran
    (disk,) = [disk for disk in await desk.house.catalog.disks() if disk.target == "vdb"]
    assert disk.source == "/pools/default/new"
    assert (await events(desk.house))[-1] == "disk.attached"
    assert await desk.house.catalog.operations() == []


async def test_s7_1_a_disk_that_cannot_be_attached_stays_and_is_told_of(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    desk.house.devices.error = HypervisorFailed("libvirt: No more available PCI slots")
    ran = await desk.hvsnap("disk-create", one, "/images/new", "--attach", "web01", "vdb")
    assert ran.status == 1
    assert "/images/new was made, but could not be attached as vdb: libvirt: No more" in ran.err
    assert "it is there" in ran.err
    assert (await events(desk.house))[-1] == "disk.attach-failed"
    assert await desk.house.catalog.operations() == []


async def test_s7_1_a_disk_is_attached_after_a_crash_once_libvirt_answers(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    desk.house.devices.error = HypervisorUnreachable("libvirt does not answer")
    desk.house.devices.silent = True
    ran = await desk.hvsnap("disk-create", one, "/images/new", "--attach", "web01", "vdb")
    assert (ran.status, "does not answer" in ran.err) == (1, True)
    ran = await desk.hvsnap("recover")
    assert (ran.status, "still-open" in ran.out) == (1, True)
    desk.house.devices.error, desk.house.devices.silent = None, False
    assert "attached" in (await desk.hvsnap("recover")).out
    assert [view.target for view in desk.house.hypervisor.shown[a_guest().uuid].disks] == ["vda", "vdb"]
    assert await desk.house.catalog.operations() == []


@pytest.mark.parametrize(
    ("arguments", "status", "word"),
    [
        (("new", "--pool", "default", "--force"), 2, "always a new one"),
        (("/images/new", "--attach", "nobody", "vdb"), 3, "nobody"),
        (("/images/new", "--attach", "web01", "vda"), 4, "already"),
        (("/images/new", "--attach", "web01", "hdc"), 2, "no target"),
    ],
)
async def test_s7_1_what_cannot_be_is_refused_before_anything_is_made(
    desk: Desk, arguments: tuple[str, ...], status: int, word: str
) -> None:
    one, _two = await two_snapshots(desk.house)
    ran = await desk.hvsnap("disk-create", one, *arguments)
    assert (ran.status, word in ran.err) == (status, True), ran
    assert desk.house.maker.orders == []


async def test_s7_1_a_disk_is_made_of_an_image_by_its_name(desk: Desk) -> None:
    one, _two = await two_snapshots(desk.house)
    async with desk.house.catalog.write() as tx:
        await tx.add_image(Image(ImageId("i-aaaaaaaaaaaa"), "debian", "", one, 1.0))
    ran = await desk.hvsnap("disk-create", "debian", "/images/new", "--force")
    assert "made of i-aaaaaaaaaaaa" in ran.out
    order = desk.house.maker.orders[-1]
    assert (order.snapshot, order.made_of, order.force) == (one, "i-aaaaaaaaaaaa", True)
    ran = await desk.hvsnap("disk-create", "i-bbbbbbbbbbbb", "/images/new")
    assert (ran.status, "no image" in ran.err) == (3, True)


# -- back to the origin ---------------------------------------------------------------------------


async def test_s7_3_a_disk_goes_back_to_what_it_was_made_of(desk: Desk) -> None:
    house = desk.house
    one, _two = await two_snapshots(house)
    put_off(house, DATA)
    await made_of(house, one)
    arguments = ("disk-reinit", "web01/vdb", "--no-safety-snapshot")
    ran = await desk.hvsnap(*arguments, "--dry-run")
    assert (ran.status, f"Snapshot: {one}" in ran.out) == (0, True), ran
    ran = await desk.hvsnap(*arguments, "--start")
    (disk,) = [disk for disk in await house.catalog.disks() if disk.target == "vdb"]
    assert ran.out.startswith(f"{disk.id}  set back to {one}, "), ran
    assert house.hypervisor.log == [f"re-initialise {disk.id}", "start web01"]
    put_off(house, DATA)
    answer = wire.RollbackAnswer.model_validate((await desk.hvsnap(*arguments, "--json")).object)
    assert answer.task is not None
    assert isinstance(answer.task.result, wire.Reinitialised)
    assert answer.task.result.origin == one


async def test_s7_3_the_guest_must_be_off_and_the_disk_must_have_been_made_here(desk: Desk) -> None:
    house = desk.house
    one, _two = await two_snapshots(house)
    put_off(house, DATA)
    ran = await desk.hvsnap("disk-reinit", "vdb")
    assert (ran.status, "was not made of" in ran.err) == (4, True)
    await made_of(house, one)
    guest = house.hypervisor.shown[a_guest().uuid]
    house.hypervisor.shown[guest.uuid] = replace(guest, state=GuestState.RUNNING)
    ran = await desk.hvsnap("disk-reinit", "vdb")
    assert (ran.status, "is running" in ran.err) == (4, True)


async def test_s7_3_another_file_in_the_place_of_the_one_that_was_made_is_left_alone(desk: Desk) -> None:
    house = desk.house
    one, _two = await two_snapshots(house)
    file = desk.directory / "data.qcow2"
    file.touch()
    put_off(house, a_view("vdb", str(file), system=False))
    async with house.catalog.write() as tx:
        await tx.put_origin(Origin(str(file), file.stat().st_ino + 1, one, 1.0))
    ran = await desk.hvsnap("disk-reinit", "vdb")
    assert (ran.status, "was replaced by another one" in ran.err) == (4, True)
    await made_of(house, one, str(file))
    assert (await desk.hvsnap("disk-reinit", "vdb", "--no-safety-snapshot")).status == 0


async def test_s4_5_a_snapshot_behind_a_disk_can_be_deleted_which_then_has_no_origin(desk: Desk) -> None:
    house = desk.house
    one, _two = await two_snapshots(house)
    put_off(house, DATA)
    await made_of(house, one)
    assert (await desk.hvsnap("snapshot-delete", one)).status == 0
    ran = await desk.hvsnap("disk-reinit", "vdb")
    assert (ran.status, f"made of {one}, which is deleted" in ran.err) == (4, True)
    await made_of(house, "i-aaaaaaaaaaaa")
    ran = await desk.hvsnap("disk-reinit", "vdb")
    assert (ran.status, "can no longer be re-initialised" in ran.err) == (4, True)


# -- what holds for a disk ------------------------------------------------------------------------


async def test_s5_6_what_goes_with_a_disk_is_said_with_disk_edit(desk: Desk) -> None:
    ran = await desk.hvsnap("disk-edit", "vda", "--delete-auto-with-disk")
    assert (ran.status, "its automatic snapshots go with it" in ran.out) == (0, True), ran
    shown = wire.Disk.model_validate((await desk.hvsnap("disk-edit", "vda", "--encrypted", "--json")).object)
    assert (shown.delete_auto_with_disk, shown.encrypted, shown.origin) == (True, True, None)
    assert "stay" in (await desk.hvsnap("disk-edit", shown.id, "--no-delete-auto-with-disk")).out
    (disk,) = await desk.house.catalog.disks()
    assert (disk.delete_auto_with_disk, disk.encrypted) == (False, True)
    assert (await desk.hvsnap("disk-edit", "vda")).status == 2
    assert (await desk.hvsnap("disk-edit", "vdz", "--encrypted")).status == 3


async def test_s8_1_no_chain_becomes_partly_plain_and_partly_encrypted(desk: Desk) -> None:
    await two_snapshots(desk.house)
    ran = await desk.hvsnap("disk-edit", "vda", "--encrypted")  # the store has no key
    assert (ran.status, "stored in plain" in ran.err) == (4, True)
    (disk,) = await desk.house.catalog.disks()
    async with desk.house.catalog.write() as tx:
        await tx.update_disk(disk.id, encrypted=True)
    ran = await desk.hvsnap("disk-edit", "vda", "--no-encrypted")
    assert (ran.status, "encrypted snapshots" in ran.err) == (4, True)


# -- release --------------------------------------------------------------------------------------


class Owned:
    """One disk with a manual, two automatic and a locked automatic snapshot."""

    def __init__(self, house: House, disk: Disk, ids: list[SnapshotId]) -> None:
        self.house, self.disk = house, disk
        self.manual, *self.automatic, self.locked = ids
        self.clock = StoppedClock()
        service = house.service
        self.scheduler = Scheduler(
            house.catalog, house.captures, service.snapshots, self.clock, ScheduleSettings(3600, 1, 64)
        )
        self.scheduler.also_expire.append(service.known_disks.release_due)

    async def left(self) -> set[SnapshotId]:
        return {row.id for row in await self.house.catalog.snapshots(self.disk.id)}

    async def row(self) -> Disk:
        return await self.house.catalog.disk(self.disk.id)

    def gone(self) -> None:
        put_off(self.house)


async def owned(house: House, **changes: Any) -> Owned:
    put_off(house, DATA)
    disk = a_disk(**known(DATA, a_guest()), **changes)
    ids = await add_chain(house.catalog, disk, {}, {}, {}, {})
    async with house.catalog.write() as tx:
        for number, name in enumerate(ids[1:], 1):
            until = 1e9 if number == 3 else None
            await tx.update_snapshot(name, automatic=True, name=f"auto_{number}", expires_at=1e9, locked_until=until)
    one = Owned(house, disk, ids)
    async with house.catalog.write() as tx:
        await tx.schedule_checked(one.clock.now())  # the schedule of an earlier daemon has looked at them
    return one


async def test_s5_6_a_disk_that_is_there_is_not_released(desk: Desk) -> None:
    one = await owned(desk.house)
    ran = await desk.hvsnap("disk-release", "web01/vdb")
    assert (ran.status, "virsh detach-disk web01 vdb" in ran.err) == (4, True)
    one.gone()
    desk.house.captures.busy.add(one.disk.id)
    assert (await desk.hvsnap("disk-release", "web01/vdb")).status == 5
    desk.house.captures.busy.clear()
    desk.house.hypervisor.shown.clear()
    desk.house.hypervisor.silent["kvm"] = HypervisorUnreachable("kvm does not answer")
    assert (await desk.hvsnap("disk-release", "web01/vdb")).status == 1
    assert not (await one.row()).released


async def test_s5_6_without_the_flag_automatic_snapshots_live_on_until_they_expire(desk: Desk) -> None:
    one = await owned(desk.house)
    one.gone()
    ran = await desk.hvsnap("disk-release", "web01/vdb")
    assert (ran.status, "snapshots that stay: 4" in ran.out) == (0, True), ran
    assert (await one.row()).released
    assert (await events(desk.house))[-1] == "disk.released"
    await one.scheduler.look()
    assert len(await one.left()) == 4
    one.clock.at = 2e9
    await one.scheduler.look()
    assert await one.left() == {one.manual, one.locked}
    ran = await desk.hvsnap("disk-release", one.disk.id)
    assert (ran.status, "released already" in ran.err) == (4, True)


async def test_s5_6_with_the_flag_automatic_snapshots_go_and_locked_ones_when_their_lock_has_ended(
    desk: Desk,
) -> None:
    one = await owned(desk.house, delete_auto_with_disk=True)
    one.gone()
    plan = wire.DiskReleased.model_validate((await desk.hvsnap("disk-release", "vdb", "--dry-run", "--json")).object)
    assert (set(plan.deleted), plan.kept, plan.dry_run) == (set(one.automatic), 2, True)
    assert len(await one.left()) == 4
    with desk.house.uses.hold_snapshot(one.automatic[0], "being restored"):
        assert (await desk.hvsnap("disk-release", "vdb")).status == 0
    assert await one.left() == {one.manual, one.automatic[0], one.locked}  # one was in use
    await one.scheduler.look()
    assert await one.left() == {one.manual, one.locked}
    async with desk.house.catalog.write() as tx:
        await tx.update_snapshot(one.locked, locked_until=1.0)
    one.scheduler._expired_at = None
    await one.scheduler.look()
    assert await one.left() == {one.manual}
    assert "snapshot.deleted" in await events(desk.house)


async def test_s5_6_a_disk_that_is_gone_is_told_of_and_may_come_back(desk: Desk) -> None:
    one = await owned(desk.house)
    look = desk.house.service.known_disks.look
    await look()
    assert await events(desk.house) == []
    one.gone()
    await look()
    await look()
    assert ((await one.row()).gone_since, await events(desk.house)) == (1000.0, ["disk.detached"])
    put_off(desk.house, DATA)
    await look()
    assert ((await one.row()).gone_since, (await events(desk.house))[-1]) == (None, "disk.attached")


@pytest.mark.parametrize("why", ["silent", "unreachable", "no disks", "overlay"])
async def test_s5_6_what_cannot_be_seen_is_not_gone(desk: Desk, why: str) -> None:
    one = await owned(desk.house)
    hypervisor = desk.house.hypervisor
    (guest,) = hypervisor.shown.values()
    if why == "silent":
        hypervisor.shown.clear()
        hypervisor.silent["kvm"] = HypervisorUnreachable("kvm does not answer")
    elif why == "unreachable":
        hypervisor.unreachable = True
    else:
        overlay = a_view("vdb", "/images/data.qcow2.s-aaaaaaaaaaaa.overlay", system=False)
        disks = () if why == "no disks" else (a_view(), overlay)
        hypervisor.shown[guest.uuid] = replace(guest, disks=disks)
    known_disks = desk.house.service.known_disks
    try:
        await known_disks.look()
    except HvsnapError:
        assert why in ("silent", "unreachable")
    with pytest.raises(HvsnapError) as caught:
        await known_disks.release(one.disk.id, dry_run=False)
    assert isinstance(caught.value, HypervisorUnreachable if why in ("silent", "unreachable") else Busy)
    row = await one.row()
    assert (row.gone_since, row.released) == (None, False)


async def test_s5_6_a_disk_that_has_been_gone_for_long_is_released_once_it_is_looked_at_again(desk: Desk) -> None:
    one = await owned(desk.house, delete_auto_with_disk=True)
    known_disks = desk.house.service.known_disks
    one.gone()
    await known_disks.look()
    await known_disks.release_due(1000.0 + 29 * DAY_S)
    assert not (await one.row()).released
    put_off(desk.house, DATA)  # it is back, and nobody has looked yet
    await known_disks.release_due(1000.0 + 31 * DAY_S)
    assert not (await one.row()).released
    one.gone()
    await known_disks.release_due(1000.0 + 31 * DAY_S)
    assert (await one.row()).released
    assert await one.left() == {one.manual, one.locked}


async def test_s5_6_a_disk_whose_guest_was_undefined_can_be_released(desk: Desk) -> None:
    one = await owned(desk.house)
    desk.house.hypervisor.shown.clear()
    await desk.house.service.known_disks.look()
    assert (await one.row()).gone_since is not None
    assert (await desk.hvsnap("disk-release", one.disk.id)).status == 0
    assert (await one.row()).released

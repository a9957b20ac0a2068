"""Listing, showing and deleting snapshots; chains; guests."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hvsnap.catalog.catalog import Catalog
from hvsnap.cli.render import deletion
from hvsnap.errors import (
    BadRequest,
    DiskUnknown,
    GuestUnknown,
    HypervisorFailed,
    Refused,
    SnapshotInUse,
    SnapshotUnknown,
)
from hvsnap.hypervisor.images import ImageInfo
from hvsnap.model import Bitmap, Disk, DiskId, GuestState, Origin, Progress, SnapshotId, State
from hvsnap.service.chains import Chains
from hvsnap.service.guests import Guests, health
from hvsnap.service.inventory import Inventory
from hvsnap.service.snapshots import Snapshots
from hvsnap.service.uses import Uses
from hvsnap.wire import BitmapHealth, Protection
from tests.catalog_kit import StoppedClock, a_block, a_disk, a_snapshot, add_chain
from tests.service_kit import MAIL, WEB, FakeCaptures, FakeHypervisor, a_catalog, a_guest, a_view, known


@dataclass
class House:
    catalog: Catalog
    hypervisor: FakeHypervisor
    captures: FakeCaptures
    uses: Uses
    snapshots: Snapshots
    chains: Chains
    inventory: Inventory

    async def chain(self, disk: Disk, *pages: dict[int, dict[int, int]]) -> list[SnapshotId]:
        return await add_chain(self.catalog, disk, *pages)

    async def progressing(self, disk: Disk, parent: SnapshotId | None) -> SnapshotId:
        async with self.catalog.write() as tx:
            one = a_snapshot(disk.id, await tx.next_sequence(disk.id), parent, state=State.PROGRESSING)
            await tx.add_snapshot(one)
        return one.id


@pytest.fixture
async def house(workdir: Path) -> AsyncIterator[House]:
    async with a_catalog(workdir) as catalog:
        await catalog.add_pack("p", 10**6, [a_block(n, 100 * n) for n in range(1, 20)])
        hypervisor = FakeHypervisor(a_guest(a_view()), a_guest(uuid=MAIL, name="mail"))
        captures, uses = FakeCaptures(catalog), Uses()
        inventory = Inventory(hypervisor, catalog, StoppedClock())
        snapshots = Snapshots(catalog, inventory, captures, uses, StoppedClock())
        chains = Chains(catalog, inventory, captures, snapshots_max=64)
        yield House(catalog, hypervisor, captures, uses, snapshots, chains, inventory)


async def test_snapshots_are_listed_newest_first_by_guest_disk_and_state(house: House) -> None:
    web, data = a_disk(), a_disk(target="vdb")
    mail = a_disk(guest_uuid=MAIL, guest_name="mail")
    one, two = await house.chain(web, {}, {})
    (three,) = await house.chain(data, {})
    (four,) = await house.chain(mail, {})
    five = await house.progressing(web, two)

    async def ids(**filters: object) -> list[str]:
        return [row.id for row in (await house.snapshots.listing(**filters)).snapshots]  # type: ignore[arg-type]

    assert set(await ids()) == {one, two, three, four, five}
    assert await ids(disk="web01/vda") == [five, two, one]
    assert await ids(disk=data.id) == [three]
    assert set(await ids(guest="web01")) == {one, two, three, five}
    assert await ids(guest=MAIL) == [four]
    assert await ids(guest="mail", disk="vda") == [four]
    assert await ids(disk="web01/vda", state=State.PROGRESSING) == [five]
    assert await ids(disk="web01/vda", limit=1) == [five]
    with pytest.raises(BadRequest, match="several disks"):
        await ids(disk="vda")
    with pytest.raises(DiskUnknown):
        await ids(disk="vdz")
    with pytest.raises(GuestUnknown):
        await ids(guest="db99")


async def test_a_guest_that_exists_without_snapshots_has_an_empty_list(house: House) -> None:
    assert (await house.snapshots.listing(guest="mail")).snapshots == []


async def test_progress_is_shown_while_it_runs_and_is_100_only_when_accomplished(house: House) -> None:
    disk = a_disk()
    (done,) = await house.chain(disk, {})
    running = await house.progressing(disk, done)
    waiting = await house.snapshots.info(running)
    assert (waiting.progress, waiting.rate_bytes_s, waiting.eta_s) == (0, None, None)
    house.captures.progresses[running] = Progress(running, 100, 100, 50.0, 0.0)
    shown = await house.snapshots.info(running)
    assert (shown.progress, shown.rate_bytes_s, shown.eta_s) == (99, 50.0, 0.0)
    assert (await house.snapshots.info(done)).progress == 100
    assert (shown.guest, shown.target) == ("web01", "vda")
    assert shown.model_dump(mode="json")["created_at"] == "1970-01-01T00:00:02Z"


@pytest.mark.parametrize("name", ["s-aaaaaaaaaaaa", "", "x" * 5000, "s-\0", "'; DROP TABLE snapshots"])
async def test_an_unknown_snapshot_is_not_found(house: House, name: str) -> None:
    with pytest.raises(SnapshotUnknown) as caught:
        await house.snapshots.info(name)
    assert len(caught.value.message) < 200


async def test_only_a_running_capture_can_be_cancelled(house: House) -> None:
    disk = a_disk()
    (done,) = await house.chain(disk, {})
    running = await house.progressing(disk, done)
    assert (await house.snapshots.cancel(running)).state is State.FAILED
    assert house.captures.cancelled == [running]
    for name in (done, running):
        with pytest.raises(Refused, match="already"):
            await house.snapshots.cancel(name)


async def test_a_dry_run_tells_the_bytes_and_changes_nothing(house: House) -> None:
    one, two = await house.chain(a_disk(), {0: {0: 1, 1: 2}}, {0: {0: 3}})
    plan = await house.snapshots.delete([two, one, two], dry_run=True)
    assert plan.dry_run
    assert [(row.id, row.freed_bytes) for row in plan.snapshots] == [(two, 300), (one, 100)]
    assert plan.freed_bytes == 600
    assert len(await house.catalog.snapshots()) == 2
    assert await house.catalog.events(0) == []


async def test_a_deletion_is_done_as_told_with_an_event_each(house: House) -> None:
    disk = a_disk()
    one, two, three = await house.chain(disk, {0: {0: 1}}, {0: {0: 2}}, {0: {1: 3}})
    done = await house.snapshots.delete([one, two], dry_run=False)
    assert (done.dry_run, done.freed_bytes) == (False, 100)
    assert [row.id for row in await house.catalog.snapshots()] == [three]
    events = await house.catalog.events(0)
    assert [(event.type, event.payload["snapshot"]) for event in events] == [
        ("snapshot.deleted", one),
        ("snapshot.deleted", two),
    ]
    assert events[0].payload["guest"] == "web01"


async def test_s4_5_a_deletion_names_the_disks_that_cannot_be_reinitialised_without_it(
    house: House, workdir: Path
) -> None:
    one, two = await house.chain(a_disk(), {0: {0: 1}}, {0: {0: 2}})
    attached, alone, replaced, gone = (workdir / name for name in ("attached", "alone", "replaced", "gone"))
    for path in (attached, alone, replaced):
        path.touch()
    inodes = {attached: attached.stat().st_ino, alone: alone.stat().st_ino, replaced: 7, gone: None}
    async with house.catalog.write() as tx:
        await tx.add_disk(replace(a_disk(), id=DiskId("d-made"), target="vdz", source=str(attached)))
        for path, inode in inodes.items():
            await tx.put_origin(Origin(str(path), inode, one, 1.0))
        await tx.put_origin(Origin(str(workdir), None, two, 1.0))
    for dry_run in (True, False):
        done = await house.snapshots.delete([one], dry_run=dry_run)
        assert [sorted(row.disks) for row in done.snapshots] == [[str(alone), "web01/vdz"]]
        assert f"{alone} {'could' if dry_run else 'can'} no longer be re-initialised: it was made of {one}" in deletion(
            done
        )


async def test_all_of_a_deletion_happens_or_nothing(house: House) -> None:
    disk = a_disk()
    one, two = await house.chain(disk, {0: {0: 1}}, {})
    running = await house.progressing(disk, two)
    for ids, error in (
        ([one, "s-aaaaaaaaaaaa"], SnapshotUnknown),
        ([one, running], SnapshotInUse),
        ([one, two], SnapshotInUse),  # the base of the running one
    ):
        with pytest.raises(error):
            await house.snapshots.delete(ids, dry_run=False)
    assert [row.id for row in await house.catalog.snapshots()] == [one, two, running]
    await house.snapshots.delete([one], dry_run=False)


async def test_a_snapshot_being_restored_is_not_deleted_and_the_use_is_named(house: House) -> None:
    (one,) = await house.chain(a_disk(), {})
    with house.uses.hold_snapshot(one, "being restored to /images/new.qcow2"):
        with pytest.raises(SnapshotInUse, match=r"being restored to /images/new\.qcow2"):
            await house.snapshots.delete([one], dry_run=False)
        with pytest.raises(SnapshotInUse):
            await house.snapshots.delete([one], dry_run=True)
    await house.snapshots.delete([one], dry_run=False)


async def test_a_chain_shows_its_nodes_oldest_first_with_what_each_alone_holds(house: House) -> None:
    disk = a_disk(**known(a_view(), a_guest()))
    one, two = await house.chain(disk, {0: {0: 1, 1: 2}}, {0: {0: 3, 2: 0}})
    await house.progressing(disk, two)
    (shared,) = await house.chain(a_disk(target="vdb"), {0: {0: 1}})
    chain = await house.chains.info("web01/vda")
    assert [(node.snapshot.id, node.exclusive_bytes, node.head) for node in chain.nodes] == [
        (one, 0, False),
        (two, 300, True),
    ]
    assert (chain.snapshots, chain.limit, chain.head) == (2, 64, two)
    assert (chain.stored_bytes, chain.exclusive_bytes, chain.logical_bytes) == (600, 300, 2**31)
    listed = (await house.chains.listing()).chains
    assert [(row.target, row.stored_bytes) for row in listed] == [("vda", 600), ("vdb", 100)]
    assert listed[0].model_dump() == {k: v for k, v in chain.model_dump().items() if k != "nodes"}
    assert shared


async def test_a_chain_outlives_its_disk(house: House) -> None:
    gone = a_disk(released=True)
    await house.chain(gone, {0: {0: 1}})
    assert [row.released for row in (await house.chains.listing()).chains] == [True]
    assert (await house.chains.info(gone.id)).stored_bytes == 100


def test_the_bitmap_s_health_is_what_the_next_snapshot_can_expect() -> None:
    good = Bitmap("hvsnap-1", 65536, recording=True, persistent=True, inconsistent=False)
    assert health(None, [good]) is BitmapHealth.NONE
    assert health("hvsnap-1", None) is BitmapHealth.UNKNOWN
    assert health("hvsnap-1", [good]) is BitmapHealth.RECORDING
    assert health("hvsnap-1", []) is BitmapHealth.LOST
    assert health("hvsnap-1", [replace(good, inconsistent=True)]) is BitmapHealth.LOST
    assert health("hvsnap-1", [replace(good, recording=False)]) is BitmapHealth.LOST
    assert health("hvsnap-2", [good]) is BitmapHealth.LOST


async def test_guests_are_listed_with_the_protection_of_each_disk(house: House) -> None:
    system, data = a_view(), a_view("vdb", "/images/data.qcow2")
    cd = a_view("sda", layers=(), skip_reason="it is a cdrom")
    guest = a_guest(system, data, cd)
    off = a_guest(a_view(path="/images/mail.qcow2"), uuid=MAIL, name="mail", state=GuestState.OFF)
    house.hypervisor.shown = {WEB: guest, MAIL: off}
    disk = a_disk(**known(system, guest))
    _one, two = await house.chain(disk, {}, {})
    bitmap = Bitmap(f"hvsnap-{two}", 65536, recording=True, persistent=True, inconsistent=False)
    house.hypervisor.bitmaps_of[WEB, "vda"] = [bitmap]
    house.captures.busy = {disk.id}
    looked_at = []

    async def inspect(path: str, image_format: str) -> ImageInfo:
        looked_at.append(path)
        if path == "/images/data.qcow2":
            raise HypervisorFailed("cannot open it")
        return ImageInfo(path, image_format, 4096, (), None, None, encrypted=False, holds_bitmaps=True)

    listing = await Guests(house.inventory, house.hypervisor, house.catalog, house.captures, inspect).listing()
    mail, web = listing.guests
    assert (mail.name, mail.state, web.name) == ("mail", GuestState.OFF, "web01")
    first, second, third = web.disks
    assert (first.id, first.protection, first.snapshots) == (disk.id, Protection.PROTECTED, 2)
    assert (first.last_snapshot, first.bitmap, first.capturing) == (two, BitmapHealth.RECORDING, True)
    assert (second.id, second.protection, second.size_bytes) == (None, Protection.UNPROTECTED, None)
    assert (second.bitmap, second.capturing) == (BitmapHealth.NONE, False)
    assert (third.protection, third.path, third.skip_reason) == (Protection.SKIPPED, "", "it is a cdrom")
    assert mail.disks[0].size_bytes == 4096
    assert sorted(looked_at) == ["/images/data.qcow2", "/images/mail.qcow2"]

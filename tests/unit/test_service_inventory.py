"""Finding guests and disks by any name, knowing a disk again, looking through open overlays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hvsnap.capture.facts import KIND, CapturedDisk, CaptureFacts, Mode, Step
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import BadRequest, DiskUnknown, GuestUnknown, HvsnapError, NoEligibleDisk
from hvsnap.model import DiskId, GuestState, Layer, OperationId, SnapshotId
from hvsnap.service.inventory import Inventory, pick_disk, pick_guest, resolve
from tests.catalog_kit import StoppedClock, a_disk
from tests.service_kit import MAIL, WEB, FakeHypervisor, a_catalog, a_guest, a_view, known

SNAPSHOT = SnapshotId("s-abcdefghijkl")
OVERLAY = f"/images/web.qcow2.{SNAPSHOT}.overlay"


def facts(disk: str = "d-1", overlay: str = OVERLAY, base: str = "/images/web.qcow2") -> dict[str, Any]:
    captured = CapturedDisk(DiskId(disk), SNAPSHOT, "vda", base, "qcow2", overlay, None, None)
    return CaptureFacts(Mode.REDIRECT, (captured,)).as_json()


async def open_capture(catalog: Catalog) -> OperationId:
    async with catalog.write() as tx:
        return (await tx.open_operation(KIND, WEB, Step.READING, facts())).id


def test_a_disk_on_an_overlay_is_shown_as_its_image_with_what_lies_below() -> None:
    base, template = Layer("/images/web.qcow2", "qcow2"), Layer("/images/template.qcow2", "qcow2")
    on_overlay = a_view(layers=(Layer(OVERLAY, "qcow2"), base, template))
    assert resolve(on_overlay, {OVERLAY: base}).layers == (base, template)


def test_a_guest_that_is_off_names_only_the_overlay_and_is_looked_through_all_the_same() -> None:
    raw = Layer("/images/web.raw", "raw")
    assert resolve(a_view(path=OVERLAY), {OVERLAY: raw}).layers == (raw,)


def test_overlays_over_overlays_and_circles_end() -> None:
    one, two, base = (Layer(path, "qcow2") for path in ("/1", "/2", "/base"))
    assert resolve(a_view(path="/1"), {"/1": two, "/2": base}).layers == (base,)
    circle = resolve(a_view(path="/1"), {"/1": two, "/2": one})
    assert circle.top in (one, two)


def test_a_disk_without_an_open_capture_stays_as_it_is() -> None:
    view = a_view()
    assert resolve(view, {OVERLAY: Layer("/x", "raw")}) is view


def test_a_guest_is_found_by_name_and_uuid_in_either_case() -> None:
    web, mail = a_guest(), a_guest(uuid=MAIL, name="mail")
    assert pick_guest([web, mail], "mail") is mail
    assert pick_guest([web, mail], WEB.upper()) is web
    with pytest.raises(GuestUnknown, match="db99"):
        pick_guest([web, mail], "db99")


def test_two_guests_of_one_name_are_named_both() -> None:
    with pytest.raises(BadRequest) as caught:
        pick_guest([a_guest(), a_guest(uuid=MAIL)], "web01")
    assert WEB in caught.value.message
    assert MAIL in caught.value.message


def test_a_disk_is_found_by_id_target_path_and_guest_with_target() -> None:
    one = a_disk(source="/images/a.qcow2")
    two = a_disk(source="/images/b.qcow2", target="vdb")
    for name in (one.id, "vda", "/images/a.qcow2", "web01/vda", f"{WEB}/vda"):
        assert pick_disk([one, two], name) is one
    with pytest.raises(DiskUnknown):
        pick_disk([one, two], "vdc")
    with pytest.raises(DiskUnknown):
        pick_disk([one], "vda", guest="mail")


def test_a_target_of_several_guests_is_refused_and_names_them() -> None:
    web, mail = a_disk(), a_disk(guest_uuid=MAIL, guest_name="mail")
    with pytest.raises(BadRequest) as caught:
        pick_disk([web, mail], "vda")
    assert {web.id, mail.id} <= set(caught.value.message.replace("(", " ").replace(")", " ").split())
    assert pick_disk([web, mail], "vda", guest="mail") is mail
    assert pick_disk([web, mail], "mail/vda") is mail


def test_a_target_means_the_disk_that_is_there_now_and_older_ones_go_by_id() -> None:
    old = a_disk(created_at=1.0, released=True)
    new = a_disk(created_at=2.0)
    assert pick_disk([new, old], "vda") is new
    assert pick_disk([new, old], old.id) is old


@pytest.fixture
def web() -> FakeHypervisor:
    skipped = a_view("sda", "/images/cd.iso", bus="sata", skip_reason="it is a cdrom")
    return FakeHypervisor(a_guest(a_view(), a_view("vdb", "/images/data.qcow2"), skipped))


async def test_no_disk_named_means_all_that_can_be_captured(workdir: Path, web: FakeHypervisor) -> None:
    async with a_catalog(workdir) as catalog:
        found = await Inventory(web, catalog, StoppedClock()).to_capture("web01", ())
        assert [one.view.target for one in found] == ["vda", "vdb"]


async def test_disks_named_twice_or_in_any_order_are_captured_once(workdir: Path, web: FakeHypervisor) -> None:
    async with a_catalog(workdir) as catalog:
        found = await Inventory(web, catalog, StoppedClock()).to_capture(
            "web01", ("vdb", "/images/web.qcow2", "web01/vda")
        )
        assert [one.view.target for one in found] == ["vda", "vdb"]


@pytest.mark.parametrize(
    ("guest", "disks", "error", "why"),
    [
        ("db99", (), GuestUnknown, "db99"),
        ("web01", ("vdc",), DiskUnknown, "web01 has no disk vdc"),
        ("web01", ("vda", "sda"), NoEligibleDisk, "it is a cdrom"),
        ("web01", ("../vda",), DiskUnknown, "has no disk"),
    ],
)
async def test_what_cannot_be_captured_is_refused_with_its_reason(
    workdir: Path, web: FakeHypervisor, guest: str, disks: tuple[str, ...], error: type[HvsnapError], why: str
) -> None:
    async with a_catalog(workdir) as catalog:
        with pytest.raises(error, match=why):
            await Inventory(web, catalog, StoppedClock()).to_capture(guest, disks)
        assert await catalog.disks() == []


async def test_a_guest_without_eligible_disks_is_refused(workdir: Path) -> None:
    diskless = FakeHypervisor(a_guest(a_view("sda", skip_reason="it is a cdrom")), a_guest(uuid=MAIL, name="mail"))
    async with a_catalog(workdir) as catalog:
        for guest in ("web01", "mail"):
            with pytest.raises(NoEligibleDisk, match="no disk that can be captured"):
                await Inventory(diskless, catalog, StoppedClock()).to_capture(guest, ())


async def test_a_disk_is_registered_once_and_known_again_after_a_rename_of_its_guest(workdir: Path) -> None:
    view = a_view()
    hypervisor = FakeHypervisor(a_guest(view))
    async with a_catalog(workdir) as catalog:
        inventory = Inventory(hypervisor, catalog, StoppedClock())
        (found,) = await inventory.to_capture("web01", ())
        first = await inventory.register(found, 2**30)
        hypervisor.shown[WEB] = a_guest(view, name="web02")
        (found,) = await inventory.to_capture("web02", ())
        assert found.known == first
        again = await inventory.register(found, 2**30)
        assert again == replace(first, guest_name="web02")
        assert await catalog.disks() == [again]


async def test_a_disk_with_a_serial_keeps_its_chain_when_its_target_changes(workdir: Path) -> None:
    hypervisor = FakeHypervisor(a_guest(a_view("vdb", serial="S1")))
    async with a_catalog(workdir) as catalog:
        inventory = Inventory(hypervisor, catalog, StoppedClock())
        first = await inventory.register((await inventory.to_capture("web01", ()))[0], 1)
        hypervisor.shown[WEB] = a_guest(a_view("vdc", serial="S1"))
        again = await inventory.register((await inventory.to_capture("web01", ()))[0], 1)
        assert (again.id, again.target) == (first.id, "vdc")


async def test_another_image_in_the_same_place_is_another_disk(workdir: Path) -> None:
    hypervisor = FakeHypervisor(a_guest(a_view()))
    async with a_catalog(workdir) as catalog:
        inventory = Inventory(hypervisor, catalog, StoppedClock())
        first = await inventory.register((await inventory.to_capture("web01", ()))[0], 1)
        hypervisor.shown[WEB] = a_guest(a_view(path="/images/new.qcow2"))
        (found,) = await inventory.to_capture("web01", ())
        assert found.known is None
        with pytest.raises(DiskUnknown, match="no longer attached"):
            await inventory.attached(first)


async def test_during_a_capture_a_disk_is_known_by_its_image_not_its_overlay(workdir: Path) -> None:
    base = Layer("/images/web.qcow2", "qcow2")
    guest = a_guest(a_view(layers=(Layer(OVERLAY, "qcow2"), base)))
    async with a_catalog(workdir) as catalog:
        disk = a_disk(**known(a_view(), guest))
        async with catalog.write() as tx:
            await tx.add_disk(disk)
        await open_capture(catalog)
        inventory = Inventory(FakeHypervisor(guest), catalog, StoppedClock())
        (found,) = await inventory.to_capture("web01", (OVERLAY.removesuffix(f".{SNAPSHOT}.overlay"),))
        assert found.known == disk
        assert (await inventory.disk(OVERLAY)).id == disk.id
        assert (await inventory.attached(disk)).view.layers == (base,)


async def test_a_capture_that_ends_during_the_look_does_not_make_a_disk_of_its_overlay(
    workdir: Path,
) -> None:
    base = Layer("/images/web.qcow2", "qcow2")
    on_overlay, back = a_guest(a_view(layers=(Layer(OVERLAY, "qcow2"), base))), a_guest(a_view())

    async with a_catalog(workdir) as catalog:
        operation = await open_capture(catalog)

        class Ending(FakeHypervisor):
            async def guests(self) -> list[Any]:
                shown = await super().guests()
                if self.shown[WEB] is on_overlay:
                    async with catalog.write() as tx:
                        await tx.close_operation(operation)
                    self.shown[WEB] = back
                return shown

        inventory = Inventory(Ending(on_overlay), catalog, StoppedClock())
        assert (await inventory.guest("web01")).disks[0].layers == (base,)


async def test_a_capture_that_begins_and_ends_between_two_looks_is_looked_at_anew(workdir: Path) -> None:
    """Neither look at the journal knows its overlay; only the overlay's name gives it away."""
    hypervisor = FakeHypervisor(a_guest(a_view(path=OVERLAY)))
    looks = []

    def back_at_the_second_look() -> None:
        looks.append(1)
        if len(looks) == 2:
            hypervisor.shown[WEB] = a_guest(a_view())

    hypervisor.before_looking.append(back_at_the_second_look)
    async with a_catalog(workdir) as catalog:
        inventory = Inventory(hypervisor, catalog, StoppedClock())
        assert (await inventory.guest("web01")).disks[0].top.path == "/images/web.qcow2"


async def test_an_overlay_that_nobody_knows_is_never_captured_as_a_disk_of_its_own(workdir: Path) -> None:
    hypervisor = FakeHypervisor(a_guest(a_view(path=OVERLAY), state=GuestState.OFF))
    async with a_catalog(workdir) as catalog:
        with pytest.raises(NoEligibleDisk, match="the journal does not know"):
            await Inventory(hypervisor, catalog, StoppedClock()).to_capture("web01", ("vda",))

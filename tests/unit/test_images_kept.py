"""Images in catalog and store: what is behind one stays, and a crash leaves neither too much nor too little."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from hvsnap.errors import Damaged, FormatUnknown, ImageUnknown, Refused, SnapshotPromoted, SnapshotUnknown, StoreFailed
from hvsnap.model import Image, ImageId, SnapshotId, new_id
from hvsnap.store import image as form
from hvsnap.store.repository import Repository
from hvsnap.upkeep.check import Checker, Kind
from hvsnap.upkeep.images import ImageKeeper
from hvsnap.upkeep.rebuild import Rebuild
from tests.store_kit import MemoryObjects
from tests.upkeep_kit import Disks, FusedObjects, House, Killed, a_house

DISK_BLOCKS = 16


def an_image(snapshot: str, name: str = "debian", **changes: object) -> Image:
    image = Image(ImageId(new_id("i")), name, "twelve", SnapshotId(snapshot), 1000.25)
    return replace(image, **changes)  # type: ignore[arg-type]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with a_house(tmp_path / "state", FusedObjects()) as one:
        yield one


async def a_snapshot(house: House, name: str = "vda") -> SnapshotId:
    disks = Disks()
    await disks.add(house, name, DISK_BLOCKS)
    disks.write(name, 1, bytes([7]) * house.store.block_size)
    return await disks.take(house, name)


# -- the object -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [False, True])
def test_an_object_says_what_it_was_made_of_and_every_change_is_found(sealed: bool) -> None:
    repository = Repository.new(65536, "zstd:1", sealed=sealed)
    image = an_image("s-aaaaaaaaaaaa", "Вася's")
    data, name = form.encode(image, repository), form.object_name(image.id)
    assert form.decode(data, name, repository) == image
    assert ("s-aaaaaaaaaaaa" in data.decode()) is not sealed
    for at in range(0, len(data), 7):
        for changed in (data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], data[:at]):
            if json_of(changed) != json.loads(data):
                with pytest.raises((Damaged, FormatUnknown)):
                    form.decode(changed, name, repository)
    for other in (
        (form.object_name(ImageId("i-other")), repository),
        (name, replace(repository, id=bytes(16))),
        (name, replace(repository, secret=bytes(32))),
        (name, replace(repository, sealed=not sealed)),
    ):
        with pytest.raises(Damaged):
            form.decode(data, *other)


def json_of(data: bytes) -> object:
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_an_object_of_a_later_version_is_told_from_a_damaged_one() -> None:
    repository = Repository.new(65536, "zstd:1")
    image = an_image("s-aaaaaaaaaaaa")
    data = form.encode(image, repository).replace(b'"version": 1', b'"version": 2')
    with pytest.raises(FormatUnknown):
        form.decode(data, form.object_name(image.id), repository)


# -- the rule -------------------------------------------------------------------------------------


async def test_s4_5_no_transaction_deletes_a_snapshot_behind_an_image(house: House) -> None:
    snapshot = await a_snapshot(house)
    keeper = ImageKeeper(house.catalog, house.store)
    image = an_image(snapshot)
    await keeper.create(image, {})
    with pytest.raises(SnapshotPromoted, match=rf"debian \({image.id}\)") as refused:
        async with house.catalog.write() as tx:
            await tx.delete_snapshot(snapshot)
    assert f"image-delete {image.id}" in refused.value.hint
    await keeper.delete(image.id, {})
    async with house.catalog.write() as tx:
        await tx.delete_snapshot(snapshot)
    assert await house.store.images.all() == []


async def test_an_image_of_a_snapshot_that_is_gone_or_with_a_name_that_is_taken_leaves_nothing(house: House) -> None:
    snapshot = await a_snapshot(house)
    keeper = ImageKeeper(house.catalog, house.store)
    kept = an_image(snapshot)
    await keeper.create(kept, {})
    with pytest.raises(SnapshotUnknown):
        await keeper.create(an_image("s-aaaaaaaaaaaa", "other"), {})
    with pytest.raises(Refused, match="image debian already"):
        await keeper.create(an_image(snapshot), {})
    with pytest.raises(ImageUnknown):
        await keeper.delete(ImageId("i-aaaaaaaaaaaa"), {})
    assert await house.catalog.images() == [kept]
    assert await house.store.images.all() == [kept.id]
    assert await house.catalog.image_objects_to_remove() == []
    assert [event.type for event in await house.catalog.events(0)] == ["image.created"]


# -- crashes and damage ---------------------------------------------------------------------------


@pytest.mark.parametrize("delete", [False, True])
async def test_killed_anywhere_an_image_is_there_wholly_or_not_at_all(tmp_path: Path, delete: bool) -> None:
    seen = set()
    for steps in range(20):
        for after in (False, True):
            objects = FusedObjects()
            state = tmp_path / f"{steps}-{after}"
            house = await House.open(state, objects, objects.fuse)
            image = an_image(await a_snapshot(house))
            keeper = ImageKeeper(house.catalog, house.store)
            if delete:
                await keeper.create(image, {})
            objects.fuse.set(steps, after=after)
            killed = False
            try:
                await (keeper.delete(image.id, {}) if delete else keeper.create(image, {}))
            except Killed:
                killed = True
            objects.fuse.blown = False
            objects.fuse.set(10**9, after=False)
            await house.restart(state)
            await ImageKeeper(house.catalog, house.store).reconcile()
            catalog = [one.id for one in await house.catalog.images()]
            assert catalog == await house.store.images.all()
            assert await house.catalog.image_objects_to_remove() == []
            events = [event.type for event in await house.catalog.events(0)]
            assert events[int(delete) :] == (
                ["image.deleted" if delete else "image.created"] * (bool(catalog) != delete)
            )
            seen.add(bool(catalog))
            await house.close()
        if not killed:
            break
    assert seen == {True, False}


async def test_what_the_store_has_lost_or_damaged_is_written_again_and_what_is_unknown_stays(house: House) -> None:
    snapshot = await a_snapshot(house)
    keeper = ImageKeeper(house.catalog, house.store)
    lost, hurt = an_image(snapshot, "lost"), an_image(snapshot, "hurt")
    for image in (lost, hurt):
        await keeper.create(image, {})
    foreign = an_image(snapshot, "foreign")
    await house.store.images.put(foreign)
    objects = house.objects
    assert isinstance(objects, MemoryObjects)
    await house.store.images.delete(lost.id)
    objects.objects[form.object_name(hurt.id)] = b"{}"
    found = await Checker(house.catalog, house.store, house.clock).check()
    assert {(one.kind, one.subject) for one in found.differences} == {
        (Kind.IMAGE_MISSING, lost.id),
        (Kind.IMAGE_UNKNOWN, foreign.id),
    }
    assert found.sound
    uncertain = ImageKeeper(house.catalog, house.store, lambda: False)
    assert await uncertain.reconcile() == 0
    assert await keeper.reconcile() == 2
    assert await keeper.reconcile() == 0
    assert await house.store.images.get(hurt.id) == hurt
    assert await house.store.images.all() == sorted([lost.id, hurt.id, foreign.id])


async def test_where_the_store_does_not_answer_the_object_goes_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = ImageKeeper(house.catalog, house.store)
    image = an_image(await a_snapshot(house))
    await keeper.create(image, {})

    async def fail(_image: ImageId) -> None:
        raise StoreFailed("it does not answer")

    with monkeypatch.context() as broken:
        broken.setattr(house.store.images, "delete", fail)
        await keeper.delete(image.id, {})
    assert (await house.catalog.images(), await house.store.images.all()) == ([], [image.id])
    assert await keeper.reconcile() == 1
    assert await house.store.images.all() == []


async def test_images_survive_the_loss_of_the_catalog(house: House, tmp_path: Path) -> None:
    snapshot = await a_snapshot(house)
    keeper = ImageKeeper(house.catalog, house.store)
    first, second = an_image(snapshot), an_image(snapshot, "web")
    for image in (first, second):
        await keeper.create(image, {})
    # A deletion that a crash interrupted, whose name was taken again; one that has lost its snapshot; a damaged one.
    again = an_image(snapshot, "web", created_at=2000.5)
    orphan, hurt = an_image("s-aaaaaaaaaaaa", "orphan"), an_image(snapshot, "hurt")
    for image in (again, orphan, hurt):
        await house.store.images.put(image)
    assert isinstance(house.objects, MemoryObjects)
    house.objects.objects[form.object_name(hurt.id)] += b"}"
    async with a_house(tmp_path / "new", house.objects) as fresh:
        found = await Rebuild(fresh.catalog, fresh.store, fresh.clock).run()
        named = replace(again, name=f"web {again.id}")
        assert await fresh.catalog.images() == sorted([first, second, named], key=lambda image: image.name)
        assert found.images == 3
        assert sorted(hurt.id in line or orphan.id in line for line in found.damaged) == [True, True]
        with pytest.raises(SnapshotPromoted):
            async with fresh.catalog.write() as tx:
                await tx.delete_snapshot(snapshot)

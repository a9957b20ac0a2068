"""Images by the service's rules, and their files, which are whole or not there."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvsnap import wire
from hvsnap.errors import (
    BadRequest,
    Failed,
    ImageUnknown,
    Refused,
    SnapshotPromoted,
    SnapshotUnknown,
    TargetExists,
)
from hvsnap.happenings import EventType
from hvsnap.hypervisor import compressed
from hvsnap.model import SnapshotId, State
from hvsnap.restore import export, target
from hvsnap.restore.export import ImageExporter
from hvsnap.service.images import ExportRecovery
from hvsnap.service.requests import DiskRequest
from tests import api_kit
from tests.api_kit import a_house
from tests.catalog_kit import a_disk, a_page, a_snapshot, add_chain

BLOCK = 65536


@dataclass
class House:
    """A service whose store holds real blocks."""

    api: api_kit.House
    directory: Path

    async def snapshot(self, blocks: dict[int, bytes], size_bytes: int, **changes: object) -> SnapshotId:
        """Store blocks as a snapshot of a new disk."""
        session = self.api.store.session()
        stored = await session.put(memoryview(b"".join(blocks.values())))
        await session.flush()
        disk = a_disk(size_bytes=size_bytes, **changes)
        row = a_snapshot(disk.id, 1, size_bytes=size_bytes)
        async with self.api.catalog.write() as tx:
            await tx.add_disk(disk)
            await tx.add_snapshot(row)
            await tx.put_page(row.id, 0, a_page(dict(zip(blocks, stored.ids.tolist(), strict=True))))
        return row.id

    async def image(self, snapshot: str, name: str = "debian-12") -> wire.Image:
        body = wire.ImageCreate(snapshot=snapshot, name=name, description="of November")
        return await self.api.service.images.create(body)

    async def exported(self, image: str, path: Path) -> wire.Task | None:
        task = await self.api.service.images.export(image, str(path))
        ended = await self.api.tasks.wait(task.id)
        if ended.error is not None:
            raise ended.error
        return None

    async def events(self) -> list[str]:
        return [event.type for event in await self.api.catalog.events(0) if event.type.startswith("image.")]


@pytest.fixture
async def house(workdir: Path) -> AsyncIterator[House]:
    async with a_house(workdir / "state") as api:
        yield House(api, workdir)


async def test_s7_4_only_an_accomplished_snapshot_of_a_system_disk_becomes_an_image(house: House) -> None:
    catalog = house.api.catalog
    (system,) = await add_chain(catalog, a_disk(), {})
    (data,) = await add_chain(catalog, a_disk(target="vdb", system=False), {})
    disk = a_disk(target="vdc")
    await add_chain(catalog, disk)
    failed = a_snapshot(disk.id, 1, state=State.FAILED)
    async with catalog.write() as tx:
        await tx.add_snapshot(failed)
    for snapshot, name, error in (
        (data, "debian", Refused),
        (failed.id, "debian", Refused),
        ("s-aaaaaaaaaaaa", "debian", SnapshotUnknown),
        (system, "x", BadRequest),
        (system, "auto-debian", BadRequest),
        (system, "i-aaaaaaaaaaaa", BadRequest),
        (system, "s-aaaaaaaaaaaa", BadRequest),
    ):
        with pytest.raises(error):
            await house.image(snapshot, name)
    assert (await catalog.images(), await house.events(), await house.api.store.images.all()) == ([], [], [])
    made = await house.image(system)
    assert (made.name, made.description, made.snapshot, made.target) == ("debian-12", "of November", system, "vda")
    with pytest.raises(Refused, match="already"):
        await house.image(system)
    assert (await house.api.service.images.listing()).images == [made]
    assert await house.events() == [EventType.IMAGE_CREATED]


async def test_s4_5_a_snapshot_behind_an_image_is_deleted_by_nobody_before_the_image_is(house: House) -> None:
    one, two = await add_chain(house.api.catalog, a_disk(), {}, {})
    first, second = await house.image(one, "debian"), await house.image(one, "web")
    delete = house.api.service.snapshots.delete
    for dry_run in (True, False):
        for told_as in (EventType.SNAPSHOT_DELETED, EventType.SNAPSHOT_EXPIRED, EventType.SNAPSHOT_EVICTED):
            with pytest.raises(SnapshotPromoted, match=rf"debian \({first.id}\), web \({second.id}\)"):
                await delete([two, one], dry_run=dry_run, told_as=told_as)
    assert len(await house.api.catalog.snapshots()) == 2
    assert (await house.api.service.images.delete(first.id)).name == "debian"
    with pytest.raises(SnapshotPromoted):
        await delete([one], dry_run=False)
    await house.api.service.images.delete("web")
    with pytest.raises(ImageUnknown):
        await house.api.service.images.delete("web")
    await delete([one], dry_run=False)
    assert await house.events() == ["image.created", "image.created", "image.deleted", "image.deleted"]


@pytest.mark.parametrize("size_bytes", [16 * BLOCK, 15 * BLOCK + 512])
async def test_s7_4_an_exported_image_is_a_compressed_qcow2_of_the_snapshot_s_bytes(
    house: House, size_bytes: int
) -> None:
    blocks = {0: b"boot" * (BLOCK // 4), 7: os.urandom(1000) * 65 + bytes(536), 15: b"last" * 128 + bytes(BLOCK - 512)}
    image = await house.image(await house.snapshot(blocks, size_bytes))
    path = house.directory / "a, b.qcow2"
    await house.exported(image.id, path)
    told = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True, check=True)
    assert "No errors" in told.stdout
    assert "100.00% compressed clusters" in told.stdout
    raw = house.directory / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    wanted = bytearray(16 * BLOCK)
    for block, content in blocks.items():
        wanted[block * BLOCK : (block + 1) * BLOCK] = content
    assert raw.read_bytes() == bytes(wanted[:size_bytes])
    assert sorted(os.listdir(house.directory)) == sorted(["a, b.qcow2", "raw", "state"])
    (task,) = house.api.tasks.all()
    assert isinstance(task.result, wire.ImageExported)
    assert (task.result.file_bytes, task.result.written_bytes) == (path.stat().st_size, 3 * BLOCK)
    before = path.read_bytes()
    with pytest.raises(TargetExists):
        await house.exported(image.id, path)
    assert path.read_bytes() == before


async def test_s7_4_disks_of_an_image_do_not_keep_it_and_an_export_goes_on_without_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await house.image(await house.snapshot({0: b"x" * BLOCK}, BLOCK))
    going, cut = asyncio.Event(), compressed.rounded

    async def held(path: str, size_bytes: int) -> None:
        await going.wait()

    monkeypatch.setattr(compressed, "rounded", lambda size_bytes: cut(size_bytes) + BLOCK)
    monkeypatch.setattr(compressed, "cut", held)
    house.api.maker.go_on.clear()
    disk = await house.api.service.disks.create(DiskRequest(snapshot=image.snapshot, path="/images/new.qcow2"))
    task = await house.api.service.images.export("debian-12", str(house.directory / "out.qcow2"))
    await house.api.service.images.delete("debian-12")
    going.set()
    house.api.maker.go_on.set()
    for one in (disk, task):
        assert (await house.api.tasks.wait(one.id)).state is wire.TaskState.ACCOMPLISHED


@pytest.mark.parametrize("path", ["relative.qcow2", "/dev/shm/a", "/var/lib/hvsnap/a", "/nowhere/a"])
async def test_a_place_that_no_file_belongs_in_is_refused_before_anything_is_written(house: House, path: str) -> None:
    image = await house.image(await house.snapshot({0: b"x" * BLOCK}, BLOCK))
    with pytest.raises(BadRequest):
        await house.api.service.images.export(image.id, path)
    with pytest.raises(ImageUnknown):
        await house.api.service.images.export("i-aaaaaaaaaaaa", str(house.directory / "a"))
    assert await house.api.catalog.operations() == []


async def test_what_fails_or_is_killed_leaves_no_file_or_a_whole_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await house.image(await house.snapshot({0: b"x" * BLOCK}, BLOCK + 512))
    path = house.directory / "out.qcow2"
    (row,) = await house.api.catalog.images()
    exporter = ImageExporter(house.api.catalog, house.api.store, str(house.directory / "state"))

    async def fail(path: str, size_bytes: int) -> None:
        raise Failed("the device is gone")

    with monkeypatch.context() as broken:
        broken.setattr(compressed, "cut", fail)
        with pytest.raises(Failed):
            await exporter.create(row, str(path), lambda _progress: None)
    assert os.listdir(house.directory) == ["state"]

    async def nothing(*_arguments: object) -> None:
        """What a killed daemon does."""

    for published in (False, True):
        with monkeypatch.context() as killed:
            killed.setattr(exporter, "_give_up", nothing)
            if not published:
                killed.setattr(compressed, "cut", fail)
            else:
                killed.setattr(target, "publish", killed_after(target.publish))
            with pytest.raises((Failed, RuntimeError)):
                await exporter.create(row, str(path), lambda _progress: None)
        assert len(await house.api.catalog.operations(export.KIND)) == 1
        found = (await house.api.service.recovery.recover()).operations
        assert [(one.kind, one.outcome) for one in found] == [("image-export", "finished" if published else "undone")]
        assert sorted(os.listdir(house.directory)) == [*["out.qcow2"] * published, "state"]
        assert await house.api.catalog.operations() == []
    with house.api.uses.hold_path(str(path), "being made"):
        async with house.api.catalog.write() as tx:
            await tx.open_operation(export.KIND, a_disk().guest_uuid, "writing", {"target": str(path)})
        assert await ExportRecovery(house.api.catalog, exporter, house.api.uses).recover() == []
    assert image


def killed_after(publish: object) -> object:
    def killed(temporary: str, path: str) -> None:
        publish(temporary, path)  # type: ignore[operator]
        raise RuntimeError("killed")

    return killed

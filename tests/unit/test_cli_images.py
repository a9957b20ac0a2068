"""Commands about images, for people and as JSON."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hvsnap import wire
from tests.catalog_kit import a_disk, add_chain
from tests.cli_kit import Desk, a_desk
from tests.unit.test_cli_completion import completed


@pytest.fixture
async def desk(workdir: Path) -> AsyncIterator[Desk]:
    async with a_desk(workdir) as one:
        yield one


async def test_s7_4_an_image_is_made_listed_exported_and_deleted(desk: Desk) -> None:
    (snapshot,) = await add_chain(desk.house.catalog, a_disk(size_bytes=2**20), {})
    ran = await desk.hvsnap("image-create", snapshot, "debian-12", "--description", "of November")
    (image,) = await desk.house.catalog.images()
    assert ran.out == f"{image.id}  image debian-12 of {snapshot}, web01/vda\n"
    header, row = (await desk.hvsnap("image-list")).out.splitlines()
    assert header.split()[:2] == ["ID", "NAME"]
    assert row.split()[:5] == [image.id, "debian-12", snapshot, "web01", "vda"]
    assert (await desk.hvsnap("image-list", "-q")).out.split() == row.split()
    answer = wire.ImageList.model_validate((await desk.hvsnap("image-list", "--json")).object)
    assert [one.id for one in answer.images] == [image.id]
    ran = await desk.hvsnap("snapshot-delete", snapshot)
    assert ran.status == 4
    assert f"behind image debian-12 ({image.id})\nhint: delete the image first" in ran.err
    path = desk.directory / "out.qcow2"
    ran = await desk.hvsnap("image-export", "debian-12", str(path))
    assert (ran.status, path.exists()) == (0, True)
    assert ran.out.startswith(f"{path}  qcow2 of 1.0 GiB, 0 B written, compressed to ")
    ran = await desk.hvsnap("image-export", "debian-12", str(path), "--json")
    assert (ran.status, ran.object["code"]) == (4, "target-exists")
    second = desk.directory / "second.qcow2"
    ran = await desk.hvsnap("image-export", image.id, str(second), "--json")
    task = wire.Task.model_validate(ran.object)
    assert isinstance(task.result, wire.ImageExported)
    ran = await desk.hvsnap("image-export", image.id, str(desk.directory / "third.qcow2"), "--detach")
    assert (await desk.house.tasks.wait(ran.out.strip())).state is wire.TaskState.ACCOMPLISHED
    ran = await desk.hvsnap("image-delete", "debian-12")
    assert ran.out == f"image debian-12 is deleted; snapshot {snapshot} stays\n"
    assert (await desk.hvsnap("image-delete", "debian-12")).status == 3
    assert (await desk.hvsnap("snapshot-delete", snapshot)).status == 0


async def test_a_file_that_cannot_be_written_is_an_error_with_its_task(desk: Desk) -> None:
    (snapshot,) = await add_chain(desk.house.catalog, a_disk(size_bytes=2**20), {0: {0: 99}})
    await desk.hvsnap("image-create", snapshot, "broken")
    path = desk.directory / "out.qcow2"
    ran = await desk.hvsnap("image-export", "broken", str(path), "--json")
    assert (ran.status, ran.object["code"], ran.object["task"]["state"]) == (7, "damaged", "failed")
    assert not path.exists()


async def test_images_complete_by_name_and_id(desk: Desk) -> None:
    (snapshot,) = await add_chain(desk.house.catalog, a_disk(), {})
    await desk.hvsnap("image-create", snapshot, "debian-12")
    (image,) = await desk.house.catalog.images()
    ran = await completed(desk, "hvsnap image-export ")
    assert set(ran.out.split()) == {"debian-12", image.id}

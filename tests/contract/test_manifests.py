"""Manifests in a repository, on each object store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hvsnap.errors import Damaged, NoSpace, NotFound, ObjectExists
from hvsnap.model import PAGE_BLOCKS, SnapshotId
from hvsnap.ports import ObjectStore
from hvsnap.store.identity import ManifestHead, ManifestName
from hvsnap.store.manifest import ManifestPage
from hvsnap.store.manifests import PIECE_BYTES, Manifests
from hvsnap.store.objects import LocalObjects
from hvsnap.store.repository import Repository
from tests.catalog_kit import a_disk, a_snapshot
from tests.store_kit import BLOCK, MemoryObjects, Watched, seeded

DISK = a_disk()


def a_head(sequence: int = 1, **changes: object) -> ManifestHead:
    return ManifestHead(replace(a_snapshot(DISK.id, sequence, size_bytes=2**40), **changes), DISK, BLOCK, "<domain/>")  # type: ignore[arg-type]


def full_pages(count: int) -> list[ManifestPage]:
    """Return pages whose digests do not compress: 139 KiB each."""
    rng = np.random.default_rng(seeded().randrange(2**32))
    index = np.arange(PAGE_BLOCKS, dtype=np.uint16)
    return [
        ManifestPage(number, index, rng.integers(0, 256, (PAGE_BLOCKS, 32), dtype=np.uint8)) for number in range(count)
    ]


async def stream(pages: Iterable[ManifestPage]) -> AsyncIterator[ManifestPage]:
    for page in pages:
        yield page


@pytest.fixture(params=["local", "memory"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    return LocalObjects(tmp_path / "store") if request.param == "local" else MemoryObjects()


@pytest.fixture(params=["plain", "sealed"])
def repository(request: pytest.FixtureRequest) -> Repository:
    return Repository.new(BLOCK, "zstd:1", sealed=request.param == "sealed")


@pytest.fixture
def manifests(objects: ObjectStore, repository: Repository) -> Manifests:
    return Manifests(objects, repository)


async def test_a_manifest_of_many_pieces_is_read_back(manifests: Manifests, objects: ObjectStore) -> None:
    head, pages = a_head(), full_pages(40)
    name = await manifests.put(head, stream(pages))
    assert await objects.size(str(name)) > 4 * PIECE_BYTES
    assert await manifests.head(name) == head
    read = [page async for page in manifests.pages(name)]
    assert [page.number for page in read] == list(range(40))
    assert all((one.digests == two.digests).all() for one, two in zip(read, pages, strict=True))


async def test_a_manifest_is_written_once(manifests: Manifests) -> None:
    head = a_head()
    name = await manifests.put(head, stream([]))
    with pytest.raises(ObjectExists):
        await manifests.put(head, stream(full_pages(1)))
    assert [page async for page in manifests.pages(name)] == []


async def test_pages_that_fail_to_come_leave_no_manifest(manifests: Manifests, objects: ObjectStore) -> None:
    async def broken() -> AsyncIterator[ManifestPage]:
        for page in full_pages(20):
            yield page
        raise NoSpace("full")

    with pytest.raises(NoSpace):
        await manifests.put(a_head(), broken())
    assert [item.name async for item in objects.list("")] == []


@pytest.mark.parametrize("step", ["write", "commit"])
async def test_a_device_that_is_full_leaves_no_manifest(
    objects: ObjectStore, repository: Repository, step: str
) -> None:
    async def fail(at: str, _name: str) -> None:
        if at == step:
            raise NoSpace("full")

    with pytest.raises(NoSpace):
        await Manifests(Watched(objects, fail), repository).put(a_head(), stream(full_pages(10)))
    assert [item.name async for item in objects.list("")] == []


async def test_names_are_listed_by_disk_and_only_the_highest_revision(manifests: Manifests) -> None:
    one, two = a_head(1), a_head(2)
    other_disk = a_disk()
    other = ManifestHead(a_snapshot(other_disk.id, 1), other_disk, BLOCK)
    revised = replace(one, revision=1)
    for head in (two, revised, one, other):
        await manifests.put(head, stream([]))
    assert [str(name) async for name in manifests.names(DISK.id)] == [revised.name, two.name]
    assert {str(name) async for name in manifests.names()} == {revised.name, two.name, other.name}
    await manifests.delete(ManifestName.parse(one.name))
    await manifests.delete(ManifestName.parse(one.name))
    await manifests.delete(ManifestName.parse(two.name))
    assert [str(name) async for name in manifests.names(DISK.id)] == [revised.name]


async def test_a_missing_manifest_is_said_so(manifests: Manifests) -> None:
    name = ManifestName(DISK.id, 1, SnapshotId("s-never"))
    with pytest.raises(NotFound):
        await manifests.head(name)
    with pytest.raises(NotFound):
        await anext(manifests.pages(name))
    assert [name async for name in manifests.names()] == []


async def test_a_manifest_that_was_cut_or_is_of_another_repository_is_damage(repository: Repository) -> None:
    objects = MemoryObjects()
    manifests = Manifests(objects, repository)
    name = await manifests.put(a_head(), stream(full_pages(20)))
    whole = objects.objects[str(name)]
    other = Manifests(objects, Repository.new(BLOCK, "zstd:1"))
    with pytest.raises(Damaged):
        await other.head(name)
    for length in (0, 10, 1000, PIECE_BYTES, len(whole) - 1):
        objects.objects[str(name)] = whole[:length]
        with pytest.raises(Damaged):
            [page async for page in manifests.pages(name)]
    for length in (0, 10, 100):
        objects.objects[str(name)] = whole[:length]
        with pytest.raises(Damaged):
            await manifests.head(name)

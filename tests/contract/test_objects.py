"""What every object store promises: one suite, run on each of them."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

import pytest

from hvsnap.errors import NotFound, ObjectExists, StoreFailed
from hvsnap.ports import ObjectStore
from hvsnap.store.objects import LocalObjects
from hvsnap.store.s3 import S3Objects
from tests.ceph import Ceph
from tests.contract.conftest import BUCKET
from tests.store_kit import MemoryObjects


@pytest.fixture(params=["local", "memory", "ceph"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "memory":
        return MemoryObjects()
    if request.param == "local":
        return LocalObjects(tmp_path / "store")
    ceph: Ceph = request.getfixturevalue("ceph")
    # A prefix of its own for each test, in the one bucket.
    return S3Objects(ceph.place(BUCKET, f"test/{uuid.uuid4().hex}"), tmp_path)


async def names(objects: ObjectStore, prefix: str = "") -> list[str]:
    return [item.name async for item in objects.list(prefix)]


async def test_what_was_put_is_read_back(objects: ObjectStore) -> None:
    await objects.put("a/b/c.json", b"content")
    await objects.put("empty", b"")
    assert await objects.get("a/b/c.json") == b"content"
    assert await objects.get("empty") == b""
    assert await objects.size("a/b/c.json") == 7
    assert await objects.size("empty") == 0


async def test_an_object_is_written_in_pieces(objects: ObjectStore) -> None:
    writer = await objects.writer("packs/00/x")
    await writer.write(b"o", b"", memoryview(b"ne"))
    await writer.write(memoryview(b"two"))
    await writer.commit()
    await writer.abort()
    assert await objects.get("packs/00/x") == b"onetwo"


async def test_a_range_is_exact(objects: ObjectStore) -> None:
    await objects.put("x", bytes(range(100)))
    assert await objects.get_range("x", 10, 5) == bytes(range(10, 15))
    assert await objects.get_range("x", 0, 100) == bytes(range(100))
    for start, length in [(0, 101), (99, 2), (100, 1), (5000, 1)]:
        with pytest.raises(StoreFailed):
            await objects.get_range("x", start, length)


async def test_what_is_not_there_is_said_so(objects: ObjectStore) -> None:
    await objects.put("a/b", b"1")
    for name in ["x", "a/x", "a", "a/b/c"]:
        with pytest.raises(NotFound):
            await objects.get(name)
        with pytest.raises(NotFound):
            await objects.get_range(name, 0, 1)
    with pytest.raises(NotFound):
        await objects.size("x")


async def test_an_object_is_never_overwritten(objects: ObjectStore) -> None:
    await objects.put("x", b"first")
    with pytest.raises(ObjectExists):
        await objects.put("x", b"second")
    assert await objects.get("x") == b"first"


async def test_of_many_writers_of_a_name_one_wins(objects: ObjectStore) -> None:
    results = await asyncio.gather(*(objects.put("x", b"%d" % n) for n in range(16)), return_exceptions=True)
    won = [n for n, result in enumerate(results) if result is None]
    assert len(won) == 1
    assert all(isinstance(result, ObjectExists) for result in results if result is not None)
    assert await objects.get("x") == b"%d" % won[0]


async def test_an_object_exists_for_nobody_before_its_commit(objects: ObjectStore) -> None:
    writer = await objects.writer("packs/x")
    await writer.write(b"1" * 100_000)
    assert await names(objects) == []
    with pytest.raises(NotFound):
        await objects.get("packs/x")
    await writer.commit()
    assert await names(objects) == ["packs/x"]


async def test_an_aborted_object_never_was(objects: ObjectStore) -> None:
    writer = await objects.writer("x")
    await writer.write(b"1")
    await writer.abort()
    await writer.abort()
    for step in (writer.commit(), writer.write(b"2")):
        with pytest.raises(StoreFailed):
            await step
    assert await names(objects) == []
    await objects.put("x", b"later")
    assert await objects.get("x") == b"later"


async def test_a_committed_object_outlives_the_abort_after_it(objects: ObjectStore) -> None:
    writer = await objects.writer("x")
    await writer.write(b"1")
    await writer.commit()
    await writer.abort()
    with pytest.raises(StoreFailed):
        await writer.commit()
    assert await objects.get("x") == b"1"


async def test_deleting_is_final_and_twice_is_no_error(objects: ObjectStore) -> None:
    await objects.put("a/x", b"1")
    await objects.delete("a/x")
    await objects.delete("a/x")
    await objects.delete("never/was")
    assert await names(objects) == []
    await objects.put("a/x", b"2")
    assert await objects.get("a/x") == b"2"


async def test_listing_is_in_order_of_whole_names_and_by_whole_parts(objects: ObjectStore) -> None:
    everything = ["a", "a-b/x", "a.b", "a/x", "a/y/z", "a0", "b/1", "b/10", "b/2", "ba/x"]
    for name in reversed(everything):
        if name != "a":  # a file and a directory of one name cannot be had in a directory
            await objects.put(name, name.encode())
    expected = sorted(everything[1:])
    assert await names(objects) == expected
    assert await names(objects, "a") == await names(objects, "a/") == ["a/x", "a/y/z"]
    assert await names(objects, "b") == ["b/1", "b/10", "b/2"]
    assert await names(objects, "nothing") == []
    assert {item.name: item.size_bytes async for item in objects.list("")} == {name: len(name) for name in expected}


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "../a", "a/../b", ".tmp/x", "A", "a b", "a\n", "ä", "-a", "a/.b", "x" * 256]
)
async def test_a_name_against_the_rules_reaches_nothing(objects: ObjectStore, name: str, tmp_path: Path) -> None:
    for call in (objects.get, objects.size, objects.delete, objects.writer):
        with pytest.raises(ValueError, match="not an object name"):
            await call(name)
    assert list(tmp_path.iterdir()) == []

"""One writer per repository, on each kind of store.

FAULTS 15.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from hvsnap.errors import StoreBusy, StoreFailed
from hvsnap.ports import ObjectStore
from hvsnap.store import sole
from hvsnap.store.lease import LEASE, WriterLease
from hvsnap.store.objects import LocalObjects
from hvsnap.store.s3 import S3Objects
from hvsnap.store.sole import SoleOwner
from tests.ceph import Ceph
from tests.contract.conftest import BUCKET
from tests.store_kit import MemoryObjects

TTL_S = 0.9

Make = Callable[..., WriterLease]


@pytest.fixture(params=["local", "memory", "ceph"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "memory":
        return MemoryObjects()
    if request.param == "local":
        return LocalObjects(tmp_path / "store")
    ceph: Ceph = request.getfixturevalue("ceph")
    return S3Objects(ceph.place(BUCKET, f"lease/{uuid.uuid4().hex}"), tmp_path)


def lease(objects: ObjectStore, holder: str, ttl_s: float = TTL_S) -> WriterLease:
    return WriterLease(objects, holder, f"host-{holder}", ttl_s=ttl_s)


def sole_lease(directory: Path, holder: str, ttl_s: float = 3600) -> WriterLease:
    """Return the lease of a store that is a directory of this host."""
    place = directory / "store"
    return WriterLease(LocalObjects(place), holder, f"host-{holder}", ttl_s=ttl_s, sole=SoleOwner(place))


async def test_a_second_writer_is_refused_while_the_first_lives(objects: ObjectStore) -> None:
    first = lease(objects, "a")
    await first.acquire()
    keeping = asyncio.create_task(first.keep())
    for _ in range(2):
        with pytest.raises(StoreBusy, match="host-a"):
            await lease(objects, "b").acquire()
    assert not keeping.done()
    assert first.certain
    keeping.cancel()


async def test_a_dead_writers_lease_expires(objects: ObjectStore) -> None:
    dead = lease(objects, "a")
    await dead.acquire()
    heir = lease(objects, "b", ttl_s=30)
    await heir.acquire()
    assert heir.certain
    assert not dead.certain


async def test_who_waits_for_a_lease_to_expire_says_so_and_goes_on_when_it_is_given_back(
    objects: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    first, heir = lease(objects, "a", ttl_s=30), lease(objects, "b")
    await first.acquire()
    waiting = asyncio.create_task(heir.acquire())
    async with asyncio.timeout(20):
        while "a daemon on host-a; if that is dead, its lease expires within 30 s" not in caplog.text:
            assert not waiting.done()
            await asyncio.sleep(0.01)
        await first.release()
        await waiting
    assert heir.certain


async def test_under_one_kernel_a_dead_writer_is_not_waited_for_and_a_living_one_refuses_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The writer of a directory is another process, and is killed."""
    script = (
        "import asyncio, pathlib, sys\n"
        "from tests.contract.test_lease import sole_lease\n"
        "asyncio.run(sole_lease(pathlib.Path(sys.argv[1]), 'a').acquire())\n"
        "print('mine', flush=True)\n"
        "sys.stdin.read()\n"
    )
    argv = [sys.executable, "-c", script, str(tmp_path)]
    writer = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "mine\n"
        async with asyncio.timeout(20):
            with pytest.raises(StoreBusy, match="another process of this host"):
                await sole_lease(tmp_path, "b").acquire()
            writer.kill()
            writer.wait()
            heir = sole_lease(tmp_path, "b")
            await heir.acquire()
        assert heir.certain
        assert "has died: its lease is taken over" in caplog.text
        await heir.release()
    finally:
        writer.kill()
        writer.communicate()


async def test_a_lock_of_another_boot_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory may be a network's, or a copy of another host's."""
    first = sole_lease(tmp_path, "a", ttl_s=0.5)
    await first.acquire()
    first._sole.let_go()  # type: ignore[union-attr]
    (tmp_path / "boot").write_text("another\n")
    monkeypatch.setattr(sole, "BOOT_ID", tmp_path / "boot")
    began = time.monotonic()
    await sole_lease(tmp_path, "b").acquire()
    assert time.monotonic() - began >= 0.5


async def test_one_who_was_thought_dead_learns_that_it_lost_the_lease(objects: ObjectStore) -> None:
    asleep, heir = lease(objects, "a"), lease(objects, "b")
    await asleep.acquire()
    await heir.acquire()
    with pytest.raises(StoreBusy, match="host-b"):
        async with asyncio.timeout(10):
            await asleep.keep()
    assert not asleep.certain


async def test_a_restarted_writer_takes_its_own_lease_at_once(objects: ObjectStore) -> None:
    await lease(objects, "a", ttl_s=3600).acquire()
    async with asyncio.timeout(10):
        await lease(objects, "a", ttl_s=3600).acquire()


async def test_a_released_lease_is_free_at_once(objects: ObjectStore) -> None:
    first = lease(objects, "a", ttl_s=3600)
    await first.acquire()
    await first.release()
    assert not first.certain
    async with asyncio.timeout(10):
        await lease(objects, "b", ttl_s=3600).acquire()


async def test_of_many_that_begin_at_once_one_wins(objects: ObjectStore) -> None:
    leases = [lease(objects, f"w{n}", ttl_s=6) for n in range(8)]
    keeping: list[asyncio.Task[None]] = []

    async def begin(one: WriterLease) -> None:
        await one.acquire()
        keeping.append(asyncio.create_task(one.keep()))

    results = await asyncio.gather(*(begin(one) for one in leases), return_exceptions=True)
    assert [result for result in results if not isinstance(result, StoreBusy)] == [None]
    assert sum(one.certain for one in leases) == 1
    keeping[0].cancel()


async def test_renewing_leaves_no_heap_of_objects(objects: ObjectStore) -> None:
    one = lease(objects, "a", ttl_s=0.05)
    await one.acquire()
    keeping = asyncio.create_task(one.keep())
    await asyncio.sleep(0.5)
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert len([item async for item in objects.list(LEASE)]) <= 3


async def test_a_renewal_whose_answer_was_lost_is_no_other_writer(objects: ObjectStore) -> None:
    """It took effect, and nobody was told; the next renewal finds it there. The same with the last one of all."""
    one = lease(objects, "a", ttl_s=3600)
    await one.acquire()
    put = objects.put

    async def deaf(name: str, data: bytes) -> None:
        await put(name, data)
        raise StoreFailed("no answer")

    async def lose_one() -> int:
        objects.put = deaf  # type: ignore[method-assign]
        with pytest.raises(StoreFailed):
            await one._create(one.number + 1)
        objects.put = put  # type: ignore[method-assign]
        return one.number

    before = await lose_one()
    await one._create(before + 1)
    assert (one.number, one.certain) == (before + 2, True)
    before = await lose_one()
    assert await one.release() == before + 2
    async with asyncio.timeout(10):
        await lease(objects, "b", ttl_s=3600).acquire()


async def test_a_copy_of_a_host_is_another_writer_even_after_lost_answers(objects: ObjectStore) -> None:
    one = lease(objects, "a", ttl_s=0.3)
    await one.acquire()
    put = objects.put

    async def deaf(_name: str, _data: bytes) -> None:
        raise StoreFailed("no answer")

    objects.put = deaf  # type: ignore[method-assign]
    with pytest.raises(StoreFailed):
        await one._create(one.number + 1)
    objects.put = put  # type: ignore[method-assign]
    await lease(objects, "a", ttl_s=0.3).acquire()
    with pytest.raises(StoreBusy):
        async with asyncio.timeout(10):
            await one.keep()


async def test_a_host_that_slept_is_not_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    one = lease(MemoryObjects(), "a", ttl_s=60)
    await one.acquire()
    assert one.certain
    gone = time.clock_gettime(time.CLOCK_BOOTTIME) + 61
    monkeypatch.setattr(time, "clock_gettime", lambda clock: gone if clock == time.CLOCK_BOOTTIME else 0.0)
    assert not one.certain


async def test_a_store_that_fails_for_a_while_costs_certainty_not_the_lease(tmp_path: Path) -> None:
    objects = MemoryObjects()
    one = lease(objects, "a", ttl_s=0.2)
    await one.acquire()
    put = objects.put

    async def broken(name: str, data: bytes) -> None:
        raise StoreFailed("down")

    objects.put = broken  # type: ignore[method-assign]
    keeping = asyncio.create_task(one.keep())
    async with asyncio.timeout(10):
        while one.certain:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        objects.put = put  # type: ignore[method-assign]
        while not one.certain:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not keeping.done()
    keeping.cancel()

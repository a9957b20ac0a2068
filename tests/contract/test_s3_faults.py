"""What the S3 store promises when endpoint and network fail: a real Ceph gateway behind a proxy that does it.

FAULTS 17.
"""

from __future__ import annotations

import asyncio
import io
import random
import signal
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError
from obstore.store import MemoryStore

from hvsnap.errors import NotFound, ObjectExists, StoreFailed
from hvsnap.store.s3 import Place, S3Objects, connect
from tests.ceph import Ceph
from tests.contract.conftest import BUCKET
from tests.fault_proxy import FaultProxy, fault_proxy

ONCE = ["503", "429", "reset", "lost", "hang", "drip"]


@pytest.fixture
async def proxy(ceph: Ceph) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(ceph.port) as running:
        yield running


def objects_through(
    ceph: Ceph, endpoint: str, spool: Path, *, timeout_s: float = 1.0, deadline_s: float = 30.0
) -> S3Objects:
    place = ceph.place(BUCKET, f"faults/{uuid.uuid4().hex}", endpoint)
    return S3Objects(place, spool, store=connect(place, timeout_s), deadline_s=deadline_s)


@pytest.mark.parametrize("fault", ONCE)
async def test_a_put_survives_a_fault_and_is_there_once(
    ceph: Ceph, proxy: FaultProxy, tmp_path: Path, fault: str
) -> None:
    objects = objects_through(ceph, proxy.endpoint, tmp_path, timeout_s=0.5)
    proxy.faults[:] = [fault, fault]
    await objects.put("packs/00/x", b"content")
    assert not proxy.faults, "the fault was not met"
    assert await objects.get("packs/00/x") == b"content"
    assert [item.name async for item in objects.list("")] == ["packs/00/x"]


@pytest.mark.parametrize("fault", ONCE)
async def test_reading_survives_a_fault(ceph: Ceph, proxy: FaultProxy, tmp_path: Path, fault: str) -> None:
    objects = objects_through(ceph, proxy.endpoint, tmp_path, timeout_s=0.5)
    await objects.put("x", bytes(range(200)))
    for read in (
        lambda: objects.get("x"),
        lambda: objects.get_range("x", 0, 200),
    ):
        proxy.faults[:] = [fault]
        assert await read() == bytes(range(200))
    proxy.faults[:] = [fault]
    assert await objects.size("x") == 200
    proxy.faults[:] = [fault]
    assert [item.name async for item in objects.list("")] == ["x"]
    proxy.faults[:] = [fault]
    await objects.delete("x")
    with pytest.raises(NotFound):
        await objects.get("x")


async def test_a_put_whose_answer_was_lost_does_not_take_its_own_object_for_another_one(
    ceph: Ceph, proxy: FaultProxy, tmp_path: Path
) -> None:
    objects = objects_through(ceph, proxy.endpoint, tmp_path)
    proxy.faults[:] = ["lost"]
    await objects.put("x", b"mine")
    assert [line.split()[0] for line in proxy.seen].count("PUT") >= 2
    with pytest.raises(ObjectExists):
        await objects.put("x", b"other")
    assert await objects.get("x") == b"mine"


async def test_a_name_that_is_said_to_be_taken_and_is_not_there_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS refuses a creation so while it settles another one of that name; no endpoint here does."""
    objects = S3Objects(Place("bucket", ""), tmp_path, store=MemoryStore())
    put, refusals = obstore.put_async, 2

    async def conflicting(*arguments: Any, **options: Any) -> Any:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise AlreadyExistsError("conflict")
        return await put(*arguments, **options)

    monkeypatch.setattr(obstore, "put_async", conflicting)
    await objects.put("lease/1", b"mine")
    assert await objects.get("lease/1") == b"mine"
    refusals = 9
    with pytest.raises(ObjectExists):
        await objects.put("lease/2", b"mine")


async def test_an_endpoint_that_stays_away_fails_at_the_deadline_and_says_so(
    ceph: Ceph, proxy: FaultProxy, tmp_path: Path
) -> None:
    objects = objects_through(ceph, proxy.endpoint, tmp_path, deadline_s=2)
    proxy.faults[:] = ["503"] * 1000
    started = asyncio.get_running_loop().time()
    with pytest.raises(StoreFailed) as caught:
        await objects.put("x", b"1")
    assert asyncio.get_running_loop().time() - started < 20
    assert "endpoint" in caught.value.hint
    proxy.faults.clear()
    assert [item.name async for item in objects.list("")] == []


async def test_a_large_object_survives_faults_whole(ceph: Ceph, proxy: FaultProxy, tmp_path: Path) -> None:
    objects = objects_through(ceph, proxy.endpoint, tmp_path, timeout_s=5.0)
    data = random.Random(1).randbytes(40 << 20)
    proxy.faults[:] = ["", "", "reset", "503", "lost"]
    writer = await objects.writer("manifests/large")
    for start in range(0, len(data), 4 << 20):
        await writer.write(data[start : start + (4 << 20)])
    await writer.commit()
    assert await objects.size("manifests/large") == len(data)
    for start in (0, 16 << 20, len(data) - 1000):
        assert await objects.get_range("manifests/large", start, 1000) == data[start : start + 1000]
    again = await objects.writer("manifests/large")
    await again.write(bytes(30 << 20))
    with pytest.raises(ObjectExists):
        await again.commit()
    assert list(tmp_path.iterdir()) == []


async def test_an_upload_that_takes_too_long_leaves_no_parts(ceph: Ceph, tmp_path: Path) -> None:
    objects = objects_through(ceph, ceph.endpoint, tmp_path, deadline_s=1.0)

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            time.sleep(0.3)
            return super().read(size)

    with pytest.raises(StoreFailed, match="slow"):
        await objects._upload("manifests/slow", Slow(bytes(200 << 20)), 200 << 20)
    listed = await asyncio.to_thread(ceph.admin, "bucket", "list", f"--bucket={BUCKET}", "--max-entries=100000")
    assert b"manifests/slow" not in listed
    with pytest.raises(NotFound):
        await objects.size("manifests/slow")


async def test_the_event_loop_stays_responsive_while_the_endpoint_hangs(
    ceph: Ceph, proxy: FaultProxy, tmp_path: Path
) -> None:
    objects = objects_through(ceph, proxy.endpoint, tmp_path, deadline_s=3)
    proxy.faults[:] = ["hang"] * 100
    putting = asyncio.create_task(objects.put("x", b"1"))
    loop = asyncio.get_running_loop()
    worst = 0.0
    while not putting.done():
        before = loop.time()
        await asyncio.sleep(0.01)
        worst = max(worst, loop.time() - before)
    with pytest.raises(StoreFailed):
        await putting
    assert worst < 0.5


async def test_wrong_keys_are_refused_at_once(ceph: Ceph, tmp_path: Path) -> None:
    place = ceph.place(BUCKET, "x")
    wrong = type(place)(place.bucket, place.prefix, place.endpoint, place.region, place.access_key, "WRONG")
    started = asyncio.get_running_loop().time()
    with pytest.raises(StoreFailed) as caught:
        await S3Objects(wrong, tmp_path).get("x")
    assert asyncio.get_running_loop().time() - started < 20
    assert "keys" in caught.value.hint


async def test_what_was_acknowledged_outlives_the_death_of_gateway_and_osd(ceph: Ceph, tmp_path: Path) -> None:
    objects = objects_through(ceph, ceph.endpoint, tmp_path, timeout_s=5.0, deadline_s=60)
    acknowledged: list[str] = []

    async def write(lane: int) -> None:
        for number in range(25):
            name = f"packs/{lane}/{number}"
            await objects.put(name, name.encode() * 1000)
            acknowledged.append(name)

    async def kill() -> None:
        for program in ("radosgw", "ceph-osd", "radosgw"):
            already = len(acknowledged)
            while len(acknowledged) < min(100, already + 10):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await asyncio.to_thread(ceph.kill, program)
            ceph.run_daemon(program)

    async with asyncio.TaskGroup() as group:
        for lane in range(4):
            group.create_task(write(lane))
        group.create_task(kill())
    assert len(acknowledged) == 100
    for name in acknowledged:
        assert await objects.get(name) == name.encode() * 1000


async def test_a_gateway_that_is_stopped_for_a_moment_only_delays(ceph: Ceph, tmp_path: Path) -> None:
    objects = objects_through(ceph, ceph.endpoint, tmp_path, timeout_s=2.0)
    ceph.signal("radosgw", signal.SIGSTOP)
    putting = asyncio.create_task(objects.put("x", b"1"))
    try:
        _done, pending = await asyncio.wait([putting], timeout=1.0)
        assert pending
    finally:
        ceph.signal("radosgw", signal.SIGCONT)
    await putting
    assert await objects.get("x") == b"1"

"""Snapshots served as disks: every byte, by a real nbdkit, whoever reads how; and nothing left when it ends."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import nbd
import pytest

from hvsnap import wire
from hvsnap.hypervisor import nbdkit
from hvsnap.model import SnapshotId
from hvsnap.restore.block_cache import BlockCache
from hvsnap.restore.serve import Access, Served, SnapshotServer, serve_directory
from tests.api_kit import a_house as a_service
from tests.api_kit import served as on_socket
from tests.store_kit import BLOCK, a_block
from tests.upkeep_kit import Contents, Disks, House, PunchedObjects, a_house

ZEROES = bytes(BLOCK)
SIZE_BLOCKS = 4096 + 40
SIZE = SIZE_BLOCKS * BLOCK
"""A page of the block map and a part of the next."""


@dataclass
class Served_:  # noqa: N801 - the product's own class has the name
    """A chain of two snapshots, what the second one holds, and it being served."""

    house: House
    disks: Disks
    server: SnapshotServer
    one: SnapshotId
    two: SnapshotId
    content: Contents

    def at(self, offset: int, length: int) -> bytes:
        """Return what the second snapshot holds somewhere."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        whole = b"".join(self.content.get(number, ZEROES) for number in range(first, last + 1))
        return whole[offset - first * BLOCK :][:length]

    def check_file(self, path: Path) -> None:
        """Compare a copy of it, every byte."""
        with path.open("rb") as file:
            for number in range(SIZE_BLOCKS):
                assert file.read(BLOCK) == self.content.get(number, ZEROES), number
            assert file.read(1) == b""


@pytest.fixture
async def serving(workdir: Path) -> AsyncIterator[Served_]:
    rng = random.Random(7)
    async with a_house(workdir / "state", PunchedObjects()) as house:
        disks = Disks()
        await disks.add(house, "vda", SIZE_BLOCKS)
        # Runs that are read ahead, single blocks, both sides of the border between the pages, the very last one.
        for block in [*range(150), *range(4090, 4100), *rng.sample(range(200, 4000), 60), SIZE_BLOCKS - 1]:
            disks.write("vda", block, a_block(rng))
        one = await disks.take(house, "vda")
        for block in [*range(20, 60), 4095, 4096, SIZE_BLOCKS - 1]:
            disks.write("vda", block, a_block(rng, "zero" if block % 3 == 0 else ""))
        two = await disks.take(house, "vda")
        (workdir / "nbd").mkdir()
        server = SnapshotServer(house.catalog, house.store, str(workdir / "nbd"), str(serve_directory(workdir)))
        await server.start()
        try:
            yield Served_(house, disks, server, one, two, disks.expected[two])
        finally:
            await server.close()


async def opened(serving: Served_, snapshot: SnapshotId, **options: bool) -> Served:
    row = await serving.house.catalog.snapshot(snapshot)
    return await serving.server.open(row, f"{snapshot}.sock", Access(), **options)


async def output(*argv: str) -> bytes:
    process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
    out, _err = await process.communicate()
    assert process.returncode == 0, argv
    return out


def client(served: Served) -> nbd.NBD:
    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    handle.connect_unix(served.what.socket)
    return handle


async def test_every_byte_and_every_zero_is_the_snapshots(serving: Served_, workdir: Path) -> None:
    served = await opened(serving, serving.two)
    await output("nbdcopy", served.uri, str(workdir / "copied"))  # many at once, and only where extents say data
    serving.check_file(workdir / "copied")
    await output("qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri, str(workdir / "converted"))
    serving.check_file(workdir / "converted")

    def look() -> None:
        handle, rng, size = client(served), random.Random(3), SIZE
        assert handle.get_size() == size
        assert handle.is_read_only()
        for _ in range(200):  # whatever its borders
            offset = rng.choice([rng.randrange(size), rng.randrange(160) * BLOCK, 4096 * BLOCK - rng.randrange(99999)])
            length = min(size - offset, rng.choice([1, 512, BLOCK, 200_000, 5 << 20]))
            assert bytes(handle.pread(length, offset)) == serving.at(offset, length), (offset, length)
        handle.shutdown()

    await asyncio.to_thread(look)
    await serving.server.end(served)
    assert not os.path.lexists(served.what.socket)
    assert not nbdkit.alive(served.pid)


async def test_what_zeroes_are_told_reads_as_zeroes_and_nothing_is_left_out(serving: Served_) -> None:
    served = await opened(serving, serving.two)
    runs: list[tuple[int, int, int]] = []

    def look() -> None:
        handle, offset = client(served), 0

        def note(_context: str, offset: int, entries: list[int], _error: object) -> None:
            for length, kind in zip(entries[::2], entries[1::2], strict=True):
                runs.append((offset, length, kind))
                offset += length

        while offset < SIZE:
            handle.block_status(SIZE - offset, offset, note)
            offset = runs[-1][0] + runs[-1][1]
        handle.shutdown()

    await asyncio.to_thread(look)
    data: set[int] = set()
    end = 0
    for offset, length, kind in runs:
        assert offset == end
        end += length
        if not kind & nbd.STATE_ZERO:
            data.update(range(offset // BLOCK, (offset + length) // BLOCK))
    assert end == SIZE
    assert data == {number for number, block in serving.content.items() if any(block)}
    await serving.server.end(served)


async def test_the_rest_of_the_chain_may_go_and_be_swept_while_one_is_served(serving: Served_) -> None:
    served = await opened(serving, serving.two)
    handle = await asyncio.to_thread(client, served)
    await asyncio.to_thread(handle.pread, BLOCK, 0)
    await serving.disks.delete(serving.house, serving.one)
    await serving.house.sweeper.sweep()
    for number in (*range(0, 160, 8), 4088, 4096, SIZE_BLOCKS - 8):
        data = bytes(await asyncio.to_thread(handle.pread, 8 * BLOCK, number * BLOCK))
        assert data == serving.at(number * BLOCK, 8 * BLOCK), number
    await asyncio.to_thread(handle.shutdown)
    await serving.server.end(served)


async def test_scratch_takes_writes_and_the_snapshot_none(serving: Served_) -> None:
    served = await opened(serving, serving.two, writable=True)

    def write() -> None:
        handle = client(served)
        handle.pwrite(b"x" * 1000, 12345)
        wanted = bytearray(serving.at(0, 1 << 20))
        wanted[12345:13345] = b"x" * 1000
        assert bytes(handle.pread(1 << 20, 0)) == wanted
        assert bytes(handle.pread(1 << 20, SIZE - (1 << 20))) == serving.at(SIZE - (1 << 20), 1 << 20)
        handle.shutdown()

    await asyncio.to_thread(write)
    await serving.server.end(served)
    again = await opened(serving, serving.two)
    handle = await asyncio.to_thread(client, again)
    assert bytes(await asyncio.to_thread(handle.pread, 1 << 20, 0)) == serving.at(0, 1 << 20)
    await asyncio.to_thread(handle.shutdown)
    await serving.server.end(again)


async def test_a_damaged_block_is_an_error_and_never_zeroes(serving: Served_) -> None:
    objects = serving.house.objects
    assert isinstance(objects, PunchedObjects)
    for name in [name for name in objects.objects if name.startswith("packs/")]:
        data = bytearray(objects.objects[name])
        data[len(data) // 3] ^= 1
        objects.objects[name] = bytes(data)
    served = await opened(serving, serving.two)
    handle = await asyncio.to_thread(client, served)
    failed: list[str] = []
    for number in sorted(serving.content):
        try:
            data = bytes(await asyncio.to_thread(handle.pread, BLOCK, number * BLOCK))
        except nbd.Error as error:
            failed.append(error.errno)
        else:
            assert data == serving.content[number]
    assert set(failed) == {"EIO"}
    await asyncio.to_thread(handle.shutdown)
    await serving.server.end(served)


async def test_a_reader_of_the_cache_gets_its_blocks_however_small_it_is(serving: Served_) -> None:
    cache = BlockCache(serving.house.store, bytes_max=3 * BLOCK)
    view = await serving.house.catalog.view(serving.two, 0)
    numbers = [number for number in range(4096) if view[number]][:40]
    ids = [int(view[number]) for number in numbers]
    for _ in range(3):
        cache.fetch(ids)
        found = await asyncio.gather(*(cache.get(ids[start : start + 7]) for start in range(0, 40, 5)))
        for start, blocks in zip(range(0, 40, 5), found, strict=True):
            for number, block in zip(numbers[start : start + 7], blocks, strict=True):
                assert block == serving.content[number]
    await cache.close()


# -- the rules --------------------------------------------------------------------------------------


@pytest.fixture
async def api(workdir: Path) -> AsyncIterator[tuple[httpx.AsyncClient, SnapshotId, SnapshotId]]:
    async with a_service(workdir / "state") as service:
        house, disks = House(service.catalog, service.store, PunchedObjects()), Disks()
        await disks.add(house, "vda", 64)
        disks.write("vda", 3, b"a" * BLOCK)
        one = await disks.take(house, "vda")
        two = await disks.take(house, "vda")
        async with on_socket(service, workdir / "s") as client:
            yield client, one, two


async def test_s4_6_what_is_served_is_not_deleted_and_what_is_deleted_not_served(
    api: tuple[httpx.AsyncClient, SnapshotId, SnapshotId],
) -> None:
    client, one, two = api
    first = wire.Served.model_validate((await client.post(f"/v1/snapshots/{one}/serve", json={})).json())
    again = wire.Served.model_validate((await client.post(f"/v1/snapshots/{one}/serve", json={})).json())
    assert again == first
    assert (await output("nbdinfo", "--size", first.uri)).split() == [str(64 * BLOCK).encode()]
    otherwise = await client.post(f"/v1/snapshots/{one}/serve", json={"writable": True})
    assert (otherwise.status_code, otherwise.json()["code"]) == (423, "busy")
    refused = await client.post("/v1/snapshots/delete", json={"ids": [one]})
    assert refused.status_code == 409
    assert "served" in refused.json()["message"]
    assert "snapshot-unserve" in refused.json()["message"]
    assert (await client.post("/v1/snapshots/delete", json={"ids": [two]})).status_code == 200
    listed = wire.ServedList.model_validate((await client.get("/v1/served")).json())
    assert listed.served == [first]
    assert (await client.post(f"/v1/snapshots/{one}/unserve")).status_code == 200
    assert (await client.post(f"/v1/snapshots/{one}/unserve")).status_code == 404
    assert (await client.post("/v1/snapshots/delete", json={"ids": [one]})).status_code == 200
    assert (await client.post(f"/v1/snapshots/{one}/serve", json={})).status_code == 404


async def test_an_nbdkit_that_is_killed_lets_go_of_its_snapshot(
    api: tuple[httpx.AsyncClient, SnapshotId, SnapshotId],
) -> None:
    client, one, _two = api
    served = wire.Served.model_validate((await client.post(f"/v1/snapshots/{one}/serve", json={})).json())
    os.kill(int(Path(f"{served.socket}.pid").read_text()), signal.SIGKILL)
    async with asyncio.timeout(30):
        while (await client.get("/v1/served")).json()["served"]:  # noqa: ASYNC110 - a watch of the daemon's
            await asyncio.sleep(0.05)
    assert (await client.post("/v1/snapshots/delete", json={"ids": [one]})).status_code == 200


class Looking:
    """A client that looks into a snapshot, until it goes."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._lines = response.aiter_lines()

    async def told(self) -> wire.Served | None:
        """Return what is told next; None at the end."""
        async for line in self._lines:
            if line.startswith("data: "):
                return wire.Served.model_validate_json(line.removeprefix("data: "))
        return None

    async def go(self) -> None:
        """End it as a client that was killed does."""
        await self._response.aclose()


async def looked(client: httpx.AsyncClient, snapshot: str, **body: bool) -> tuple[wire.Served, Looking]:
    """Look into a snapshot."""
    request = client.build_request("POST", f"/v1/snapshots/{snapshot}/look", json=body)
    looking = Looking(await client.send(request, stream=True))
    served = await looking.told()
    assert served is not None
    return served, looking


async def lookers(client: httpx.AsyncClient, *wanted: int) -> None:
    """Return once so many look into each snapshot that is served."""
    async with asyncio.timeout(30):
        while True:
            listed = wire.ServedList.model_validate((await client.get("/v1/served")).json())
            if tuple(one.lookers for one in listed.served) == wanted:
                return
            await asyncio.sleep(0.02)


async def test_what_is_looked_into_is_served_as_long_as_somebody_does(
    api: tuple[httpx.AsyncClient, SnapshotId, SnapshotId],
) -> None:
    client, one, _two = api
    first, looking = await looked(client, one)
    assert (first.stays, first.lookers) == (False, 1)
    second, other = await looked(client, one)
    assert (second.uri, second.lookers) == (first.uri, 2)
    refused = await client.post("/v1/snapshots/delete", json={"ids": [one]})
    assert "being served" in refused.json()["message"]
    assert (await client.post(f"/v1/snapshots/{one}/look", json={"writable": True})).status_code == 423
    await looking.go()
    await lookers(client, 1)
    assert (await output("nbdinfo", "--size", first.uri)).split() == [str(64 * BLOCK).encode()]
    await other.go()
    await lookers(client)
    assert not os.path.lexists(first.socket)
    assert (await client.post("/v1/snapshots/delete", json={"ids": [one]})).status_code == 200
    assert (await client.post(f"/v1/snapshots/{one}/look", json={})).status_code == 404


async def test_what_is_served_until_it_is_ended_outlives_lookers_and_its_end_ends_them(
    api: tuple[httpx.AsyncClient, SnapshotId, SnapshotId],
) -> None:
    client, one, _two = api
    _served, looking = await looked(client, one)
    stays = wire.Served.model_validate((await client.post(f"/v1/snapshots/{one}/serve", json={})).json())
    assert (stays.stays, stays.lookers) == (True, 1)
    await looking.go()
    await lookers(client, 0)
    _served, looking = await looked(client, one)
    assert (await client.post(f"/v1/snapshots/{one}/unserve")).status_code == 200
    async with asyncio.timeout(30):
        assert await looking.told() is None
    await lookers(client)

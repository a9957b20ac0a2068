"""Another host's repository, on a real directory and a real bucket: read while its writer deletes and sweeps."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from hvsnap import rebuilding
from hvsnap.catalog.catalog import Catalog
from hvsnap.config import S3, Settings, Store
from hvsnap.errors import Damaged, Refused
from hvsnap.house import _opened
from hvsnap.model import SnapshotId, State
from hvsnap.ports import ObjectStore
from hvsnap.store.lease import LEASE, WriterLease
from hvsnap.store.objects import LocalObjects
from hvsnap.store.s3 import S3Objects
from tests.catalog_kit import StoppedClock
from tests.ceph import ACCESS_KEY, SECRET_KEY, Ceph
from tests.contract.conftest import BUCKET
from tests.store_kit import a_block, seeded
from tests.upkeep_kit import Contents, Disks, House, a_house, restored


@pytest.fixture(params=["local", "ceph"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ObjectStore, Store]:
    """Return where the writer writes, and what the reader's configuration says of it."""
    if request.param == "local":
        root = tmp_path / "store"
        return LocalObjects(root), Store(url=f"file://{root}", read_only=True)
    ceph: Ceph = request.getfixturevalue("ceph")
    prefix = f"read/{uuid.uuid4().hex}"
    key = tmp_path / "secret"
    key.write_text(SECRET_KEY)
    key.chmod(0o600)
    s3 = S3(endpoint=ceph.endpoint, access_key=ACCESS_KEY, secret_key_file=str(key))
    return S3Objects(ceph.place(BUCKET, prefix), tmp_path), Store(url=f"s3://{BUCKET}/{prefix}", read_only=True, s3=s3)


@pytest.fixture
async def writer(tmp_path: Path, place: tuple[ObjectStore, Store]) -> AsyncIterator[House]:
    async with a_house(tmp_path / "writer", place[0]) as opened:
        yield opened


async def listed(objects: ObjectStore) -> dict[str, int]:
    return {item.name: item.size_bytes async for item in objects.list("")}


async def read(settings: Settings) -> tuple[AsyncExitStack, House]:
    """Open the store as the daemon of the second host does."""
    stack = AsyncExitStack()
    catalog = await Catalog.open(Path(settings.state_dir), StoppedClock())
    stack.push_async_callback(catalog.close)
    store, lease = await _opened(stack, settings, catalog)
    assert not lease.certain
    return stack, House(catalog, store, store.manifests._objects)


async def test_a_reader_restores_what_is_there_and_nothing_else_whatever_the_writer_does(
    writer: House, place: tuple[ObjectStore, Store], tmp_path: Path
) -> None:
    objects, store = place
    rng, disks = seeded(), Disks()
    lease = WriterLease(objects, "writer", "host-a", ttl_s=3600)
    await lease.acquire()
    await disks.add(writer, "vda")
    for _ in range(6):
        for number in rng.sample(range(64), 20):
            disks.write("vda", number, a_block(rng))
        await disks.take(writer, "vda")
    (tmp_path / "reader").mkdir()
    settings = Settings(state_dir=str(tmp_path / "reader"), store=store)
    before = await listed(objects)
    assert any(name.startswith(LEASE) for name in before)

    told = await rebuilding._rebuild(settings, force=False)
    assert (told.snapshots, told.damaged, told.lost, told.damaged_blocks) == (6, [], [], 0)
    stack, reader = await read(settings)
    for snapshot, content in disks.expected.items():
        assert await restored(reader, snapshot) == content
    session = reader.store.session()
    with pytest.raises(Refused, match="another host's"):
        await put(session)
    assert await listed(objects) == before

    known: dict[SnapshotId, Contents] = dict(disks.expected)
    refused = 0
    while disks.expected:
        await disks.delete(writer, rng.choice(list(disks.expected)))
        await writer.sweeper.sweep()
        for snapshot, content in known.items():
            got = await outcome(reader, snapshot)
            if isinstance(got, Damaged):
                assert "store-rebuild" in got.hint
                refused += 1
            else:
                assert got == content
    assert refused, "what was freed cannot be read any more"
    await stack.aclose()

    await disks.take(writer, "vda")
    await rebuilding._rebuild(settings, force=False)
    stack, reader = await read(settings)
    rows = await reader.catalog.snapshots(state=State.ACCOMPLISHED)
    assert [row.id for row in rows] == list(disks.expected)
    assert await restored(reader, rows[0].id) == disks.expected[rows[0].id]
    await stack.aclose()


async def outcome(reader: House, snapshot: SnapshotId) -> Contents | Damaged:
    try:
        return await restored(reader, snapshot)
    except Damaged as error:
        return error


async def put(session: object) -> None:
    await session.put(memoryview(seeded().randbytes(65536)))  # type: ignore[attr-defined]
    await session.flush()  # type: ignore[attr-defined]


async def test_of_a_block_in_two_packs_the_whole_one_is_found(
    writer: House, place: tuple[ObjectStore, Store], tmp_path: Path
) -> None:
    """An index tells where a block was: the copy that a hole was punched into must not be the one that is believed."""
    _objects, store = place
    rng, disks = seeded(), Disks()
    await disks.add(writer, "vda")
    contents = [a_block(rng, "noise") for _ in range(40)]
    for turn in range(3):  # stored, dropped while a neighbour of the pack lives on, stored again
        for number, content in enumerate(contents):
            disks.write("vda", number, content)
        for number in range(len(contents)):  # of each pack these live on: it is not rewritten
            disks.write("vda", 100 * (turn + 1) + number, a_block(rng, "noise"))
        full = await disks.take(writer, "vda")
        for number in range(len(contents)):
            disks.write("vda", number, bytes(65536))
        await disks.take(writer, "vda")
        if turn < 2:
            await disks.delete(writer, full)
            await writer.sweeper.sweep()
    (tmp_path / "reader").mkdir()
    settings = Settings(state_dir=str(tmp_path / "reader"), store=store)
    told = await rebuilding._rebuild(settings, force=False)
    assert (told.damaged, told.damaged_blocks) == ([], 0)
    stack, reader = await read(settings)
    for snapshot, content in disks.expected.items():
        assert await restored(reader, snapshot) == content
    await stack.aclose()

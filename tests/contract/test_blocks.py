"""What the block store promises, with an index in memory and with the real catalog."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CatalogFailed, Damaged, FormatUnknown, HvsnapError, NoSpace, StoreFailed
from hvsnap.ports import BlockIndex
from hvsnap.store import packer
from hvsnap.store.blocks import PackedBlocks, Session, open_store
from hvsnap.store.keyring import StoreKey
from hvsnap.store.objects import LocalObjects
from tests.catalog_kit import StoppedClock
from tests.store_kit import BLOCK, MemoryIndex, MemoryObjects, Watched, a_block, ids_of, read_back, seeded


@pytest.fixture(params=["memory", "catalog"])
async def index(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[BlockIndex]:
    if request.param == "memory":
        yield MemoryIndex()
        return
    (tmp_path / "state").mkdir()
    catalog = await Catalog.open(tmp_path / "state", StoppedClock())
    yield catalog
    await catalog.close()


class Stops:
    """Steps of writers that wait, or fail, as a test says."""

    def __init__(self) -> None:
        self.errors: list[tuple[str, HvsnapError]] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.reached: dict[str, asyncio.Event] = {"write": asyncio.Event(), "commit": asyncio.Event()}

    async def __call__(self, step: str, name: str) -> None:
        if not name.startswith("packs/"):
            return
        self.reached[step].set()
        if step in self.gates:
            await self.gates[step].wait()
        if self.errors and self.errors[0][0] == step:
            raise self.errors.pop(0)[1]


@pytest.fixture
def stops() -> Stops:
    return Stops()


@pytest.fixture
def memory() -> MemoryObjects:
    return MemoryObjects()


@pytest.fixture(params=["plain", "sealed"])
def key(request: pytest.FixtureRequest) -> StoreKey | None:
    return StoreKey("k", raw=bytes(range(32))) if request.param == "sealed" else None


@pytest.fixture
async def store(
    index: BlockIndex, memory: MemoryObjects, stops: Stops, key: StoreKey | None
) -> AsyncIterator[PackedBlocks]:
    opened = await open_store(Watched(memory, stops), index, key=key)
    yield opened
    for gate in stops.gates.values():
        gate.set()
    await opened.close()


def packs(memory: MemoryObjects) -> list[str]:
    return [name for name in memory.objects if name.startswith("packs/")]


async def put_one(session: Session, block: bytes) -> int:
    return ids_of((await session.put(memoryview(block))).ids)[0]


# -- storing and reading ----------------------------------------------------------------------------


async def test_what_was_put_is_read_back_byte_for_byte(store: PackedBlocks) -> None:
    rng = seeded()
    session = store.session()
    chunks = [b"".join(a_block(rng) for _ in range(rng.randrange(1, 20))) for _ in range(12)]
    stored = await asyncio.gather(*(session.put(memoryview(chunk)) for chunk in chunks))
    await session.flush()
    for chunk, answer in zip(chunks, stored, strict=True):
        assert await read_back(store, ids_of(answer.ids)) == chunk


async def test_another_process_reads_it_with_the_same_configuration(
    store: PackedBlocks, index: BlockIndex, memory: MemoryObjects, key: StoreKey | None
) -> None:
    data = a_block(seeded(), "text")
    session = store.session()
    block = await put_one(session, data)
    await session.flush()
    again = await open_store(memory, index, create=False, key=key, block_size=131072)
    assert again.block_size == BLOCK
    assert await read_back(again, [block]) == data
    other = again.session()
    assert await put_one(other, data) == block
    assert await put_one(other, a_block(seeded(), "noise")) > block
    await again.close()


async def test_a_zero_block_is_never_stored(store: PackedBlocks, memory: MemoryObjects) -> None:
    session = store.session()
    nearly = [bytearray(BLOCK) for _ in range(5)]
    for block, position in zip(nearly, (0, 7, 8, BLOCK // 2 + 3, BLOCK - 1), strict=True):
        block[position] = 1
    data = b"".join(bytes(BLOCK) + bytes(block) for block in nearly)
    stored = await session.put(memoryview(data))
    await session.flush()
    assert [number == 0 for number in ids_of(stored.ids)] == [True, False] * 5
    assert await read_back(store, ids_of(stored.ids)) == data
    only_zero = await session.put(memoryview(bytes(BLOCK * 8)))
    await session.flush()
    assert (ids_of(only_zero.ids), only_zero.new_blocks, only_zero.new_bytes) == ([0] * 8, 0, 0)
    assert len(packs(memory)) == 1


async def test_equal_blocks_are_stored_once(store: PackedBlocks, memory: MemoryObjects) -> None:
    """Within a put, across puts that wait for the same pack, and against what is in the index."""
    rng = seeded()
    a, b, c = (a_block(rng, "noise") for _ in range(3))
    session, other = store.session(), store.session()
    first = await session.put(memoryview(a + b + a + a))
    second = await other.put(memoryview(b + c))
    assert (first.new_blocks, second.new_blocks) == (2, 1)
    await session.flush()
    await other.flush()
    third = await session.put(memoryview(c + a + b))
    assert third.new_blocks == third.new_bytes == 0
    one, two, three = (ids_of(answer.ids) for answer in (first, second, third))
    assert one[0] == one[2] == one[3] == three[1]
    assert one[1] == two[0] == three[2]
    assert two[1] == three[0]
    assert len({*one, *two, *three}) == 3
    assert sum(len(memory.objects[name]) for name in packs(memory)) < 4 * BLOCK


async def test_puts_at_the_same_time_store_a_block_once(store: PackedBlocks, memory: MemoryObjects) -> None:
    rng = seeded()
    pool = [a_block(rng, "noise") for _ in range(24)]
    sessions = [store.session() for _ in range(3)]
    chunks = [b"".join(rng.choices(pool, k=16)) for _ in range(30)]
    stored = await asyncio.gather(*(sessions[n % 3].put(memoryview(chunk)) for n, chunk in enumerate(chunks)))
    await asyncio.gather(*(session.flush() for session in sessions))
    distinct = {block for chunk in chunks for block in (chunk[at : at + BLOCK] for at in range(0, len(chunk), BLOCK))}
    assert sum(answer.new_blocks for answer in stored) == len(distinct)
    assert sum([len(await store.packs.index(name)) for name in packs(memory)]) == len(distinct)
    for chunk, answer in zip(chunks, stored, strict=True):
        assert await read_back(store, ids_of(answer.ids)) == chunk


async def test_what_does_not_compress_is_stored_as_it_is(store: PackedBlocks, index: BlockIndex) -> None:
    rng = seeded()
    session = store.session()
    noise, text = await session.put(memoryview(a_block(rng, "noise"))), await session.put(memoryview(b"t" * BLOCK))
    await session.flush()
    places = await index.places(ids_of(noise.ids) + ids_of(text.ids))
    sealed = store.repository.sealed
    expected = [(2, BLOCK + 28), (3, text.new_bytes)] if sealed else [(0, BLOCK), (1, text.new_bytes)]
    assert [(place.flags, place.length) for place in places] == expected
    assert noise.new_bytes == expected[0][1]
    assert text.new_bytes < 100


async def test_the_buffer_may_be_reused_at_once(store: PackedBlocks) -> None:
    rng = seeded()
    session = store.session()
    buffer = bytearray(BLOCK * 4)
    kept, ids = [], []
    for _ in range(10):
        content = b"".join(a_block(rng, "noise") for _ in range(4))
        buffer[:] = content
        ids += ids_of((await session.put(memoryview(buffer))).ids)
        kept.append(content)
    buffer[:] = bytes(len(buffer))
    await session.flush()
    assert await read_back(store, ids) == b"".join(kept)


async def test_a_buffer_of_a_cancelled_put_is_not_read_any_more(store: PackedBlocks) -> None:
    """A capture that is cancelled reuses its buffers; a block read after that would be stored under a wrong digest."""
    rng = seeded()
    session = store.session()
    contents = [a_block(rng, "noise") for _ in range(40)]
    for delay in range(20):
        buffer = bytearray(b"".join(contents[2 * delay : 2 * delay + 2]))
        task = asyncio.create_task(session.put(memoryview(buffer)))
        for _ in range(delay):
            await asyncio.sleep(0.0002)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        buffer[:] = b"\xff" * len(buffer)
    other = store.session()
    again = await other.put(memoryview(b"".join(contents)))
    await other.flush()
    assert await read_back(store, ids_of(again.ids)) == b"".join(contents)


async def test_a_cancelled_put_disturbs_nobody_else(store: PackedBlocks, stops: Stops) -> None:
    rng = seeded()
    shared = [a_block(rng, "noise") for _ in range(64)]
    cancelled, session = store.session(), store.session()
    for delay in range(8):
        part = b"".join(shared[8 * delay : 8 * delay + 8])
        task = asyncio.create_task(cancelled.put(memoryview(part)))
        await asyncio.sleep(0.0004 * delay)
        answer = asyncio.create_task(session.put(memoryview(part)))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert await answer
    final = await session.put(memoryview(b"".join(shared)))
    await session.flush()
    assert await read_back(store, ids_of(final.ids)) == b"".join(shared)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK + 512, packer.PACK_BYTES + BLOCK])
async def test_only_whole_blocks_within_bounds_are_taken(store: PackedBlocks, size: int) -> None:
    with pytest.raises(ValueError, match="blocks"):
        await store.session().put(memoryview(bytes(size)))


async def test_nothing_at_all_is_stored_without_a_pack(store: PackedBlocks, memory: MemoryObjects) -> None:
    session = store.session()
    assert ids_of((await session.put(memoryview(b""))).ids) == []
    await session.flush()
    assert packs(memory) == []


async def test_digests_are_those_of_the_packs_and_zero_for_zero(store: PackedBlocks, memory: MemoryObjects) -> None:
    rng = seeded()
    session = store.session()
    ids = (await session.put(memoryview(a_block(rng, "noise") + bytes(BLOCK) + a_block(rng, "text")))).ids
    await session.flush()
    digests = await store.digests(ids)
    stored = {bytes(row) for name in packs(memory) for row in (await store.packs.index(name))["digest"]}
    assert not digests[1].any()
    assert {bytes(digests[0]), bytes(digests[2])} == stored


# -- packs ------------------------------------------------------------------------------------------


async def test_packs_stay_below_their_size_and_are_filled(
    store: PackedBlocks, memory: MemoryObjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "PACK_BYTES", 32 * BLOCK)
    rng = seeded()
    session = store.session()
    chunks = [b"".join(a_block(rng, rng.choice(["noise", "text"])) for _ in range(8)) for _ in range(40)]
    ids = [number for chunk in chunks for number in ids_of((await session.put(memoryview(chunk))).ids)]
    await session.flush()
    sizes = [len(memory.objects[name]) for name in packs(memory)]
    assert max(sizes) <= 33 * BLOCK
    assert sorted(sizes)[1] >= 24 * BLOCK, "all but the last are filled, up to one put"
    assert await read_back(store, ids) == b"".join(chunks)


async def test_few_packs_are_under_way_and_little_is_held_however_slow_the_device(
    store: PackedBlocks, stops: Stops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "PACK_BYTES", 16 * BLOCK)
    stops.gates["commit"] = asyncio.Event()
    rng = seeded()
    session = store.session()
    done = 0

    async def put_all() -> None:
        nonlocal done
        for _ in range(200):
            await session.put(memoryview(rng.randbytes(BLOCK * 4)))
            done += 1

    task = asyncio.create_task(put_all())
    async with asyncio.timeout(60):
        while done < 8:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    before = -1
    while before != done:  # all the time it wants to go too far
        before = done
        await asyncio.sleep(0.2)
    assert 8 <= done <= 3 * 4, "three packs of four puts each, then it waits"
    stops.gates["commit"].set()
    await task
    await session.flush()


async def test_blocks_are_in_the_index_only_once_their_pack_is_durable(
    store: PackedBlocks, index: BlockIndex, memory: MemoryObjects, stops: Stops
) -> None:
    stops.gates["commit"] = asyncio.Event()
    session = store.session()
    block = await put_one(session, a_block(seeded(), "noise"))
    flush = asyncio.create_task(session.flush())
    await stops.reached["commit"].wait()
    with pytest.raises(Damaged):
        await index.places([block])
    assert packs(memory) == []
    assert not flush.done()
    stops.gates["commit"].set()
    await flush
    assert (await index.places([block]))[0].pack in memory.objects


# -- failing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["write", "commit"])
async def test_a_failed_pack_fails_all_that_rely_on_it_and_nothing_after(
    store: PackedBlocks, memory: MemoryObjects, stops: Stops, step: str
) -> None:
    rng = seeded()
    mine, shared = a_block(rng, "noise"), a_block(rng, "noise")
    early, first, second = store.session(), store.session(), store.session()
    safe = await put_one(early, a_block(rng, "text"))
    await early.flush()
    stops.errors.append((step, NoSpace("full")))
    await first.put(memoryview(mine + shared))
    await second.put(memoryview(shared))  # relies on the first session's pack
    for session in (first, second, first, second):
        with pytest.raises(NoSpace) as caught:
            await session.flush()
        assert caught.value.hint
        with pytest.raises(NoSpace):
            await session.put(memoryview(shared))
    assert len(packs(memory)) == 1
    await early.flush()
    assert await read_back(store, [safe])

    later = store.session()
    answer = await later.put(memoryview(mine + shared))
    assert answer.new_blocks == 2, "nothing of a failed pack is taken for stored"
    await later.flush()
    assert await read_back(store, ids_of(answer.ids)) == mine + shared


async def test_an_index_that_fails_fails_the_flush(
    store: PackedBlocks, index: BlockIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_args: object) -> None:
        raise CatalogFailed("read-only")

    data = a_block(seeded(), "noise")
    session = store.session()
    await session.put(memoryview(data))
    with monkeypatch.context() as patched:
        patched.setattr(index, "add_pack", refuse)
        with pytest.raises(CatalogFailed):
            await session.flush()
    later = store.session()
    block = await put_one(later, data)
    await later.flush()
    assert await read_back(store, [block]) == data


async def test_an_error_nobody_foresaw_fails_the_pack_too(
    store: PackedBlocks, index: BlockIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def break_down(*_args: object) -> None:
        raise ZeroDivisionError

    session = store.session()
    await session.put(memoryview(a_block(seeded(), "noise")))
    monkeypatch.setattr(index, "add_pack", break_down)
    with pytest.raises(StoreFailed):
        await session.flush()


async def test_random_failures_never_lose_a_block_that_was_flushed(
    store: PackedBlocks, stops: Stops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packer, "PACK_BYTES", 12 * BLOCK)
    rng = seeded()
    pool = [a_block(rng, "noise") for _ in range(60)]
    flushed: list[tuple[int, bytes]] = []
    failures = 0

    async def capture() -> None:
        nonlocal failures
        session = store.session()
        mine: list[tuple[int, bytes]] = []
        try:
            for _ in range(rng.randrange(1, 6)):
                blocks = rng.choices(pool, k=rng.randrange(1, 6))
                answer = await session.put(memoryview(b"".join(blocks)))
                mine += zip(ids_of(answer.ids), blocks, strict=True)
            await session.flush()
        except StoreFailed:
            failures += 1
        else:
            flushed.extend(mine)

    for _ in range(25):
        stops.errors[:] = [(rng.choice(["write", "commit"]), StoreFailed("I/O error"))] if rng.random() < 0.6 else []
        await asyncio.gather(*(capture() for _ in range(3)))
    assert failures > 3
    assert len(flushed) > 30
    assert await read_back(store, [number for number, _ in flushed]) == b"".join(block for _, block in flushed)


async def test_a_closed_store_finishes_what_is_awaited_and_gives_up_the_rest(
    index: BlockIndex, memory: MemoryObjects, stops: Stops
) -> None:
    stops.gates["commit"] = asyncio.Event()
    store = await open_store(Watched(memory, stops), index)
    rng = seeded()
    awaited, given_up = store.session(), store.session()
    block = await put_one(awaited, a_block(rng, "noise"))
    flush = asyncio.create_task(awaited.flush())
    await stops.reached["commit"].wait()
    await put_one(given_up, a_block(rng, "noise"))
    closing = asyncio.create_task(store.close())
    await asyncio.sleep(0)
    stops.gates["commit"].set()
    await closing
    await flush
    assert (await index.places([block]))[0].pack in memory.objects
    assert len(packs(memory)) == 1
    with pytest.raises(StoreFailed):
        await given_up.flush()


# -- reading ----------------------------------------------------------------------------------------


async def test_neighbours_are_read_together_and_each_position_is_answered_once(
    store: PackedBlocks, memory: MemoryObjects
) -> None:
    rng = seeded()
    session = store.session()
    contents = [a_block(rng, "text") for _ in range(200)]
    stored = await session.put(memoryview(b"".join(contents)))
    await session.flush()
    ids = ids_of(stored.ids)
    wanted = rng.choices(range(200), k=300)
    memory.reads.clear()
    assert await read_back(store, [ids[n] for n in wanted]) == b"".join(contents[n] for n in wanted)
    assert len(memory.reads) <= 6
    assert max(length for _, _, length in memory.reads) <= 2 << 20


async def test_a_reader_that_stops_leaves_nothing_running(store: PackedBlocks) -> None:
    session = store.session()
    stored = await session.put(memoryview(seeded().randbytes(BLOCK * 200)))
    await session.flush()
    async with contextlib.aclosing(store.get(ids_of(stored.ids))) as blocks:
        async for _ in blocks:
            break
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("read ")]


async def test_an_unknown_block_is_damage(store: PackedBlocks) -> None:
    with pytest.raises(Damaged):
        await read_back(store, [12345])


async def test_a_missing_swapped_or_cut_pack_is_named(
    store: PackedBlocks, index: BlockIndex, memory: MemoryObjects
) -> None:
    """FAULTS 12."""
    rng = seeded()
    blocks, names = [], []
    for _ in range(2):
        session = store.session()
        blocks.append(await put_one(session, a_block(rng, "text")))
        await session.flush()
        names.append((await index.places(blocks[-1:]))[0].pack)
    whole = [memory.objects[name] for name in names]
    for damage in ({names[0]: whole[1], names[1]: whole[0]}, {names[0]: whole[0][:80]}, {names[0]: b""}):
        memory.objects |= damage
        with pytest.raises(Damaged) as caught:
            await read_back(store, blocks[:1])
        assert names[0] in caught.value.message
        assert str(blocks[0]) in caught.value.message
        with pytest.raises(Damaged):
            await store.packs.index(names[0])
    del memory.objects[names[0]]
    with pytest.raises(Damaged) as caught:
        await read_back(store, blocks[:1])
    assert names[0] in caught.value.message


@pytest.mark.parametrize("kind", ["text", "noise"])
async def test_a_flipped_bit_anywhere_is_never_handed_out(
    store: PackedBlocks, index: BlockIndex, memory: MemoryObjects, kind: str
) -> None:
    """FAULTS 12."""
    rng = seeded()
    session = store.session()
    contents = [a_block(rng, kind) for _ in range(3)]
    stored = await session.put(memoryview(b"".join(contents)))
    await session.flush()
    ids = ids_of(stored.ids)
    places = await index.places(ids)
    name = places[0].pack
    whole = memory.objects[name]
    blocks_end = max(place.offset + place.length for place in places)
    every = [*range(64), *range(blocks_end, len(whole))]
    harmless = 0
    inside = {at for place in places for at in range(place.offset, min(place.offset + 40, place.offset + place.length))}
    for at in [*every, *sorted(inside), *rng.sample(range(64, blocks_end), 200)]:
        memory.objects[name] = whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :]
        if 64 <= at < blocks_end:
            with contextlib.suppress(Damaged):
                assert await read_back(store, ids) == b"".join(contents)
                harmless += 1  # a compressed frame has bits that mean nothing
            assert len(await store.packs.index(name)) == 3
        else:
            assert await read_back(store, ids) == b"".join(contents)
            with pytest.raises((Damaged, FormatUnknown)):
                await store.packs.index(name)
    assert harmless <= (0 if kind == "noise" else 30)


# -- the configuration ------------------------------------------------------------------------------


async def test_of_two_who_create_a_repository_both_use_the_same(tmp_path: Path) -> None:
    objects = LocalObjects(tmp_path / "store")
    stores = await asyncio.gather(*(open_store(objects, MemoryIndex()) for _ in range(6)))
    assert len({store.repository for store in stores}) == 1


async def test_a_repository_is_not_created_when_that_is_not_wanted(memory: MemoryObjects) -> None:
    with pytest.raises(StoreFailed) as caught:
        await open_store(memory, MemoryIndex(), create=False)
    assert caught.value.hint
    assert memory.objects == {}


async def test_a_digest_tells_nothing_without_the_secret(memory: MemoryObjects) -> None:
    """Two repositories with the same content have no digest in common."""
    data = a_block(seeded(), "noise")
    digests = []
    for objects in (memory, MemoryObjects()):
        store = await open_store(objects, MemoryIndex())
        session = store.session()
        ids = (await session.put(memoryview(data))).ids
        await session.flush()
        digests.append((await store.digests(ids)).tobytes())
        await store.close()
    assert digests[0] != digests[1]


@pytest.mark.parametrize("block_size", [1 << 17, 1 << 20])
async def test_other_block_sizes_work(memory: MemoryObjects, block_size: int) -> None:
    rng = seeded()
    store = await open_store(memory, MemoryIndex(), block_size=block_size)
    session = store.session()
    data = rng.randbytes(block_size) + bytes(block_size) + b"x" * block_size
    stored = await session.put(memoryview(data))
    await session.flush()
    assert await read_back(store, ids_of(stored.ids)) == data
    assert np.count_nonzero(stored.ids) == 2
    await store.close()

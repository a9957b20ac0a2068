"""The table of blocks and its index of digests: found again after every restart, whatever was merged by then."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hvsnap.catalog import blocks as blocks_module
from hvsnap.catalog import ranges
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CatalogFailed, Damaged
from hvsnap.model import BlockPlace
from tests.catalog_kit import StoppedClock
from tests.store_kit import seeded


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Catalog]:
    opened = await Catalog.open(tmp_path, StoppedClock())
    yield opened
    await opened.close()


def places(rng: random.Random, first: int, count: int, pack: str) -> list[BlockPlace]:
    return [BlockPlace(first + n, rng.randbytes(32), pack, 64 + 1000 * n, 900 + n, n % 2) for n in range(count)]


async def add(catalog: Catalog, rng: random.Random, count: int) -> list[BlockPlace]:
    """Add a pack with new blocks, in an order of its own."""
    first = await catalog.next_block_id()
    pack = f"packs/{first}"
    made = places(rng, first, count, pack)
    await catalog.add_pack(pack, 10**6, rng.sample(made, count))
    return made


async def check(catalog: Catalog, known: list[BlockPlace]) -> None:
    assert await catalog.find([place.digest for place in known]) == {place.digest: place.id for place in known}
    assert await catalog.places([place.id for place in known]) == known
    digests = await catalog.digests(np.array([place.id for place in known], np.uint64))
    assert [digest.tobytes() for digest in digests] == [place.digest for place in known]
    packs = {pack.name: pack for pack in await catalog.upkeep.packs()}
    for name, pack in packs.items():
        live = [place for place in known if place.pack == name]
        assert (pack.live_blocks, pack.live_bytes) == (len(live), sum(place.length for place in live))
        assert await catalog.blocks.places_of_pack(pack.number) == sorted(live, key=lambda place: place.offset)


async def test_blocks_are_found_before_and_after_they_entered_the_index_and_after_a_restart(tmp_path: Path) -> None:
    rng = seeded()
    known: list[BlockPlace] = []
    for step in range(4):
        catalog = await Catalog.open(tmp_path, StoppedClock())
        await check(catalog, known)
        known += await add(catalog, rng, rng.randint(1, 1500))
        await check(catalog, known)
        if step % 2:
            await catalog.blocks.merge()
            known += await add(catalog, rng, 7)
        await check(catalog, known)
        assert await catalog.find([rng.randbytes(32) for _ in range(50)]) == {}
        await catalog.close()


async def test_recent_digests_enter_the_index_by_themselves(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = seeded()
    monkeypatch.setattr(blocks_module, "MERGE_BLOCKS", 64)
    catalog.blocks.recent_max = 100
    known: list[BlockPlace] = []
    for _ in range(12):
        known += await add(catalog, rng, rng.randint(10, 90))
        assert len(catalog.blocks._recent) < 200
    await check(catalog, known)
    ((indexed,),) = await catalog._db.read("SELECT count(*) FROM digests")
    assert indexed > len(known) - 200


async def test_an_interrupted_merge_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = seeded()
    monkeypatch.setattr(blocks_module, "MERGE_BLOCKS", 16)
    catalog = await Catalog.open(tmp_path, StoppedClock())
    known = await add(catalog, rng, 100)
    commits = 0
    commit = catalog._db._commit

    async def failing(cursor: object) -> None:
        nonlocal commits
        commits += 1
        if commits == 4:
            raise CatalogFailed("interrupted")
        await commit(cursor)  # type: ignore[arg-type]

    monkeypatch.setattr(catalog._db, "_commit", failing)
    with pytest.raises(CatalogFailed):
        await catalog.blocks.merge()
    await check(catalog, known)
    known += await add(catalog, rng, 5)
    await check(catalog, known)
    await catalog.close()
    catalog = await Catalog.open(tmp_path, StoppedClock())
    await check(catalog, known)
    await catalog.blocks.merge()
    await check(catalog, known)
    assert await catalog._db.read("SELECT count(*) FROM digests") == [(105,)]
    await catalog.close()


@pytest.mark.parametrize("merged", [False, True])
async def test_dropped_blocks_are_gone_and_their_ids_are_not_used_again(tmp_path: Path, merged: bool) -> None:
    rng = seeded()
    catalog = await Catalog.open(tmp_path, StoppedClock())
    known = await add(catalog, rng, 1300) + await add(catalog, rng, 300)
    if merged:
        await catalog.blocks.merge()
    gone = rng.sample(known, 900)
    kept = [place for place in known if place not in gone]
    freed = await catalog.upkeep.drop(np.array([place.id for place in gone] + [999_999], np.uint64))
    assert freed == sum(place.length for place in gone)
    for _ in range(2):
        await check(catalog, kept)
        assert await catalog.find([place.digest for place in gone]) == {}
        with pytest.raises(Damaged):
            await catalog.places([gone[0].id])
        assert (await catalog.blocks.missing(np.array([0, gone[0].id], np.uint64))).tolist() == [gone[0].id]
        assert await catalog.next_block_id() == 1601
        assert all(pack.to_sweep for pack in await catalog.upkeep.packs())
        await catalog.close()
        catalog = await Catalog.open(tmp_path, StoppedClock())
    if merged:
        assert await catalog.upkeep.tidy() == len(gone)
        assert await catalog._db.read("SELECT count(*) FROM digests") == [(len(kept),)]
        await check(catalog, kept)
    # The same content comes again: a new block.
    again = replace(gone[0], id=1601, pack="packs/again")
    await catalog.add_pack("packs/again", 1000, [again])
    await check(catalog, [*kept, again])
    await catalog.close()


async def test_a_block_that_is_there_is_not_added_again(catalog: Catalog) -> None:
    rng = seeded()
    known = await add(catalog, rng, 10)
    with pytest.raises(CatalogFailed, match="already"):
        await catalog.add_pack("packs/other", 1, [replace(known[3], pack="packs/other")])
    await check(catalog, known)
    assert len(await catalog.upkeep.packs()) == 1


async def test_a_damaged_block_is_not_found_until_it_is_added_again(catalog: Catalog) -> None:
    rng = seeded()
    known = await add(catalog, rng, 10)
    bad = known[4]
    assert await catalog.upkeep.mark_damaged({bad.id: "why", 77: "gone"}, 5.0) == {bad.id: "why"}
    assert await catalog.upkeep.mark_damaged({bad.id: "again"}, 6.0) == {}
    assert [(one.id, one.why, one.found_at) for one in await catalog.upkeep.damaged()] == [(bad.id, "why", 5.0)]
    assert await catalog.find([bad.digest]) == {}
    assert await catalog.damaged([bad.digest, known[0].digest]) == {bad.digest: bad.id}
    healed = replace(bad, pack="packs/new", offset=64)
    await catalog.add_pack("packs/new", 1000, [healed])
    await check(catalog, [healed if place is bad else place for place in known])
    assert await catalog.upkeep.damaged() == []
    assert await catalog.damaged([bad.digest]) == {}


async def test_blocks_move_only_from_where_they_were_copied(catalog: Catalog) -> None:
    """One was dropped, one healed, since they were copied."""
    rng = seeded()
    known = await add(catalog, rng, 600)
    mover = catalog.upkeep.mover(known)
    dropped, healed = known[2], replace(known[3], pack="packs/healed")
    await catalog.upkeep.drop(np.array([dropped.id], np.uint64))
    await catalog.upkeep.mark_damaged({healed.id: ""}, 1.0)
    await catalog.add_pack("packs/healed", 1, [healed])
    copies = [replace(place, pack="packs/new", offset=place.offset + 7) for place in known]
    await mover.add_pack("packs/new", 10**6, copies)
    await check(catalog, [healed if copy.id == healed.id else copy for copy in copies if copy.id != dropped.id])
    packs = {pack.name: pack for pack in await catalog.upkeep.packs()}
    assert packs[known[0].pack].live_blocks == 0
    assert packs["packs/new"].to_sweep == 1  # it holds two blocks for nobody
    await catalog.upkeep.forget_pack(packs[known[0].pack].number)
    await catalog.upkeep.forget_pack(packs["packs/new"].number)  # which has live blocks, and stays
    assert {pack.name for pack in await catalog.upkeep.packs()} == {"packs/healed", "packs/new"}


async def test_a_damaged_range_is_never_handed_out(catalog: Catalog) -> None:
    known = await add(catalog, seeded(), 3)
    async with catalog.write() as tx:
        flip = "UPDATE blocks SET entries = CAST(substr(entries, 1, length(entries) - 1) || x'00' AS BLOB)"
        assert await tx._cursor.execute(flip) == 1
    if known[-1].digest[-1] == 0:
        pytest.skip("the last byte was that already")
    with pytest.raises(CatalogFailed, match="checksum"):
        await catalog.places([known[0].id])


@pytest.mark.parametrize("blob", [b"", b"\x01\x00\x00\x00\x00", bytes(57), bytes(5 + 52 * 513)])
def test_noise_is_no_range(blob: bytes) -> None:
    live = ranges.encode_live(np.array([1], np.uint16))
    with pytest.raises(CatalogFailed):
        ranges.decode(7, live, blob)


def test_damage_of_what_is_live_is_noticed() -> None:
    entries = np.zeros(2, ranges.ENTRY)
    entries["slot"], entries["length"], entries["pack"] = (3, 9), 1, 1
    blob, live = ranges.encode(7, entries), ranges.encode_live(entries["slot"])
    assert ranges.decode(7, live, blob)["slot"].tolist() == [3, 9]
    assert ranges.decode(7, ranges.encode_live(entries["slot"][1:]), blob)["slot"].tolist() == [9]
    for bit in range(8 * len(live)):
        damaged = bytearray(live)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CatalogFailed):
            ranges.decode(7, bytes(damaged), blob)
    with pytest.raises(CatalogFailed):
        ranges.decode(7, ranges.encode_live(np.array([3, 4], np.uint16)), blob)

"""Freeing and verifying on every kind of store: a real directory, and a real bucket, where no holes can be had."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hvsnap.ports import ObjectStore
from hvsnap.store.objects import LocalObjects
from hvsnap.store.s3 import S3Objects
from hvsnap.upkeep.check import Checker
from hvsnap.upkeep.plan import LIVE_SHARE_MIN
from hvsnap.upkeep.verify import Verifier
from tests.ceph import Ceph
from tests.contract.conftest import BUCKET
from tests.store_kit import a_block, seeded
from tests.upkeep_kit import Disks, House, a_house, live_bytes, referred_bytes


@pytest.fixture(params=["local", "ceph"])
def objects(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local":
        return LocalObjects(tmp_path / "store")
    ceph: Ceph = request.getfixturevalue("ceph")
    return S3Objects(ceph.place(BUCKET, f"test/{uuid.uuid4().hex}"), tmp_path)


@pytest.fixture
async def house(tmp_path: Path, objects: ObjectStore) -> AsyncIterator[House]:
    async with a_house(tmp_path / "state", objects) as opened:
        yield opened


async def test_any_deletions_leave_exactly_what_is_referred_to_and_an_empty_store_at_the_end(house: House) -> None:
    rng = seeded()
    disks = Disks()
    await disks.add(house, "vda")
    for _ in range(6):
        for number in rng.sample(range(64), 20):
            disks.write("vda", number, a_block(rng))
        await disks.take(house, "vda")
    while disks.expected:
        await disks.delete(house, rng.choice(list(disks.expected)))
        planned, _packs = await house.sweeper.plan()
        swept = await house.sweeper.sweep()
        if isinstance(house.objects, S3Objects):
            for pack in await house.catalog.upkeep.packs():
                assert pack.live_bytes >= LIVE_SHARE_MIN * pack.size_bytes, "a bucket's packs waste more than they hold"
        assert (swept.freed_bytes, swept.deleted_packs) == (planned.freed_bytes, planned.deleted_packs)
        await disks.check(house)
        assert await live_bytes(house) == await referred_bytes(house)
        found = await Verifier(house.catalog, house.store, house.sweeper, house.clock).everything(lambda *_: None)
        assert (found.damaged, found.manifests, found.indexes) == ({}, {}, {})
        assert (await Checker(house.catalog, house.store, house.clock).check()).differences == []
    assert [item.name async for item in house.objects.list("")] == ["hvsnap.json"]

"""What says what may be deleted, and when, is used as it was written, or refused; no change of a row forgets its sum.

FAULTS 14.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvsnap.catalog import migrations, row_sums
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CatalogFailed, SnapshotPromoted
from hvsnap.model import DiskId, GuestUuid, Image, ImageId, Origin, SnapshotId
from hvsnap.policy import Policy, PolicyId
from tests.catalog_kit import StoppedClock, a_disk, add_chain

WAY_OUT = "store-rebuild"


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Catalog]:
    opened = await Catalog.open(tmp_path, StoppedClock())
    yield opened
    await opened.close()


async def a_chain(catalog: Catalog) -> tuple[DiskId, list[SnapshotId]]:
    disk = a_disk()
    return disk.id, await add_chain(catalog, disk, {0: {1: 1}}, {0: {2: 2}}, {0: {3: 3}})


def behind_our_back(catalog: Catalog, sql: str, *parameters: Any) -> None:
    """Change the file as damage does: without a sum."""
    with closing(sqlite3.connect(catalog._db.path)) as connection, connection:
        connection.execute(sql, parameters)


async def test_every_column_is_under_the_sum(catalog: Catalog) -> None:
    for table, columns in row_sums.COLUMNS.items():
        found = [row[1] for row in await catalog._db.read(f"PRAGMA table_info({table})")]
        assert sorted(found) == sorted([*columns, "row_sum"])


@pytest.mark.parametrize(
    "change",
    [
        *(
            "locked_until = NULL",
            "locked_until = 1.0",
            "expires_at = 1.0",
            "automatic = 1",
            "retention = '{\"last\": 1}'",
        ),
        *("state = 'failed'", "name = 'another'", "tags = '{}'", "created_at = 5.0", "manifest_changes = 0"),
    ],
)
async def test_a_snapshot_that_is_not_what_was_written_is_not_listed_deleted_or_changed(
    catalog: Catalog, change: str
) -> None:
    _disk, (first, second, _third) = await a_chain(catalog)
    async with catalog.write() as tx:
        await tx.update_snapshot(second, locked_until=2e9, expires_at=3e9, tags={"a": "b"})
    row = await catalog.snapshot(second)
    behind_our_back(catalog, f"UPDATE snapshots SET {change} WHERE id = ?", second)
    for look in (catalog.snapshots, lambda: catalog.snapshot(second), catalog.upkeep.manifests):
        with pytest.raises(CatalogFailed) as refused:
            await look()
        assert WAY_OUT in refused.value.hint
    for doomed in (second, first):  # its parent, too: that would be written into the damaged row
        with pytest.raises(CatalogFailed) as refused:
            async with catalog.write() as tx:
                await tx.delete_snapshot(doomed)
        assert WAY_OUT in refused.value.hint
    with pytest.raises(CatalogFailed, match="not what was written"):
        async with catalog.write() as tx:
            await tx.update_snapshot(second, description="this would make it look sound")
    behind_our_back(
        catalog,
        """UPDATE snapshots SET locked_until = ?, expires_at = ?, automatic = 0, retention = '', state = 'accomplished',
           name = ?, tags = '{"a": "b"}', created_at = ?, manifest_changes = 1 WHERE id = ?""",
        *(row.locked_until, row.expires_at, row.name, row.created_at, second),
    )
    assert await catalog.snapshot(second) == row, "nothing of it was changed"


async def test_every_way_to_change_a_row_writes_its_sum(catalog: Catalog) -> None:
    disk, (first, second, third) = await a_chain(catalog)
    async with catalog.write() as tx:
        await tx.put_policy(Policy(PolicyId("p"), "Daily", (3,)))
        await tx.put_policy(Policy(PolicyId("p"), "Nightly", (4,)))
        await tx.update_disk(disk, policy="p", gone_since=5.0)
        await tx.add_image(Image(ImageId("i"), "debian", "", first, 1.0))
        for inode in (1, 2):
            await tx.put_origin(Origin("/a", inode, first, 1.0))
        for block in (3, 4):
            await tx.add_carry(disk, 0, np.array([block], np.uint16))
        operation = await tx.open_operation("capture", GuestUuid("g"), "first", {})
        await tx.step(operation.id, "second", overlay="/o")
    async with catalog.write() as tx:
        await tx.delete_snapshot(second)
        await tx.delete_snapshot(third)
    await catalog.upkeep.manifest_written((await catalog.upkeep.manifests())[first], 1)
    for _table, sql in row_sums.damaged_rows():
        assert await catalog._db.read(sql) == [(0,)]
    for missing, _statement in row_sums.missing_sums():
        assert await catalog._db.read(missing) == []
    assert [one.name for one in await catalog.policies()] == ["Nightly"]
    assert await catalog.origin("/a") == Origin("/a", 2, first, 1.0)
    assert {page: index.tolist() for page, index in (await catalog.carry(disk)).items()} == {0: [2, 3, 4]}
    async with catalog.write() as tx:
        await tx.remove_policy(PolicyId("p"))
        await tx.close_operation(operation.id)
        await tx.clear_carry(disk)
    assert (await catalog.disk(disk)).policy is None


async def test_an_image_that_points_elsewhere_lets_no_snapshot_go(catalog: Catalog) -> None:
    _disk, (first, second, _third) = await a_chain(catalog)
    async with catalog.write() as tx:
        await tx.add_image(Image(ImageId("i"), "debian", "", first, 1.0))
    with pytest.raises(SnapshotPromoted):
        async with catalog.write() as tx:
            await tx.delete_snapshot(first)
    behind_our_back(catalog, "UPDATE images SET snapshot = ?", second)
    with pytest.raises(CatalogFailed, match="image i"):
        async with catalog.write() as tx:
            await tx.delete_snapshot(first)


async def test_a_carried_block_of_another_page_is_not_merged_with_what_is_right(catalog: Catalog) -> None:
    disk, (_first, _second, third) = await a_chain(catalog)
    async with catalog.write() as tx:
        await tx.add_carry(disk, 7, np.array([3], np.uint16))
    behind_our_back(catalog, "UPDATE carry SET page = 0")
    with pytest.raises(CatalogFailed, match="carry"):
        await catalog.carry(disk)
    with pytest.raises(CatalogFailed, match="carry"):
        async with catalog.write() as tx:
            await tx.add_carry(disk, 0, np.array([9], np.uint16))
    with pytest.raises(CatalogFailed, match="carry"):
        async with catalog.write() as tx:
            await tx.delete_snapshot(third)  # the head: what it changed is to be carried


async def test_the_start_refuses_a_damaged_row_and_sums_those_of_an_earlier_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = next(one for one in migrations.MIGRATIONS if "row_sum" in one)
    before = migrations.MIGRATIONS[: migrations.MIGRATIONS.index(script)]
    with closing(sqlite3.connect(tmp_path / "catalog.db")) as connection:
        for number, one in enumerate(before, start=1):
            connection.executescript(f"{one}\nPRAGMA user_version = {number};")
        connection.execute(f"PRAGMA application_id = {migrations.APPLICATION_ID}")
        connection.execute("INSERT INTO meta VALUES ('opened', '1')")
        connection.execute("INSERT INTO policies VALUES ('p', 'Daily', '[3]', '[]', 'UTC', 30, '{}', 1.0)")
        connection.commit()
    catalog = await Catalog.open(tmp_path, StoppedClock())
    for missing, _statement in row_sums.missing_sums():
        assert await catalog._db.read(missing) == []
    await catalog.close()
    behind_our_back(catalog, "UPDATE policies SET retain_days = 3")
    with pytest.raises(CatalogFailed, match="policies") as refused:
        await Catalog.open(tmp_path, StoppedClock())
    assert WAY_OUT in refused.value.hint

"""A catalog file that cannot be used is refused with a next step, and left as it is."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from hvsnap.catalog import db, migrations
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import CatalogFailed, HvsnapError, NoSpace, StoreBusy
from hvsnap.model import Impact, SnapshotId
from tests.catalog_kit import StoppedClock, a_block, a_disk, a_page, add_chain, contents

ROOT = Path(__file__).parents[2]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system of its own")


async def open_catalog(directory: Path) -> Catalog:
    return await Catalog.open(directory, StoppedClock())


async def refused(directory: Path, kind: type[HvsnapError] = CatalogFailed) -> HvsnapError:
    """Return the error with which a state directory is refused; its lock must be free afterwards."""
    with pytest.raises(kind) as failure:
        await open_catalog(directory)
    assert failure.value.hint
    return failure.value


async def a_used_catalog(directory: Path) -> Path:
    """Make a catalog with a chain in it, and close it."""
    catalog = await open_catalog(directory)
    await add_chain(catalog, a_disk(), {0: {1: 1}}, {0: {2: 2}})
    await catalog.close()
    return directory / "catalog.db"


@pytest.fixture
def small_device(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    path = tmp_path / "device"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)  # a failed test may have left a file open


async def test_what_was_committed_is_there_after_a_restart(tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet" / "there"
    catalog = await open_catalog(directory)
    (first, second) = await add_chain(catalog, a_disk(), {0: {1: 1}}, {0: {2: 2}})
    await catalog.close()
    catalog = await open_catalog(directory)
    assert await contents(catalog, first) == {0: {1: 1}}
    assert await contents(catalog, second) == {0: {1: 1, 2: 2}}
    await catalog.close()


async def test_commits_are_durable_when_they_return(tmp_path: Path) -> None:
    catalog = await open_catalog(tmp_path)
    pragmas = [
        next(iter(await catalog._db._writer.execute_fetchall(f"PRAGMA {name}")))[0]
        for name in ("journal_mode", "synchronous", "foreign_keys")
    ]
    assert pragmas == ["wal", 2, 1]
    await catalog.close()


# -- versions -------------------------------------------------------------------------------------


async def test_a_catalog_of_a_newer_version_is_refused_untouched(tmp_path: Path) -> None:
    """FAULTS 14."""
    path = await a_used_catalog(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {len(migrations.MIGRATIONS) + 1}")
    before = path.read_bytes()
    assert "newer" in (await refused(tmp_path)).message
    assert path.read_bytes() == before


async def test_another_programs_database_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE photos (name TEXT)")
        connection.commit()
    before = path.read_bytes()
    assert "not an hvsnap catalog" in (await refused(tmp_path)).message
    assert path.read_bytes() == before


async def test_a_migration_that_fails_half_way_leaves_the_version_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 14."""
    path = await a_used_catalog(tmp_path)
    known = migrations.MIGRATIONS
    good, bad = "CREATE TABLE one (x);", "CREATE TABLE two (x); DELETE FROM disks; CREATE TABLE disks (x);"
    monkeypatch.setattr(migrations, "MIGRATIONS", (*known, good, bad))
    await refused(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_schema")}
        assert connection.execute("PRAGMA user_version").fetchone() == (len(known) + 1,)
        assert connection.execute("SELECT count(*) FROM snapshots").fetchone() == (2,)
    assert "one" in tables
    assert "two" not in tables
    monkeypatch.setattr(migrations, "MIGRATIONS", (*known, good, "CREATE TABLE two (x);"))
    catalog = await open_catalog(tmp_path)
    assert len(await catalog.disks()) == 1
    await catalog.close()


async def test_a_catalog_of_the_first_version_is_brought_to_the_present_one(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "catalog.db")) as connection:
        connection.executescript(migrations.MIGRATIONS[0])
        connection.execute(f"PRAGMA application_id = {migrations.APPLICATION_ID}")
        connection.execute("PRAGMA user_version = 1")
        disk = "'d-1', 'uuid', 'web01', 'vda', '', '/a', 'qcow2', 1, 1, 0.0"
        columns = "id, guest_uuid, guest_name, target, serial, source, format, size_bytes, system, created_at"
        connection.execute(f"INSERT INTO disks ({columns}) VALUES ({disk})")
        columns = "id, disk, sequence, name, description, kind, method, reason, consistency, state, size_bytes"
        row = "'s-1', 'd-1', 1, 'old', '', 'full', 'full', '', 'crash', 'accomplished', 1"
        connection.execute(f"INSERT INTO snapshots ({columns}, created_at) VALUES ({row}, 0.0)")
        connection.commit()
    catalog = await open_catalog(tmp_path)
    old = await catalog.snapshot(SnapshotId("s-1"))
    assert (old.name, old.impact) == ("old", None)
    felt = Impact(100.0, 250.5, 80.0, None, 1.25, 8 << 20)
    async with catalog.write() as tx:
        await tx.update_snapshot(old.id, impact=felt)
    assert (await catalog.snapshot(old.id)).impact == felt
    await catalog.close()


async def test_a_first_schema_that_fails_leaves_an_empty_file_that_can_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "MIGRATIONS", ("CREATE TABLE disks (x); CREATE TABLE disks (x);",))
        await refused(tmp_path)
    catalog = await open_catalog(tmp_path)
    assert await catalog.disks() == []
    await catalog.close()


# -- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 16, 100])
async def test_a_damaged_header_or_schema_is_refused_untouched(tmp_path: Path, start: int) -> None:
    path = await a_used_catalog(tmp_path)
    content = bytearray(path.read_bytes())
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(content)
    error = await refused(tmp_path)
    assert "store-rebuild" in error.hint
    assert path.read_bytes() == bytes(content)


async def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = await a_used_catalog(tmp_path)
    path.write_bytes(path.read_bytes()[: 4096 * 3])
    assert "store-rebuild" in (await refused(tmp_path)).hint


async def test_damage_in_a_table_is_found_at_the_start_after_a_crash(tmp_path: Path) -> None:
    path = await a_used_catalog(tmp_path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM meta WHERE key = 'closed'")  # as a daemon that was killed leaves it
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (root,) = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'events'").fetchone()
    content = bytearray(path.read_bytes())
    content[(root - 1) * 4096 : root * 4096] = b"\x55" * 4096
    path.write_bytes(content)
    assert "damaged" in (await refused(tmp_path)).message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_id_max", "3\x13"),
        ("block_id_max", "-1"),
        ("sequence/d-aaaaaaaaaaaa", ""),
        ("note/swept", "nan"),
        ("schedule/checked", "1.5x"),
        ("guest/web01", '{"a":'),
    ],
)
async def test_a_single_value_that_was_never_written_so_is_refused(tmp_path: Path, key: str, value: str) -> None:
    """FAULTS 14."""
    await (await Catalog.open(tmp_path, StoppedClock())).close()
    with closing(sqlite3.connect(tmp_path / "catalog.db")) as connection, connection:
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
    with pytest.raises(CatalogFailed, match=key) as refused:
        await Catalog.open(tmp_path, StoppedClock())
    assert "store-rebuild" in refused.value.hint


async def test_a_damaged_page_is_never_handed_out(tmp_path: Path) -> None:
    catalog = await open_catalog(tmp_path)
    (snapshot,) = await add_chain(catalog, a_disk(), {0: {1: 1, 9: 4}})
    async with catalog.write() as tx:
        # One flipped bit: block 5 in place of block 4, which may well exist and have the right digest.
        flip = "UPDATE pages SET entries = CAST(substr(entries, 1, length(entries) - 4) || x'05000000' AS BLOB)"
        assert await tx._cursor.execute(flip) == 1
    with pytest.raises(CatalogFailed, match="checksum"):
        await catalog.view(snapshot, 0)
    await catalog.close()


# -- who else is there ----------------------------------------------------------------------------

HOLDER = """
import asyncio, sys
from pathlib import Path
from hvsnap.catalog.catalog import Catalog
from tests.catalog_kit import StoppedClock

async def hold():
    await Catalog.open(Path(sys.argv[1]), StoppedClock())
    print("open", flush=True)
    if sys.argv[2:] == ["fail"]:
        raise SystemExit(3)
    await asyncio.Event().wait()

asyncio.run(hold())
"""


async def test_a_second_process_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    """FAULTS 15."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "open\n"
            await refused(tmp_path, StoreBusy)
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    catalog = await open_catalog(tmp_path)
    await catalog.close()


def test_a_process_that_ends_by_an_error_does_not_wait_for_its_catalog(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "fail"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=20).returncode == 3


async def test_a_second_catalog_in_one_process_is_refused(tmp_path: Path) -> None:
    catalog = await open_catalog(tmp_path)
    await refused(tmp_path, StoreBusy)
    async with catalog.write() as tx:  # and the first one goes on undisturbed
        await tx.emit("test.alive", {})
    await catalog.close()


async def test_a_file_that_another_program_has_locked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 14."""
    path = await a_used_catalog(tmp_path)
    monkeypatch.setattr(db, "BUSY_TIMEOUT_MS", 50)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        error = await refused(tmp_path)
    assert "locked" in error.message
    catalog = await open_catalog(tmp_path)
    await catalog.close()


# -- devices --------------------------------------------------------------------------------------


@needs_root
async def test_a_read_only_directory_is_refused(small_device: Path) -> None:
    """FAULTS 14."""
    await a_used_catalog(small_device / "state")
    subprocess.run(["mount", "-o", "remount,ro", small_device], check=True)
    assert "not usable" in (await refused(small_device / "state")).message


async def test_a_state_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    assert "not usable" in (await refused(tmp_path / "state")).message


def fill_device(device: Path) -> None:
    """Write a file until nothing more fits."""
    with (device / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(4096)):
            pass


@needs_root
async def test_a_device_that_the_catalog_fills_fails_the_capture_and_harms_nothing(
    small_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAULTS 10."""
    monkeypatch.setattr(db, "WAL_PAGES", 256)  # to 24 MiB what the product's log is to a small disk
    catalog = await open_catalog(small_device)
    first, second = await add_chain(catalog, a_disk(), {0: {1: 1}}, {0: {2: 2}})

    async def fill() -> None:
        for number in range(5000):
            async with catalog.write() as tx:
                page = a_page({index: number + index * 3 for index in range(0, 4096, 2)})
                await tx.put_page(second, number + 1, page)
                await tx.emit("test.filled", {"number": number})

    with pytest.raises(NoSpace) as failure:
        await fill()
    assert failure.value.hint
    filled = [event.payload["number"] for event in await catalog.events(0, limit=10_000)]
    assert len(filled) > 100
    assert filled == list(range(len(filled)))
    assert await catalog.page_numbers(second) == [0, *(number + 1 for number in filled)]
    assert await contents(catalog, first) == {0: {1: 1}}

    async with catalog.write() as tx:
        await tx.delete_snapshot(second)
    (third,) = await add_chain(catalog, a_disk(), {0: {1: 7}})  # and what was freed is used again
    await catalog.close()
    catalog = await open_catalog(small_device)
    assert [one.id for one in await catalog.snapshots()] == [first, third]
    assert await contents(catalog, third) == {0: {1: 7}}
    await catalog.close()


@needs_root
async def test_on_a_device_filled_by_others_failures_are_recorded_and_snapshots_deleted(small_device: Path) -> None:
    """FAULTS 10."""
    catalog = await open_catalog(small_device)
    first, second = await add_chain(catalog, a_disk(), {page: {1: 1} for page in range(200)}, {0: {2: 2}})
    fill_device(small_device)

    async def grow() -> None:
        for pack in range(10_000):
            await catalog.add_pack(f"p{pack}", 1, [a_block(pack + 1)])

    with pytest.raises(NoSpace):  # growing is what the reserve is not for
        await grow()
    async with catalog.write() as tx:
        await tx.emit("snapshot.failed", {"id": second})
        await tx.delete_snapshot(first)
    assert await contents(catalog, second) == {0: {1: 1, 2: 2}} | {page: {1: 1} for page in range(1, 200)}
    assert [event.type for event in await catalog.events(0)] == ["snapshot.failed"]
    (small_device / "ballast").unlink()
    await catalog.add_pack("later", 1, [a_block(999_999)])
    await catalog.close()


@needs_root
async def test_a_catalog_is_closed_and_opened_on_a_full_device(small_device: Path) -> None:
    catalog = await open_catalog(small_device)
    made = await add_chain(catalog, a_disk(), {0: {1: 1}})
    fill_device(small_device)
    await catalog.close()
    catalog = await open_catalog(small_device)
    assert await contents(catalog, made[0]) == {0: {1: 1}}
    async with catalog.write() as tx:
        await tx.delete_snapshot(made[0])
    await catalog.close()


@needs_root
async def test_after_a_kill_on_a_full_device_snapshots_are_deleted(small_device: Path) -> None:
    """FAULTS 10."""
    catalog = await open_catalog(small_device)
    (first, second) = await add_chain(catalog, a_disk(), {page: {1: 1} for page in range(200)}, {0: {2: 2}})
    await catalog.close()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(small_device)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        fill_device(small_device)
        holder.kill()
    catalog = await open_catalog(small_device)
    async with catalog.write() as tx:
        await tx.delete_snapshot(first)
    assert (await contents(catalog, second))[0] == {1: 1, 2: 2}
    await catalog.close()


async def test_an_opening_that_is_cancelled_leaves_the_directory_free(tmp_path: Path) -> None:
    for turns in range(40):
        task = asyncio.create_task(open_catalog(tmp_path))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await (await task).close()
    catalog = await open_catalog(tmp_path)
    await catalog.close()

"""A transaction happens wholly or not at all, whatever happens to who runs it; nobody sees it before."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.db import Cursor
from hvsnap.errors import CatalogFailed, NoSpace
from hvsnap.model import Event, Origin
from tests.catalog_kit import StoppedClock, a_block, a_disk


@pytest_asyncio.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Catalog]:
    opened = await Catalog.open(tmp_path, StoppedClock())
    yield opened
    await opened.close()


class Gate:
    """Holds the writer before one statement (or after it, its answer under way) until it is opened; or fails then."""

    def __init__(
        self, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, statement: str, *, after: bool = False
    ) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.error: sqlite3.Error | None = None
        writer = catalog._db._writer
        real = writer.execute

        async def held(sql: str, parameters: Any = ()) -> Any:
            if sql != statement:
                return await real(sql, parameters)
            answer = await real(sql, parameters) if after else None
            self.reached.set()
            await self.open.wait()
            if self.error is not None:
                raise self.error
            return answer or await real(sql, parameters)

        monkeypatch.setattr(writer, "execute", held)


async def write_one(catalog: Catalog) -> None:
    async with catalog.write() as tx:
        await tx.emit("test.done", {})


async def test_an_error_rolls_everything_back(catalog: Catalog) -> None:
    async def fail() -> None:
        async with catalog.write() as tx:
            await tx.add_disk(a_disk())
            await tx.emit("disk.attached", {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await catalog.disks() == []
    assert await catalog.events(0) == []


async def test_a_cancellation_in_the_middle_rolls_everything_back(catalog: Catalog) -> None:
    inside = asyncio.Event()

    async def hang() -> None:
        async with catalog.write() as tx:
            await tx.add_disk(a_disk())
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(hang())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await catalog.disks() == []
    await write_one(catalog)


async def test_a_cancellation_at_the_beginning_leaves_no_transaction_open(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(catalog, monkeypatch, "BEGIN IMMEDIATE", after=True)
    task = asyncio.create_task(write_one(catalog))
    await gate.reached.wait()
    task.cancel()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await write_one(catalog)
    assert len(await catalog.events(0)) == 1


async def test_a_cancellation_during_the_commit_comes_after_it(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Event] = []
    catalog.on_event.append(heard.append)
    gate = Gate(catalog, monkeypatch, "COMMIT")
    task = asyncio.create_task(write_one(catalog))
    await gate.reached.wait()
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert heard == await catalog.events(0) != []


async def test_a_commit_that_fails_after_a_cancellation_leaves_no_transaction_open(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(catalog, monkeypatch, "COMMIT")
    gate.error = sqlite3.OperationalError("disk I/O error")
    task = asyncio.create_task(write_one(catalog))
    await gate.reached.wait()
    task.cancel()
    gate.open.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.error = None
    assert await catalog.events(0) == []
    await write_one(catalog)


async def test_a_commit_that_fails_announces_nothing(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Event] = []
    catalog.on_event.append(heard.append)
    gate = Gate(catalog, monkeypatch, "COMMIT")
    gate.error = sqlite3.OperationalError("disk I/O error")
    gate.open.set()
    with pytest.raises(CatalogFailed):
        await write_one(catalog)
    assert heard == []
    assert await catalog.events(0) == []


async def test_readers_see_nothing_before_the_commit(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = a_disk()
    async with catalog.write() as tx:
        await tx.add_disk(disk)
        assert await catalog.disks() == []
    assert await catalog.disks() == [disk]
    # Deduplication must not refer to a block whose row may yet be rolled back.
    before_commit: list[object] = []
    commit = catalog._db._commit

    async def look_and_commit(cursor: Cursor) -> None:
        before_commit.append(await catalog.find([a_block(1).digest]))
        await commit(cursor)

    monkeypatch.setattr(catalog._db, "_commit", look_and_commit)
    await catalog.add_pack("p", 1, [a_block(1)])
    assert before_commit == [{}]
    assert await catalog.find([a_block(1).digest]) == {a_block(1).digest: 1}


async def test_a_scan_sees_one_moment_while_others_write(catalog: Catalog) -> None:
    async with catalog._db.scan() as reader:
        before = await reader.read("SELECT count(*) FROM disks")
        async with catalog.write() as tx:
            await tx.add_disk(a_disk())
        assert await reader.read("SELECT count(*) FROM disks") == before == [(0,)]
    assert len(await catalog.disks()) == 1


async def test_writers_wait_for_each_other(catalog: Catalog) -> None:
    async def add(number: int) -> None:
        async with catalog.write() as tx:
            seen = await tx._cursor.read("SELECT count(*) FROM events")
            await asyncio.sleep(0)
            await tx.emit("test.count", {"before": seen[0][0], "number": number})

    await asyncio.gather(*(add(number) for number in range(20)))
    assert [event.payload["before"] for event in await catalog.events(0)] == list(range(20))


async def test_a_transaction_within_a_transaction_is_refused_instead_of_waiting_for_ever(catalog: Catalog) -> None:
    async with catalog.write() as tx:
        with pytest.raises(RuntimeError, match="within a transaction"):
            await catalog.add_pack("p", 1, [a_block(1)])
        await tx.emit("test.alive", {})
    assert [event.type for event in await catalog.events(0)] == ["test.alive"]


async def test_a_transaction_that_is_over_takes_no_more_changes(catalog: Catalog) -> None:
    async with catalog.write() as tx:
        pass
    with pytest.raises(RuntimeError, match="over"):
        await tx.emit("test.late", {})


async def test_an_error_that_made_sqlite_roll_back_cannot_be_ignored(catalog: Catalog) -> None:
    async def go_on() -> None:
        async with catalog.write() as tx:
            await tx.add_disk(a_disk())
            await tx._cursor.execute("ROLLBACK")  # what SQLite does by itself on a full device
            await tx.emit("disk.attached", {})

    with pytest.raises(CatalogFailed, match="rolled back"):
        await go_on()
    assert await catalog.events(0) == []


async def test_listeners_hear_of_events_in_order_and_only_after_the_commit(catalog: Catalog) -> None:
    heard: list[int] = []
    catalog.on_event.append(lambda event: heard.append(event.sequence))
    async with catalog.write() as tx:
        first = await tx.emit("test.one", {})
        second = await tx.emit("test.two", {})
        assert heard == []
    assert heard == [first.sequence, second.sequence] == [1, 2]


async def test_a_listener_that_fails_harms_neither_the_transaction_nor_other_listeners(catalog: Catalog) -> None:
    problems: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: problems.append(context))
    heard: list[Event] = []

    def fail(_event: Event) -> None:
        raise ValueError("deaf")

    catalog.on_event += [fail, heard.append]
    await write_one(catalog)
    assert len(heard) == len(problems) == 1
    assert "test.done" in problems[0]["message"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [(sqlite3.SQLITE_FULL, NoSpace), (sqlite3.SQLITE_READONLY, CatalogFailed), (sqlite3.SQLITE_IOERR, CatalogFailed)],
)
async def test_sqlites_errors_become_ours_with_a_next_step(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[CatalogFailed]
) -> None:
    gate = Gate(catalog, monkeypatch, "COMMIT")
    gate.error = sqlite3.OperationalError("as SQLite says")
    gate.error.sqlite_errorcode = code
    gate.open.set()
    with pytest.raises(kind) as failure:
        await write_one(catalog)
    assert type(failure.value) is kind
    assert failure.value.hint


# -- origins --------------------------------------------------------------------------------------


async def test_s7_3_what_disks_were_made_of_is_remembered_by_path(catalog: Catalog) -> None:
    first = Origin("/images/a.qcow2", 2**63 - 1, "s-aaaaaaaaaaaa", 5.0)
    device = Origin("/dev/vg/b", None, "i-bbbbbbbbbbbb", 6.0)
    async with catalog.write() as tx:
        await tx.put_origin(first)
        await tx.put_origin(device)
    assert await catalog.origins() == [device, first]
    again = replace(first, inode=7, made_of="s-cccccccccccc")
    async with catalog.write() as tx:
        await tx.put_origin(again)
        await tx.forget_origin(device.path)
    assert (await catalog.origin(first.path), await catalog.origin(device.path)) == (again, None)

"""The catalog's file: one writer, readers that see only what is committed, nothing half.

Two connections: the writer's, whose transactions are serialised, and the readers'. A reader on the writer's own
connection would see rows that may yet be rolled back, and deduplication must never refer to those. Long scans have
a connection each (:meth:`Database.scan`): one consistent state, and nobody waits behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite

from hvsnap.catalog import row_sums
from hvsnap.catalog.lock import StateLock
from hvsnap.catalog.migrations import migrate
from hvsnap.errors import CatalogFailed, NoSpace
from hvsnap.reserve import Reserve

BUSY_TIMEOUT_MS = 10_000
CACHE_KIB = 32 * 1024
WAL_PAGES = 8192
"""Pages (4 KiB) after which the log is written back: index pages that several packs touch are written once."""

RESERVE_BYTES_MAX = 64 << 20
"""What is kept free for deletions and failures: the log of the largest deletion that was measured, and some."""

REBUILD = "the file was left as it is; `hvsnap store-rebuild` makes a new one from the store"

FAULTS = (sqlite3.Error, UnicodeDecodeError)
"""What a file raises that is not usable; the second where its damage is in a text that SQLite quotes."""

_SIGNS_OF_DAMAGE = ("decode to UTF-8", "user-defined function")
"""What SQLite's module for Python says of texts that are none, when it hands them to us or to the sum of a row."""

Row = tuple[Any, ...]
T = TypeVar("T")


def failure(error: Exception, path: Path) -> CatalogFailed | NoSpace:
    """Return what SQLite's error means to a user."""
    extended = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    damaged = isinstance(error, UnicodeDecodeError) or any(sign in str(error) for sign in _SIGNS_OF_DAMAGE)
    damaged = damaged or extended == sqlite3.SQLITE_CONSTRAINT_TRIGGER  # a row is not what was written: row_sums.py
    code = sqlite3.SQLITE_CORRUPT if damaged else extended & 0xFF
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(path)):
        return NoSpace(f"the catalog {path} cannot grow: {error}")
    hints = {
        sqlite3.SQLITE_BUSY: "another program has it open (sqlite3?); close that and try again",
        sqlite3.SQLITE_CORRUPT: REBUILD,
        sqlite3.SQLITE_NOTADB: REBUILD,
        sqlite3.SQLITE_CONSTRAINT: "nothing was changed; please report this",
    }
    default = "check the file system and the permissions of state_dir; the file was left as it is"
    return CatalogFailed(f"the catalog {path} failed: {error}", hint=hints.get(code, default))


def _is_full(path: Path) -> bool:
    """Whether the device has no space left: SQLite reports some full devices as I/O errors (its shared memory)."""
    try:
        return os.statvfs(path.parent).f_bavail == 0
    except OSError:
        return False


async def settled(operation: Coroutine[Any, Any, T]) -> T:
    """Wait for an operation to its end, whatever happens to the caller; a cancellation is delivered then."""
    task = asyncio.ensure_future(operation)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled from task.exception()
    return task.result()


class Reader:
    """Queries on one connection."""

    def __init__(self, connection: aiosqlite.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    async def read(self, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
        """Return all rows of a query. (All at once: an open query would pin an old state for those that follow.)"""
        try:
            return list(await self._connection.execute_fetchall(sql, parameters))  # type: ignore[arg-type]
        except FAULTS as error:
            raise failure(error, self._path) from error


class Cursor(Reader):
    """Statements of one transaction, on the writer's connection; its queries see its own changes.

    ``after_commit`` is called once the transaction is committed, and only then.
    """

    def __init__(self, connection: aiosqlite.Connection, path: Path, reserve: Reserve) -> None:
        super().__init__(connection, path)
        self._reserve = reserve
        self.after_commit: Callable[[], None] = lambda: None
        self.over = False

    async def read(self, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
        """Return all rows of a query, seeing the transaction's own changes."""
        self._check()
        return await super().read(sql, parameters)

    async def execute(self, sql: str, parameters: Iterable[Any] = ()) -> int:
        """Run one statement and return how many rows it changed."""
        return (await self._run(self._connection.execute, sql, parameters)).rowcount

    async def insert(self, sql: str, parameters: Iterable[Any]) -> int:
        """Run one INSERT and return its row id."""
        return int((await self._run(self._connection.execute, sql, parameters)).lastrowid or 0)

    async def many(self, sql: str, rows: Iterable[Iterable[Any]]) -> None:
        """Run one statement for each row."""
        await self._run(self._connection.executemany, sql, rows)

    async def check_room(self) -> None:
        """Raise :class:`NoSpace` if what is left is for making room: asked before the catalog is made to grow."""
        if self._reserve.held:
            return
        sql = "SELECT freelist_count * page_size FROM pragma_freelist_count, pragma_page_size"
        ((reusable_bytes,),) = await self.read(sql)
        if not await asyncio.to_thread(self._reserve.has_room, reusable_bytes):
            raise NoSpace(f"the device of the catalog {self._path} is nearly full")

    async def _run(self, run: Callable[..., Any], sql: str, parameters: Iterable[Any]) -> aiosqlite.Cursor:
        self._check()
        try:
            cursor: aiosqlite.Cursor = await run(sql, parameters)
        except FAULTS as error:
            raise failure(error, self._path) from error
        return cursor

    def _check(self) -> None:
        """Refuse statements that would be committed one by one."""
        if self.over:
            raise RuntimeError("this transaction is over")
        if not self._connection.in_transaction:
            # A full device, for one, makes SQLite roll back by itself; whoever caught that error must not go on.
            raise CatalogFailed("the transaction was rolled back by an earlier error", hint="nothing was changed")


class Database:
    """Connections to one catalog file, and its transactions."""

    def __init__(
        self,
        path: Path,
        lock: StateLock,
        reserve: Reserve,
        writer: aiosqlite.Connection,
        reader: aiosqlite.Connection,
    ) -> None:
        self.path = path
        self._lock = lock
        self._reserve = reserve
        self._writer = writer
        self._reader_connection = reader
        self._reader = Reader(reader, path)
        self._turn = asyncio.Lock()
        self._holder: asyncio.Task[Any] | None = None

    @classmethod
    async def open(cls, directory: Path) -> Database:
        """Open (or create) ``catalog.db`` in ``directory``, and migrate it.

        Raises :class:`CatalogFailed` for a file that is damaged, read-only, locked or of a newer version,
        :class:`NoSpace`, and :class:`StoreBusy` when another process has the directory.
        """
        path = directory / "catalog.db"
        lock = StateLock(directory)
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(lock.release)
            await settled(asyncio.to_thread(lock.acquire))
            reserve = Reserve(directory / "reserve", RESERVE_BYTES_MAX)
            try:
                await asyncio.to_thread(reserve.adjust)
                writer = await _connect(path)
                undo.push_async_callback(writer.close)
                await migrate(writer, path)
                for trigger in row_sums.triggers():
                    await writer.execute(trigger)
                await _begin_session(writer, path)
                reader = await _connect(path, read_only=True)
            except FAULTS as error:
                raise failure(error, path) from error
            undo.pop_all()
        return cls(path, lock, reserve, writer, reader)

    async def close(self) -> None:
        """Close the file; a transaction under way ends first."""
        async with self._turn:
            try:
                # Only saves the next start a check: if it cannot be written (a full device), there will be one.
                with contextlib.suppress(sqlite3.Error):
                    await self._writer.execute("INSERT OR REPLACE INTO meta VALUES ('closed', '1')")
                await self._reader_connection.close()
                await self._writer.close()
            finally:
                self._lock.release()

    async def read(self, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
        """Return all rows of a query, seeing committed rows only."""
        return await self._reader.read(sql, parameters)

    @contextlib.asynccontextmanager
    async def scan(self) -> AsyncIterator[Reader]:
        """Give a reader of its own that sees one and the same committed state until it is left."""
        try:
            connection = await _connect(self.path, read_only=True)
            try:
                await connection.execute("BEGIN")
                yield Reader(connection, self.path)
            finally:
                await settled(connection.close())
        except FAULTS as error:
            raise failure(error, self.path) from error

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Cursor]:
        """Run one write transaction: committed at the end, rolled back on any error or cancellation.

        A cancellation that comes while it is being committed is delivered after that, and does not undo it.
        """
        if self._holder is asyncio.current_task():
            raise RuntimeError("a transaction within a transaction: use the one that is open")
        async with self._turn:
            self._holder = asyncio.current_task()
            cursor = Cursor(self._writer, self.path, self._reserve)
            try:
                await settled(self._begin())
                yield cursor
                await settled(self._commit(cursor))
            except BaseException as error:
                await self._roll_back(error)
                raise
            finally:
                cursor.over = True
                self._holder = None

    async def _begin(self) -> None:
        try:
            if await asyncio.to_thread(self._reserve.adjust):
                # What the log holds can be written back now; it is cut, and its space is free again.
                with contextlib.suppress(sqlite3.Error):
                    await self._writer.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
            await self._writer.execute("BEGIN IMMEDIATE")
        except FAULTS as error:
            raise failure(error, self.path) from error

    async def _commit(self, cursor: Cursor) -> None:
        await cursor.execute("COMMIT")
        cursor.after_commit()

    async def _roll_back(self, cause: BaseException) -> None:
        """Undo what is open, if anything is (after a commit, or an error that rolled back by itself, nothing is)."""
        try:
            await settled(self._writer.rollback())
        except FAULTS as error:
            # The next transaction cannot begin then, and says so.
            cause.add_note(f"and the catalog could not be rolled back: {error}")


async def _connect(path: Path, *, read_only: bool = False) -> aiosqlite.Connection:
    """Open a connection with our settings."""
    connection = aiosqlite.connect(path, isolation_level=None)
    # A process that ends by an error must not wait for a connection that nobody closed: what is committed is durable.
    connection._thread.daemon = True
    await connection
    await connection.create_function(row_sums.FUNCTION, -1, row_sums.row_sum, deterministic=True)
    pragmas = [
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "foreign_keys = ON",
        # FULL: a commit is on the disk when it returns, which every promise of the journal rests on.
        "synchronous = FULL",
        f"cache_size = -{CACHE_KIB}",
        f"wal_autocheckpoint = {WAL_PAGES}",
        # Debian compiles it on; overwriting deleted rows with zeroes doubles the cost of a deletion.
        "secure_delete = OFF",
        f"query_only = {'ON' if read_only else 'OFF'}",
    ]
    try:
        for pragma in pragmas:
            await connection.execute_fetchall(f"PRAGMA {pragma}")
    except BaseException:
        await settled(connection.close())
        raise
    return connection


async def _begin_session(connection: aiosqlite.Connection, path: Path) -> None:
    """Prove that the file can be written, and check it unless its last user closed it."""
    await _check_small_tables(connection, path)
    fresh = not list(await connection.execute_fetchall("SELECT 1 FROM meta LIMIT 1"))
    closed = (await connection.execute("DELETE FROM meta WHERE key = 'closed'")).rowcount
    if fresh:
        await connection.execute("INSERT INTO meta VALUES ('opened', '1')")
        return
    if not closed:
        found = [str(row[0]) for row in await connection.execute_fetchall("PRAGMA quick_check(1)")]
        if found != ["ok"]:
            raise CatalogFailed(f"the catalog {path} is damaged: {found[0]}", hint=REBUILD)


async def _check_small_tables(connection: aiosqlite.Connection, path: Path) -> None:
    """Check what has few rows, and says what may be deleted: at every start, each row, and that none is lost.

    A table of which rows are lost, or all, has more of them in its indexes.
    """
    for table in ("disks", "snapshots", "images", "carry", "pack_ranges"):
        if list(await connection.execute_fetchall(f"PRAGMA foreign_key_check({table})")):
            raise CatalogFailed(f"the catalog {path} is damaged: {table} refer to what is not there", hint=REBUILD)
    for table in (*row_sums.COLUMNS, "packs", "meta"):
        found = [str(row[0]) for row in await connection.execute_fetchall(f"PRAGMA integrity_check({table})")]
        if found != ["ok"]:
            raise CatalogFailed(f"the catalog {path} is damaged: {found[0]}", hint=REBUILD)
    for table, sql in row_sums.damaged_rows():
        if list(await connection.execute_fetchall(sql)) != [(0,)]:
            raise CatalogFailed(f"the catalog {path} is damaged: {table} are not what was written", hint=REBUILD)

"""The catalog's file: opening, migrating, one writer, readers that see only what is committed.

Two connections: the writer's, whose transactions are serialised, and the readers'. A reader on the writer's own
connection would see rows that may yet be rolled back, and deduplication must never refer to those.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sqlite3
from collections.abc import AsyncIterator, Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import aiosqlite

from hvsnap.errors import CatalogFailed, NoSpace, StoreBusy

VERSION = 1
BUSY_TIMEOUT_MS = 10_000

_PRAGMAS = (
    "PRAGMA foreign_keys = ON",
    f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}",
    # FULL: a commit is on the disk when it returns, which every promise of the journal rests on.
    "PRAGMA synchronous = FULL",
)

Row = tuple[Any, ...]


def _failure(error: sqlite3.Error, path: Path) -> CatalogFailed | NoSpace:
    text = str(error)
    if "full" in text:
        return NoSpace(f"the catalog {path} cannot grow: {text}")
    hint = "check the file system and the permissions of state_dir; the file was left as it is"
    return CatalogFailed(f"the catalog {path} failed: {text}", hint=hint)


class StateLock:
    """The state directory belongs to one process: a lock that the kernel drops when its holder dies."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        self._fd = -1

    def acquire(self) -> None:
        """Take the lock; raises :class:`StoreBusy` when another process holds it."""
        self._path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(fd)
            hint = "another hvsnap daemon or `hvsnap recover` is running with this state_dir"
            raise StoreBusy(f"{self._path.parent} is in use by another process", hint=hint) from error
        self._fd = fd

    def release(self) -> None:
        """Drop the lock."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Database:
    """Connections to one catalog file, and its transactions."""

    def __init__(self, path: Path, lock: StateLock, writer: aiosqlite.Connection, reader: aiosqlite.Connection) -> None:
        self.path = path
        self._lock = lock
        self._writer = writer
        self._reader = reader
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, directory: Path) -> Database:
        """Open (or create) ``catalog.db`` in ``directory`` and migrate it.

        Raises :class:`CatalogFailed` for a file that is damaged, read-only or of a newer version, and
        :class:`StoreBusy` when another process has it.
        """
        path = directory / "catalog.db"
        lock = StateLock(directory)
        try:
            await asyncio.to_thread(lock.acquire)
        except OSError as error:
            hint = "check state_dir in the configuration and its permissions"
            raise CatalogFailed(
                f"the state directory {directory} is not usable: {error.strerror}", hint=hint
            ) from error
        opened: list[aiosqlite.Connection] = []
        try:
            for _ in range(2):
                connection = await aiosqlite.connect(path, isolation_level=None)
                opened.append(connection)
                for pragma in _PRAGMAS:
                    await connection.execute(pragma)
                if len(opened) == 1:
                    await _migrate(connection, path)
            await opened[1].execute("PRAGMA query_only = ON")
        except BaseException as error:
            for connection in opened:
                await connection.close()
            lock.release()
            if isinstance(error, sqlite3.Error):
                raise _failure(error, path) from error
            raise
        return cls(path, lock, opened[0], opened[1])

    async def close(self) -> None:
        """Close the file; a transaction under way ends first."""
        async with self._turn:
            await self._reader.close()
            await self._writer.close()
        self._lock.release()

    async def read(self, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
        """Return all rows of a query, seeing committed rows only."""
        try:
            return [tuple(row) for row in await self._reader.execute_fetchall(sql, parameters)]
        except sqlite3.Error as error:
            raise _failure(error, self.path) from error

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[Cursor]:
        """Run one write transaction: committed at the end, rolled back on any error or cancellation."""
        async with self._turn:
            cursor = Cursor(self._writer, self.path)
            await cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
            except BaseException:
                await asyncio.shield(self._writer.rollback())
                raise
            # A commit that has begun is waited for, whatever happens to the caller: it may have taken effect.
            try:
                await asyncio.shield(asyncio.ensure_future(cursor.execute("COMMIT")))
            except (CatalogFailed, NoSpace):
                await asyncio.shield(self._writer.rollback())
                raise


class Cursor:
    """Statements of one transaction, on the writer's connection."""

    def __init__(self, connection: aiosqlite.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path

    async def execute(self, sql: str, parameters: Iterable[Any] = ()) -> int:
        """Run one statement and return how many rows it changed."""
        try:
            cursor = await self._connection.execute(sql, parameters)
            return cursor.rowcount
        except sqlite3.Error as error:
            raise _failure(error, self._path) from error

    async def insert(self, sql: str, parameters: Iterable[Any]) -> int:
        """Run one INSERT and return its row id."""
        try:
            cursor = await self._connection.execute(sql, parameters)
            return int(cursor.lastrowid or 0)
        except sqlite3.Error as error:
            raise _failure(error, self._path) from error

    async def many(self, sql: str, rows: Iterable[Iterable[Any]]) -> None:
        """Run one statement for each row."""
        try:
            await self._connection.executemany(sql, rows)
        except sqlite3.Error as error:
            raise _failure(error, self._path) from error

    async def read(self, sql: str, parameters: Iterable[Any] = ()) -> list[Row]:
        """Return all rows of a query, seeing the transaction's own changes."""
        try:
            return [tuple(row) for row in await self._connection.execute_fetchall(sql, parameters)]
        except sqlite3.Error as error:
            raise _failure(error, self._path) from error


async def _migrate(connection: aiosqlite.Connection, path: Path) -> None:
    """Bring the file to :data:`VERSION` in one transaction, or refuse it."""
    await connection.execute("PRAGMA journal_mode = WAL")
    rows = list(await connection.execute_fetchall("PRAGMA user_version"))
    version = int(rows[0][0])
    if version > VERSION:
        hint = "use that version of hvsnap; nothing was changed"
        raise CatalogFailed(
            f"the catalog {path} is from a newer hvsnap (version {version}, known: {VERSION})", hint=hint
        )
    if version == VERSION:
        return
    schema = resources.files("hvsnap.catalog").joinpath("schema.sql").read_text()
    await connection.executescript(f"BEGIN IMMEDIATE;\n{schema}\nPRAGMA user_version = {VERSION};\nCOMMIT;")

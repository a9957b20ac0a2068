"""The catalog's schema and its versions: each step happens wholly or not at all."""

from __future__ import annotations

import sqlite3
from importlib import resources
from pathlib import Path

import aiosqlite

from hvsnap.errors import CatalogFailed

APPLICATION_ID = 0x68767370  # "hvsp": tells our file from any other SQLite file


def _script(name: str) -> str:
    return resources.files("hvsnap.catalog").joinpath(name).read_text(encoding="utf-8")


MIGRATIONS: tuple[str, ...] = (
    _script("schema.sql"),
    "ALTER TABLE snapshots ADD COLUMN impact TEXT;  -- JSON of model.Impact; NULL: not measured",
    _script("schema_images.sql"),
    _script("schema_origins.sql"),
    "ALTER TABLE snapshots ADD COLUMN sum INTEGER;  -- of an accomplished one: sums.py",
    _script("schema_usage.sql"),
    _script("schema_alarms.sql"),
    "ALTER TABLE snapshots ADD COLUMN skew_ms REAL;  -- of a group of several guests; NULL: of one guest",
    _script("schema_row_sums.sql"),
    _script("schema_drills.sql"),
)
"""Scripts in order; the n-th (from 1) makes version n of version n - 1. A released one is never edited.

One that adds a column to a table of row_sums.py sets ``row_sum`` to NULL there."""


async def migrate(connection: aiosqlite.Connection, path: Path) -> None:
    """Bring a catalog file, or an empty one, to the present version.

    Raises :class:`CatalogFailed`, with the file untouched, when it is from a newer version or not a catalog;
    a script that fails leaves the version before it.
    """
    version = await _number(connection, "PRAGMA user_version")
    known = len(MIGRATIONS)
    if version > known:
        message = f"the catalog {path} is from a newer hvsnap (version {version}, known: {known})"
        raise CatalogFailed(message, hint="use that version of hvsnap; nothing was changed")
    application = await _number(connection, "PRAGMA application_id")
    is_empty = not await _number(connection, "SELECT count(*) FROM sqlite_schema")
    if application != APPLICATION_ID and not (is_empty and version == application == 0):
        raise CatalogFailed(f"{path} is not an hvsnap catalog", hint="check state_dir; nothing was changed")
    await connection.execute_fetchall("PRAGMA journal_mode = WAL")  # it answers: an unread answer blocks COMMIT
    for number, script in enumerate(MIGRATIONS[version:], start=version + 1):
        pragmas = f"PRAGMA application_id = {APPLICATION_ID};\nPRAGMA user_version = {number};"
        try:
            await connection.executescript(f"BEGIN IMMEDIATE;\n{script}\n{pragmas}\nCOMMIT;")
        except sqlite3.Error:
            await connection.rollback()
            raise


async def _number(connection: aiosqlite.Connection, sql: str) -> int:
    rows = list(await connection.execute_fetchall(sql))
    return int(rows[0][0])

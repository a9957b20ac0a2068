"""A checksum over each row of the small tables, where a flipped bit would delete too much or restore the wrong thing.

SQLite has no checksums. In a row of :data:`COLUMNS` a flipped bit would read as if it had been written so: a snapshot
that expires earlier, a lock that is gone, a policy that keeps less. So each row has a CRC-32 over all its other
columns. It is written by triggers of the writer's connection, which nothing that changes a row can forget to call, and
which refuse to change or delete a row that is damaged; whoever reads rows selects :func:`whole`, too.

The triggers are temporary: they are made from the columns of the day, and not in the file. A migration that adds a
column to one of these tables sets ``row_sum`` to NULL, as in rows of before there were sums; the next start writes it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

FUNCTION = "hvsnap_row_sum"
"""What the sum is called in SQL, on every connection of ours."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "disks": (
        *("id", "guest_uuid", "guest_name", "target", "serial", "source", "format", "size_bytes", "system"),
        *("created_at", "released", "head", "bitmap", "policy", "delete_auto_with_disk", "encrypted", "gone_since"),
    ),
    "snapshots": (
        *("number", "id", "disk", "sequence", "parent", "name", "description", "kind", "method", "reason"),
        *("consistency", "state", "size_bytes", "created_at", "accomplished_at", "error", "group", "read_bytes"),
        *("changed_bytes", "stored_bytes", "tags", "automatic", "expires_at", "retention", "locked_until"),
        *("manifest_revision", "manifest_changes", "impact", "sum", "alarm", "held_until", "skew_ms"),
    ),
    "policies": ("id", "name", "hours", "weekdays", "timezone", "retain_days", "keep", "created_at"),
    "images": ("id", "name", "description", "snapshot", "created_at"),
    "origins": ("path", "inode", "made_of", "created_at"),
    "carry": ("disk", "page", "indexes"),
    "operations": ("id", "kind", "guest_uuid", "step", "facts", "created_at"),
}
"""Tables, and all their columns but ``row_sum``."""

_KEYS = {"snapshots": ("number",), "origins": ("path",), "carry": ("disk", "page")}
_KEY = ("id",)


def row_sum(*values: Any) -> int:
    """Return the sum of a row's columns, as SQLite hands them over."""
    return zlib.crc32(json.dumps(values, default=bytes.hex).encode())


def whole(table: str, alias: str = "") -> str:
    """Return an SQL expression: whether a row is what was written."""
    name = alias or table
    return f"({name}.row_sum IS NULL OR {name}.row_sum = {_of(table, name)})"


def damaged_rows() -> Iterator[tuple[str, str]]:
    """Yield tables, and a query for how many of their rows are damaged."""
    for table in COLUMNS:
        yield table, f"SELECT count(*) FROM {table} WHERE NOT {whole(table)}"


def missing_sums() -> Iterator[tuple[str, str]]:
    """Yield, for each table, a query for a row that has no sum, and the statement that gives all of them one."""
    for table in COLUMNS:
        yield (
            f"SELECT 1 FROM {table} WHERE row_sum IS NULL LIMIT 1",
            f"UPDATE {table} SET row_sum = {_of(table, table)} WHERE row_sum IS NULL",
        )


def triggers() -> Iterator[str]:
    """Yield the statements that make the triggers of a connection."""
    for table, columns in COLUMNS.items():
        named = ", ".join(f'"{column}"' for column in columns)
        row = " AND ".join(f'"{key}" = NEW."{key}"' for key in _KEYS.get(table, _KEY))
        refuse = f"SELECT RAISE(ABORT, 'a row of {table} is not what was written')"
        damaged = f"NOT {whole(table, 'OLD')}"
        write = f"UPDATE {table} SET row_sum = {_of(table, 'NEW')} WHERE {row}"
        # None of them fires for row_sum alone: only other columns are named.
        update, on = f"UPDATE OF {named} ON main.{table}", f"ON main.{table}"
        yield f"CREATE TEMP TRIGGER {table}_a BEFORE {update} WHEN {damaged} BEGIN {refuse}; END"
        yield f"CREATE TEMP TRIGGER {table}_b BEFORE DELETE {on} WHEN {damaged} BEGIN {refuse}; END"
        yield f"CREATE TEMP TRIGGER {table}_c AFTER {update} BEGIN {write}; END"
        yield f"CREATE TEMP TRIGGER {table}_d AFTER INSERT {on} BEGIN {write}; END"


def _of(table: str, name: str) -> str:
    columns = ", ".join(f'{name}."{column}"' for column in COLUMNS[table])
    return f"{FUNCTION}({columns})"

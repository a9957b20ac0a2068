"""Taking a node out of its chain, within one transaction; every other snapshot keeps its view (SERVICE 4)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from hvsnap.catalog import chain, images, sums
from hvsnap.catalog.db import Cursor, Row
from hvsnap.errors import SnapshotInUse, SnapshotUnknown
from hvsnap.model import SnapshotId, State

PAGES_AT_ONCE = 64
"""Pages worked on together: at most a few MiB, and a thread's hop is paid once for all of them."""


async def delete(cursor: Cursor, snapshot_id: SnapshotId) -> None:
    """Remove an accomplished or failed snapshot.

    Children that failed hold nothing and get nothing. A root's disk is left without a head: its next snapshot is a
    full one, whatever the bitmap says; the bitmap's name is kept, so that the next capture removes it from the image.
    """
    sql = "SELECT number, parent, state FROM snapshots WHERE id = ?"
    found = await cursor.read(sql, (snapshot_id,))
    if not found:
        raise SnapshotUnknown(f"there is no snapshot {snapshot_id}")
    number, parent, state = found[0]
    children = await cursor.read("SELECT id, number, state FROM snapshots WHERE parent = ?", (snapshot_id,))
    await images.check_unpromoted(cursor, snapshot_id)
    check_deletable(snapshot_id, state, [(child, child_state) for child, _, child_state in children])
    for _child, child_number, child_state in children:
        if child_state != State.FAILED:
            await _hand_over(cursor, number, child_number)
    for (disk,) in await cursor.read("SELECT id FROM disks WHERE head = ?", (snapshot_id,)):
        await _move_head(cursor, number, disk, parent)
    # What the children's manifests say is not the whole truth now; it is still true while the deleted one's is there.
    sql = "UPDATE snapshots SET parent = ?, manifest_changes = manifest_changes + 1 WHERE parent = ?"
    await cursor.execute(sql, (parent, snapshot_id))
    await cursor.execute("DELETE FROM pages WHERE snapshot = ?", (number,))
    await cursor.execute("DELETE FROM snapshots WHERE id = ?", (snapshot_id,))
    for _child, child_number, child_state in children:
        if child_state == State.ACCOMPLISHED:
            await sums.write(cursor, child_number)


def check_deletable(snapshot_id: SnapshotId, state: str, children: list[tuple[str, str]]) -> None:
    """Raise :class:`SnapshotInUse` while the snapshot, or one that is compared with it, is being made."""
    if state == State.PROGRESSING:
        raise SnapshotInUse(f"snapshot {snapshot_id} is still being made", hint="wait for it, or cancel it")
    for child, child_state in children:
        if child_state == State.PROGRESSING:
            # Its pages are differences from this snapshot's view; those yet to be written would lack what moved.
            raise SnapshotInUse(f"snapshot {child} is being made on top of {snapshot_id}", hint="wait for it")


async def _hand_over(cursor: Cursor, deleted: int, child: int) -> None:
    """Give a child the entries it lacks."""
    both = """SELECT p.page, p.entries, c.entries FROM pages p CROSS JOIN pages c ON c.snapshot = ? AND c.page = p.page
              WHERE p.snapshot = ? AND p.page > ? ORDER BY p.page LIMIT ?"""
    update = "UPDATE pages SET entries = ? WHERE page = ? AND snapshot = ?"
    await _in_batches(cursor, both, (child, deleted), update, child, _merge_child)
    # Last, or the copies would be merged as well.
    await cursor.execute(
        """INSERT INTO pages (snapshot, page, entries)
           SELECT ?1, page, entries FROM pages
           WHERE snapshot = ?2 AND page NOT IN (SELECT page FROM pages WHERE snapshot = ?1)""",
        (child, deleted),
    )


async def _move_head(cursor: Cursor, deleted: int, disk: str, parent: str | None) -> None:
    """Let a disk continue from the parent, and carry what the deleted snapshot had changed."""
    await cursor.execute("UPDATE disks SET head = ? WHERE id = ?", (parent, disk))
    if parent is None:
        await cursor.execute("DELETE FROM carry WHERE disk = ?", (disk,))
        return
    await sums.check_rows(cursor, "carry", "disk = ?", (disk,))
    carried = """SELECT p.page, p.entries, c.indexes FROM pages p LEFT JOIN carry c ON c.disk = ? AND c.page = p.page
                 WHERE p.snapshot = ? AND p.page > ? ORDER BY p.page LIMIT ?"""
    replace = "INSERT OR REPLACE INTO carry (indexes, page, disk) VALUES (?, ?, ?)"
    await _in_batches(cursor, carried, (disk, deleted), replace, disk, _merge_carry)


async def _in_batches(
    cursor: Cursor, query: str, keys: Row, change: str, key: int | str, merge: Callable[[bytes, bytes | None], bytes]
) -> None:
    """Merge pairs of blobs, a bounded number at a time; numpy works in a thread."""
    last = -1
    while rows := await cursor.read(query, (*keys, last, PAGES_AT_ONCE)):
        last = rows[-1][0]
        merged = await asyncio.to_thread(lambda rows: [(page, old, merge(one, old)) for page, one, old in rows], rows)
        await cursor.many(change, [(blob, page, key) for page, old, blob in merged if blob != old])


def _merge_child(deleted: bytes, child: bytes | None) -> bytes:
    return chain.encode(chain.hand_over(chain.decode(deleted), chain.EMPTY if child is None else chain.decode(child)))


def _merge_carry(deleted: bytes, carry: bytes | None) -> bytes:
    known = chain.EMPTY.index if carry is None else chain.decode_indexes(carry)
    return chain.encode_indexes(chain.join_indexes(known, chain.decode(deleted).index))

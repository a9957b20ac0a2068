"""The catalog's table of blocks: where each lies, and which digest is which block (:class:`hvsnap.ports.BlockIndex`).

Rows of ``blocks`` hold ranges of ids (:mod:`hvsnap.catalog.ranges`), and are the truth. ``digests`` finds an id by the
beginning of its digest; it is behind by the blocks of the newest packs (:mod:`hvsnap.catalog.recent`), which are read
into memory at the start. Whatever it finds is compared with the whole digest, so an entry too many does no harm.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from hvsnap.catalog import ranges, rows
from hvsnap.catalog.block_rows import (
    Blobs,
    blobs_of,
    entries_of,
    forget_damage,
    insert_pack,
    pick,
    raise_highest,
    write,
)
from hvsnap.catalog.db import Database
from hvsnap.catalog.ranges import DIGEST_BYTES, ENTRY, EntryArray
from hvsnap.catalog.recent import Prefixes, Recent, prefixes_of
from hvsnap.errors import Damaged
from hvsnap.model import BlockPlace
from hvsnap.ports import UInt64Array

RECENT_BLOCKS_MAX = 512 * 1024
"""Blocks that are gathered before they enter the index: 8 MiB of memory, 32 GiB of new data."""

MERGE_BLOCKS = 32 * 1024
"""Blocks that enter the index in one transaction: others wait for it, a tenth of a second."""

RANGES_AT_ONCE = 64
"""Ranges that are read together, 1.7 MiB."""


CHECKED_AT_ONCE = 64 * 1024
"""Blocks that are looked for together, 3 MiB."""


class Blocks:
    """Finds and adds blocks, once :meth:`load` has read what is kept in memory."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._packs: dict[int, str] = {}
        self._recent = Recent()
        self._merging: Recent | None = None
        self._damaged: dict[int, bytes] = {}
        self.turn = asyncio.Lock()
        """Held while digests enter the index, or leave it."""
        self.recent_max = RECENT_BLOCKS_MAX

    async def load(self) -> None:
        """Read what is kept in memory: the names of packs, the newest digests, what is damaged."""
        packs = await self._db.read(f"SELECT {rows.PACK_COLUMNS} FROM packs")
        self._packs = {pack.number: pack.name for pack in map(rows.pack, packs)}
        for (number,) in await self._db.read("SELECT number FROM packs WHERE NOT indexed ORDER BY number"):
            ids, entries = await self.of_pack(number)
            self._recent.add(number, prefixes_of(entries["digest"]), ids)
        damaged = [row[0] for row in await self._db.read("SELECT block FROM damaged")]
        digests = await self.digests(np.array(damaged, np.uint64))
        self._damaged = {block: digest.tobytes() for block, digest in zip(damaged, digests, strict=True)}

    # -- looking up -------------------------------------------------------------------------------

    async def find(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Return the ids of those digests that are stored, and not known to be damaged."""
        if not digests:
            return {}
        wanted = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
        prefixes = prefixes_of(wanted)
        # First what is in memory, before anything is awaited: it leaves there only for the index.
        parts = [recent.candidates(prefixes) for recent in (self._merging, self._recent) if recent is not None]
        parts.append(await self._indexed(prefixes))
        candidates = np.unique(np.concatenate(parts))
        known = set(digests)
        found = {}
        for block, digest in await self.digests_of_present(candidates):
            if digest in known and block not in self._damaged:
                found[digest] = block
        return found

    async def damaged(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Return the ids of those digests whose stored form is damaged: storing them again heals these blocks."""
        if not self._damaged:
            return {}
        known = {digest: block for block, digest in self._damaged.items()}
        return {digest: known[digest] for digest in digests if digest in known}

    async def entries(self, ids: UInt64Array) -> EntryArray:
        """Return the entries of blocks, in the order asked for; an unknown id is :class:`Damaged`."""
        distinct, inverse = np.unique(ids, return_inverse=True)
        found, present = await self._lookup(distinct)
        if not present.all():
            missing = int(distinct[np.flatnonzero(~present)[0]])
            hint = "the catalog is damaged; keep the store as it is"
            raise Damaged(f"block {missing} is not in the catalog", hint=hint)
        result: EntryArray = found[inverse]
        return result

    async def places(self, ids: Sequence[int]) -> list[BlockPlace]:
        """Return where blocks lie, in the order asked for; an unknown id is :class:`Damaged`."""
        return self._as_places(ids, await self.entries(np.array(ids, np.uint64)))

    async def present_places(self, ids: Sequence[int]) -> list[BlockPlace]:
        """Return where those of these blocks lie that are there, ascending by id."""
        distinct = np.unique(np.array(ids, np.uint64))
        found, present = await self._lookup(distinct)
        return self._as_places(distinct[present].tolist(), found[present])

    async def missing(self, ids: UInt64Array) -> UInt64Array:
        """Return those of these ids, ascending, that are not there; 0 is none of them."""
        distinct = np.unique(ids[ids != 0])
        missing: list[UInt64Array] = [np.zeros(0, np.uint64)]
        for start in range(0, distinct.size, CHECKED_AT_ONCE):
            part = distinct[start : start + CHECKED_AT_ONCE]
            _found, present = await self._lookup(part)
            missing.append(part[~present])
        return np.concatenate(missing)

    async def digests(self, ids: UInt64Array) -> npt.NDArray[np.uint8]:
        """Return the digests of blocks, ``uint8[n, 32]``, in the order asked for; an unknown id is :class:`Damaged`."""
        digests: npt.NDArray[np.uint8] = (await self.entries(ids))["digest"]
        return digests

    async def next_id(self) -> int:
        """Return an id greater than any that was ever recorded, dropped ones included."""
        found = await self._db.read("SELECT value FROM meta WHERE key = 'block_id_max'")
        return int(found[0][0]) + 1 if found else 1

    # -- adding -----------------------------------------------------------------------------------

    async def add_pack(self, pack: str, size_bytes: int, blocks: Sequence[BlockPlace]) -> None:
        """Record a durable pack and its blocks in one transaction; a damaged block among them is healed.

        Raises :class:`CatalogFailed` for a block that is known, and whole.
        """
        if len(self._recent) >= self.recent_max:
            await self.merge(above=self.recent_max)
        ids, entries = entries_of(blocks)
        healed = [int(block) for block in ids if int(block) in self._damaged]
        async with self._db.transaction() as cursor:
            await cursor.check_room()
            number = await insert_pack(cursor, pack, size_bytes, entries)
            entries["pack"] = number
            await write(cursor, number, ids, entries, may_replace=set(healed))
            await forget_damage(cursor, healed)
            await raise_highest(cursor, int(ids.max(initial=0)))
            prefixes = prefixes_of(entries["digest"])
            cursor.after_commit = lambda: self._added(number, pack, prefixes, ids, healed)

    def _added(self, number: int, pack: str, prefixes: Prefixes, ids: UInt64Array, healed: list[int]) -> None:
        self._packs[number] = pack
        self._recent.add(number, prefixes, ids)
        self.forget_damage(healed)

    async def merge(self, *, above: int = 0) -> None:
        """Enter the newest digests into the index if there are as many as ``above``.

        A part of them in each transaction; a crash or a full device in between costs a repetition.
        """
        async with self.turn:
            while self._merging is not None or len(self._recent) >= max(1, above):
                if self._merging is None:
                    self._merging, self._recent = self._recent, Recent()
                await self._merge(self._merging)
                self._merging = None

    async def _merge(self, recent: Recent) -> None:
        for start in range(0, len(recent), MERGE_BLOCKS):
            part = slice(start, start + MERGE_BLOCKS)
            async with self._db.transaction() as cursor:
                await cursor.check_room()
                pairs = zip(recent.prefixes[part].tolist(), recent.ids[part].tolist(), strict=True)
                await cursor.many("INSERT OR IGNORE INTO digests (prefix, block) VALUES (?, ?)", pairs)
        async with self._db.transaction() as cursor:
            sql = "UPDATE packs SET indexed = 1 WHERE number IN (SELECT value FROM json_each(?))"
            await cursor.execute(sql, (json.dumps(recent.packs),))

    # -- what the upkeep changes (hvsnap.catalog.upkeep), after its commit ------------------------

    def forget(self, ids: UInt64Array) -> None:
        """Forget dropped blocks; ``turn`` is held."""
        self._recent.remove(ids)
        if self._merging is not None:
            self._merging.remove(ids)
        self.forget_damage([block for block in list(self._damaged) if block in set(ids.tolist())])

    def name_pack(self, number: int, name: str) -> None:
        """Remember a pack."""
        self._packs[number] = name

    def forget_pack(self, number: int) -> None:
        """Forget a pack that no block lies in."""
        self._packs.pop(number, None)

    def is_damaged(self, block: int) -> bool:
        """Whether a block is known to be damaged."""
        return block in self._damaged

    def remember_damage(self, damaged: dict[int, bytes]) -> None:
        """Hand these blocks, id to digest, out to no deduplication any more."""
        self._damaged |= damaged

    def forget_damage(self, ids: Iterable[int]) -> None:
        """Hand these blocks out again."""
        for block in ids:
            self._damaged.pop(block, None)

    def pack_name(self, number: int) -> str:
        """Return a pack's object name; an unknown one is :class:`Damaged`."""
        name = self._packs.get(number)
        if name is None:
            hint = "the catalog is damaged; keep the store as it is"
            raise Damaged(f"pack {number} is not in the catalog", hint=hint)
        return name

    async def of_pack(self, number: int) -> tuple[UInt64Array, EntryArray]:
        """Return ids, ascending, and entries of all blocks that lie in a pack."""
        sql = """SELECT b.range, b.live, b.entries FROM pack_ranges r CROSS JOIN blocks b ON b.range = r.range
                 WHERE r.pack = ? AND b.range > ? ORDER BY r.range LIMIT ?"""
        parts: list[tuple[UInt64Array, EntryArray]] = [(np.zeros(0, np.uint64), np.zeros(0, ENTRY))]
        at = -1
        while found := await self._db.read(sql, (number, at, RANGES_AT_ONCE)):
            at = found[-1][0]
            for key, live, blob in found:
                entries = ranges.decode(key, live, blob)
                mine = entries[entries["pack"] == number]
                parts.append((ranges.ids_of(key, mine), mine))
        return np.concatenate([ids for ids, _ in parts]), np.concatenate([entries for _, entries in parts])

    async def places_of_pack(self, number: int) -> list[BlockPlace]:
        """Return all blocks that lie in a pack, in the order of their offsets."""
        ids, entries = await self.of_pack(number)
        return sorted(self._as_places(ids.tolist(), entries), key=lambda place: place.offset)

    async def ranges_from(self, first: int) -> AsyncIterator[tuple[int, int]]:
        """Yield ``(range, how many of its ids there are)`` of all ranges from ``first`` on, ascending."""
        sql = "SELECT range, live FROM blocks WHERE range >= ? ORDER BY range LIMIT ?"
        while found := await self._db.read(sql, (first, 8192)):
            for number, live in found:
                yield number, int(ranges.decode_live(live).sum())
            first = found[-1][0] + 1

    async def in_ranges(self, numbers: Sequence[int]) -> tuple[UInt64Array, EntryArray]:
        """Return ids, ascending, and entries of all blocks in some ranges (ascending)."""
        blobs = await self._blobs(list(numbers))
        decoded = [(number, ranges.decode(number, *blobs[number])) for number in numbers if number in blobs]
        ids = [ranges.ids_of(number, entries) for number, entries in decoded]
        return (
            np.concatenate([np.zeros(0, np.uint64), *ids]),
            np.concatenate([np.zeros(0, ENTRY), *(entries for _, entries in decoded)]),
        )

    # -- inside -----------------------------------------------------------------------------------

    def _as_places(self, ids: Sequence[int], entries: EntryArray) -> list[BlockPlace]:
        digests = entries["digest"].tobytes()
        columns = zip(
            entries["pack"].tolist(),
            entries["offset"].tolist(),
            entries["length"].tolist(),
            entries["flags"].tolist(),
            strict=True,
        )
        return [
            BlockPlace(int(block), digests[at : at + DIGEST_BYTES], self.pack_name(pack), offset, length, flags)
            for block, at, (pack, offset, length, flags) in zip(
                ids, range(0, len(digests), DIGEST_BYTES), columns, strict=True
            )
        ]

    async def _indexed(self, prefixes: Prefixes) -> UInt64Array:
        """Return the ids that the index holds for prefixes."""
        sql = "SELECT d.block FROM json_each(?) j CROSS JOIN digests d ON d.prefix = j.value"
        found = await self._db.read(sql, (json.dumps(prefixes.tolist()),))
        return np.array([row[0] for row in found], np.uint64)

    async def digests_of_present(self, ids: UInt64Array) -> list[tuple[int, bytes]]:
        """Return ids and digests of those ascending ids that are there."""
        if not ids.size:
            return []
        found, present = await self._lookup(ids)
        return [
            (block, digest.tobytes())
            for block, digest in zip(ids[present].tolist(), found["digest"][present], strict=True)
        ]

    async def _lookup(self, ids: UInt64Array) -> tuple[EntryArray, npt.NDArray[np.bool_]]:
        """Return the entries of ascending ids, and which of them there are."""
        entries = np.zeros(ids.size, ENTRY)
        present = np.zeros(ids.size, np.bool_)
        parts = list(ranges.group(ids))
        for start in range(0, len(parts), RANGES_AT_ONCE):
            some = parts[start : start + RANGES_AT_ONCE]
            blobs = await self._blobs([number for number, _ in some])
            pick(ids, some, blobs, entries, present)
        return entries, present

    async def _blobs(self, numbers: list[int]) -> Blobs:
        return await blobs_of(self._db, numbers)

"""Samples of what was stored, and when: of each chain, of the store, of its device."""

from __future__ import annotations

from collections.abc import Mapping

from hvsnap.catalog.db import Database
from hvsnap.metering import Sample, thin

HOST, DEVICE = "host", "device"
"""Subjects beside the chains: what the store keeps, and what is used of the device that it is on."""


class Usage:
    """The table of samples."""

    def __init__(self, database: Database) -> None:
        self._db = database

    async def series(self) -> dict[str, list[Sample]]:
        """Return all samples, each subject's ascending by time."""
        found: dict[str, list[Sample]] = {}
        for subject, at, value in await self._db.read("SELECT subject, at, bytes FROM usage ORDER BY subject, at"):
            found.setdefault(subject, []).append(Sample(at, value))
        return found

    async def of(self, subject: str) -> list[Sample]:
        """Return the samples of one subject, ascending by time."""
        sql = "SELECT at, bytes FROM usage WHERE subject = ? ORDER BY at"
        return [Sample(at, value) for at, value in await self._db.read(sql, (subject,))]

    async def add(self, at: float, values: Mapping[str, int]) -> None:
        """Note what is stored from a moment on, subject → bytes; raises :class:`NoSpace` in time."""
        async with self._db.transaction() as cursor:
            await cursor.check_room()
            sql = "INSERT OR REPLACE INTO usage (subject, at, bytes) VALUES (?, ?, ?)"
            await cursor.many(sql, [(subject, at, value) for subject, value in values.items()])

    async def thin(self, now: float) -> int:
        """Average the details of the past away; return how many samples fewer there are."""
        fewer = 0
        for subject, before in (await self.series()).items():
            after = thin(before, now)
            gone, new = set(before) - set(after), set(after) - set(before)
            if not gone and not new:
                continue
            async with self._db.transaction() as cursor:
                await cursor.many(
                    "DELETE FROM usage WHERE subject = ? AND at = ?", [(subject, sample.at) for sample in gone]
                )
                sql = "INSERT OR REPLACE INTO usage (subject, at, bytes) VALUES (?, ?, ?)"
                await cursor.many(sql, [(subject, sample.at, sample.value) for sample in new])
            fewer += len(before) - len(after)
        return fewer

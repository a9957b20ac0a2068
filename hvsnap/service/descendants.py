"""Disks that were made of a snapshot: they live on without it, but cannot be re-initialised any more (SERVICE 4.5)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection

from hvsnap.catalog.catalog import Catalog
from hvsnap.model import Origin, SnapshotId
from hvsnap.restore.target import inode_of


async def disks_made_of(catalog: Catalog, snapshots: Collection[SnapshotId]) -> dict[SnapshotId, list[str]]:
    """Return the disks that were made of each snapshot: ``GUEST/TARGET``, or the path of one that no guest has.

    Left out are those that are gone, or were replaced by another file.
    """
    made = [one for one in await catalog.origins() if one.made_of in snapshots]
    there = await asyncio.to_thread(_that_are_there, made)
    names = {one.source: f"{one.guest_name}/{one.target}" for one in await catalog.disks()}
    found: dict[SnapshotId, list[str]] = {}
    for one in there:
        found.setdefault(SnapshotId(one.made_of), []).append(names.get(one.path, one.path))
    return found


def _that_are_there(origins: list[Origin]) -> list[Origin]:
    return [
        one for one in origins
        if (os.path.lexists(one.path) if one.inode is None else inode_of(one.path) == one.inode)
    ]  # fmt: skip

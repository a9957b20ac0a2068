"""Chains: their nodes, and what they hold (SERVICE 3, 9.1)."""

from __future__ import annotations

from collections.abc import Sequence

from hvsnap import wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.drill import Drill
from hvsnap.model import ChainUsage, Disk, Snapshot, State
from hvsnap.service import views
from hvsnap.service.freeing import (
    Counts,
    Parents,
    chain_blocks,
    count_references,
    freed_bytes,
    parents_of,
    stored_bytes,
)
from hvsnap.service.inventory import Inventory
from hvsnap.service.requests import CapturesPort


class Chains:
    """Lists chains and shows one."""

    def __init__(self, catalog: Catalog, inventory: Inventory, captures: CapturesPort, *, snapshots_max: int) -> None:
        self._catalog = catalog
        self._inventory = inventory
        self._captures = captures
        self._snapshots_max = snapshots_max

    async def listing(self) -> wire.ChainList:
        """Return all chains that have snapshots, those of released disks, too."""
        rows = await self._catalog.snapshots()
        parents = parents_of(rows)
        counts = await count_references(self._catalog)
        drills = await self._catalog.drills.newest()
        chains = []
        for disk in await self._catalog.disks(include_released=True):
            nodes = [row for row in rows if row.disk == disk.id and row.state is State.ACCOMPLISHED]
            if nodes:
                chains.append(self._summary(disk, await self._usage(disk, nodes, parents, counts), drills.get(disk.id)))
        return wire.ChainList(chains=chains)

    async def info(self, name: str) -> wire.Chain:
        """Return one chain with its nodes, oldest first; raises :class:`DiskUnknown`, :class:`BadRequest`."""
        disk = await self._inventory.disk(name)
        rows = await self._catalog.snapshots()
        nodes = [row for row in rows if row.disk == disk.id and row.state is State.ACCOMPLISHED]
        usage = await self._usage(disk, nodes, parents_of(rows), await count_references(self._catalog))
        drills = await self._catalog.drills.newest()
        of_snapshots = await self._catalog.drills.of_snapshots()
        summary = self._summary(disk, usage, drills.get(disk.id))
        return wire.Chain(
            **summary.model_dump(),
            nodes=[
                wire.ChainNode(
                    snapshot=views.snapshot(row, disk, self._captures.progress(row.id), of_snapshots.get(row.id)),
                    exclusive_bytes=usage.exclusive_bytes[row.id],
                    head=row.id == disk.head,
                )
                for row in nodes
            ],
        )

    async def _usage(self, disk: Disk, nodes: Sequence[Snapshot], parents: Parents, counts: Counts) -> ChainUsage:
        return ChainUsage(
            disk=disk.id,
            snapshots=len(nodes),
            logical_bytes=sum(row.size_bytes for row in nodes),
            stored_bytes=await stored_bytes(
                self._catalog, await chain_blocks(self._catalog, [row.id for row in nodes])
            ),
            exclusive_bytes={row.id: await freed_bytes(self._catalog, [row.id], parents, counts) for row in nodes},
        )

    def _summary(self, disk: Disk, usage: ChainUsage, drill: Drill | None) -> wire.ChainSummary:
        return wire.ChainSummary(
            disk=disk.id,
            guest=disk.guest_name,
            target=disk.target,
            path=disk.source,
            system=disk.system,
            released=disk.released,
            head=disk.head,
            snapshots=usage.snapshots,
            limit=self._snapshots_max,
            drill=views.drill(drill),
            size_bytes=disk.size_bytes,
            logical_bytes=usage.logical_bytes,
            stored_bytes=usage.stored_bytes,
            exclusive_bytes=sum(usage.exclusive_bytes.values()),
        )

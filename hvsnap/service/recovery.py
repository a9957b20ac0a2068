"""Finishing or undoing what a crash left open, and telling what became of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Literal

from hvsnap import wire
from hvsnap.capture.facts import KIND, CaptureFacts
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError, NotFound
from hvsnap.model import Operation, State

Recover = Callable[[], Awaitable[list[tuple[Operation, HvsnapError | None]]]]
"""Settles the open operations of one kind; returns each and, if it could not be settled, why."""


class Recovery:
    """All recoveries, one after the other."""

    def __init__(self, catalog: Catalog, recoveries: Sequence[Recover]) -> None:
        self._catalog = catalog
        self._recoveries = recoveries

    async def recover(self) -> wire.Recovery:
        """Recover what can be recovered now; what is being worked on is left alone."""
        found = []
        for recover in self._recoveries:
            for operation, error in await recover():
                found.append(await self._told(operation, error))
        return wire.Recovery(operations=found)

    async def _told(self, operation: Operation, error: HvsnapError | None) -> wire.RecoveredOperation:
        outcome: Literal["finished", "undone", "still-open"]
        if error is not None:
            outcome = "still-open"
            detail = f"{error.message}; {error.hint}" if error.hint else error.message
        elif operation.kind == KIND:
            kept = await self._accomplished(operation)
            outcome = "finished" if kept else "undone"
            detail = "its snapshots are accomplished" if kept else "its snapshots failed; the next ones miss nothing"
        else:
            outcome, detail = "finished", ""
        return wire.RecoveredOperation(
            id=operation.id,
            kind=operation.kind,
            guest=await self._guest_name(operation),
            step=operation.step,
            outcome=outcome,
            detail=detail,
        )

    async def _accomplished(self, operation: Operation) -> bool:
        try:
            rows = [await self._catalog.snapshot(disk.snapshot) for disk in CaptureFacts.of(operation).disks]
        except NotFound:
            return False
        return all(row.state is State.ACCOMPLISHED for row in rows)

    async def _guest_name(self, operation: Operation) -> str:
        disks = await self._catalog.disks(include_released=True)
        return next(
            (disk.guest_name for disk in disks if disk.guest_uuid == operation.guest_uuid), operation.guest_uuid
        )

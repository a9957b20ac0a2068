"""Finishing or undoing what a crash left open, and telling what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Literal, Protocol

from hvsnap import wire
from hvsnap.capture import freeze
from hvsnap.capture.facts import KIND, CaptureFacts
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError, NotFound
from hvsnap.model import DiskId, Operation, Progress, SnapshotId, State
from hvsnap.restore import disk, rollback
from hvsnap.service.uses import Uses

log = logging.getLogger(__name__)

RETRY_S = 30.0

Recover = Callable[[], Awaitable[list[tuple[Operation, HvsnapError | None]]]]
"""Settles the open operations of one kind; returns each and, if it could not be settled, why."""


class Undo(Protocol):
    """Removes what a crash left of a new disk: :class:`hvsnap.restore.disk.DiskMaker`."""

    async def recover(self, operation: Operation) -> None:
        """Settle one operation."""
        ...


class Resume(Protocol):
    """Goes on with a rollback: :class:`hvsnap.restore.rollback.Rollback`."""

    async def resume(self, operation: Operation, report: Callable[[Progress], None]) -> None:
        """Settle one operation."""
        ...


class RestoreRecovery:
    """Removes new disks that a crash left half-made, and goes on with rollbacks that it interrupted."""

    def __init__(self, catalog: Catalog, maker: Undo, roller: Resume, uses: Uses) -> None:
        self._catalog = catalog
        self._maker = maker
        self._roller = roller
        self._uses = uses
        self._turn = asyncio.Lock()

    async def recover(self) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle what is open and nobody works on; what cannot be settled yet stays in the journal."""
        async with self._turn:
            # First who is at work, then the journal: work that ends in between must not be taken for a crash's.
            held = self._uses.held()
            outcome: list[tuple[Operation, HvsnapError | None]] = []
            for kind in (disk.KIND, rollback.KIND):
                for operation in await self._catalog.operations(kind):
                    if _place(operation) not in held | self._uses.held():
                        outcome += await self._settle(operation)
            return outcome

    async def recover_loop(self) -> None:
        """Try again, every :data:`RETRY_S`, what could not be settled before."""
        while True:
            await asyncio.sleep(RETRY_S)
            await self.recover()

    async def _settle(self, operation: Operation) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle one operation; nothing is told of one that has ended by itself meanwhile."""
        try:
            with self._holding(operation):
                try:
                    operation = await self._catalog.operation(operation.id)
                except NotFound:
                    return []
                if operation.kind == disk.KIND:
                    await self._maker.recover(operation)
                else:
                    await self._roller.resume(operation, lambda _progress: None)
        except HvsnapError as error:
            log.warning("%s %s cannot be settled yet: %s", operation.kind, operation.id, error.message)
            return [(operation, error)]
        log.info("%s %s was settled", operation.kind, operation.id)
        return [(operation, None)]

    @contextlib.contextmanager
    def _holding(self, operation: Operation) -> Iterator[None]:
        if operation.kind == disk.KIND:
            with self._uses.hold_path(_place(operation), "being recovered"):
                yield
            return
        snapshot = SnapshotId(str(operation.facts["snapshot"]))
        with (
            self._uses.hold_snapshot(snapshot, "being rolled back to"),
            self._uses.hold_disk(DiskId(_place(operation)), "being rolled back"),
        ):
            yield


def _place(operation: Operation) -> str:
    """Return what work on an operation holds: the new disk's path, or the disk."""
    return str(operation.facts.get("target" if operation.kind == disk.KIND else "disk"))


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
        elif operation.kind == freeze.KIND:
            outcome, detail = "finished", "the guest's file systems are thawed"
        elif operation.kind == disk.KIND:
            outcome, detail = "undone", "what was half-made is removed"
        else:
            outcome, detail = "finished", "the disk holds the snapshot"
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
            rows = [await self._catalog.snapshot(one.snapshot) for one in CaptureFacts.of(operation).disks]
        except NotFound:
            return False
        return all(row.state is State.ACCOMPLISHED for row in rows)

    async def _guest_name(self, operation: Operation) -> str:
        known = await self._catalog.disks(include_released=True)
        uuid = operation.guest_uuid
        return next((one.guest_name for one in known if one.guest_uuid == uuid), uuid)

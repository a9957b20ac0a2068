"""Finishing or undoing what a crash left open, and telling what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import Literal, Protocol

from hvsnap import wire
from hvsnap.capture import freeze
from hvsnap.capture.facts import KIND, CaptureFacts
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HvsnapError, NoSpace, NotFound
from hvsnap.guard import ROLLBACK, StartGuard
from hvsnap.model import DiskId, Operation, OperationId, Progress, SnapshotId, State
from hvsnap.ports import Clock
from hvsnap.restore import disk, drill, export, instant, rollback, target
from hvsnap.service.patience import Patience
from hvsnap.service.uses import Uses

log = logging.getLogger(__name__)

RETRY_S = 30.0
"""What could not be settled is tried again this often, and whenever something has happened to a guest."""

Only = Container[OperationId] | None
Recover = Callable[[Only], Awaitable[list[tuple[Operation, HvsnapError | None]]]]
"""Settles the open operations of one kind, all or only some; returns each and, if it could not be settled, why."""


class Undo(Protocol):
    """Removes what a crash left of a new disk: :class:`hvsnap.restore.disk.DiskMaker`."""

    async def recover(self, operation: Operation) -> bool:
        """Settle one operation; True if the disk was whole, and stays."""
        ...


class Resume(Protocol):
    """Goes on with a rollback: :class:`hvsnap.restore.rollback.Rollback`."""

    async def resume(self, operation: Operation, report: Callable[[Progress], None]) -> None:
        """Settle one operation."""
        ...


class RestoreRecovery:
    """Removes new disks that a crash left half-made, and goes on with rollbacks that it interrupted."""

    def __init__(
        self, catalog: Catalog, maker: Undo, roller: Resume, uses: Uses, guard: StartGuard, clock: Clock
    ) -> None:  # fmt: skip
        self._catalog = catalog
        self._guard = guard
        self._clock = clock
        self._patience = Patience()
        self._maker = maker
        self._roller = roller
        self._uses = uses
        self._turn = asyncio.Lock()

    async def recover(self, only: Only = None) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle what is open and nobody works on; what cannot be settled yet stays in the journal."""
        return await self._recover(only, patient=False)

    async def retry(self, only: Only = None) -> list[tuple[Operation, HvsnapError | None]]:
        """Do the same, but leave a rollback that a full device has stopped alone for its pause."""
        return await self._recover(only, patient=True)

    async def _recover(self, only: Only, *, patient: bool) -> list[tuple[Operation, HvsnapError | None]]:
        async with self._turn:
            # First who is at work, then the journal: work that ends in between must not be taken for a crash's.
            held = self._uses.held()
            outcome: list[tuple[Operation, HvsnapError | None]] = []
            for kind in (disk.KIND, rollback.KIND):
                for operation in await self._catalog.operations(kind):
                    if only is not None and operation.id not in only:
                        continue
                    if patient and not await self._is_due(operation):
                        continue
                    if _place(operation) not in held | self._uses.held():
                        outcome += await self._settle(operation)
            if only is None:
                await self._lift_stale()
            return outcome

    async def _lift_stale(self) -> None:
        """Let guests start whose rollback a crash ended before it began, or when it was over."""
        open_now = {_place(operation) for operation in await self._catalog.operations(rollback.KIND)}
        try:
            await self._guard.lift_all_but(open_now | self._uses.held(), ROLLBACK)
        except HvsnapError as error:
            log.warning("%s; %s", error.message, error.hint)

    async def _settle(self, operation: Operation) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle one operation; nothing is told of one that has ended by itself meanwhile."""
        try:
            with self._holding(operation):
                try:
                    operation = await self._catalog.operation(operation.id)
                except NotFound:
                    return []
                if operation.kind == disk.KIND:
                    if await self._maker.recover(operation):
                        operation = replace(operation, step=disk.Step.NAMED)
                else:
                    await self._roller.resume(operation, lambda _progress: None)
        except HvsnapError as error:
            log.warning("%s %s cannot be settled yet: %s", operation.kind, operation.id, error.message)
            if isinstance(error, NoSpace) and operation.kind == rollback.KIND:
                self._patience.note(operation.id, self._clock.monotonic(), await self._free_bytes(operation))
            else:
                self._patience.forget(operation.id)
            return [(operation, error)]
        self._patience.forget(operation.id)
        log.info("%s %s was settled", operation.kind, operation.id)
        return [(operation, None)]

    async def _is_due(self, operation: Operation) -> bool:
        if operation.kind != rollback.KIND:
            return True
        return self._patience.is_due(operation.id, self._clock.monotonic(), await self._free_bytes(operation))

    async def _free_bytes(self, operation: Operation) -> int:
        """Return the room that there is for the image of a rollback."""
        source = (await self._catalog.disk(DiskId(_place(operation)))).source
        return await asyncio.to_thread(target.free_bytes, source)

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


async def disks_of_image(catalog: Catalog, image: str) -> list[DiskId]:
    """Return the known disks whose image this is, by whatever name it is called."""
    known = await catalog.disks(include_released=True)
    paths = await asyncio.to_thread(_same_file, image, [one.source for one in known])
    return [one.id for one in known if one.source in paths]


def _same_file(image: str, paths: Sequence[str]) -> set[str]:
    wanted = os.path.realpath(image)
    return {path for path in paths if os.path.realpath(path) == wanted}


async def operations_on(catalog: Catalog, disks: Sequence[DiskId]) -> list[Operation]:
    """Return the journal's open operations that concern any of these disks."""
    found = []
    for operation in await catalog.operations():
        if operation.kind == KIND:
            mine = {one.disk for one in CaptureFacts.of(operation).disks}
        else:
            mine = {DiskId(str(operation.facts.get("disk")))}
        if mine & set(disks):
            found.append(operation)
    return found


class Recovery:
    """All recoveries, one after the other; ``give_way`` ends the captures of disks whose guest is to be started.

    ``retries`` are what is done when only time has passed; None: the same.
    """

    def __init__(
        self,
        catalog: Catalog,
        recoveries: Sequence[Recover],
        give_way: Callable[[Sequence[DiskId]], Awaitable[None]] | None = None,
        retries: Sequence[Recover] | None = None,
    ) -> None:
        self._catalog = catalog
        self._recoveries = recoveries
        self._retries = recoveries if retries is None else retries
        self._give_way = give_way
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Try again soon: a guest has started or stopped, or a hypervisor is back."""
        self._woken.set()

    async def run(self) -> None:
        """Try again what could not be settled, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY_S):
                    await self._woken.wait()
            recoveries = self._recoveries if self._woken.is_set() else self._retries
            self._woken.clear()
            try:
                if await self._catalog.operations():
                    # Side by side: a long merge keeps no rollback waiting.
                    await asyncio.gather(*(recover(None) for recover in recoveries))
            except HvsnapError as error:
                log.warning("recovery: %s; it is tried again", error.message)

    async def recover(self) -> wire.Recovery:
        """Recover what can be recovered now; what is being worked on is left alone."""
        return await self._recover(None)

    async def recover_image(self, image: str) -> wire.Recovery:
        """Make an image ready for its guest to be started: all that concerns it and no more, also what is at work now.

        The guest goes before a snapshot: one that is being taken of the image is given up.
        """
        disks = await disks_of_image(self._catalog, image)
        if self._give_way is not None:
            await self._give_way(disks)
        return await self._recover({one.id for one in await operations_on(self._catalog, disks)})

    async def _recover(self, only: Only) -> wire.Recovery:
        found = []
        for recover in self._recoveries:
            for operation, error in await recover(only):
                found.append(await self._told(operation, error))
        return wire.Recovery(operations=found)

    async def _told(self, operation: Operation, error: HvsnapError | None) -> wire.RecoveredOperation:
        outcome: Literal["finished", "undone", "waiting", "still-open"]
        if isinstance(error, instant.Awaited):
            outcome, detail = "waiting", error.message
        elif error is not None:
            outcome = "still-open"
            detail = f"{error.message}; {error.hint}" if error.hint else error.message
        elif operation.kind == KIND:
            kept = await self._accomplished(operation)
            outcome = "finished" if kept else "undone"
            detail = "its snapshots are accomplished" if kept else "its snapshots failed; the next ones miss nothing"
        elif operation.kind == freeze.KIND:
            outcome, detail = "finished", "the guest's file systems are thawed"
        elif operation.kind == export.KIND:
            whole = operation.step == export.Step.NAMED
            outcome = "finished" if whole else "undone"
            detail = "the file is whole" if whole else "what was half-written is removed"
        elif operation.kind == drill.KIND:
            outcome, detail = "undone", "what was restored for trial is removed"
        elif operation.kind == disk.KIND and operation.step == disk.Step.NAMED:
            outcome, detail = "finished", "the disk is whole"
        elif operation.kind == instant.KIND:
            outcome, detail = "finished", "the disk is whole, or gone"
        elif operation.kind == disk.ATTACH_KIND:
            outcome, detail = "finished", "the disk is attached, or an event says why not"
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

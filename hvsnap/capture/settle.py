"""Ending a capture, well or badly, now or after a crash: one way for all.

A capture's own last step and the recovery at start-up are the same: look at the journal's facts and at what the
hypervisor really shows, and bring the guest back to its image, its bitmaps to what the catalog says, and the journal
to an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable

from hvsnap.capture import fleece
from hvsnap.capture.facts import KIND, CapturedDisk, CaptureFacts, Mode, Step
from hvsnap.capture.freeze import Freezer
from hvsnap.capture.merge import POLL_S_FIRST, POLL_S_MAX, Action, Merge, attached
from hvsnap.capture.offline import OfflineWork
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Busy, Failed, HvsnapError, HypervisorUnreachable, NotFound
from hvsnap.guard import OVERLAY, StartGuard
from hvsnap.happenings import EventType, snapshot_payload
from hvsnap.hypervisor import images
from hvsnap.model import GuestUuid, Operation, State
from hvsnap.ports import Hypervisor

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""How often one step is looked at anew after an error: a guest that starts or stops meanwhile changes what is right."""

RETRY_S = 1.0

BEFORE_THE_MERGE = {Action.START_COMMIT, Action.WAIT}
"""What is done while only the overlay is the newest: a guest that was started from the image would lose that."""

WITHOUT_A_GUEST = {Action.COMMIT_OFFLINE, Action.FINISH_PIVOT}

_NOT_SWITCHED = (Step.BITMAPS, Step.OVERLAYS, Step.FREEZING)
"""Steps before a guest can have been switched to an overlay."""


class Settle:
    """Brings open captures to their end. Never raises away what is open: an error leaves the journal's entry."""

    def __init__(self, hypervisor: Hypervisor, freezer: Freezer, catalog: Catalog, guard: StartGuard) -> None:
        self._hypervisor = hypervisor
        self._freezer = freezer
        self._catalog = catalog
        self._guard = guard
        self._merge = Merge(hypervisor)
        self.offline = OfflineWork()

    async def settle(self, operation: Operation, error: str = "interrupted") -> None:
        """Bring one capture to its end. ``error`` is the reason put on its snapshots that are not accomplished.

        Raises what stands in the way (:class:`HypervisorUnreachable`, :class:`ForeignJob`, a full device); the entry
        stays open then, the guest is on its newest data, and this may be called again.
        """
        facts = CaptureFacts.of(operation)
        accomplished = await self._fail_unaccomplished(facts, error)
        if facts.freezing and operation.step in (Step.FREEZING, Step.SWITCHING):
            await self._freezer.thaw(operation.guest_uuid)
        if facts.mode is Mode.REDIRECT:
            for disk in facts.disks:
                await self._bring_back(operation, disk)
            # A full device below an overlay stops the guest at its first write; back on its image it can do it.
            with contextlib.suppress(NotFound):
                await self._hypervisor.resume_after_error(operation.guest_uuid)
        elif facts.mode is Mode.FLEECE:
            await fleece.undo(self._hypervisor, operation.guest_uuid, facts.disks)
        for disk in facts.disks:
            await self._retire(operation.guest_uuid, disk, disk.old if accomplished else disk.new)
        async with self._catalog.write() as tx:
            await tx.close_operation(operation.id)

    async def settle_open(self, leave: Callable[[Operation], bool]) -> list[tuple[Operation, HvsnapError | None]]:
        """Settle the journal's open captures but those to be left; returns each and, if it could not be, why.

        Raises nothing: what cannot be settled yet stays in the journal.
        """

        async def attempt(operation: Operation) -> HvsnapError | None:
            try:
                await self.settle(operation)
            except HvsnapError as error:
                log.warning("capture %s cannot be settled yet: %s", operation.id, error.message)
                return error
            except Exception:
                log.exception("settling capture %s failed", operation.id)
                return Failed("a fault in hvsnap", hint="the daemon's log has the details")
            log.info("capture %s was settled", operation.id)
            return None

        # Side by side: no guest waits for another one's merge, nor for another hypervisor that does not answer.
        found = [operation for operation in await self._catalog.operations(KIND) if not leave(operation)]
        return list(zip(found, await asyncio.gather(*map(attempt, found)), strict=True))

    async def _fail_unaccomplished(self, facts: CaptureFacts, error: str) -> bool:
        """Mark snapshots failed that never became durable; True if the capture was accomplished (all or none are)."""
        accomplished = True
        for disk in facts.disks:
            snapshot = await self._catalog.snapshot(disk.snapshot) if await self._known(disk) else None
            if snapshot is None or snapshot.state is State.ACCOMPLISHED:
                continue
            accomplished = False
            if snapshot.state is State.PROGRESSING:
                known = await self._catalog.disk(disk.disk)
                async with self._catalog.write() as tx:
                    await tx.drop_pages(disk.snapshot)
                    await tx.update_snapshot(disk.snapshot, state=State.FAILED, error=error)
                    failed = dataclasses.replace(snapshot, state=State.FAILED, error=error)
                    await tx.emit(EventType.SNAPSHOT_FAILED, snapshot_payload(known, failed))
        return accomplished

    async def _known(self, disk: CapturedDisk) -> bool:
        with contextlib.suppress(NotFound):
            await self._catalog.snapshot(disk.snapshot)
            return True
        return False

    async def _bring_back(self, operation: Operation, disk: CapturedDisk) -> None:
        """Merge a disk's overlay into the image below it, whatever state the guest is in or gets into."""
        if operation.step in _NOT_SWITCHED:
            # No guest was ever on it. A crash may have left it half made, so it is not looked into.
            await images.remove(disk.overlay)
            return
        pause_s = POLL_S_FIRST
        errors = commits = 0
        while True:
            facts = CaptureFacts.of(await self._catalog.operation(operation.id))
            pivot_asked, asked = disk.target in facts.pivoting, facts.asked.get(disk.target, "")
            try:
                action = await self._merge.decide(operation.guest_uuid, disk, pivot_asked=pivot_asked, asked=asked)
                if action not in BEFORE_THE_MERGE:
                    # Soon the image is the newest again, and after a crash the guest must start from it.
                    await self._guard.lift(disk.disk, OVERLAY)
                if action is Action.DONE:
                    return
                if action is Action.PIVOT and not pivot_asked:
                    await self._note_pivot(operation, disk)
                elif action is Action.COMMIT_OFFLINE and pivot_asked:
                    # It did not happen, and the merge will write to the image: nothing of that may pass for a pivot.
                    await self._note_no_pivot(operation, disk)
                elif action is Action.START_COMMIT:
                    commits += 1
                    await self._check_commits(commits, disk)
                with self._at_work(action, operation.guest_uuid):
                    await self._merge.act(action, operation.guest_uuid, disk)
            except (Busy, HypervisorUnreachable):
                raise
            except HvsnapError as error:
                # An interrupted change is unknown, not failed: look again, a few times.
                errors += 1
                if errors >= ATTEMPTS:
                    raise
                log.info("merging %s: %s; looking again", disk.overlay, error.message)
                await asyncio.sleep(RETRY_S)
                continue
            if action is Action.WAIT:
                await asyncio.sleep(pause_s)
                pause_s = min(POLL_S_MAX, pause_s * 1.5)

    def _at_work(self, action: Action, guest: GuestUuid) -> contextlib.AbstractContextManager[None]:
        return self.offline.on(guest) if action in WITHOUT_A_GUEST else contextlib.nullcontext()

    async def _check_commits(self, number: int, disk: CapturedDisk) -> None:
        """A commit that has to be started anew has ended by itself: the guest died, or a device is full."""
        if number > ATTEMPTS:
            raise Busy(
                f"the merge of {disk.overlay} has failed {ATTEMPTS} times",
                hint=f"is the file system of {disk.base} full? It goes on by itself once there is room",
            )
        if number > 1:
            await asyncio.sleep(RETRY_S)

    async def _note_pivot(self, operation: Operation, disk: CapturedDisk) -> None:
        """Write down that a pivot is about to be asked for, and of which QEMU."""
        guest = await self._merge.look(operation.guest_uuid)
        asked = "" if guest is None or guest.instance is None else guest.instance
        facts = CaptureFacts.of(await self._catalog.operation(operation.id))
        async with self._catalog.write() as tx:
            await tx.step(
                operation.id,
                Step.SETTLING,
                pivoting=[*facts.pivoting, disk.target],
                asked={**facts.asked, disk.target: asked},
            )

    async def _note_no_pivot(self, operation: Operation, disk: CapturedDisk) -> None:
        """Cross out a pivot that was asked for."""
        facts = CaptureFacts.of(await self._catalog.operation(operation.id))
        async with self._catalog.write() as tx:
            left = [target for target in facts.pivoting if target != disk.target]
            await tx.step(operation.id, Step.SETTLING, pivoting=left)

    async def _retire(self, uuid: GuestUuid, disk: CapturedDisk, name: str | None) -> None:
        """Remove a bitmap from the image, through QEMU or from outside, whichever has it open."""
        if name is None or disk.base_format != "qcow2":
            return
        for attempt in range(1, ATTEMPTS + 1):
            guest = await self._merge.look(uuid)
            found = attached(guest, disk.base)
            try:
                if guest is not None and guest.active and found is not None:
                    await self._hypervisor.bitmap_remove(uuid, found.target, name)
                    return
                if not await asyncio.to_thread(images.exists, disk.base):
                    return  # the image was deleted, and its bitmaps with it
                if (await images.image_info(disk.base, disk.base_format)).bitmap(name) is not None:
                    key = await self._hypervisor.passphrase(disk.secret)
                    with self.offline.on(uuid):
                        await images.bitmap_remove(disk.base, name, key=key)
                return
            except HypervisorUnreachable:
                raise
            except HvsnapError:
                if attempt == ATTEMPTS:
                    raise
                await asyncio.sleep(RETRY_S)

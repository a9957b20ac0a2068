"""A disk at once: an overlay over the served snapshot, filled while it is used, at its end an ordinary image.

SERVICE 7.2.

Who fills it follows from who has it open. A running guest's own QEMU pulls the rest in (block-stream): nobody else may
write to an image that it has open. While nobody has it open, a whole disk is made beside, of the store alone or of what
was written to it, too, and takes its name in one step: a guest may start at any moment, and then that copy is given up.

Everything is in the journal before it is done. nbdkit outlives the daemon, so that a guest sees no error when that is
restarted; the next daemon finds it again, or starts it at the same socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

from hvsnap.capture.pipeline import Meter
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Busy, Failed, HvsnapError
from hvsnap.happenings import EventType
from hvsnap.hypervisor import images
from hvsnap.hypervisor.image_lock import images_locked, in_use, is_written
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import Operation, OperationId, Origin, Snapshot, SnapshotId
from hvsnap.restore import target
from hvsnap.restore.disk import Order, Plan, open_attaching
from hvsnap.restore.fill import Filler
from hvsnap.restore.pull import Puller, Pulling, Report
from hvsnap.restore.serve import Access, Served, SnapshotServer
from hvsnap.restore.writer import open_writer
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.uninterrupted import to_its_end

log = logging.getLogger(__name__)

KIND = "disk-instant"

LOOK_S = 1.0
RETRY_S = 5.0
RETRY_S_MAX = 300.0
"""What cannot be filled now (a device that is full, a store that is away) is tried again after growing pauses."""

LOCK_KEPT_S = 3.0
"""How long the lock of an image that was replaced is kept: a QEMU may have opened it, and not have locked it yet."""


class Step(StrEnum):
    """What is done next of an instant disk."""

    SERVING = "serving the snapshot"
    NAMING = "giving it its name"
    FILLING = "filling"


class Gone(Failed):
    """The disk was removed before it was whole."""


class Awaited(Busy):
    """It goes on by itself as soon as the daemon runs: nothing has to be done for it."""


class InstantDisks:
    """Makes instant disks, and fills them. ``access`` lets guests' QEMU connect."""

    def __init__(
        self,
        hypervisor: Pulling,
        catalog: Catalog,
        store: PackedBlocks,
        server: SnapshotServer,
        run_dir: str,
        access: Access,
    ) -> None:
        self._hypervisor = hypervisor
        self._catalog = catalog
        self._store = store
        self._server = server
        self._run_dir = run_dir
        self._access = access

    # -- making one -------------------------------------------------------------------------------

    async def make(self, order: Order, plan: Plan) -> tuple[Operation, OperationId | None]:
        """Make the disk: it can be used on return. Returns the journal's entry, and that for attaching it.

        Raises what serving raises, :class:`TargetExists`, :class:`HypervisorFailed`; nothing is left then.
        """
        operation = await self._begin(order, plan)
        try:
            served = await self._serve(operation)
            try:
                temporary = str(operation.facts["temporary"])
                await images.create_over_nbd(temporary, served.what.socket, plan.snapshot.size_bytes)
            except BaseException:
                self._server.leave(served)
                raise
        except BaseException as error:
            await asyncio.shield(self._undo(operation, str(error) or type(error).__name__))
            raise
        # From here on it comes to its end, even for a caller that is cancelled: a name cannot be half given.
        try:
            return await to_its_end(self._end(operation, plan.path), name=f"name {plan.path}")
        finally:
            self._server.leave(served)

    async def _end(self, operation: Operation, path: str) -> tuple[Operation, OperationId | None]:
        """Publish the disk and tell of it. If telling fails, the entry stays for the recovery to tell."""
        temporary = str(operation.facts["temporary"])
        try:
            inode = await asyncio.to_thread(target.inode_of, temporary)
            async with self._catalog.write() as tx:
                await tx.step(operation.id, Step.NAMING, inode=inode)
            await asyncio.to_thread(target.publish, temporary, path)
        except HvsnapError as error:
            await self._undo(operation, error.message)
            raise
        return await self._named(await self._catalog.operation(operation.id))

    async def _begin(self, order: Order, plan: Plan) -> Operation:
        disk = await self._catalog.disk(plan.snapshot.disk)
        facts: dict[str, Any] = {
            "target": plan.path,
            "snapshot": plan.snapshot.id,
            "payload": {"snapshot": plan.snapshot.id, "disk": disk.id, "guest": disk.guest_name, "path": plan.path},
            "made_of": order.made_of or plan.snapshot.id,
            "attach": None if order.attach is None else [order.attach.guest, order.attach.target],
        }
        async with self._catalog.write() as tx:
            operation = await tx.open_operation(KIND, disk.guest_uuid, Step.SERVING, facts)
            temporary = target.temporary_beside(plan.path, operation.id)
            await tx.step(operation.id, Step.SERVING, temporary=temporary)
        return await self._catalog.operation(operation.id)

    async def _named(self, operation: Operation) -> tuple[Operation, OperationId | None]:
        """Tell of a disk that has its name."""
        async with self._catalog.write() as tx:
            await tx.step(operation.id, Step.FILLING)
            await tx.emit(EventType.DISK_CREATED, operation.payload)
            await self._put_origin(tx, operation, operation.facts.get("inode"))
            attaching = await open_attaching(tx, operation, "qcow2")
        return await self._catalog.operation(operation.id), attaching

    async def _put_origin(self, tx: Any, operation: Operation, inode: object) -> None:
        facts = operation.facts
        known = inode if isinstance(inode, int) else None
        await tx.put_origin(Origin(str(facts["target"]), known, str(facts["made_of"]), operation.created_at))

    async def _undo(self, operation: Operation, error: str) -> None:
        await images.remove(str(operation.facts["temporary"]))
        await self._unserve(operation)
        await self._tell_failure(operation, error)

    # -- after a crash ----------------------------------------------------------------------------

    async def settle(self, operation: Operation) -> bool:
        """Settle what needs no serving: True if nothing is left to do of this entry; its step may have changed."""
        path, inode = str(operation.facts["target"]), operation.facts.get("inode")
        if operation.step != Step.FILLING:
            known = inode if operation.step == Step.NAMING and isinstance(inode, int) else None
            if known is None or not await asyncio.to_thread(target.was_published, path, known):
                await self._undo(operation, "interrupted")
                return True
            await images.remove(str(operation.facts["temporary"]))
            operation, _attaching = await self._named(operation)
        await images.remove(_beside(operation))
        if not await asyncio.to_thread(os.path.lexists, path):
            await self._lost(operation)
            return True
        if await self._whole(operation):
            await self._finish(operation)
            return True
        return False

    async def serve(self, operation: Operation) -> None:
        """Let what a disk is made of be served (again): its guest goes on from here. Raises what serving raises."""
        self._server.leave(await self._serve(operation))

    # -- filling ----------------------------------------------------------------------------------

    async def fill(self, operation_id: OperationId, say: Callable[[str], None], report: Report) -> int:
        """Fill a disk until it is whole and stands alone; return its bytes. Interrupted, it is called again.

        Raises :class:`Gone` for a disk that was removed meanwhile.
        """
        operation = await self._catalog.operation(operation_id)
        snapshot = await self._catalog.snapshot(SnapshotId(str(operation.facts["snapshot"])))
        served = await self._serve(operation)
        self._server.watch(served, self._server.revive)
        try:
            await self._until_whole(operation, snapshot, say, report)
        finally:
            self._server.leave(served)
        await self._finish(operation)
        return snapshot.size_bytes

    async def _until_whole(
        self, operation: Operation, snapshot: Snapshot, say: Callable[[str], None], report: Report
    ) -> None:
        path, failures = str(operation.facts["target"]), 0
        puller = Puller(self._hypervisor, path)
        while True:
            pause_s = LOOK_S
            try:
                await self._check_there(operation)
                # Taken first: what is written after it is seen, also before the disk is found to be empty.
                before = await asyncio.to_thread(_stamp, path)
                if await self._whole(operation):
                    return
                await images.check_no_snapshots(path)
                await asyncio.to_thread(_let_in, path, self._server.socket(_name(operation)))
                if await self._open(operation):
                    await puller.look(report)
                    say("the guest's QEMU fills it")
                else:
                    say("filling it beside, nobody uses it")
                    await self._beside(operation, snapshot, before, report)
                    pause_s = 0.0
                failures = 0
            except Gone:
                raise
            except HvsnapError as error:
                # A guest that starts or ends in between, a device that is full: later it looks different.
                log.info("%s is not filled yet: %s", path, error.message)
                say(f"waiting: {error.message}"[:200])
                if not isinstance(error, Busy):
                    pause_s = min(RETRY_S * 2**failures, RETRY_S_MAX)
                    failures += 1
            await asyncio.sleep(pause_s)

    async def _check_there(self, operation: Operation) -> None:
        """Raise :class:`Gone` for a disk that was removed, :class:`Busy` as long as a guest still lives on it."""
        path = str(operation.facts["target"])
        if await asyncio.to_thread(os.path.lexists, path):
            return
        if await asyncio.to_thread(_clients, self._server.socket(_name(operation))):
            raise Busy(f"{path} was removed, and is still in use", hint="")
        await self._lost(operation)
        raise Gone(f"{path} was removed before it was whole")

    async def _whole(self, operation: Operation) -> bool:
        """Whether nothing is left that reads from the served snapshot, of the image or of who has it open."""
        path = str(operation.facts["target"])
        if (await images.image_info(path, "qcow2")).backing_path is not None:
            return False
        return not await asyncio.to_thread(_clients, self._server.socket(_name(operation)))

    async def _open(self, operation: Operation) -> bool:
        """Whether anybody has the disk open: who has reads the served snapshot by it, too, or will again.

        One whose connection was lost has the image's lock still.
        """
        if await asyncio.to_thread(_clients, self._server.socket(_name(operation))):
            return True
        return await asyncio.to_thread(in_use, str(operation.facts["target"]))

    async def _beside(self, operation: Operation, snapshot: Snapshot, before: tuple[int, ...], report: Report) -> None:
        """Make a whole disk beside, and put it in the place of the overlay if nobody has used that meanwhile."""
        path, beside = str(operation.facts["target"]), _beside(operation)
        await images.remove(beside)
        filler = Filler(self._catalog, self._store, snapshot)
        blocks, _zero = await filler.count(filler.stored_writes())
        await asyncio.to_thread(target.check_space, path, blocks * self._store.block_size + _held_bytes(before))
        try:
            await images.create_image(beside, "qcow2", snapshot.size_bytes, like=path)
            if await images.is_empty(path):
                meter = Meter(snapshot.id, blocks * self._store.block_size, report)
                work = self._write(beside, filler, snapshot, meter)
            else:
                work = images.copy_whole(path, beside)
            filling = asyncio.create_task(work, name=f"fill {path}")
            try:
                while not (await asyncio.wait([filling], timeout=LOOK_S))[0]:
                    if await asyncio.to_thread(_stamp, path) != before or await self._used(operation):
                        raise Busy(f"{path} is used now", hint="")
                filling.result()
            finally:
                filling.cancel()
                await asyncio.wait([filling])
            await self._replace(operation, path, beside, before)
        finally:
            await asyncio.shield(images.remove(beside))

    async def _used(self, operation: Operation) -> bool:
        """Whether anybody may write to the disk. That we read it ourselves is nothing."""
        return await asyncio.to_thread(is_written, str(operation.facts["target"]))

    async def _write(self, path: str, filler: Filler, snapshot: Snapshot, meter: Meter) -> None:
        serving = serve_image(path, "qcow2", run_dir=self._run_dir, read_only=False)
        async with serving as export, open_writer(export) as writer:
            await filler.fill(filler.stored_writes(), writer, snapshot.size_bytes, meter)
            await writer.finish()

    async def _replace(self, operation: Operation, path: str, beside: str, before: tuple[int, ...]) -> None:
        """Give the whole disk the overlay's name, under the overlay's lock: no guest's QEMU has it, nor gets it."""
        async with images_locked([path]):
            if await asyncio.to_thread(_stamp, path) != before:
                raise Busy(f"{path} was used meanwhile", hint="")
            inode = await asyncio.to_thread(target.inode_of, beside)
            await asyncio.to_thread(_same_owner, path, beside)
            await asyncio.to_thread(target.publish, beside, path, replace=True)
            async with self._catalog.write() as tx:
                await tx.step(operation.id, Step.FILLING, inode=inode)
            await asyncio.sleep(LOCK_KEPT_S)

    # -- the ends ---------------------------------------------------------------------------------

    async def _finish(self, operation: Operation) -> None:
        """Tell that a disk stands alone."""
        path = str(operation.facts["target"])
        inode = await asyncio.to_thread(target.inode_of, path)
        await self._unserve(operation)
        async with self._catalog.write() as tx:
            await tx.emit(EventType.DISK_FILLED, operation.payload)
            await self._put_origin(tx, operation, inode)
            await tx.close_operation(operation.id)

    async def _lost(self, operation: Operation) -> None:
        await self._unserve(operation)
        await self._tell_failure(operation, "it was removed before it was whole")

    async def _tell_failure(self, operation: Operation, error: str) -> None:
        async with self._catalog.write() as tx:
            await tx.emit(EventType.DISK_CREATE_FAILED, operation.payload | {"error": error})
            await tx.close_operation(operation.id)

    async def _serve(self, operation: Operation) -> Served:
        snapshot = await self._catalog.snapshot(SnapshotId(str(operation.facts["snapshot"])))
        return await self._server.open(snapshot, _name(operation), self._access, outlives=True)

    async def _unserve(self, operation: Operation) -> None:
        await self._server.end_named(_name(operation))


def _name(operation: Operation) -> str:
    return f"{operation.id}.sock"


def _beside(operation: Operation) -> str:
    return f"{operation.facts['temporary']}.whole"


def _held_bytes(stamp: tuple[int, ...]) -> int:
    """Return what an overlay takes on its device, by its stamp: what was written to it, at most."""
    return stamp[3] * 512 if stamp else 0


def _stamp(path: str) -> tuple[int, ...]:
    """Return what changes when a file is written to; nothing for one that is gone. Blocking."""
    try:
        seen = os.stat(path)
    except FileNotFoundError:
        return ()
    return seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_blocks


def _same_owner(path: str, new: str) -> None:
    """Let a new file belong to whom the old one does: libvirt has given it to QEMU's user, maybe. Blocking."""
    seen = os.stat(path)
    with contextlib.suppress(PermissionError):
        os.chown(new, seen.st_uid, seen.st_gid)
    os.chmod(new, seen.st_mode & 0o7777)


def _let_in(path: str, socket: str) -> None:
    """Let the user to whom a disk was given read what lies below it, too: a bare guest's QEMU. Blocking."""
    with contextlib.suppress(OSError):
        owner = os.stat(path)
        if owner.st_uid not in (0, os.stat(socket).st_uid):
            os.chown(socket, owner.st_uid, owner.st_gid)


def _clients(socket: str) -> int:
    """Return how many connections a Unix socket has, by the kernel's list (proc(5)). Blocking."""
    wanted, found = os.fsencode(socket), 0
    for line in Path("/proc/net/unix").read_bytes().splitlines()[1:]:
        words = line.split(None, 7)
        if len(words) == 8 and words[7] == wanted and words[5] == b"03":
            found += 1
    return found

"""Fleecing: an instant held inside a bare guest's own QEMU, its image current all the time.

For each disk four block nodes are made and found again by their names, which carry the snapshot's id::

    device ── switch (raw) ─┬─ disk's own nodes           before the instant, and after the end
                            └─ before (copy-before-write) ─┬─ disk's own nodes
                                          │                └─ scratch (qcow2): old data, copied before it is overwritten
                                        access (snapshot-access): the disk as it was, exported by NBD

The instant is one ``blockdev-reopen``, which puts all the ``before`` nodes below their ``switch`` nodes at once, while
requests are held: so it is one for several disks. Why not the ``blockdev-backup`` job, which can be part of a
``transaction``: when its scratch image cannot take a write, the guest's own write fails (until QEMU 10.1 at least);
the filter gives the snapshot up instead (``on-cbw-error``), and reading what is lost then is an error. What nobody will
read can be given back (discarded in ``access``), and is not copied any more (docs/bare-qemu.md has measurements).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hvsnap.errors import ForeignJob, HypervisorFailed, Refused
from hvsnap.hypervisor.qemu_nodes import OURS, SWITCH, Graph
from hvsnap.hypervisor.qmp_connection import GuestAway, QmpConnection
from hvsnap.hypervisor.qmp_look import QmpLook
from hvsnap.hypervisor.qmp_view import Attachment, find
from hvsnap.instant import Ready, Span, alone
from hvsnap.model import GuestUuid, SnapshotId
from hvsnap.ports import FleecedDisk, NbdExport

QEMU_MIN = (7, 1)
"""The first QEMU whose copy-before-write filter can give the snapshot up instead of the guest's write."""

QEMU_IOTHREAD_MIN = (9, 0)
"""Before it a QEMU with the fix of CVE-2024-7409 aborts when a client of its NBD server disconnects from a disk with an
I/O thread (``nbd_blockdev_client_closed: Assertion qemu_in_main_thread()``): measured on 7.2.22."""

QEMU_BORDERS_MIN = (9, 0)
"""Before it, reads and block status that begin in a copied cluster and end beyond it are answered from the guest's
present data (``hbitmap_status`` returns the opposite of what it found): measured on 7.2.22, not there in 10.0. Single
clusters are answered right, and so is everything that the scratch image itself says of what was copied to it."""

CBW_TIMEOUT_S = 4
"""A guest's write waits for its copy this long before the snapshot is given up; QEMU 7.2 overflows above 4."""

GRANULARITY = 65536
"""What the filter copies at once, the scratch image's cluster, and the granularity of bitmaps."""

RELEASE_S = 10.0
POLL_S = 0.02
SOCKETS_BACKLOG = 16


@dataclass(frozen=True, slots=True)
class Names:
    """What is made in QEMU for one snapshot."""

    snapshot: SnapshotId

    @property
    def export(self) -> str:
        """The export's id and name."""
        return f"{OURS}{self.snapshot}"

    @property
    def copied(self) -> str:
        """Id and name of the export of the scratch image, for the QEMUs that need it."""
        return f"{OURS}{self.snapshot}-copied"

    @property
    def switch(self) -> str:
        """The node that the device is put on."""
        return f"{OURS}{self.snapshot}{SWITCH}"

    @property
    def before(self) -> str:
        """The filter that copies before the guest writes."""
        return f"{OURS}{self.snapshot}-before"

    @property
    def scratch(self) -> str:
        """The node of the scratch image; the bitmap that is exported is on it, and goes with it."""
        return f"{OURS}{self.snapshot}-scratch"

    @property
    def access(self) -> str:
        """The node that shows the disk as it was."""
        return f"{OURS}{self.snapshot}-access"


class QmpFleecer:
    """Implements :class:`hvsnap.ports.Fleecer` for one guest. One change happens at a time."""

    def __init__(self, connection: QmpConnection, look: QmpLook, run_dir: str) -> None:
        self._connection = connection
        self._look = look
        key = hashlib.blake2b(connection.guest.encode(), digest_size=6).hexdigest()  # a name may be long, or hold a /
        self._socket = os.path.join(run_dir, f"fleece-{key}.sock")
        self._changing = asyncio.Lock()
        self._exporting: set[SnapshotId] = set()

    async def fleece_check(self, uuid: GuestUuid, targets: Sequence[str]) -> None:
        """Refuse what this QEMU cannot fleece, or would not survive, with the way out."""
        attached = await self._look.attachments()
        version = await self._look.version()
        guest = self._connection.guest
        if version < QEMU_MIN:
            raise Refused(
                f"the QEMU of guest {guest} is {_dotted(version)}; fleecing needs {_dotted(QEMU_MIN)} or later",
                hint=f'capture it by redirecting: hypervisor.qmp.{guest}.capture = "redirect" (docs/bare-qemu.md)',
            )
        for target in targets:
            if find(attached, target).view.iothread and version < QEMU_IOTHREAD_MIN:
                raise Refused(
                    f"disk {target} of guest {guest} has an I/O thread, and QEMU {_dotted(version)} would abort when "
                    "the disk is read through its own NBD server",
                    hint=f'capture it by redirecting: hypervisor.qmp.{guest}.capture = "redirect" (docs/bare-qemu.md), '
                    f"or use QEMU {_dotted(QEMU_IOTHREAD_MIN)} or later",
                )

    # -- doing ------------------------------------------------------------------------------------

    async def fleece_prepare(self, uuid: GuestUuid, disks: Sequence[FleecedDisk]) -> None:
        """Put every node in place and the devices on their switches; no instant is held yet."""
        async with self._changing:
            await self.fleece_check(uuid, [disk.target for disk in disks])
            attached = await self._look.attachments()
            for disk in disks:
                if (root := find(attached, disk.target).root).startswith(OURS):
                    why = f"disk {disk.target} of guest {self._connection.guest} is being fleeced already ({root})"
                    raise ForeignJob(why, hint="`hvsnap recover` ends what a crash left open")
            await self._start_server()
            self._exporting |= {disk.snapshot for disk in disks}
            for disk in disks:
                await self._put_in_place(find(attached, disk.target), disk)

    async def fleece_hold(self, uuid: GuestUuid, disks: Sequence[FleecedDisk], ready: Ready = alone) -> Span:
        """Hold the instant of all disks at once; tells when that was."""
        names = [Names(disk.snapshot) for disk in disks]
        await ready()
        began_s = time.monotonic()
        await self._reopen([(name.switch, name.before) for name in names])
        return Span(began_s, time.monotonic())

    async def fleece_export(self, uuid: GuestUuid, disks: Sequence[FleecedDisk]) -> dict[str, NbdExport]:
        """Make the instants readable. The bitmap is merged after the instant: it may name more than was written."""
        async with self._changing:
            attached = await self._look.attachments()
            return {disk.target: await self._export(find(attached, disk.target), disk) for disk in disks}

    async def fleece_undo(self, uuid: GuestUuid, disks: Sequence[FleecedDisk]) -> None:
        """Remove what there is of these fleeces, whatever was interrupted: the present is looked at, not remembered."""
        async with self._changing:
            names = [Names(disk.snapshot) for disk in disks]
            await self._unexport({export for name in names for export in (name.export, name.copied)})
            self._exporting -= {disk.snapshot for disk in disks}
            await self._stop_server()
            for name in names:
                await self._take_away(name)

    # -- nodes ------------------------------------------------------------------------------------

    async def _put_in_place(self, disk: Attachment, order: FleecedDisk) -> None:
        names = Names(order.snapshot)
        await self._add(_scratch_options(names.scratch, order.scratch))
        await self._add(
            {
                "driver": "copy-before-write",
                "node-name": names.before,
                "discard": "unmap",
                "file": disk.root,
                "target": names.scratch,
                "on-cbw-error": "break-snapshot",
                "cbw-timeout": CBW_TIMEOUT_S,
            }
        )
        await self._add(_switch_options(names.switch, disk.root))
        await self._set_drive(disk.path, names.switch)

    async def _add(self, options: dict[str, Any]) -> None:
        await self._connection.execute("blockdev-add", **options)

    async def _set_drive(self, path: str, node: str) -> None:
        """Put a device on another node: ``drive`` may be set on a device in use since QEMU 6.1."""
        await self._connection.execute("qom-set", path=path, property="drive", value=node)

    async def _reopen(self, changes: Sequence[tuple[str, str]]) -> None:
        """Put nodes below switches, all at once."""
        options = [_switch_options(switch, below) for switch, below in changes]
        await self._connection.execute("blockdev-reopen", options=options)

    async def _take_away(self, names: Names) -> None:
        """Take the nodes of one fleece away, top down."""
        present = {node["node-name"] for node in await self._look.nodes()}
        if names.access in present:
            await self._delete(names.access)
        if names.switch in present:
            # Somebody else's snapshot may have put another node below the filter meanwhile: ask for what is there.
            graph = Graph(await self._look.graph())
            below = graph.below(names.switch)
            if below == names.before:
                below = graph.below(names.before)
                if below is None:
                    raise HypervisorFailed(f"nothing lies below the node {names.before}")
                await self._reopen([(names.switch, below)])
            for disk in await self._look.attachments():
                if disk.root == names.switch and below is not None:
                    await self._set_drive(disk.path, below)
            await self._delete(names.switch)
        for name in (names.before, names.scratch):
            if name in present:
                await self._delete(name)

    async def _delete(self, node: str) -> None:
        """Delete a node; one that is still being let go of is tried again for a while."""
        await _patiently(lambda: self._connection.execute("blockdev-del", **{"node-name": node}))

    # -- exports ----------------------------------------------------------------------------------

    async def _export(self, disk: Attachment, order: FleecedDisk) -> NbdExport:
        names = Names(order.snapshot)
        bitmaps = []
        if order.old is not None:
            bitmap = {"node": names.scratch, "name": order.old}
            source = {"node": disk.format_node, "name": order.old}
            # Merged into one that does not record, on a node of ours: the guest's own bitmap is never exported, since a
            # migration or a save would abort QEMU then.
            add = {**bitmap, "granularity": GRANULARITY, "persistent": False, "disabled": True}
            merge = {"node": names.scratch, "target": order.old, "bitmaps": [source]}
            actions = [
                {"type": "block-dirty-bitmap-add", "data": add},
                {"type": "block-dirty-bitmap-merge", "data": merge},
            ]
            await self._connection.execute("transaction", actions=actions)
            bitmaps.append(bitmap)
        access = {"driver": "snapshot-access", "node-name": names.access, "discard": "unmap", "file": names.before}
        await self._add(access)
        # Writable for the sake of discards alone: snapshot-access takes no writes.
        export = {"type": "nbd", "id": names.export, "name": names.export, "node-name": names.access, "writable": True}
        await self._connection.execute("block-export-add", **export, bitmaps=bitmaps)
        shown = NbdExport(self._socket, order.old, names.export, give_back=True)
        if await self._look.version() >= QEMU_BORDERS_MIN:
            return shown
        copied = {"type": "nbd", "id": names.copied, "name": names.copied, "node-name": names.scratch}
        await self._connection.execute("block-export-add", **copied)
        return replace(shown, piece_bytes=GRANULARITY, also=names.copied)

    async def _unexport(self, exports: set[str]) -> None:
        """Remove exports, and return when they are gone."""
        deadline = time.monotonic() + RELEASE_S
        while True:
            left = [one for one in await self._exports() if one["id"] in exports]
            if not left:
                return
            if time.monotonic() > deadline:
                raise HypervisorFailed(f"QEMU does not end the export {left[0]['id']}")
            for one in left:
                if not one["shutting-down"]:
                    await self._connection.execute("block-export-del", id=one["id"], mode="hard")
            await asyncio.sleep(POLL_S)

    async def _exports(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await self._connection.execute("query-block-exports")
        return found

    # -- the NBD server ---------------------------------------------------------------------------

    async def _start_server(self) -> None:
        """Start QEMU's NBD server on a private socket; raises :class:`ForeignJob` when another program has it.

        QEMU has one server. The socket is made here and its descriptor passed: QEMU's user need not be able to enter
        our directory, and nobody else can.
        """
        if await self._serves():
            return
        listening = await asyncio.to_thread(_listen, self._socket)
        try:
            self._connection.send_fd(listening.fileno())
            await self._connection.execute("getfd", fdname=f"{OURS}nbd")
        finally:
            listening.close()
        try:
            address = {"type": "fd", "data": {"str": f"{OURS}nbd"}}
            await self._connection.execute("nbd-server-start", addr=address, **{"max-connections": 0})
        except GuestAway:
            raise
        except HypervisorFailed as error:
            with contextlib.suppress(HypervisorFailed):
                await self._connection.execute("closefd", fdname=f"{OURS}nbd")
            shown = ", ".join(str(one["id"]) for one in await self._exports()) or "none yet"
            why = f"the NBD server of guest {self._connection.guest} cannot be had ({error.message}); exports: {shown}"
            raise ForeignJob(why, hint="another backup is at work there; try again when it has finished") from error

    async def _stop_server(self) -> None:
        """Stop the server, if it is ours and nobody needs it any more."""
        if self._exporting or not await self._serves():
            return
        if not await self._exports():  # whoever has put one of his own on our server keeps it
            await self._connection.execute("nbd-server-stop")
            await asyncio.to_thread(_remove, self._socket)

    async def _serves(self) -> bool:
        """Whether QEMU's server listens on our socket; the socket alone tells, also after a crash of ours."""
        return await asyncio.to_thread(_listens, self._socket)


def _listen(path: str) -> socket.socket:
    """Return a listening socket at a path. Blocking."""
    _remove(path)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(path)
        listening.listen(SOCKETS_BACKLOG)
    except OSError as error:
        listening.close()
        raise HypervisorFailed(f"cannot listen at {path}: {error.strerror}") from error
    return listening


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(path) == 0


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


async def _patiently(do: Callable[[], Awaitable[Any]]) -> None:
    """Do something that QEMU refuses while it is still ending something else, for :data:`RELEASE_S`."""
    deadline = time.monotonic() + RELEASE_S
    while True:
        try:
            await do()
        except GuestAway:
            raise
        except HypervisorFailed:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(POLL_S)
        else:
            return


def _switch_options(name: str, below: str) -> dict[str, Any]:
    return {"driver": "raw", "node-name": name, "discard": "unmap", "file": below}


def _scratch_options(name: str, path: str) -> dict[str, Any]:
    """Return the options of a scratch image: never flushed, since nobody reads it after a crash."""
    cache = {"no-flush": True}
    file = {"driver": "file", "filename": path, "discard": "unmap", "cache": cache}
    return {"driver": "qcow2", "node-name": name, "discard": "unmap", "cache": cache, "file": file}


def _dotted(version: Sequence[int]) -> str:
    return ".".join(str(part) for part in version)

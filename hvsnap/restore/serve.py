"""Snapshots as disks that any client of NBD can open: nbdkit in front, the daemon's :class:`BlockSource` behind.

What is served lasts as long as somebody here holds it; who may delete what is the service's matter.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import hvsnap
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Failed, HvsnapError
from hvsnap.hypervisor import nbdkit
from hvsnap.hypervisor.nbd_server import listens
from hvsnap.hypervisor.nbdkit import Nbdkit
from hvsnap.model import Snapshot, SnapshotId
from hvsnap.restore.block_cache import BlockCache
from hvsnap.restore.block_source import BlockSource
from hvsnap.restore.snapshot_reader import SnapshotReader
from hvsnap.store.blocks import PackedBlocks

log = logging.getLogger(__name__)

PLUGIN = Path(__file__).with_name("nbdkit_plugin.py")

WATCH_S = 0.5
"""How soon it is seen that an nbdkit is gone. A guest whose disk it is waits meanwhile."""

PATIENCE_S = 900
"""How long a guest's disk waits for a daemon that is being restarted, before it sees an error."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may connect, besides root: ``owner`` (uid, gid; -1: the daemon's own) by ``mode``."""

    owner: tuple[int, int] = (-1, -1)
    mode: int = 0o600


class Served:
    """One snapshot being served; :meth:`close` ends it."""

    def __init__(self, snapshot: Snapshot, what: Nbdkit, pid: int) -> None:
        self.snapshot = snapshot
        self.what = what
        self.pid = pid
        self.watch: asyncio.Task[None] | None = None

    @property
    def uri(self) -> str:
        """Where clients of NBD find it (the NBD project's own form of URIs)."""
        return uri_of(self.what.socket)


def uri_of(socket: str) -> str:
    """Return the URI of what is served at a Unix socket."""
    return f"nbd+unix:///?socket={quote(socket)}"


def serve_directory(run_dir: Path) -> Path:
    """Make the directory of the sockets: one passes through it to a socket whose name one knows. Blocking."""
    directory = run_dir / "served"
    try:
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
        directory.chmod(0o711)
        # QEMU's user comes to its disks' sockets this way; what else is there is closed to it.
        run_dir.chmod(stat.S_IMODE(run_dir.stat().st_mode) | 0o011)
    except OSError as error:
        hint = "check `socket` in the configuration, and the permissions of its directory"
        raise Failed(f"cannot use {directory}: {error.strerror}", hint=hint) from error
    return directory


class SnapshotServer:
    """Serves snapshots. ``private`` is for the daemon's own socket, ``directory`` for those of nbdkit."""

    def __init__(self, catalog: Catalog, store: PackedBlocks, private: str, directory: str) -> None:
        self._catalog = catalog
        self._cache = BlockCache(store)
        self._source = BlockSource(private)
        self._directory = directory
        self._readers: dict[SnapshotId, int] = {}

    async def start(self) -> None:
        """Answer nbdkit from now on, also one that an earlier daemon has left, and clear what dead ones have left."""
        await self._source.start()
        await asyncio.to_thread(_clear_dead, Path(self._directory))

    async def close(self) -> None:
        """Answer no more; what outlives us waits for the next daemon."""
        await self._source.close()
        await self._cache.close()

    def socket(self, name: str) -> str:
        """Return the path of the socket of this name."""
        return os.path.join(self._directory, name)

    async def open(
        self, snapshot: Snapshot, name: str, access: Access, *, writable: bool = False, outlives: bool = False
    ) -> Served:
        """Serve a snapshot at the socket ``name``; one that is there already, and outlives daemons, goes on.

        Raises :class:`Failed` where nbdkit is not installed, :class:`HypervisorFailed` if it does not come up.
        """
        what = Nbdkit(
            socket=self.socket(name),
            plugin=str(PLUGIN),
            parameters={
                "source": self._source.path,
                "snapshot": snapshot.id,
                "size": str(snapshot.size_bytes),
                "patience": str(PATIENCE_S if outlives else 0),
            },
            path=str(Path(hvsnap.__file__).parents[1]),
            writable=writable,
            outlives=outlives,
            owner=access.owner,
            mode=access.mode,
        )
        self._add(snapshot)
        try:
            pid = await asyncio.to_thread(nbdkit.running, what) if outlives else None
            return Served(snapshot, what, pid or await nbdkit.start(what))
        except BaseException:
            self._remove(snapshot)
            raise

    def watch(self, served: Served, gone: Callable[[Served], Awaitable[None]]) -> None:
        """Call ``gone`` if its nbdkit ends by itself."""
        served.watch = asyncio.create_task(self._watch(served, gone), name=f"watch nbdkit {served.pid}")

    async def revive(self, served: Served) -> None:
        """Start an nbdkit that has ended again, at the same socket."""
        served.pid = await nbdkit.start(served.what)

    async def end(self, served: Served) -> None:
        """Serve it no more: its clients are cut off."""
        if served.watch is not None and served.watch is not asyncio.current_task():
            served.watch.cancel()
        await nbdkit.end(served.pid, served.what)
        self._remove(served.snapshot)

    async def end_named(self, name: str) -> None:
        """End what serves at the socket of this name, whoever started it."""
        what = Nbdkit(self.socket(name), str(PLUGIN), {}, "")
        pid = await asyncio.to_thread(nbdkit.running, what)
        if pid is not None:
            await nbdkit.end(pid, what)

    def leave(self, served: Served) -> None:
        """Let what outlives us go on without us."""
        if served.watch is not None:
            served.watch.cancel()
        self._remove(served.snapshot)

    async def _watch(self, served: Served, gone: Callable[[Served], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            if not await asyncio.to_thread(nbdkit.alive, served.pid):
                log.warning("nbdkit %d, which served snapshot %s, has ended", served.pid, served.snapshot.id)
                try:
                    await gone(served)
                except HvsnapError as error:
                    log.error("snapshot %s is not served any more: %s", served.snapshot.id, error.message)

    def _add(self, snapshot: Snapshot) -> None:
        self._readers[snapshot.id] = self._readers.get(snapshot.id, 0) + 1
        if self._readers[snapshot.id] == 1:
            self._source.add(snapshot.id, SnapshotReader(self._catalog, self._cache, snapshot))

    def _remove(self, snapshot: Snapshot) -> None:
        left = self._readers.get(snapshot.id, 0) - 1
        self._readers[snapshot.id] = left
        if left <= 0:
            self._readers.pop(snapshot.id, None)
            self._source.remove(snapshot.id)


def _clear_dead(directory: Path) -> None:
    """Remove the sockets that nobody listens at any more, and the process ids beside them."""
    for path in list(directory.glob("*.sock")):
        if stat.S_ISSOCK(path.lstat().st_mode) and not listens(str(path)):
            path.unlink(missing_ok=True)
            Path(f"{path}.pid").unlink(missing_ok=True)

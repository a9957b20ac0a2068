"""Where nbdkit's plugin gets its bytes: the daemon's end of :mod:`hvsnap.restore.block_protocol`, on a private socket.

The catalog has one writer, the store its keys and credentials: they stay in this one process, and nbdkit, which talks
to guests and to whoever may connect, has neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from hvsnap.errors import HvsnapError, StoreFailed
from hvsnap.restore import block_protocol as protocol
from hvsnap.restore.snapshot_reader import SnapshotReader

log = logging.getLogger(__name__)

ANSWERS_MAX = 16
"""Requests that are answered at once, over all connections: 64 MiB of answers at most."""

DRAIN_S = 30.0

SOCKET_NAME = "blocks.sock"


class BlockSource:
    """Answers requests about the snapshots that are served. :meth:`start` it, then :meth:`add` them."""

    def __init__(self, run_dir: str) -> None:
        self.path = os.path.join(run_dir, SOCKET_NAME)
        self._readers: dict[str, SnapshotReader] = {}
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(ANSWERS_MAX)

    def add(self, snapshot: str, reader: SnapshotReader) -> None:
        """Answer for a snapshot from now on."""
        self._readers[snapshot] = reader

    def remove(self, snapshot: str) -> None:
        """Answer for it no more."""
        self._readers.pop(snapshot, None)

    async def start(self) -> None:
        """Listen; the directory keeps everybody else away."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        self._server = await asyncio.start_unix_server(self._connected, self.path)
        await asyncio.to_thread(os.chmod, self.path, 0o600)

    async def close(self) -> None:
        """Listen no more, and hang up."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer), name="blocks for nbdkit")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readexactly(protocol.REQUEST.size)
                async with self._turn:
                    status, pieces = await self._answer(request)
                    writer.write(protocol.ANSWER.pack(status, sum(len(one) for one in pieces)))
                    for piece in pieces:
                        writer.write(piece)
                    # One that is stopped must not take the others' turns for ever; it asks again.
                    await asyncio.wait_for(writer.drain(), DRAIN_S)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass
        finally:
            writer.transport.abort()

    async def _answer(self, request: bytes) -> tuple[int, list[bytes] | list[memoryview]]:
        magic, operation, name, offset, length = protocol.REQUEST.unpack(request)
        snapshot = name.rstrip(b"\0").decode("ascii", errors="replace")
        if magic != protocol.MAGIC:
            return protocol.FAILED, [b"nbdkit's plugin is of another release than the daemon"]
        source = self._readers.get(snapshot)
        if source is None:
            return protocol.NOT_SERVED, [f"snapshot {snapshot} is not served".encode()]
        try:
            if operation == protocol.READ and length <= protocol.READ_BYTES_MAX:
                return protocol.OK, await source.read(offset, length)
            if operation == protocol.EXTENTS:
                runs = await source.extents(offset, length)
                return protocol.OK, [b"".join(protocol.EXTENT.pack(count, zero) for count, zero in runs)]
        except StoreFailed as error:
            # A store that is away comes back: who has patience asks again, and sees no error meanwhile.
            log.warning("snapshot %s cannot be read at %d now: %s", snapshot, offset, error.message)
            return protocol.NOT_SERVED, [error.message.encode()]
        except HvsnapError as error:
            log.error("snapshot %s cannot be read at %d: %s", snapshot, offset, error.message)
            return protocol.FAILED, [error.message.encode()]
        except Exception:
            log.exception("snapshot %s cannot be read at %d", snapshot, offset)
            return protocol.FAILED, [b"a fault in hvsnap: its log has the details"]
        return protocol.FAILED, [b"an unknown request"]

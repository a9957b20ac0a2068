"""Writing an image through libnbd: several connections, several requests in flight, bounded memory.

The mirror image of :mod:`hvsnap.capture.reader`: each connection lives in a thread of its own and takes batches from a
bounded queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import nbd

from hvsnap.errors import Failed, NoSpace
from hvsnap.ports import NbdExport

CONNECTIONS = 2
BATCH_BYTES = 2 << 20
BATCHES = 12
"""Batches that wait or are being written: 24 MiB, whatever is restored."""

ZERO_BYTES_MAX = 1 << 30
"""Bytes of one zero request; NBD's field has 32 bits."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes to write at ``offset``, or (``data`` None) a range that is to read as zeroes."""

    offset: int
    length: int
    data: memoryview | None


class NbdWriter:
    """Takes pieces in any order; they are durable when :meth:`finish` has returned."""

    def __init__(self, export: NbdExport) -> None:
        self._export = export
        self._batch: list[Piece] = []
        self._batch_bytes = 0
        self._queue: queue.SimpleQueue[list[Piece] | None] = queue.SimpleQueue()
        self._free = asyncio.Semaphore(BATCHES)
        self._loop = asyncio.get_running_loop()
        self._failure: Exception | None = None
        self._threads = [
            threading.Thread(target=self._write_all, name=f"hvsnap-write-{number}", daemon=True)
            for number in range(CONNECTIONS)
        ]
        for thread in self._threads:
            thread.start()

    async def size_bytes(self) -> int:
        """Return the size of what is written to, as it was opened."""
        return await asyncio.to_thread(self._size_bytes)

    async def write(self, offset: int, data: memoryview) -> None:
        """Write bytes; waits while too much is under way. Raises what an earlier piece failed with."""
        self._batch.append(Piece(offset, len(data), data))
        self._batch_bytes += len(data)
        if self._batch_bytes >= BATCH_BYTES:
            await self._send()

    async def zero(self, offset: int, length: int) -> None:
        """Make a range read as zeroes."""
        for start in range(offset, offset + length, ZERO_BYTES_MAX):
            self._batch.append(Piece(start, min(ZERO_BYTES_MAX, offset + length - start), None))
        if len(self._batch) >= BATCH_BYTES >> 16:
            await self._send()

    async def finish(self) -> None:
        """Write what is left and make all of it durable; no thread is left afterwards."""
        await self._send()
        await self.stop()
        if self._failure is not None:
            raise self._failure
        await asyncio.to_thread(self._flush)

    async def stop(self) -> None:
        """End the threads; what they have begun is waited for."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        self._threads = []

    async def _send(self) -> None:
        if self._failure is not None:
            raise self._failure
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if batch:
            await self._free.acquire()
            self._queue.put(batch)

    # -- in threads -------------------------------------------------------------------------------

    def _connect(self) -> Any:
        handle = nbd.NBD()
        handle.connect_unix(self._export.socket)
        return handle

    def _write_all(self) -> None:
        handle: Any = None
        while (batch := self._queue.get()) is not None:
            try:
                # After a failure the queue is only emptied, so that nobody waits for a place in it.
                if self._failure is None:
                    handle = handle or self._connect()
                    _write_batch(handle, batch)
            except Exception as error:
                self._failure = _translate(error)
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed: the daemon is ending
                    self._loop.call_soon_threadsafe(self._free.release)
        if handle is not None:
            with contextlib.suppress(nbd.Error):
                handle.shutdown()

    def _size_bytes(self) -> int:
        try:
            handle = self._connect()
            size_bytes = int(handle.get_size())
            handle.shutdown()
        except nbd.Error as error:
            raise _translate(error) from error
        return size_bytes

    def _flush(self) -> None:
        try:
            handle = self._connect()
            handle.flush()
            handle.shutdown()
        except nbd.Error as error:
            raise _translate(error) from error


def merged(batch: list[Piece]) -> Iterator[Piece]:
    """Yield a batch's pieces by offset, neighbours with data as one: fewer, larger writes cost QEMU far less.

    The pieces of a batch do not overlap.
    """
    run: list[memoryview] = []
    start = end = 0
    for piece in sorted(batch, key=lambda piece: piece.offset):
        if run and (piece.data is None or piece.offset != end):
            yield _joined(start, run)
            run = []
        if piece.data is None:
            yield piece
            continue
        if not run:
            start = piece.offset
        run.append(piece.data)
        end = piece.offset + piece.length
    if run:
        yield _joined(start, run)


def _joined(offset: int, run: list[memoryview]) -> Piece:
    data = run[0] if len(run) == 1 else memoryview(b"".join(run))
    return Piece(offset, len(data), data)


def _write_batch(handle: Any, batch: list[Piece]) -> None:
    pending = []
    for piece in merged(batch):
        if piece.data is None:
            pending.append(handle.aio_zero(piece.length, piece.offset))
        else:
            pending.append(handle.aio_pwrite(piece.data, piece.offset))
    while pending:
        handle.poll(-1)
        pending = [cookie for cookie in pending if not handle.aio_command_completed(cookie)]


def _translate(error: Exception) -> Exception:
    if isinstance(error, nbd.Error):
        if error.errno in ("ENOSPC", "EDQUOT"):
            return NoSpace("the target's file system is full")
        return Failed(f"the target cannot be written: {error.string}")
    return error


@contextlib.asynccontextmanager
async def open_writer(export: NbdExport) -> AsyncIterator[NbdWriter]:
    """Give a writer; the caller calls :meth:`NbdWriter.finish` when all is handed over. No thread outlives this."""
    writer = NbdWriter(export)
    try:
        yield writer
    finally:
        await asyncio.shield(writer.stop())

"""Reading a frozen disk through libnbd: its allocation and dirty bitmap, then its blocks.

libnbd's calls release the GIL; every connection lives in a thread of its own, and fills buffers from a bounded
pool. Two figures bound the design (docs/performance.md): requests of 256 KiB on four connections read more than
twice as fast from qemu-nbd as requests of 1 MiB, and a hop between threads costs as much as hashing two blocks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import nbd
import numpy as np
import numpy.typing as npt

from hvsnap.capture.blockset import BlockSet
from hvsnap.capture.plan import Group, group_blocks, runs
from hvsnap.errors import ReadFailed
from hvsnap.model import PAGE_BLOCKS
from hvsnap.ports import NbdExport

CONNECTIONS = 4
REQUEST_BYTES = 256 * 1024
BUFFERS = 10
"""Buffers of a group each: 40 MiB, whatever the disk's size and the block's. Four are being filled, four are with the
store's workers, two are on their way."""

NICE = 10
"""Niceness of threads that read for a capture: the daemon's own loop, and guests in its control group, come first."""

STATUS_BYTES_MAX = 1 << 30
"""Bytes that one block-status request asks about: NBD's field has 32 bits, and a reply's extents take memory."""

ALLOCATION = "base:allocation"
_ZERO = 2  # NBD_STATE_ZERO of base:allocation: reads as zeroes
_DIRTY = 1  # NBD_STATE_DIRTY of qemu:dirty-bitmap


@dataclass(frozen=True, slots=True)
class DiskMap:
    """What a frozen disk holds: its size, the blocks that may hold data, and those its bitmap names."""

    size_bytes: int
    data: BlockSet
    dirty: BlockSet | None


@contextlib.contextmanager
def connected(export: NbdExport, contexts: list[str]) -> Iterator[Any]:
    """Give a connected handle; it says goodbye at the end, so that the server does not log a lost client."""
    handle = nbd.NBD()
    handle.set_pread_initialize(False)  # pread need not clear buffers that it is about to fill
    for context in contexts:
        handle.add_meta_context(context)
    handle.set_export_name(export.name)
    handle.connect_unix(export.socket)
    for context in contexts:
        if not handle.can_meta_context(context):
            raise ReadFailed(f"the image does not export {context}")
    try:
        yield handle
    finally:
        with contextlib.suppress(nbd.Error):
            handle.shutdown()


def _window(handle: Any, start: int, length: int, contexts: list[str]) -> dict[str, list[npt.NDArray[np.int64]]]:
    """Return for each context rows of ``(offset, length, flags)`` that together cover a window."""
    found: dict[str, list[npt.NDArray[np.int64]]] = {context: [] for context in contexts}
    offset = start
    while offset < start + length:
        reached: dict[str, int] = {}

        def extent(context: str, at: int, entries: list[int], error: Any, reached: dict[str, int] = reached) -> int:
            pairs = np.array(entries, np.int64).reshape(-1, 2)
            ends = at + np.cumsum(pairs[:, 0])
            found[context].append(np.column_stack((ends - pairs[:, 0], pairs)))
            reached[context] = int(ends[-1])
            return 0

        handle.block_status(min(start + length - offset, STATUS_BYTES_MAX), offset, extent)
        if set(reached) != set(contexts) or min(reached.values()) <= offset:
            raise ReadFailed("the server's block status is incomplete")
        offset = min(reached.values())
    return found


def _blocks_touched(
    rows: list[npt.NDArray[np.int64]], keep: npt.NDArray[np.bool_], start: int, block_size: int, disk_bytes: int
) -> npt.NDArray[np.bool_]:
    """Return ``bool[PAGE_BLOCKS]``: which blocks of the page at byte ``start`` the kept extents touch, even partly.

    A server may let its last extent run beyond what was asked, even beyond the disk's end.
    """
    extents = np.concatenate(rows)[keep]
    blocks = min(PAGE_BLOCKS, -(-(disk_bytes - start) // block_size))
    first = np.clip((extents[:, 0] - start) // block_size, 0, blocks)
    last = np.clip(-(-(extents[:, 0] + extents[:, 1] - start) // block_size), 0, blocks)
    steps = np.zeros(PAGE_BLOCKS + 1, np.int64)
    np.add.at(steps, first, 1)
    np.add.at(steps, last, -1)
    return np.cumsum(steps[:-1]) > 0


def scan(export: NbdExport, block_size: int) -> DiskMap:
    """Return the map of a frozen disk. Blocking: call it in a thread. Raises :class:`ReadFailed`."""
    found = _scan(export, block_size)
    if export.also:
        more = _scan(NbdExport(export.socket, name=export.also), block_size)
        for page in range(min(found.data.pages, more.data.pages)):
            found.data.add_page(page, more.data.page(page))
    return found


def _scan(export: NbdExport, block_size: int) -> DiskMap:
    contexts = [ALLOCATION] + ([export.bitmap_context] if export.bitmap_context else [])
    try:
        with connected(export, contexts) as handle:
            size = handle.get_size()
            blocks = -(-size // block_size)
            data = BlockSet(blocks)
            dirty = BlockSet(blocks) if export.bitmap_context else None
            page_bytes = PAGE_BLOCKS * block_size
            for start in range(0, size, page_bytes):
                length = min(page_bytes, size - start)
                found = _window(handle, start, length, contexts)
                flags = np.concatenate(found[ALLOCATION])[:, 2]
                page = start // page_bytes
                data.add_page(page, _blocks_touched(found[ALLOCATION], (flags & _ZERO) == 0, start, block_size, size))
                if dirty is not None and export.bitmap_context:
                    rows = found[export.bitmap_context]
                    marked = (np.concatenate(rows)[:, 2] & _DIRTY) != 0
                    dirty.add_page(page, _blocks_touched(rows, marked, start, block_size, size))
            return DiskMap(size, data, dirty)
    except nbd.Error as error:
        raise ReadFailed(f"cannot read the disk's map: {error.string}") from error


@dataclass(slots=True)
class Chunk:
    """Blocks of a group as read: ``data`` holds ``index.size`` whole blocks; valid until :meth:`release`."""

    page: int
    index: npt.NDArray[np.uint16]
    data: memoryview
    _pool: queue.SimpleQueue[memoryview | None] = field(repr=False)
    _buffer: memoryview = field(repr=False)

    def release(self) -> None:
        """Hand the buffer back to the readers."""
        self._pool.put(self._buffer)


class Pace(Protocol):
    """What readers ask before each group: :class:`hvsnap.capture.throttle.Throttle`, seen from here."""

    def wait(self, length: int, stop: threading.Event) -> bool:
        """Return once ``length`` bytes may be read. False: not any more, ``stop`` was set. Blocking."""
        ...


class ChunkStream:
    """Chunks of a frozen disk, read ahead by several connections; several tasks may :meth:`get` from it.

    Memory is the pool's: a reader waits until a consumer releases a chunk.
    """

    def __init__(
        self,
        export: NbdExport,
        size_bytes: int,
        block_size: int,
        work: Iterator[Group],
        pace: Pace | None = None,
    ) -> None:
        """``pace`` lets a running guest go first; None: nobody is to be spared."""
        self._pace = pace
        self._export = export
        self._size_bytes = size_bytes
        self._block_size = block_size
        self._work = work
        self._work_lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Queue[Chunk | BaseException | None] = asyncio.Queue()
        self._pool: queue.SimpleQueue[memoryview | None] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._running = CONNECTIONS
        self._failure: BaseException | None = None
        for _ in range(BUFFERS):
            # Not cleared: clearing them all takes longer than a small reading.
            self._pool.put(np.empty(group_blocks(block_size) * block_size, np.uint8).data)
        self._threads = [
            threading.Thread(target=self._read_all, name=f"hvsnap-read-{i}", daemon=True) for i in range(CONNECTIONS)
        ]

    async def get(self) -> Chunk | None:
        """Return the next chunk, or None when all have been read. Raises :class:`ReadFailed`, for every caller."""
        if self._failure is None:
            item = await self._ready.get()
            if isinstance(item, BaseException):
                self._failure = item
            elif item is not None:
                return item
        if self._failure is not None:
            self._ready.put_nowait(None)
            raise self._failure
        self._ready.put_nowait(None)  # for the next consumer
        return None

    def start(self) -> None:
        """Start the connections."""
        for thread in self._threads:
            thread.start()

    async def stop(self) -> None:
        """End the readers; returns when no thread is left. A request in flight is waited for."""
        self._stop.set()
        for _ in self._threads:
            self._pool.put(None)
        for thread in self._threads:
            await asyncio.to_thread(thread.join)

    # -- in the readers' threads ------------------------------------------------------------------

    def _deliver(self, item: Chunk | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop may be closed when a test or the daemon dies
            self._loop.call_soon_threadsafe(self._ready.put_nowait, item)

    def _read_all(self) -> None:
        try:
            if self._pace is not None:
                _give_way()
            with connected(self._export, []) as handle:
                while (taken := self._take()) is not None:
                    self._deliver(self._read(handle, *taken))
        except nbd.Error as error:
            self._deliver(ReadFailed(f"cannot read the disk: {error.string}"))
        except BaseException as error:  # carried to the consumer, who raises it
            self._deliver(error)
        finally:
            with self._work_lock:
                self._running -= 1
                last = self._running == 0
            if last:
                self._deliver(None)

    def _take(self) -> tuple[Group, memoryview] | None:
        """Return the next group and a free buffer for it, in the order of the disk."""
        buffer = self._pool.get()
        if buffer is None or self._stop.is_set():
            return None
        with self._work_lock:
            group = next(self._work, None)
        if group is None:
            self._pool.put(buffer)
            return None
        if self._pace is not None and not self._pace.wait(group.index.size * self._block_size, self._stop):
            return None
        return group, buffer

    def _read(self, handle: Any, group: Group, buffer: memoryview) -> Chunk:
        size = self._block_size
        base = group.page * PAGE_BLOCKS
        pending = []
        for position, first, blocks in runs(group.index, max(1, REQUEST_BYTES // size)):
            offset = (base + first) * size
            length = min(blocks * size, self._size_bytes - offset)
            at = position * size
            # The last block of a disk may be short; its rest reads as zeroes in every snapshot.
            buffer[at + length : at + blocks * size] = bytes(blocks * size - length)
            piece = self._export.piece_bytes or length
            for start in range(0, length, piece):
                end = min(length, start + piece)
                pending.append(handle.aio_pread(buffer[at + start : at + end], offset + start))
        _complete(handle, pending)
        if self._export.give_back:
            _complete(handle, list(self._give_back(handle, group)))
        return Chunk(group.page, group.index, buffer[: group.index.size * size], self._pool, buffer)

    def _give_back(self, handle: Any, group: Group) -> Iterator[int]:
        """Discard what has been read: whoever holds the instant need not keep it for us any more."""
        for _position, first, blocks in runs(group.index, group.index.size):
            offset = (group.page * PAGE_BLOCKS + first) * self._block_size
            yield handle.aio_trim(min(blocks * self._block_size, self._size_bytes - offset), offset)


def _give_way() -> None:
    """Let this thread alone (Linux has it so) run after others; a daemon that is nicer already stays as it is."""
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, max(NICE, os.getpriority(os.PRIO_PROCESS, thread)))


def _complete(handle: Any, cookies: list[int]) -> None:
    """Return when commands are done; raises the error of one that failed."""
    while cookies:
        handle.poll(-1)
        cookies = [cookie for cookie in cookies if not handle.aio_command_completed(cookie)]


@contextlib.asynccontextmanager
async def read_chunks(
    export: NbdExport, size_bytes: int, block_size: int, work: Iterator[Group], pace: Pace | None = None
) -> AsyncIterator[ChunkStream]:
    """Read groups of blocks ahead for as long as the context lasts; no thread is left afterwards."""
    stream = ChunkStream(export, size_bytes, block_size, work, pace)
    stream.start()
    try:
        yield stream
    finally:
        await asyncio.shield(stream.stop())

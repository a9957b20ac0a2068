"""Blocks on their way in: which are new, who stores them, and in which pack. Shared by all who put.

A block is stored once. What is being stored is *pending* until its pack is durable and in the index; one put at a time
decides, looking first at what is pending and then into the index, so nobody else can decide the same in between.

What was decided is written into the *leases* of those who will refer to it, within the same turn. A sweep takes its
turn, too, when it drops blocks from the index: whatever was handed out before is in a lease, and nothing that was
dropped is handed out afterwards (docs/locking.md, "Sweep and capture").
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

import numpy as np

from hvsnap.errors import StoreFailed
from hvsnap.ports import BlockIndex, ObjectStore, Stored
from hvsnap.store.codec import Codec, digest_blocks
from hvsnap.store.idset import IdSet
from hvsnap.store.pack import PackId
from hvsnap.store.packer import Packer
from hvsnap.store.repository import Repository

PACKS_UNDER_WAY = 3
"""One is filled while two become durable; more would only hide a device that is too slow."""

PUTS_PER_THREAD = 3
"""Puts that are let in for each thread: one computes, the others wait for the index or the device."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Workers:
    """The store's threads for hashing and compressing: as many as there are processors, whoever asks."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or os.cpu_count() or 1
        self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="store")

    async def run(self, function: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a plain function in one of them."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def close(self) -> None:
        """Let them go once they are done."""
        self._threads.shutdown(wait=False)


@dataclass(frozen=True, slots=True)
class _Decision:
    """The ids of a put's distinct digests, the packs that they wait for, and what is to be put into ``packer``."""

    ids: dict[bytes, int]
    awaited: set[Packer]
    new: list[bytes]
    packer: Packer | None


class Lease:
    """The blocks that somebody may refer to: every one that was handed out to it. Lasts as long as this object."""

    def __init__(self) -> None:
        self.ids = IdSet()


class Intake:
    """Takes blocks from several puts at once. The caller sees to it that no call is cancelled half-way."""

    def __init__(
        self,
        objects: ObjectStore,
        index: BlockIndex,
        repository: Repository,
        codec: Codec,
        workers: Workers,
        next_block_id: int,
    ) -> None:
        self._objects = objects
        self._index = index
        self._repository = repository
        self._keys = repository.keys
        self._codec = codec
        self._workers = workers
        self._next_block_id = next_block_id
        self._pending: dict[bytes, Packer] = {}
        self._open: Packer | None = None
        self._tasks: dict[Packer, asyncio.Task[None]] = {}
        self._deciding = asyncio.Lock()
        self._slots = asyncio.Semaphore(PACKS_UNDER_WAY)
        self._turns = asyncio.Semaphore(self._workers.count * PUTS_PER_THREAD)
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._guards: list[Lease] = []
        self._closed = False

    def lease(self) -> Lease:
        """Return a new lease. It ends with its last reference, so that nobody can forget to hold it."""
        lease = Lease()
        self._leases.add(lease)
        return lease

    @contextlib.contextmanager
    def guard(self) -> Iterator[Lease]:
        """Give a lease on every block that anybody has, or is handed out while the context lasts: a sweep's."""
        guard = Lease()
        for lease in self._leases:
            guard.ids.update(lease.ids)
        self._guards.append(guard)
        try:
            yield guard
        finally:
            self._guards.remove(guard)

    @contextlib.asynccontextmanager
    async def nobody_deciding(self) -> AsyncIterator[None]:
        """Let nobody be told that a block is stored while the context lasts."""
        async with self._deciding:
            yield

    @property
    def under_way(self) -> set[str]:
        """Names of the packs that are written, or may be in the store and not yet in the index."""
        return {packer.pack.name for packer in self._tasks}

    async def store(self, data: memoryview, awaited: set[Packer], lease: Lease) -> Stored:
        """Store consecutive blocks; the packs that must become durable for it are added to ``awaited``."""
        block_size = self._repository.block_size
        async with self._turns:
            digests = await self._workers.run(digest_blocks, data, block_size, self._keys.block)
            async with self._deciding:
                decision = await self._decide(digests)
                handed_out = np.fromiter(decision.ids.values(), np.uint64)
                for holder in (lease, *self._guards):
                    holder.ids.add(handed_out)
            awaited |= decision.awaited
            new_bytes = await self._deliver(data, digests, decision)
        ids = np.zeros(len(data) // block_size, np.uint64)
        for position, digest in digests.items():
            ids[position] = decision.ids[digest]
        return Stored(ids, new_bytes, len(decision.new))

    async def close(self) -> None:
        """Give up the pack that nobody has asked to be durable, wait for those that somebody has."""
        self._closed = True
        if self._open is not None and not self._open.sealed:
            self._open.fail(StoreFailed("the store was closed before the blocks were durable"))
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _decide(self, digests: dict[int, bytes]) -> _Decision:
        """Find each distinct digest's id, and claim those that nobody has. One caller at a time."""
        ids: dict[bytes, int] = {}
        awaited: set[Packer] = set()
        unknown: list[bytes] = []
        for digest in dict.fromkeys(digests.values()):
            packer = self._pending.get(digest)
            if packer is None:
                unknown.append(digest)
            else:
                ids[digest] = packer.claims[digest]
                awaited.add(packer)
        if unknown:
            ids |= await self._index.find(unknown)
        unknown = [digest for digest in unknown if digest not in ids]
        if not unknown:
            return _Decision(ids, awaited, [], None)
        # A block whose stored form is damaged keeps its id, so that all that refer to it are healed with it.
        new = await self._index.damaged(unknown)
        unknown = [digest for digest in unknown if digest not in new]
        new |= {digest: self._next_block_id + n for n, digest in enumerate(unknown)}
        packer = await self._packer_for(new)
        self._next_block_id += len(unknown)
        self._pending |= dict.fromkeys(new, packer)
        return _Decision(ids | new, awaited | {packer}, list(new), packer)

    async def _packer_for(self, new: dict[bytes, int]) -> Packer:
        """Return the pack that has taken a claim on ``new``: the open one, or another after it."""
        if self._open is not None:
            if self._open.claim(new):
                return self._open
            self._open.seal()
            self._open = None
        await self._slots.acquire()
        if self._closed:
            self._slots.release()
            raise StoreFailed("the store is closed")
        pack = PackId.new(self._repository.id, self._repository.block_size, sealed=self._repository.sealed)
        packer = Packer(pack, self._keys.pack, self._objects, self._index, self._over)
        packer.claim(new)
        self._tasks[packer] = asyncio.create_task(packer.run(), name=pack.name)
        self._open = packer
        return packer

    async def _deliver(self, data: memoryview, digests: dict[int, bytes], decision: _Decision) -> int:
        """Compress what is new and hand it to its pack; return its stored bytes. Any error fails the pack."""
        packer = decision.packer
        if packer is None:
            return 0
        try:
            await packer.room()
            first = {digest: position for position, digest in reversed(digests.items())}
            batch = await self._workers.run(
                self._codec.compress, data, [first[digest] for digest in decision.new], list(decision.new)
            )
            packer.append(decision.new, batch)
        except BaseException as error:
            packer.fail(error if isinstance(error, Exception) else StoreFailed("the store was interrupted"))
            raise
        return batch.size_bytes

    def _over(self, packer: Packer) -> None:
        """A pack is durable and in the index, or has failed: either way nothing of it is pending any more."""
        for digest in packer.claims:
            self._pending.pop(digest, None)
        if self._open is packer:
            self._open = None
        del self._tasks[packer]
        self._slots.release()

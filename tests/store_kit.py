"""Parts for tests of the store: objects and an index in memory, objects that fail on demand, blocks to store."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from hvsnap.errors import Damaged, NotFound, ObjectExists, StoreFailed
from hvsnap.model import BlockPlace
from hvsnap.ports import ObjectInfo, ObjectStore, ObjectWriter, UInt64Array
from hvsnap.store.blocks import PackedBlocks
from hvsnap.store.objects import check_name

BLOCK = 65536


class MemoryObjects:
    """An object store in a dict, under the same contract as the others."""

    object_bytes_best = 64 << 20
    reads_at_once = 4

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.reads: list[tuple[str, int, int]] = []

    async def get(self, name: str) -> bytes:
        check_name(name)
        if name not in self.objects:
            raise NotFound(f"{name} is not there")
        return self.objects[name]

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        data = await self.get(name)
        self.reads.append((name, start, length))
        if len(data) < start + length:
            raise StoreFailed(f"{name} ends before byte {start + length}")
        return data[start : start + length]

    async def put(self, name: str, data: bytes) -> None:
        writer = await self.writer(name)
        await writer.write(data)
        await writer.commit()

    def appear(self, name: str, data: bytes) -> None:
        if name in self.objects:
            raise ObjectExists(f"{name} exists")
        self.objects[name] = data

    async def writer(self, name: str) -> ObjectWriter:
        return _MemoryWriter(self, check_name(name))

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        prefix = prefix.removesuffix("/")
        for name in sorted(self.objects):
            if not prefix or name.startswith(f"{prefix}/"):
                yield ObjectInfo(name, len(self.objects[name]))

    async def size(self, name: str) -> int:
        return len(await self.get(name))

    async def delete(self, name: str) -> None:
        self.objects.pop(check_name(name), None)


class _MemoryWriter:
    def __init__(self, objects: MemoryObjects, name: str) -> None:
        self._objects = objects
        self._name = name
        self._data: bytearray | None = bytearray()

    async def write(self, *pieces: bytes | memoryview) -> None:
        for piece in pieces:
            self._open().extend(piece)

    async def commit(self) -> None:
        data, self._data = self._open(), None
        self._objects.appear(self._name, bytes(data))

    async def abort(self) -> None:
        self._data = None

    def _open(self) -> bytearray:
        if self._data is None:
            raise StoreFailed(f"{self._name} was finished or given up before")
        return self._data


Step = Callable[[str, str], Awaitable[None]]
"""Is told the step (``write``, ``commit``) and the object's name before it is done; may wait, or raise."""


class Watched:
    """Objects whose writers ask ``before`` at each step."""

    def __init__(self, inner: ObjectStore, before: Step) -> None:
        self._inner = inner
        self.before = before

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    async def writer(self, name: str) -> ObjectWriter:
        return _WatchedWriter(self, name, await self._inner.writer(name))


class _WatchedWriter:
    def __init__(self, watched: Watched, name: str, inner: ObjectWriter) -> None:
        self._watched = watched
        self._name = name
        self._inner = inner
        self.abort = inner.abort

    async def write(self, *pieces: bytes | memoryview) -> None:
        await self._watched.before("write", self._name)
        await self._inner.write(*pieces)

    async def commit(self) -> None:
        await self._watched.before("commit", self._name)
        await self._inner.commit()


class MemoryIndex:
    """A block index in dicts. As a real one, it lets others run in every call."""

    def __init__(self) -> None:
        self.ids: dict[bytes, int] = {}
        self.blocks: dict[int, BlockPlace] = {}
        self.packs: dict[str, int] = {}

    async def find(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        await asyncio.sleep(0)
        return {digest: self.ids[digest] for digest in digests if digest in self.ids}

    async def damaged(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        await asyncio.sleep(0)
        return {}

    async def digests(self, ids: UInt64Array) -> npt.NDArray[np.uint8]:
        joined = b"".join(place.digest for place in await self.places(ids.tolist()))
        return np.frombuffer(joined, np.uint8).reshape(-1, 32)

    async def places(self, ids: Sequence[int]) -> list[BlockPlace]:
        await asyncio.sleep(0)
        if unknown := [number for number in ids if number not in self.blocks]:
            raise Damaged(f"block {unknown[0]} is unknown")
        return [self.blocks[number] for number in ids]

    async def add_pack(self, pack: str, size_bytes: int, blocks: Sequence[BlockPlace]) -> None:
        await asyncio.sleep(0)
        assert pack not in self.packs
        assert not any(block.digest in self.ids or block.id in self.blocks for block in blocks)
        self.packs[pack] = size_bytes
        self.ids |= {block.digest: block.id for block in blocks}
        self.blocks |= {block.id: block for block in blocks}

    async def next_block_id(self) -> int:
        return max(self.blocks, default=0) + 1


def seeded() -> random.Random:
    """Return a generator whose seed is printed, and can be set by HVSNAP_TEST_SEED."""
    seed = int(os.environ.get("HVSNAP_TEST_SEED", random.SystemRandom().randrange(2**32)))
    print(f"HVSNAP_TEST_SEED={seed}")
    return random.Random(seed)


def a_block(rng: random.Random, kind: str = "") -> bytes:
    """Return a block: ``noise`` (does not compress), ``text`` (does), ``zero``, or one of them."""
    match kind or rng.choice(["noise", "text", "text", "zero"]):
        case "zero":
            return bytes(BLOCK)
        case "noise":
            return rng.randbytes(BLOCK)
        case _:
            return (rng.randbytes(rng.randrange(8, 3000)) * (BLOCK // 8))[:BLOCK]


async def read_back(store: PackedBlocks, ids: Sequence[int]) -> bytes:
    """Return the contents of blocks, zeroes for id 0."""
    found = [bytes(store.block_size)] * len(ids)
    wanted = [position for position, block in enumerate(ids) if block]
    seen = set()
    async for position, block in store.get([int(ids[position]) for position in wanted]):
        assert position not in seen
        seen.add(position)
        found[wanted[position]] = block
    assert len(seen) == len(wanted)
    return b"".join(found)


def ids_of(array: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> list[int]:
    return [int(number) for number in array]


def skip_unless_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")

"""A process that stores seeded blocks, to be killed or measured: ``python -m tests.faults.store_writer ROOT SEED MIB``.

Prints a line with the blocks flushed so far after each flush, and at the end the memory that it grew by, in MiB.
"""

from __future__ import annotations

import asyncio
import random
import resource
import sys
from pathlib import Path

from hvsnap.store.blocks import open_store
from hvsnap.store.objects import LocalObjects
from tests.store_kit import BLOCK, MemoryIndex

CHUNK = BLOCK * 32
FLUSH_CHUNKS = 16


def chunk(seed: int, number: int) -> bytes:
    """Return the chunk of this number: half of it compresses."""
    rng = random.Random(seed * 1_000_003 + number)
    return rng.randbytes(CHUNK // 2) + (rng.randbytes(500) * (CHUNK // 1000 + 1))[: CHUNK // 2]


def grown_mib(before: int) -> int:
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


async def main(root: Path, seed: int, mib: int) -> None:
    index = MemoryIndex()
    store = await open_store(LocalObjects(root), index)
    session = store.session()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    total = mib * (1 << 20) // CHUNK
    for start in range(0, total, FLUSH_CHUNKS):
        await asyncio.gather(
            *(session.put(memoryview(chunk(seed, n))) for n in range(start, min(total, start + FLUSH_CHUNKS)))
        )
        if total <= 1024 // 2:
            await session.flush()
            print(len(index.blocks), flush=True)
    await session.flush()
    print(grown_mib(before), flush=True)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))

"""How fast a frozen disk is read: ``python -m bench.reading``. What the figures in hvsnap/capture/reader.py rest on.

The reader alone, nothing is hashed or kept: so many connections to qemu-nbd, requests of so many KiB.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.disk import build
from hvsnap.capture import reader
from hvsnap.capture.plan import Group, Selection, groups
from hvsnap.hypervisor.nbd_server import serve_image
from hvsnap.model import BLOCK_SIZE_DEFAULT

CONNECTIONS = (1, 2, 4, 8)
REQUEST_KIB = (64, 256, 1024, 2048)
ROUNDS = 3
MIB = 1 << 20


async def read_all(image: Path, run_dir: Path) -> float:
    """Return MiB/s."""
    async with serve_image(str(image), "qcow2", run_dir=str(run_dir)) as export:
        found = await asyncio.to_thread(reader.scan, export, BLOCK_SIZE_DEFAULT)
        pages = Selection(found.data, None).work()
        work: itertools.chain[Group] = itertools.chain.from_iterable(groups(page, BLOCK_SIZE_DEFAULT) for page in pages)
        done = 0
        began = time.monotonic()
        async with reader.read_chunks(export, found.size_bytes, BLOCK_SIZE_DEFAULT, work) as stream:
            while (chunk := await stream.get()) is not None:
                done += len(chunk.data)
                chunk.release()
        return done / MIB / (time.monotonic() - began)


def main() -> int:
    image = build(1 << 30, 200 << 20).path
    rates: dict[tuple[int, int], list[float]] = {}
    with TemporaryDirectory(prefix="hvr") as run_dir:
        asyncio.run(read_all(image, Path(run_dir)))  # into the page cache
        for _ in range(ROUNDS):
            for connections, kib in itertools.product(CONNECTIONS, REQUEST_KIB):
                reader.CONNECTIONS, reader.REQUEST_BYTES = connections, kib << 10
                rates.setdefault((connections, kib), []).append(asyncio.run(read_all(image, Path(run_dir))))
    print("MiB/s            " + "".join(f"{kib:>6} KiB" for kib in REQUEST_KIB))
    for connections in CONNECTIONS:
        row = "".join(f"{median(rates[connections, kib]):>10.0f}" for kib in REQUEST_KIB)
        print(f"{connections} connection{'s' if connections > 1 else ' '}    {row}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

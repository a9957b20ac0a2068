"""What a snapshot must restore to, by the manifests in the store alone: the digest of every block, in a file.

The catalog is not asked what the blocks are: that it and the manifests agree is part of what a drill proves. A digest
has 32 bytes for a block of 64 KiB or more; in memory that would be 512 MiB for 1 TiB of disk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from hvsnap.errors import Damaged, NotFound
from hvsnap.model import PAGE_BLOCKS
from hvsnap.store.identity import ManifestName
from hvsnap.store.manifest import ManifestPage
from hvsnap.store.manifests import Manifests
from hvsnap.store.repository import DIGEST_BYTES

DigestArray = npt.NDArray[np.uint8]

_PAGE_BYTES = PAGE_BLOCKS * DIGEST_BYTES


class Expected:
    """Digests of the blocks of one disk; all zeroes for a block of zeroes. The file is sparse, and its maker's."""

    def __init__(self, path: str, blocks: int) -> None:
        self.blocks = blocks
        self.pages = -(-blocks // PAGE_BLOCKS)
        self._path = path

    async def lay_over(self, manifests: Manifests, lineage: Sequence[ManifestName]) -> None:
        """Write down what manifests say, the oldest first. Raises :class:`Damaged`."""
        for name in lineage:
            try:
                async for page in manifests.pages(name):
                    await asyncio.to_thread(self._put, page)
            except NotFound as error:
                raise Damaged(f"the manifest {name} is not in the store") from error

    async def page(self, number: int) -> DigestArray:
        """Return the digests of a page, ``uint8[PAGE_BLOCKS, 32]``; zeroes beyond the disk's end."""
        digests = await asyncio.to_thread(self._get, number)
        digests[max(0, self.blocks - number * PAGE_BLOCKS) :] = 0
        return digests

    # -- in threads -------------------------------------------------------------------------------

    def _put(self, page: ManifestPage) -> None:
        digests = self._get(page.number)
        digests[page.index] = page.digests
        with open(self._path, "r+b") as file:
            os.pwrite(file.fileno(), digests.tobytes(), page.number * _PAGE_BYTES)

    def _get(self, number: int) -> DigestArray:
        with open(self._path, "rb") as file:
            data = os.pread(file.fileno(), _PAGE_BYTES, number * _PAGE_BYTES)
        return np.frombuffer(bytearray(data.ljust(_PAGE_BYTES, b"\0")), np.uint8).reshape(PAGE_BLOCKS, DIGEST_BYTES)

"""The block store: content-addressed blocks in packs, each stored once, each verified on its way out.

::

    store = await open_store(LocalObjects(path), catalog)
    session = store.session()                  # one for each capture
    stored = await session.put(chunk)          # ids, to be written into the block map
    await session.flush()                      # now they are durable, or this raises
    async for position, block in store.get(ids):
        ...
    await store.close()
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import numpy as np
import numpy.typing as npt

from hvsnap.errors import NotFound, ObjectExists, StoreFailed
from hvsnap.model import BLOCK_SIZE_DEFAULT, ZERO_BLOCK
from hvsnap.ports import BlockIndex, ObjectStore, Stored
from hvsnap.store.codec import Codec, digest_blocks
from hvsnap.store.fetch import Fetcher
from hvsnap.store.images import ImageObjects
from hvsnap.store.intake import Intake, Workers
from hvsnap.store.keyring import StoreKey, add_key, read_repository
from hvsnap.store.manifests import Manifests
from hvsnap.store.packer import PACK_BYTES, Packer
from hvsnap.store.packs import Packs
from hvsnap.store.repository import (
    COMPRESSION_DEFAULT,
    CONFIG_NAME,
    DIGEST_BYTES,
    Repository,
    compression_level,
    encode_config,
)
from hvsnap.store.rewriting import Rewriting
from hvsnap.store.settings import SettingsObjects
from hvsnap.store.uninterrupted import uninterrupted


async def open_store(
    objects: ObjectStore,
    index: BlockIndex,
    *,
    create: bool = True,
    key: StoreKey | None = None,
    block_size: int = BLOCK_SIZE_DEFAULT,
    compression: str = "",
    threads: int | None = None,
    hint: str = "",
) -> PackedBlocks:
    """Open the repository in ``objects``, or create it if there is none and ``create`` allows it.

    ``block_size`` is for a new repository: an existing one keeps its own. ``compression`` (``zstd:LEVEL``) is for the
    blocks stored from now on; empty is the repository's default. ``threads`` hash and compress, by default one
    for each processor. With a ``key`` a new repository is encrypted; an existing one must be, and opens with just that.
    ``hint`` is the next step where a block cannot be read.

    Raises :class:`StoreFailed` if there is none, :class:`Refused` for a wrong or missing key, :class:`Damaged`,
    :class:`FormatUnknown`, :class:`BadRequest`.
    """
    repository = await _repository(objects, create, key, block_size, compression or COMPRESSION_DEFAULT)
    level = compression_level(compression or repository.compression)
    return PackedBlocks(objects, index, repository, level, threads, await index.next_block_id(), hint)


async def _repository(
    objects: ObjectStore, create: bool, key: StoreKey | None, block_size: int, compression: str
) -> Repository:
    """Read the configuration, or create it: exclusively, so that of two at the same time one wins."""
    try:
        return await read_repository(objects, key)
    except NotFound as error:
        if not create:
            raise StoreFailed(
                f"there is no repository: {error}", hint="check the store's place, and that its disk is mounted"
            ) from error
    repository = Repository.new(block_size, compression, sealed=key is not None)
    if key is not None:
        await add_key(
            objects, repository, key
        )  # first: a repository that nothing opens would be worse than a key too many
    try:
        await objects.put(CONFIG_NAME, encode_config(repository))
    except ObjectExists:
        return await read_repository(objects, key)
    return repository


class PackedBlocks:
    """An open repository's blocks. Made by :func:`open_store`, ended by :meth:`close`."""

    def __init__(
        self,
        objects: ObjectStore,
        index: BlockIndex,
        repository: Repository,
        level: int,
        threads: int | None,
        next_block_id: int,
        hint: str = "",
    ) -> None:
        self.repository = repository
        self._index = index
        self._workers = Workers(threads)
        codec = Codec(repository.block_size, level, repository.keys.block, repository.seal)
        self.intake = Intake(objects, index, repository, codec, self._workers, next_block_id)
        self.manifests = Manifests(objects, repository)
        self.images = ImageObjects(objects, repository)
        self.settings = SettingsObjects(objects, repository)
        self.packs = Packs(objects, repository)
        self.rewriting = Rewriting(objects, repository, codec, self._workers, self.packs)
        self._fetcher = Fetcher(objects, index, codec, self._workers, repository.block_size, hint)

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self.repository.block_size

    def session(self) -> Session:
        """Return a new user's view: the :class:`~hvsnap.ports.BlockStore` of one capture or restore."""
        return Session(self, self.intake)

    def get(self, ids: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Yield ``(position in ids, block)``, verified, in the order in which they lie in the packs.

        At most 4,096 ids are sorted together: ask for a page's blocks in one call. Blocks must have been flushed.
        Who stops before the end closes the iterator (``contextlib.aclosing``). Raises :class:`Damaged`.
        """
        return self._fetcher.fetch(ids)

    async def digests(self, ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return the digests of stored blocks, ``uint8[n, 32]``; zeroes for id 0. What manifests hold."""
        stored = np.flatnonzero(ids != ZERO_BLOCK)
        digests = np.zeros((ids.size, DIGEST_BYTES), np.uint8)
        if stored.size:
            digests[stored] = await self._index.digests(ids[stored])
        return digests

    async def digests_of(self, data: memoryview) -> dict[int, bytes]:
        """Return the digests of consecutive blocks as they would be stored, by position; of zeroes there is none."""
        return await self._workers.run(digest_blocks, data, self.block_size, self.repository.keys.block)

    async def close(self) -> None:
        """Finish what somebody waits for, give up what nobody does, let the threads go."""
        await self.intake.close()
        self._workers.close()


class Session:
    """One user's view of the store, a :class:`~hvsnap.ports.BlockStore`; put may be called several times at once.

    While it exists, no block that it was given is swept: whoever refers to them in the catalog keeps the session until
    that is committed. It knows the packs that its blocks are in. Once one of them has failed, whether it was filled by
    this session or by another that had the same content, every put and flush raises: some block is not stored.
    """

    def __init__(self, store: PackedBlocks, intake: Intake) -> None:
        self._store = store
        self._intake = intake
        self._awaited: set[Packer] = set()
        self._lease = intake.lease()

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        return self._store.block_size

    async def put(self, data: memoryview) -> Stored:
        """Store consecutive blocks, at most 64 MiB; 1 to 4 MiB is best. See :meth:`hvsnap.ports.BlockStore.put`.

        A cancelled put returns once nobody reads ``data`` any more.
        """
        data = memoryview(data).cast("B")
        if len(data) % self.block_size or len(data) > PACK_BYTES:
            raise ValueError(f"{len(data)} bytes are not whole blocks of {self.block_size}, or too many at once")
        self._settle()
        if not data:
            return Stored(np.zeros(0, np.uint64), 0, 0)
        stored = await uninterrupted(self._intake.store(data, self._awaited, self._lease), name="put")
        self._settle()
        return stored

    async def flush(self) -> None:
        """Return when every block put before through this session is durable and in the index.

        Raises :class:`~hvsnap.errors.NoSpace`, :class:`StoreFailed`, what the index raises.
        """
        awaited = set(self._awaited)
        for packer in awaited:
            packer.seal()
        for packer in awaited:
            await packer.wait()
        self._settle()

    def get(self, ids: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """See :meth:`PackedBlocks.get`."""
        return self._store.get(ids)

    def _settle(self) -> None:
        """Forget packs that are durable; raise for one that has failed."""
        # In place: puts that are under way add to this very set.
        self._awaited -= {packer for packer in self._awaited if packer.durable}
        for packer in self._awaited:
            packer.raise_error()

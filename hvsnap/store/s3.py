"""Objects in an S3 bucket (AWS, Ceph's gateway, MinIO): the :class:`~hvsnap.ports.ObjectStore` of many hosts.

obstore signs, pools, and sends single requests. What it cannot know is here: that a request which failed may have been
carried out all the same, so that everything is repeated until its outcome is certain or a deadline has passed; and
what an error means to a user.

An object up to :data:`SINGLE_BYTES_MAX` is one conditional PUT: the endpoint itself refuses to overwrite. Larger ones
(manifests of large disks) are uploaded in parts, for which no endpoint honours that condition: whether the name is free
is looked up before, which is enough since their names are never used twice.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar

import obstore
from obstore import exceptions
from obstore.store import S3Store

from hvsnap.errors import NotFound, ObjectExists, StoreFailed
from hvsnap.ports import ObjectInfo
from hvsnap.store.objects import check_name
from hvsnap.store.uninterrupted import uninterrupted

T = TypeVar("T")

SINGLE_BYTES_MAX = 24 << 20
"""Objects up to this size are held in memory and put at once; a pack here has 16 MiB and its index."""

OBJECT_BYTES_BEST = 16 << 20
"""Packs of this size are put whole from memory, three under way at once: nothing is spooled, nothing uploaded in
parts, and a request that must be repeated is short."""

READS_AT_ONCE = 12
"""A request takes some milliseconds before its first byte, some tens to another site: ``python -m bench.bucket``."""

PART_BYTES = 16 << 20
PARTS_AT_ONCE = 3

REQUEST_TIMEOUT_S = 60.0
CONNECT_TIMEOUT_S = 5.0
DEADLINE_S = 120.0
"""How long one operation is repeated: a gateway restarts, and a Ceph OSD fails over, within seconds."""

REMOVAL_S = 20.0
"""The same for a removal: one that came later might meet another writer, who has taken the lease over (lease.py)."""

PAUSE_S_FIRST = 0.2
PAUSE_S_MAX = 10.0

CONFLICTS_MAX = 3
"""How often a name may be said to be taken, and not be there, before that is believed."""

_REFUSALS = (
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
    exceptions.UnknownConfigurationKeyError,
)
"""What no repetition mends."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a repository lies. Without keys the usual AWS_* variables and instance roles are asked."""

    bucket: str
    prefix: str
    endpoint: str = ""
    region: str = "default"
    access_key: str = ""
    secret_key: str = ""

    @property
    def url(self) -> str:
        """The place as the configuration writes it."""
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")


def connect(place: Place, request_timeout_s: float = REQUEST_TIMEOUT_S) -> S3Store:
    """Return a client of a bucket; no request is made. Raises :class:`StoreFailed` for an impossible place."""
    options: dict[str, Any] = {"region": place.region, "virtual_hosted_style_request": False}
    if place.endpoint:
        options["endpoint"] = place.endpoint
    if place.access_key:
        options |= {"access_key_id": place.access_key, "secret_access_key": place.secret_key}
    client: Any = {
        "allow_http": place.endpoint.startswith("http://"),
        "timeout": timedelta(seconds=request_timeout_s),
        "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
    }
    # One repetition inside is for connections that died in the pool; the others are counted here.
    retry: Any = {"max_retries": 1, "retry_timeout": timedelta(seconds=request_timeout_s)}
    try:
        return S3Store(place.bucket, prefix=place.prefix or None, client_options=client, retry_config=retry, **options)
    except (exceptions.BaseError, ValueError) as error:
        raise StoreFailed(f"{place.url} cannot be used: {error}", hint="check [store] and [store.s3]") from error


class S3Objects:
    """Immutable objects in a bucket. ``spool`` is a directory for large objects on their way."""

    object_bytes_best = OBJECT_BYTES_BEST
    reads_at_once = READS_AT_ONCE

    def __init__(self, place: Place, spool: Path, *, store: Any = None, deadline_s: float = DEADLINE_S) -> None:
        self._url = place.url
        self._store = connect(place) if store is None else store
        self._spool = spool
        self._deadline_s = deadline_s

    async def get(self, name: str) -> bytes:
        """Return a whole object."""
        path = check_name(name)

        async def once() -> bytes:
            return bytes(await (await obstore.get_async(self._store, path)).bytes_async())

        return await self._patiently(f"cannot read {self._named(name)}", once)

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``; :class:`StoreFailed` if the object ends before."""
        path = check_name(name)
        if length == 0:
            return b""

        async def once() -> bytes:
            try:
                return bytes(await obstore.get_range_async(self._store, path, start=start, length=length))
            except exceptions.GenericError as error:
                # A range that begins behind the end is refused like a fault of the endpoint: tell them apart.
                if (await obstore.head_async(self._store, path))["size"] < start + length:
                    raise _CutShort from error
                raise

        try:
            data = await self._patiently(f"cannot read {self._named(name)}", once)
        except _CutShort:
            data = b""
        if len(data) != length:
            hint = "it was cut: check the store"
            raise StoreFailed(f"{self._named(name)} ends before byte {start + length}", hint=hint)
        return data

    async def put(self, name: str, data: bytes) -> None:
        """Write an object, durable on return; :class:`ObjectExists` if there is another one of that name."""
        if len(data) > SINGLE_BYTES_MAX:
            raise ValueError(f"{len(data)} bytes are too much for one request: use a writer")
        await uninterrupted(self._create(name, data), name=f"put {name}")

    async def writer(self, name: str) -> S3Writer:
        """Start an object."""
        return S3Writer(self, check_name(name), self._spool)

    async def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Yield the objects below ``prefix``, in order of their names; a thousand in memory at a time."""
        prefix = prefix.removesuffix("/")
        if prefix:
            check_name(prefix)
        last = ""
        while True:

            async def page(after: str = last) -> Sequence[Any]:
                found = obstore.list(self._store, prefix or None, offset=after or None, chunk_size=1000)
                return await anext(aiter(found), [])

            batch = await self._patiently(f"cannot list {self._url}/{prefix}", page)
            if not batch:
                return
            for item in batch:
                yield ObjectInfo(str(item["path"]), int(item["size"]))
            last = str(batch[-1]["path"])

    async def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        path = check_name(name)

        async def once() -> int:
            return int((await obstore.head_async(self._store, path))["size"])

        return await self._patiently(f"cannot look at {self._named(name)}", once)

    async def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        path = check_name(name)

        async def once() -> None:
            try:
                await obstore.delete_async(self._store, path)
            except (exceptions.NotFoundError, FileNotFoundError):
                return

        await self._patiently(f"cannot delete {self._named(name)}", once, min(REMOVAL_S, self._deadline_s))

    async def clean_temporaries(self) -> int:
        """Nothing lies about here: the endpoint keeps unfinished uploads, and a rule of the bucket ends them."""
        return 0

    def close(self) -> None:
        """There is nothing to close: connections are pooled by obstore."""

    # -- inside -----------------------------------------------------------------------------------

    def _named(self, name: str) -> str:
        return f"{self._url}/{name}"

    async def _create(self, name: str, data: bytes) -> None:
        """Put an object at once; the endpoint refuses to overwrite."""
        path = check_name(name)

        async def once() -> None:
            await obstore.put_async(self._store, path, data, mode="create", use_multipart=False)

        for attempt in range(CONFLICTS_MAX):
            try:
                await self._patiently(f"cannot write {self._named(name)}", once)
            except ObjectExists:
                try:
                    # Perhaps by us: a request whose answer was lost is repeated, and then meets what it wrote itself.
                    if await self.get(name) == data:
                        return
                except NotFound:
                    # AWS refuses a creation in the same way while it removes the name, or settles another one.
                    if attempt + 1 < CONFLICTS_MAX:
                        await asyncio.sleep(PAUSE_S_FIRST)
                        continue
                raise
            return

    async def _upload(self, name: str, file: IO[bytes], size_bytes: int) -> None:
        """Upload an object in parts."""
        path = check_name(name)
        try:
            await self.size(name)
        except NotFound:
            pass
        else:
            raise ObjectExists(f"{self._named(name)} exists")

        until = _Until(file, time.monotonic() + self._deadline_s)

        async def once() -> None:
            await asyncio.to_thread(file.seek, 0)
            await obstore.put_async(
                self._store, path, until, use_multipart=True, chunk_size=PART_BYTES, max_concurrency=PARTS_AT_ONCE
            )

        await self._patiently(f"cannot write {self._named(name)}", once, ends_itself=True)
        if await self.size(name) != size_bytes:
            raise StoreFailed(f"{self._named(name)} has not the size that was written", hint="try again")

    async def _patiently(
        self, what: str, once: Callable[[], Awaitable[T]], deadline_s: float = 0.0, *, ends_itself: bool = False
    ) -> T:
        """Repeat a request until its outcome is certain, with growing, jittered pauses, up to the deadline.

        ``ends_itself``: it must not be cancelled, and sees to the deadline.
        """
        loop = asyncio.get_running_loop()
        deadline_s = deadline_s or self._deadline_s
        deadline = loop.time() + deadline_s
        pause_s = PAUSE_S_FIRST
        while True:
            try:
                async with asyncio.timeout_at(None if ends_itself else deadline):
                    return await once()
            except (exceptions.NotFoundError, FileNotFoundError) as error:
                raise NotFound(f"{what}: it is not there") from error
            except exceptions.AlreadyExistsError as error:
                raise ObjectExists(f"{what}: it exists") from error
            except _REFUSALS as error:
                hint = "check the keys, the bucket and its policy"
                raise StoreFailed(f"{what}: {_first_line(error)}", hint=hint) from error
            except (exceptions.BaseError, OSError, TimeoutError) as error:
                if loop.time() + pause_s >= deadline:
                    hint = f"it was tried for {deadline_s:.0f} s: is the endpoint up, does the bucket exist?"
                    raise StoreFailed(f"{what}: {_first_line(error)}", hint=hint) from error
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(PAUSE_S_MAX, pause_s * 2)


class _Until:
    """A file that cannot be read any more after a deadline, in seconds of ``time.monotonic``.

    What ends an upload: obstore takes the parts back then. If it were cancelled, the endpoint would keep them.
    """

    def __init__(self, file: IO[bytes], deadline: float) -> None:
        self._file = file
        self._deadline = deadline

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        if time.monotonic() > self._deadline:
            raise TimeoutError("it takes too long")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        """Return whatever else obstore asks a file for."""
        return getattr(self._file, name)


class _CutShort(Exception):
    """The object ends before the range does."""


def _first_line(error: BaseException) -> str:
    """Return what an error says, without the debugging form that obstore adds."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def _spooled(directory: Path) -> IO[bytes]:
    return tempfile.SpooledTemporaryFile(max_size=SINGLE_BYTES_MAX, dir=str(directory))


class S3Writer:
    """An object being written, spooled until its commit. Made by :meth:`S3Objects.writer`."""

    def __init__(self, objects: S3Objects, name: str, spool: Path) -> None:
        self._objects = objects
        self._name = name
        self._size_bytes = 0
        self._spool = spool
        self._file: IO[bytes] | None = _spooled(spool)

    async def write(self, *pieces: bytes | memoryview) -> None:
        """Append bytes, piece after piece."""
        file = self._open()
        try:
            await uninterrupted(asyncio.to_thread(file.writelines, pieces), name=f"spool {self._name}")
        except OSError as error:
            await self.abort()
            # Not NoSpace: what a sweep does about a store that is full makes no room here.
            hint = f"{self._spool} holds what is larger than {SINGLE_BYTES_MAX >> 20} MiB on its way into the bucket"
            raise StoreFailed(f"cannot hold {self._name} on its way: {error.strerror}", hint=hint) from error
        self._size_bytes += sum(memoryview(piece).nbytes for piece in pieces)

    async def commit(self) -> None:
        """Make it durable and visible. After any failure the writer is of no more use."""
        file = self._open()
        self._file = None
        try:
            await uninterrupted(self._send(file), name=f"put {self._name}")
        finally:
            file.close()

    async def abort(self) -> None:
        """Forget what was written, unless it has been committed."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    async def _send(self, file: IO[bytes]) -> None:
        if self._size_bytes > SINGLE_BYTES_MAX:
            await self._objects._upload(self._name, file, self._size_bytes)
            return
        file.seek(0)
        await self._objects._create(self._name, file.read())

    def _open(self) -> IO[bytes]:
        if self._file is None:
            raise StoreFailed(f"{self._name} was finished or given up before")
        return self._file

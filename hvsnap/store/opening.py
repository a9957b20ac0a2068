"""Opening the objects that the configuration names: a directory or a bucket."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import tempfile
from pathlib import Path

from hvsnap.config import Store
from hvsnap.errors import NotFound
from hvsnap.ports import ObjectStore
from hvsnap.secret import read_secret
from hvsnap.store.keyring import StoreKey, read_repository
from hvsnap.store.lease import WriterLease
from hvsnap.store.objects import LocalObjects
from hvsnap.store.s3 import Place, S3Objects
from hvsnap.store.sole import SoleOwner


def open_objects(settings: Store, state_dir: Path) -> LocalObjects | S3Objects:
    """Return the configured object store; nothing is asked of it yet. Blocking, at start only.

    Raises :class:`ConfigInvalid` for a key file that cannot be used, :class:`StoreFailed` for an impossible bucket.
    """
    if settings.path is not None:
        return LocalObjects(settings.path)
    bucket, prefix = settings.bucket
    s3 = settings.s3
    secret = read_secret(s3.secret_key_file, "store.s3.secret_key_file") if s3.secret_key_file else ""
    spool = Path(tempfile.gettempdir())
    if state_dir.is_dir():
        spool = state_dir
    return S3Objects(Place(bucket, prefix, s3.endpoint, s3.region, s3.access_key, secret), spool)


async def open_key(settings: Store, objects: ObjectStore) -> StoreKey | None:
    """Return the configured key, None if there is none, once it is certain that it suits what is there already.

    Asked before anything is written. Raises :class:`ConfigInvalid` for a key file that cannot be used, and what
    :func:`~hvsnap.store.keyring.read_repository` raises.
    """
    path = settings.encryption.key_file
    key = await asyncio.to_thread(StoreKey.read, path) if path else None
    with contextlib.suppress(NotFound):
        await read_repository(objects, key)
    return key


def writer_lease(settings: Store, objects: ObjectStore, holder: str, host: str) -> WriterLease:
    """Return the lease of the configured store, not taken yet."""
    return WriterLease(objects, holder, host, sole=None if settings.path is None else SoleOwner(settings.path))


def writer_id(state_dir: Path) -> str:
    """Return who this host's daemon is to others, the same over restarts; made at the first start. Blocking."""
    file = state_dir / "writer-id"
    try:
        known = file.read_text().strip()
        if known:
            return known
    except FileNotFoundError:
        pass
    made = secrets.token_hex(16)
    file.write_text(made + "\n")
    return made

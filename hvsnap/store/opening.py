"""Opening the objects that the configuration names: a directory or a bucket."""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path

from hvsnap.config import Store
from hvsnap.secret import read_secret
from hvsnap.store.objects import LocalObjects
from hvsnap.store.s3 import Place, S3Objects


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

"""The repository's configuration object and the keys that its secret yields (docs/format.md, "Configuration").

Pure: bytes in, values out.
"""

from __future__ import annotations

import json
import re
import secrets
import uuid
from dataclasses import dataclass

from blake3 import blake3

from hvsnap.errors import BadRequest, Damaged, FormatUnknown
from hvsnap.store.seal import Seal

CONFIG_NAME = "hvsnap.json"
CONFIG_BYTES_MAX = 64 * 1024
BLOCK_SIZE_MIN = 64 * 1024
BLOCK_SIZE_MAX = 1024 * 1024
COMPRESSION_DEFAULT = "zstd:1"
DIGEST_BYTES = 32
SEALED = "sealed"

_FORMAT = "hvsnap-repository"
_VERSION = 1
_LEVEL = re.compile(r"zstd:(-?[0-9]{1,2})")
_HEX32 = re.compile(r"[0-9a-f]{32}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys of 32 bytes, one for each purpose, so that no digest of one kind can stand for another."""

    block: bytes
    pack: bytes
    manifest: bytes
    seal: bytes
    image: bytes
    settings: bytes

    @classmethod
    def derive(cls, secret: bytes) -> Keys:
        """Return the keys of a repository's secret."""

        def key(purpose: str) -> bytes:
            return blake3(secret, derive_key_context=f"hvsnap.store v1 {purpose}").digest()

        purposes = ("block digest", "pack", "manifest", "seal", "image", "settings")
        return cls(*(key(purpose) for purpose in purposes))


@dataclass(frozen=True, slots=True)
class Repository:
    """What is fixed for a repository's life. ``id`` is a UUID's 16 bytes; ``compression`` only a default.

    ``sealed``: everything in it is encrypted, and its secret is not in the configuration object.
    """

    id: bytes
    block_size: int
    secret: bytes
    compression: str = COMPRESSION_DEFAULT
    sealed: bool = False

    @classmethod
    def new(cls, block_size: int, compression: str, *, sealed: bool = False) -> Repository:
        """Return a new repository's values. Raises :class:`BadRequest` for ones out of bounds."""
        check_block_size(block_size)
        compression_level(compression)
        return cls(uuid.uuid4().bytes, block_size, secrets.token_bytes(32), compression, sealed)

    @property
    def keys(self) -> Keys:
        """The keys of its secret."""
        return Keys.derive(self.secret)

    @property
    def seal(self) -> Seal | None:
        """What encrypts it; None for a plain one."""
        return Seal(self.keys.seal, self.id) if self.sealed else None


def check_block_size(block_size: int) -> None:
    """Raise :class:`BadRequest` unless it is a power of two within the limits."""
    if not BLOCK_SIZE_MIN <= block_size <= BLOCK_SIZE_MAX or block_size & (block_size - 1):
        raise BadRequest(
            f"block size {block_size} is not possible",
            hint=f"choose a power of two from {BLOCK_SIZE_MIN} to {BLOCK_SIZE_MAX}",
        )


def compression_level(compression: str) -> int:
    """Return the level of ``zstd:LEVEL``, -50 to 19. Raises :class:`BadRequest`."""
    match = _LEVEL.fullmatch(compression)
    level = int(match[1]) if match else 0
    if not -50 <= level <= 19 or level == 0:
        raise BadRequest(f"compression {compression!r} is unknown", hint="say zstd:1 (fast) to zstd:19 (small)")
    return level


def encode_config(repository: Repository) -> bytes:
    """Return the configuration object's bytes."""
    values: dict[str, object] = {
        "format": _FORMAT,
        "version": _VERSION,
        "repository": repository.id.hex(),
        "block_size": repository.block_size,
        "secret": repository.secret.hex(),
        "compression": repository.compression,
        "features": [SEALED] if repository.sealed else [],
    }
    if repository.sealed:
        del values["secret"]
    values["check"] = _check(values, repository.secret)
    return (json.dumps(values, indent=2) + "\n").encode()


def sealed_id(data: bytes) -> bytes | None:
    """Return the id of an encrypted repository, whose secret is elsewhere; None for a plain one.

    Nothing is authenticated yet: :func:`parse_config` does that. Raises :class:`Damaged`, :class:`FormatUnknown`.
    """
    values = _values(data)
    if "secret" in values:
        return None
    if values.get("features") != [SEALED]:
        raise Damaged(f"{CONFIG_NAME}: the secret is missing")
    if not _is_hex(values.get("repository"), _HEX32):
        raise Damaged(f"{CONFIG_NAME}: the repository's id is not hexadecimal")
    return bytes.fromhex(str(values["repository"]))


def parse_config(data: bytes, secret: bytes | None = None) -> Repository:
    """Return what a configuration object says; ``secret`` is that of an encrypted repository.

    Raises :class:`Damaged`, :class:`FormatUnknown`.
    """
    values = _values(data)
    repository_id = values.get("repository")
    written = values.get("secret") if secret is None else secret.hex()
    if not _is_hex(repository_id, _HEX32) or not _is_hex(written, _HEX64) or (secret and "secret" in values):
        raise Damaged(f"{CONFIG_NAME}: the repository's id or secret is not hexadecimal")
    key = bytes.fromhex(str(written))
    if not _is_hex(values.get("check"), _HEX64) or values.pop("check") != _check(values, key):
        raise Damaged(f"{CONFIG_NAME} was changed: its check value is wrong")
    return _checked(values, bytes.fromhex(str(repository_id)), key, sealed=secret is not None)


def _values(data: bytes) -> dict[str, object]:
    try:
        values = json.loads(data) if len(data) <= CONFIG_BYTES_MAX else None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise Damaged(f"{CONFIG_NAME} is not the configuration of a repository")
    if values.get("version") != _VERSION:
        raise FormatUnknown(f"{CONFIG_NAME} has format version {values.get('version')}, this release knows {_VERSION}")
    return values


def _checked(values: dict[str, object], repository_id: bytes, secret: bytes, *, sealed: bool) -> Repository:
    """Turn authenticated values into a repository; what is wrong now was written so."""
    if values.get("features") != ([SEALED] if sealed else []):
        raise FormatUnknown(f"{CONFIG_NAME}: the repository uses {values.get('features')}")
    block_size, compression = values.get("block_size"), values.get("compression")
    if type(block_size) is not int or not isinstance(compression, str):
        raise Damaged(f"{CONFIG_NAME}: block size or compression is missing")
    try:
        check_block_size(block_size)
        compression_level(compression)
    except BadRequest as error:
        raise Damaged(f"{CONFIG_NAME}: {error}") from error
    return Repository(repository_id, block_size, secret, compression, sealed)


def _is_hex(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _check(values: dict[str, object], secret: bytes) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode(), key=secret).hexdigest()

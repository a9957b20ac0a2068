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

CONFIG_NAME = "hvsnap.json"
CONFIG_BYTES_MAX = 64 * 1024
BLOCK_SIZE_MIN = 64 * 1024
BLOCK_SIZE_MAX = 1024 * 1024
COMPRESSION_DEFAULT = "zstd:1"
DIGEST_BYTES = 32

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

    @classmethod
    def derive(cls, secret: bytes) -> Keys:
        """Return the keys of a repository's secret."""

        def key(purpose: str) -> bytes:
            return blake3(secret, derive_key_context=f"hvsnap.store v1 {purpose}").digest()

        return cls(key("block digest"), key("pack"), key("manifest"))


@dataclass(frozen=True, slots=True)
class Repository:
    """What is fixed for a repository's life. ``id`` is a UUID's 16 bytes; ``compression`` only a default."""

    id: bytes
    block_size: int
    secret: bytes
    compression: str = COMPRESSION_DEFAULT

    @classmethod
    def new(cls, block_size: int, compression: str) -> Repository:
        """Return a new repository's values. Raises :class:`BadRequest` for ones out of bounds."""
        check_block_size(block_size)
        compression_level(compression)
        return cls(uuid.uuid4().bytes, block_size, secrets.token_bytes(32), compression)

    @property
    def keys(self) -> Keys:
        """The keys of its secret."""
        return Keys.derive(self.secret)


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
        "features": [],
    }
    values["check"] = _check(values, repository.secret)
    return (json.dumps(values, indent=2) + "\n").encode()


def parse_config(data: bytes) -> Repository:
    """Return what a configuration object says. Raises :class:`Damaged`, :class:`FormatUnknown`."""
    try:
        values = json.loads(data) if len(data) <= CONFIG_BYTES_MAX else None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise Damaged(f"{CONFIG_NAME} is not the configuration of a repository")
    if values.get("version") != _VERSION:
        raise FormatUnknown(f"{CONFIG_NAME} has format version {values.get('version')}, this release knows {_VERSION}")
    repository_id, secret = values.get("repository"), values.get("secret")
    if not _is_hex(repository_id, _HEX32) or not _is_hex(secret, _HEX64):
        raise Damaged(f"{CONFIG_NAME}: the repository's id or secret is not hexadecimal")
    key = bytes.fromhex(str(secret))
    if not _is_hex(values.get("check"), _HEX64) or values.pop("check") != _check(values, key):
        raise Damaged(f"{CONFIG_NAME} was changed: its check value is wrong")
    return _checked(values, bytes.fromhex(str(repository_id)), key)


def _checked(values: dict[str, object], repository_id: bytes, secret: bytes) -> Repository:
    """Turn authenticated values into a repository; what is wrong now was written so."""
    if values.get("features") != []:
        raise FormatUnknown(f"{CONFIG_NAME}: the repository uses {values.get('features')}")
    block_size, compression = values.get("block_size"), values.get("compression")
    if type(block_size) is not int or not isinstance(compression, str):
        raise Damaged(f"{CONFIG_NAME}: block size or compression is missing")
    try:
        check_block_size(block_size)
        compression_level(compression)
    except BadRequest as error:
        raise Damaged(f"{CONFIG_NAME}: {error}") from error
    return Repository(repository_id, block_size, secret, compression)


def _is_hex(value: object, pattern: re.Pattern[str]) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _check(values: dict[str, object], secret: bytes) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return blake3(text.encode(), key=secret).hexdigest()

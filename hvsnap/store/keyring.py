"""The secret of an encrypted repository: in its key objects, sealed with the key of a file (docs/format.md, "Keys").

A :class:`StoreKey` is what the key file holds. The secret itself never changes; changing the key writes a new object
and removes the older ones.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from hvsnap.errors import ConfigInvalid, Damaged, FormatUnknown, NotFound, Refused
from hvsnap.ports import ObjectStore
from hvsnap.secret import read_secret
from hvsnap.store.repository import CONFIG_BYTES_MAX, CONFIG_NAME, Repository, parse_config, sealed_id

KEYS = "keys"
PASSPHRASE_LETTERS_MIN = 12
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1 << 17, 8, 1
"""128 MiB and some tenths of a second for each guess at a passphrase."""

_FORMAT, _VERSION = "hvsnap-key", 1
_NAME = re.compile(KEYS + r"/([0-9]{4})")
_SECRET_BYTES, _TAG_BYTES, _NONCE_BYTES = 32, 16, 12


@dataclass(frozen=True, slots=True)
class StoreKey:
    """A key file's content: 32 bytes, or a passphrase. ``path`` is for errors."""

    path: str
    raw: bytes | None = field(default=None, repr=False)
    passphrase: str = field(default="", repr=False)

    @classmethod
    def read(cls, path: str, key: str = "store.encryption.key_file") -> StoreKey:
        """Return the key of a file that only its owner may read; ``key`` names the setting in errors. Blocking.

        Raises :class:`ConfigInvalid`.
        """
        line = read_secret(path, key)
        if re.fullmatch(r"[0-9a-fA-F]{64}", line):
            return cls(path, raw=bytes.fromhex(line))
        if re.fullmatch(r"[A-Za-z0-9+/]{43}=", line):
            try:
                return cls(path, raw=base64.b64decode(line, validate=True))
            except binascii.Error:
                pass
        if len(line) < PASSPHRASE_LETTERS_MIN:
            hint = (
                f"32 random bytes in hexadecimal (`openssl rand -hex 32`), or {PASSPHRASE_LETTERS_MIN} letters or more"
            )
            raise ConfigInvalid(f"{key}: the passphrase in {path} is too short", hint=hint)
        return cls(path, passphrase=line)

    def wrapping_key(self, n: int, r: int, p: int, salt: bytes) -> bytes:
        """Return the key that seals the secret; *n* = 0 is the raw kind. Slow for a passphrase: call it in a thread."""
        if self.raw is not None:
            return blake3(self.raw, derive_key_context="hvsnap.store v1 key file").digest()
        return Scrypt(salt=salt, length=32, n=n, r=r, p=p).derive(self.passphrase.encode())


def wrap(secret: bytes, repository: bytes, key: StoreKey) -> bytes:
    """Return a key object's bytes."""
    values: dict[str, Any] = {"format": _FORMAT, "version": _VERSION, "repository": repository.hex()}
    if key.raw is not None:
        values |= {"kdf": "raw", "n": 0, "r": 0, "p": 0, "salt": ""}
    else:
        salt = secrets.token_bytes(16).hex()
        values |= {"kdf": "scrypt", "n": SCRYPT_N, "r": SCRYPT_R, "p": SCRYPT_P, "salt": salt}
    wrapping = key.wrapping_key(values["n"], values["r"], values["p"], bytes.fromhex(values["salt"]))
    nonce = secrets.token_bytes(_NONCE_BYTES)
    sealed = AESGCM(wrapping).encrypt(nonce, secret, _text(values))
    values |= {"nonce": nonce.hex(), "sealed": sealed.hex()}
    values["check"] = blake3(_text(values)).hexdigest()
    return (json.dumps(values, indent=2) + "\n").encode()


def unwrap(data: bytes, name: str, repository: bytes, key: StoreKey) -> bytes | None:
    """Return the secret; None if the key does not open the object, or it is another repository's.

    Raises :class:`Damaged`, :class:`FormatUnknown`. Nothing is allocated by what the object says before it is checked.
    """
    values = _checked(data, name)
    sealed, nonce = bytes.fromhex(values.pop("sealed")), bytes.fromhex(values.pop("nonce"))
    if values["repository"] != repository.hex() or (values["kdf"] == "raw") != (key.raw is not None):
        return None
    wrapping = key.wrapping_key(values["n"], values["r"], values["p"], bytes.fromhex(values["salt"]))
    try:
        return AESGCM(wrapping).decrypt(nonce, sealed, _text(values))
    except InvalidTag:
        return None


def _checked(data: bytes, name: str) -> dict[str, Any]:
    """Return a key object's values but ``check``, in their bounds."""
    try:
        values = json.loads(data) if len(data) <= CONFIG_BYTES_MAX else None
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{name} is not JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise Damaged(f"{name} is not a key of a repository")
    check = values.pop("check", None)
    if check != blake3(_text(values)).hexdigest():
        raise Damaged(f"{name} was changed: its check value is wrong")
    if values.get("version") != _VERSION or values.get("kdf") not in ("raw", "scrypt"):
        raise FormatUnknown(f"{name} has version {values.get('version')} and kind {values.get('kdf')}")
    lengths = {"nonce": _NONCE_BYTES, "sealed": _SECRET_BYTES + _TAG_BYTES, "repository": 16}
    lengths["salt"] = 16 if values["kdf"] == "scrypt" else 0
    for field_name, length in lengths.items():
        if not isinstance(values.get(field_name), str) or not re.fullmatch(
            f"[0-9a-f]{{{2 * length}}}", values[field_name]
        ):
            raise Damaged(f"{name}: its {field_name} is not possible")
    n, r, p = (values.get(one) for one in ("n", "r", "p"))
    if not (type(n) is int and type(r) is int and type(p) is int):
        raise Damaged(f"{name}: a number is missing")
    possible = (n, r, p) == (0, 0, 0)
    if values["kdf"] == "scrypt":
        possible = n in {1 << bits for bits in range(14, 19)} and r == SCRYPT_R and 1 <= p <= 4
    if not possible:
        raise Damaged(f"{name}: the parameters of its key are not possible")
    return values


def _text(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


# -- in a repository --------------------------------------------------------------------------------


async def read_repository(objects: ObjectStore, key: StoreKey | None) -> Repository:
    """Return an existing repository, opened with its key.

    Raises :class:`NotFound` if there is none; :class:`Refused` without its key, with a wrong one, or with a key for one
    that is plain; :class:`Damaged`, :class:`FormatUnknown`.
    """
    config = await objects.get(CONFIG_NAME)
    repository = sealed_id(config)
    if repository is None:
        plain = parse_config(config)
        if key is not None:
            raise Refused(
                "the store is not encrypted, and store.encryption.key_file is set",
                hint="a store is never turned into an encrypted one: choose an empty place for that, or remove the key",
            )
        return plain
    if key is None:
        hint = "name its key in store.encryption.key_file; nothing was changed"
        raise Refused("the store is encrypted, and there is no key", hint=hint)
    return parse_config(config, await _open_any(objects, repository, key))


async def _open_any(objects: ObjectStore, repository: bytes, key: StoreKey) -> bytes:
    damaged: Damaged | FormatUnknown | None = None
    names = await _names(objects)
    for name in reversed(names):
        try:
            data = await objects.get(name)
            secret = await asyncio.to_thread(unwrap, data, name, repository, key)
        except NotFound:
            continue  # the key is being changed
        except (Damaged, FormatUnknown) as error:
            damaged = error
            continue
        if secret is not None:
            return secret
    if damaged is not None:
        raise damaged
    if not names:
        raise Damaged("the store is encrypted, and has no key object", hint="put keys/ back from a copy of the store")
    hint = "use the file that it was created with, or last re-keyed to; nothing was changed"
    raise Refused(f"the key in {key.path} is not the store's", hint=hint)


async def add_key(objects: ObjectStore, repository: Repository, key: StoreKey) -> str:
    """Write the repository's secret under a key, durable on return; return the object's name."""
    names = await _names(objects)
    number = int(names[-1].removeprefix(f"{KEYS}/")) + 1 if names else 1
    name = f"{KEYS}/{number:04d}"
    await objects.put(name, await asyncio.to_thread(wrap, repository.secret, repository.id, key))
    return name


async def change_key(objects: ObjectStore, old: StoreKey, new: StoreKey) -> Repository:
    """Let ``new`` open the repository, and nothing else; interrupted, both do. The writer's lease is held.

    Raises as :func:`read_repository` does, with the old key.
    """
    repository = await read_repository(objects, old)
    kept = await add_key(objects, repository, new)
    if (await _open_any(objects, repository.id, new)) != repository.secret:
        raise Damaged(f"{kept} does not hold what was written", hint="the old key still opens the store")
    for name in await _names(objects):
        if name < kept:
            await objects.delete(name)
    return repository


async def _names(objects: ObjectStore) -> list[str]:
    return sorted([item.name async for item in objects.list(KEYS) if _NAME.fullmatch(item.name)])

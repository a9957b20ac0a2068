"""AES-256-GCM over blocks and manifests of an encrypted repository (docs/format.md, "Sealed data").

Each thing has a key of its own, derived from the repository's and its name, so that a random nonce is never in danger
of being used twice with the same key, and nothing opens in another's place.
"""

from __future__ import annotations

import secrets

from blake3 import blake3
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hvsnap.errors import Damaged

NONCE_BYTES = 12
SEAL_BYTES = NONCE_BYTES + 16
"""What sealing adds: nonce and tag."""


class Seal:
    """Seals and opens what belongs to one repository."""

    def __init__(self, key: bytes, repository: bytes) -> None:
        self._key = key
        self._repository = repository

    def seal(self, kind: bytes, name: bytes, data: bytes | memoryview) -> bytes:
        """Return ``data`` sealed; it opens under the same kind and name only."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher(kind, name).encrypt(nonce, data, self._about(kind, name))

    def open(self, kind: bytes, name: bytes, sealed: bytes | memoryview, what: str) -> bytes:
        """Return what was sealed. Raises :class:`Damaged`, naming ``what``."""
        try:
            return self._cipher(kind, name).decrypt(
                bytes(sealed[:NONCE_BYTES]), sealed[NONCE_BYTES:], self._about(kind, name)
            )
        except (InvalidTag, ValueError) as error:
            raise Damaged(f"{what} is not what was stored: its seal is broken") from error

    def _cipher(self, kind: bytes, name: bytes) -> AESGCM:
        return AESGCM(blake3(kind + b"\0" + name, key=self._key).digest())

    def _about(self, kind: bytes, name: bytes) -> bytes:
        return kind + b"\0" + name + b"\0" + self._repository

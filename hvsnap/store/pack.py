"""The pack format (docs/format.md, "Pack"): header, index and footer as bytes and as values.

Pure: nothing here reads a file. The stored blocks between header and index are not touched.
"""

from __future__ import annotations

import re
import secrets
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from hvsnap.errors import Damaged, FormatUnknown
from hvsnap.store.repository import BLOCK_SIZE_MAX, DIGEST_BYTES
from hvsnap.store.seal import SEAL_BYTES

PACKS = "packs"
FLAG_ZSTD = 0x0001
FLAG_SEALED = 0x0002
"""AES-256-GCM, after compression: all blocks of an encrypted repository, none of a plain one."""

KNOWN_FLAGS = FLAG_ZSTD | FLAG_SEALED

HEADER_BYTES = 64
FOOTER_BYTES = 96
ENTRIES_MAX = 65536

ENTRY = np.dtype(
    [("digest", "u1", DIGEST_BYTES), ("offset", "<u8"), ("length", "<u4"), ("flags", "<u2"), ("reserved", "<u2")]
)
"""One index entry, 48 bytes."""

_VERSION = 1
_HEADER = struct.Struct("<8sHHI16s16s16s")
_FOOTER = struct.Struct("<8sHHI16s16sQII")
_HEADER_MAGIC = b"HVSNPACK"
_FOOTER_MAGIC = b"HVSNPEND"
_NAME = re.compile(PACKS + r"/([0-9a-f]{2})/(\1[0-9a-f]{30})")

EntryArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class PackId:
    """Which pack of which repository, and its block size: what header and footer repeat."""

    repository: bytes
    pack: bytes
    block_size: int
    sealed: bool = False

    @classmethod
    def new(cls, repository: bytes, block_size: int, *, sealed: bool = False) -> PackId:
        """Return a new random id."""
        return cls(repository, secrets.token_bytes(16), block_size, sealed)

    @property
    def name(self) -> str:
        """The pack's object name."""
        text = self.pack.hex()
        return f"{PACKS}/{text[:2]}/{text}"


@dataclass(frozen=True, slots=True)
class Footer:
    """Where a pack's index lies, and the checksum over it."""

    index_offset: int
    entries: int
    prefix: bytes
    checksum: bytes

    @property
    def index_bytes(self) -> int:
        """Size of the index."""
        return self.entries * ENTRY.itemsize


def is_pack(name: str) -> bool:
    """Whether a pack can have this object name."""
    return _NAME.fullmatch(name) is not None


def pack_id_of(name: str, repository: bytes, block_size: int, *, sealed: bool = False) -> PackId:
    """Return the id that a pack of this object name must carry. Raises :class:`Damaged`."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise Damaged(f"{name} is not the name of a pack")
    return PackId(repository, bytes.fromhex(match[2]), block_size, sealed)


def encode_header(pack: PackId) -> bytes:
    """Return the first 64 bytes of a pack."""
    return _HEADER.pack(_HEADER_MAGIC, _VERSION, 0, pack.block_size, pack.repository, pack.pack, bytes(16))


def index_entries(digests: list[bytes], offsets: list[int], lengths: list[int], flags: list[int]) -> EntryArray:
    """Return an index, ``ENTRY[n]``, in the order given (ascending offsets)."""
    index = np.zeros(len(digests), ENTRY)
    index["digest"] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
    index["offset"], index["length"], index["flags"] = offsets, lengths, flags
    return index


def encode_tail(pack: PackId, index_offset: int, index: EntryArray, key: bytes) -> bytes:
    """Return index and footer: what follows the stored blocks, which end at ``index_offset``."""
    _check_entries(pack, index_offset, index)
    prefix = _FOOTER.pack(
        _FOOTER_MAGIC, _VERSION, 0, pack.block_size, pack.repository, pack.pack, index_offset, index.size, 0
    )
    body = index.tobytes()
    return body + prefix + _checksum(pack, body, prefix, key)


def parse_footer(pack: PackId, data: bytes, pack_bytes: int) -> Footer:
    """Return what the last 96 bytes of a pack of ``pack_bytes`` say. Raises :class:`Damaged`, :class:`FormatUnknown`.

    Flags are judged by :func:`parse_index`, once the checksum has shown that they were written so.
    """
    if len(data) != FOOTER_BYTES or pack_bytes < HEADER_BYTES + FOOTER_BYTES:
        raise Damaged(f"{pack.name} is too short for a pack")
    prefix, checksum = data[: _FOOTER.size], data[_FOOTER.size :]
    magic, version, _, block_size, repository, pack_id, index_offset, entries, _ = _FOOTER.unpack(prefix)
    if magic != _FOOTER_MAGIC:
        raise Damaged(f"{pack.name} does not end like a pack: it was cut or overwritten")
    if version != _VERSION:
        raise FormatUnknown(f"{pack.name} has format version {version}, this release knows {_VERSION}")
    if (repository, pack_id, block_size) != (pack.repository, pack.pack, pack.block_size):
        raise Damaged(f"{pack.name} is another pack, or of another repository")
    footer = Footer(index_offset, entries, prefix, checksum)
    if not 1 <= entries <= ENTRIES_MAX or index_offset + footer.index_bytes + FOOTER_BYTES != pack_bytes:
        raise Damaged(f"{pack.name}: the index does not fit the pack's size")
    return footer


def parse_index(pack: PackId, header: bytes, footer: Footer, body: bytes, key: bytes) -> EntryArray:
    """Return the index, ``ENTRY[n]``, all rules checked. Raises :class:`Damaged`, :class:`FormatUnknown`."""
    if len(body) != footer.index_bytes or footer.checksum != _checksum(pack, body, footer.prefix, key, header):
        raise Damaged(f"{pack.name}: the checksum of its index is wrong")
    version, flags = _HEADER.unpack(header)[1:3]
    footer_flags = _FOOTER.unpack(footer.prefix)[2]
    if version != _VERSION or flags or footer_flags:
        raise FormatUnknown(f"{pack.name} has version {version} and flags {flags | footer_flags:#x}")
    if header != encode_header(pack):
        raise Damaged(f"{pack.name}: its header is not its own")
    index = np.frombuffer(body, ENTRY)
    _check_entries(pack, footer.index_offset, index)
    return index


def check_flags(flags: int, what: str, *, sealed: bool = False) -> None:
    """Raise :class:`FormatUnknown` for a stored block that this release cannot read.

    One that is in plain in an encrypted repository (``sealed``) is :class:`Damaged`: somebody put it there.
    """
    if flags & ~KNOWN_FLAGS:
        raise FormatUnknown(f"{what} has unknown flags {flags:#x}")
    if flags & FLAG_SEALED and not sealed:
        raise FormatUnknown(f"{what} is encrypted, in a repository that is not")
    if sealed and not flags & FLAG_SEALED:
        raise Damaged(f"{what} is in plain, in an encrypted repository")


def _check_entries(pack: PackId, index_offset: int, index: EntryArray) -> None:
    """Hold the rules of index entries, before writing and after reading."""
    for flags in np.unique(index["flags"]):
        check_flags(int(flags), f"a block in {pack.name}", sealed=pack.sealed)
    if not 1 <= index.size <= ENTRIES_MAX or index["reserved"].any():
        raise Damaged(f"{pack.name}: number of index entries, or a reserved field, is wrong")
    length = index["length"].astype(np.uint64)
    compressed = (index["flags"] & FLAG_ZSTD) != 0
    added = SEAL_BYTES if pack.sealed else 0
    full = pack.block_size + added
    if not np.where(compressed, (length > added) & (length < full), length == full).all():
        raise Damaged(f"{pack.name}: a block's length is not possible")
    # Lengths are at most a block now, so no sum below can wrap once offsets are bounded.
    if (
        index_offset > ENTRIES_MAX * (BLOCK_SIZE_MAX + SEAL_BYTES) + HEADER_BYTES
        or (index["offset"] > index_offset).any()
    ):
        raise Damaged(f"{pack.name}: a block lies beyond the index")
    ends = index["offset"] + length
    starts = np.append(index["offset"][1:], np.uint64(index_offset))
    if index["offset"][0] < HEADER_BYTES or (ends > starts).any():
        raise Damaged(f"{pack.name}: blocks overlap each other, the header or the index")


def _checksum(pack: PackId, body: bytes, prefix: bytes, key: bytes, header: bytes | None = None) -> bytes:
    hasher = blake3(encode_header(pack) if header is None else header, key=key)
    hasher.update(body)
    hasher.update(prefix)
    return hasher.digest()

"""The manifest format (docs/format.md, "Manifest"): one snapshot's identity and the digests of what it changed.

Pure: an encoder that turns head and pages into bytes, a decoder that is fed bytes in pieces of any size. Both hold one
page at a time, 140 KiB at most, whatever the disk's size.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard
from blake3 import blake3

from hvsnap.errors import Damaged, FormatUnknown
from hvsnap.model import PAGE_BLOCKS
from hvsnap.store.identity import ManifestHead, decode_document, encode_document
from hvsnap.store.repository import DIGEST_BYTES
from hvsnap.store.seal import SEAL_BYTES, Seal

DOCUMENT_BYTES_MAX = 16 << 20

_VERSION = 1
_HEADER = struct.Struct("<8sHHI16s")
_PAGE = struct.Struct("<QII")
_TRAILER = struct.Struct("<8sQQ")
_HEADER_MAGIC = b"HVSNMANI"
_TRAILER_MAGIC = b"HVSNMEND"
_FLAG_SEALED = 0x0001
_ENTRY_BYTES = 2 + DIGEST_BYTES
_TRAILER_BYTES = _TRAILER.size + DIGEST_BYTES
_LEVEL = 1  # digests do not compress; indexes and runs of zero blocks do at any level


def _page_name(name: str, number: int) -> bytes:
    """Return what a page is sealed under."""
    return f"{name}#{number}".encode()


@dataclass(frozen=True, slots=True)
class ManifestPage:
    """The entries of one page of a block map, at least one.

    ``index`` is ``uint16[n]``, ascending; ``digests`` is ``uint8[n, 32]``, all zeroes for a block of zeroes.
    """

    number: int
    index: npt.NDArray[np.uint16]
    digests: npt.NDArray[np.uint8]


class _Rules:
    """What the pages of one disk must keep to: checked before writing and after reading."""

    def __init__(self, what: str, head: ManifestHead) -> None:
        self._what = what
        self._blocks = -(-head.snapshot.size_bytes // head.block_size)
        self._last_page = -1
        self.pages = 0
        self.entries = 0

    def take(self, number: int, index: npt.NDArray[np.uint16]) -> None:
        """Count a page. Raises :class:`Damaged`."""
        if number <= self._last_page or number * PAGE_BLOCKS >= self._blocks:
            raise Damaged(f"{self._what}: page {number} is out of order or beyond the end of the disk")
        ascending = index.size == 1 or bool(np.all(index[1:] > index[:-1]))
        if not ascending or number * PAGE_BLOCKS + int(index[-1]) >= self._blocks or index[-1] >= PAGE_BLOCKS:
            raise Damaged(f"{self._what}: entries of page {number} are out of order or beyond the end of the disk")
        self._last_page = number
        self.pages += 1
        self.entries += index.size


class ManifestEncoder:
    """Turns one manifest into bytes: :meth:`start`, :meth:`page` for each in ascending order, :meth:`finish`."""

    def __init__(self, head: ManifestHead, repository: bytes, key: bytes, seal: Seal | None = None) -> None:
        self._seal = seal
        self._head = head
        self._repository = repository
        self._hasher = blake3(key=key)
        self._rules = _Rules(head.name, head)
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)

    def start(self) -> bytes:
        """Return header and document."""
        document = encode_document(self._head)
        if len(document) > DOCUMENT_BYTES_MAX - SEAL_BYTES:
            raise Damaged(f"{self._head.name}: {len(document)} bytes of identity are more than a manifest holds")
        if self._seal is not None:
            document = self._seal.seal(b"document", self._head.name.encode(), document)
        flags = _FLAG_SEALED if self._seal is not None else 0
        header = _HEADER.pack(_HEADER_MAGIC, _VERSION, flags, len(document), self._repository)
        return self._authenticated(header + document)

    def page(self, page: ManifestPage) -> bytes:
        """Return one page. Raises :class:`Damaged` for one that a reader would refuse."""
        count = page.index.size
        if not 1 <= count <= PAGE_BLOCKS or page.digests.shape != (count, DIGEST_BYTES):
            raise Damaged(f"{self._head.name}: page {page.number} has {count} entries, or other than their digests")
        self._rules.take(page.number, page.index)
        raw = page.index.astype("<u2").tobytes() + page.digests.astype(np.uint8).tobytes()
        frame = self._compressor.compress(raw)
        if self._seal is not None:
            frame = self._seal.seal(b"page", _page_name(self._head.name, page.number), frame)
        return self._authenticated(_PAGE.pack(page.number, count, len(frame)) + frame)

    def finish(self) -> bytes:
        """Return the trailer."""
        return self._authenticated(_TRAILER.pack(_TRAILER_MAGIC, self._rules.pages, self._rules.entries))

    def _authenticated(self, data: bytes) -> bytes:
        """Return ``data`` and the running digest behind it."""
        digest = self._hasher.update(data).digest()
        self._hasher.update(digest)
        return data + digest


class ManifestDecoder:
    """Turns the bytes of one manifest back into its head and pages.

    What :meth:`feed` hands out is authenticated; that nothing is missing is known only when :meth:`finish` returned.
    ``name`` is the object's, ``size_bytes`` its whole size. All methods raise :class:`Damaged`, :class:`FormatUnknown`.
    """

    def __init__(
        self, name: str, size_bytes: int, repository: bytes, block_size: int, key: bytes, seal: Seal | None = None
    ) -> None:
        self._seal = seal
        self.head: ManifestHead | None = None
        self._name = name
        self._rest_bytes = size_bytes - _TRAILER_BYTES  # before the trailer, not yet taken off the buffer
        self._repository = repository
        self._block_size = block_size
        self._hasher = blake3(key=key)
        self._buffer = bytearray()
        self._rules: _Rules | None = None
        self._decompressor = zstandard.ZstdDecompressor()

    def feed(self, data: bytes) -> list[ManifestPage]:
        """Take the next bytes; return the pages that they complete. ``head`` is set before the first one."""
        self._buffer += data
        if self.head is None and not self._read_head():
            return []
        pages: list[ManifestPage] = []
        while self._rest_bytes > 0 and (page := self._read_page()) is not None:
            pages.append(page)
        return pages

    def finish(self) -> ManifestHead:
        """Check the trailer: everything was there. Return the head."""
        if self.head is None or self._rules is None or self._rest_bytes or len(self._buffer) != _TRAILER_BYTES:
            raise self._damaged("bytes are missing or left over")
        magic, pages, entries = _TRAILER.unpack(self._authenticated(_TRAILER.size))
        if (magic, pages, entries) != (_TRAILER_MAGIC, self._rules.pages, self._rules.entries):
            raise self._damaged("its end does not fit its pages")
        return self.head

    def _read_head(self) -> bool:
        if len(self._buffer) < _HEADER.size:
            return False
        magic, version, flags, length, repository = _HEADER.unpack_from(self._buffer)
        if magic != _HEADER_MAGIC:
            raise self._damaged("it does not begin like a manifest")
        if version != _VERSION:
            raise FormatUnknown(f"{self._name} has format version {version}, this release knows {_VERSION}")
        if not 2 <= length <= min(DOCUMENT_BYTES_MAX, self._rest_bytes - _HEADER.size - DIGEST_BYTES):
            raise self._damaged("its document does not fit")
        if len(self._buffer) < _HEADER.size + length + DIGEST_BYTES:
            return False
        document = self._authenticated(_HEADER.size + length)[_HEADER.size :]
        if flags & ~_FLAG_SEALED:
            raise FormatUnknown(f"{self._name} has unknown flags {flags:#x}")
        if flags & _FLAG_SEALED and self._seal is None:
            raise FormatUnknown(f"{self._name} is encrypted, in a repository that is not")
        if self._seal is not None:
            if not flags & _FLAG_SEALED:
                raise self._damaged("it is in plain, in an encrypted repository")
            document = self._seal.open(b"document", self._name.encode(), document, self._name)
        head = decode_document(document, self._name)
        if repository != self._repository or head.block_size != self._block_size:
            raise self._damaged("it belongs to another repository")
        if head.name != self._name:
            raise self._damaged(f"it is {head.name}")
        self.head, self._rules = head, _Rules(self._name, head)
        self._rest_bytes -= _HEADER.size + length + DIGEST_BYTES
        return True

    def _read_page(self) -> ManifestPage | None:
        """Return the next page; None if not all of it is there yet."""
        if len(self._buffer) < _PAGE.size:
            return None
        number, count, length = _PAGE.unpack_from(self._buffer)
        raw_bytes = count * _ENTRY_BYTES
        # zstd's own bound for what does not compress, so that a lie about the length costs no memory.
        length_max = raw_bytes + (raw_bytes >> 8) + 128 + (SEAL_BYTES if self._seal is not None else 0)
        if not 1 <= count <= PAGE_BLOCKS or not 1 <= length <= length_max:
            raise self._damaged("a page's size is not possible")
        if self._rest_bytes < _PAGE.size + length + DIGEST_BYTES:
            raise self._damaged("a page runs into the end")
        if len(self._buffer) < _PAGE.size + length + DIGEST_BYTES:
            return None
        frame = self._authenticated(_PAGE.size + length)[_PAGE.size :]
        if self._seal is not None:
            frame = self._seal.open(b"page", _page_name(self._name, number), frame, self._name)
        raw = self._decompress(frame, raw_bytes)
        index = np.frombuffer(raw, "<u2", count).astype(np.uint16)
        digests = np.frombuffer(raw, np.uint8, offset=2 * count).reshape(count, DIGEST_BYTES)
        if self._rules is not None:
            self._rules.take(number, index)
        self._rest_bytes -= _PAGE.size + length + DIGEST_BYTES
        return ManifestPage(number, index, digests)

    def _decompress(self, frame: bytes, raw_bytes: int) -> bytes:
        try:
            if zstandard.frame_content_size(frame) != raw_bytes:
                raise self._damaged("a page's frame is not of its size")
            return self._decompressor.decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._damaged(str(error)) from error

    def _authenticated(self, length: int) -> bytes:
        """Take ``length`` bytes and the running digest behind them off the buffer."""
        data, digest = bytes(self._buffer[:length]), bytes(self._buffer[length : length + DIGEST_BYTES])
        if self._hasher.update(data).digest() != digest:
            raise self._damaged("a digest is wrong")
        self._hasher.update(digest)
        del self._buffer[: length + DIGEST_BYTES]
        return data

    def _damaged(self, why: str) -> Damaged:
        return Damaged(f"{self._name} is not what was stored: {why}")

"""The pack format's bytes, and what a reader refuses.

Forged packs carry a right checksum: the rules must hold without its help.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from blake3 import blake3

from hvsnap.errors import Damaged, FormatUnknown
from hvsnap.store import pack as format_
from hvsnap.store.pack import ENTRY, FLAG_SEALED, FLAG_ZSTD, FOOTER_BYTES, HEADER_BYTES, EntryArray, PackId

BLOCK = 65536
KEY = bytes(range(32))
PACK = PackId(b"r" * 16, bytes.fromhex("ab" * 16), BLOCK)


def an_index(*rows: tuple[int, int, int]) -> EntryArray:
    """Return an index of ``(offset, length, flags)``."""
    index = np.zeros(len(rows), ENTRY)
    for number, (offset, length, flags) in enumerate(rows):
        index[number] = (np.full(32, number + 1, np.uint8), offset, length, flags, 0)
    return index


def encode_unchecked(
    index: bytes, entries: int, index_offset: int, *, header: bytes | None = None, **fields: Any
) -> tuple[bytes, bytes, bytes]:
    """Return header, index and footer with a right checksum over whatever they say."""
    header = format_.encode_header(PACK) if header is None else header
    values = {"magic": b"HVSNPEND", "version": 1, "flags": 0, "block": BLOCK, "repository": b"r" * 16}
    values |= {"pack": PACK.pack, "offset": index_offset, "entries": entries, "reserved": 0} | fields
    prefix = struct.pack("<8sHHI16s16sQII", *values.values())
    return header, index, prefix + blake3(header + index + prefix, key=KEY).digest()


def parse(header: bytes, index: bytes, footer: bytes, pack_bytes: int) -> EntryArray:
    parsed = format_.parse_footer(PACK, footer, pack_bytes)
    assert parsed.index_bytes <= pack_bytes
    return format_.parse_index(PACK, header, parsed, index, KEY)


GOOD = an_index((64, 100, FLAG_ZSTD), (164, BLOCK, 0), (70_000, 1, FLAG_ZSTD))
END = 70_001


def parse_forged(index: EntryArray, index_offset: int = END, **fields: Any) -> EntryArray:
    entries = fields.pop("entries", index.size)
    forged = encode_unchecked(index.tobytes(), entries, index_offset, **fields)
    return parse(*forged, index_offset + index.nbytes + FOOTER_BYTES)


def test_what_is_encoded_is_parsed() -> None:
    tail = format_.encode_tail(PACK, END, GOOD, KEY)
    index, footer = tail[:-FOOTER_BYTES], tail[-FOOTER_BYTES:]
    parsed = parse(format_.encode_header(PACK), index, footer, END + len(tail))
    assert parsed.tobytes() == GOOD.tobytes()


def test_its_form_is_that_of_the_documentation() -> None:
    """Written out once: a change here is another format version."""
    header = format_.encode_header(PACK)
    assert header == b"HVSNPACK\x01\0\0\0\0\0\x01\0" + b"r" * 16 + b"\xab" * 16 + bytes(16)
    assert len(header) == HEADER_BYTES
    tail = format_.encode_tail(PACK, END, GOOD[:1], KEY)
    entry = b"\x01" * 32 + (64).to_bytes(8, "little") + b"\x64\0\0\0" + b"\x01\0" + b"\0\0"
    prefix = b"HVSNPEND\x01\0\0\0\0\0\x01\0" + b"r" * 16 + b"\xab" * 16 + END.to_bytes(8, "little") + b"\x01" + bytes(7)
    assert tail == entry + prefix + blake3(header + entry + prefix, key=KEY).digest()
    assert tail == b"".join(encode_unchecked(entry, 1, END)[1:])
    assert PACK.name == "packs/ab/" + "ab" * 16


def test_the_forger_of_these_tests_can_make_a_good_pack() -> None:
    assert parse_forged(GOOD).tobytes() == GOOD.tobytes()


def test_every_flipped_bit_of_header_index_and_footer_is_noticed() -> None:
    """FAULTS 12."""
    parts = encode_unchecked(GOOD.tobytes(), GOOD.size, END)
    for number, part in enumerate(parts):
        for at in range(len(part)):
            for bit in range(8):
                bad = list(parts)
                bad[number] = part[:at] + bytes([part[at] ^ (1 << bit)]) + part[at + 1 :]
                with pytest.raises((Damaged, FormatUnknown)):
                    parse(*bad, END + GOOD.nbytes + FOOTER_BYTES)


@pytest.mark.parametrize(
    "index",
    [
        an_index((63, 10, FLAG_ZSTD)),
        an_index((0, 10, FLAG_ZSTD)),
        an_index((64, 0, FLAG_ZSTD)),
        an_index((64, 0, 0)),
        an_index((64, BLOCK, FLAG_ZSTD)),
        an_index((64, BLOCK + 1, FLAG_ZSTD)),
        an_index((64, BLOCK - 1, 0)),
        an_index((64, 2**32 - 1, FLAG_ZSTD)),
        an_index((64, 2**32 - 1, 0)),
        an_index((END - 9, 10, FLAG_ZSTD)),
        an_index((END, 1, FLAG_ZSTD)),
        an_index((2**64 - 5, 10, FLAG_ZSTD)),
        an_index((2**63, 10, FLAG_ZSTD)),
        an_index((164, 10, FLAG_ZSTD), (64, 10, FLAG_ZSTD)),
        an_index((64, 10, FLAG_ZSTD), (73, 10, FLAG_ZSTD)),
        an_index((64, 10, FLAG_ZSTD), (64, 10, FLAG_ZSTD)),
        an_index(),
    ],
)
def test_an_index_that_breaks_a_rule_is_refused_by_reader_and_writer(index: EntryArray) -> None:
    with pytest.raises(Damaged):
        parse_forged(index)
    with pytest.raises(Damaged):
        format_.encode_tail(PACK, END, index, KEY)


def test_a_reserved_field_that_is_not_zero_is_refused() -> None:
    index = GOOD.copy()
    index["reserved"][1] = 1
    with pytest.raises(Damaged):
        parse_forged(index)
    header = format_.encode_header(PACK)[:-1] + b"\x01"
    with pytest.raises(Damaged):
        parse_forged(GOOD, header=header)


@pytest.mark.parametrize("flags", [FLAG_SEALED, FLAG_SEALED | FLAG_ZSTD, 4, 0x8000])
def test_flags_of_later_releases_are_refused_as_such(flags: int) -> None:
    for index in (an_index((64, 10, flags)), an_index((64, BLOCK, flags))):
        with pytest.raises(FormatUnknown):
            parse_forged(index)


@pytest.mark.parametrize("fields", [{"version": 2}, {"version": 0}, {"flags": 1}, {"flags": 0x8000}])
def test_versions_and_flags_of_a_pack_are_refused_as_such(fields: dict[str, int]) -> None:
    with pytest.raises(FormatUnknown):
        parse_forged(GOOD, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"magic": b"HVSNPACK"},
        {"block": BLOCK * 2},
        {"repository": b"s" * 16},
        {"pack": bytes(16)},
        {"offset": END + 1},
        {"offset": 2**64 - 48 * 3 - 96},
        {"offset": 2**64 - 1},
        {"entries": 0},
        {"entries": 2},
        {"entries": 4},
        {"entries": 65537},
        {"entries": 2**32 - 1},
    ],
)
def test_a_footer_that_does_not_fit_is_refused(fields: dict[str, Any]) -> None:
    offset = fields.pop("offset", END)
    entries = fields.pop("entries", GOOD.size)
    forged = encode_unchecked(GOOD.tobytes(), entries, offset, **fields)
    with pytest.raises(Damaged):
        parse(*forged, END + GOOD.nbytes + FOOTER_BYTES)


def test_a_pack_that_is_another_one_is_refused() -> None:
    tail = format_.encode_tail(PACK, END, GOOD, KEY)
    for other in (replace(PACK, pack=bytes(16)), replace(PACK, repository=bytes(16)), replace(PACK, block_size=131072)):
        with pytest.raises(Damaged):
            format_.parse_footer(other, tail[-FOOTER_BYTES:], END + len(tail))


def test_a_foreign_header_under_a_right_footer_is_refused() -> None:
    header = format_.encode_header(replace(PACK, pack=bytes(16)))
    with pytest.raises(Damaged):
        parse_forged(GOOD, header=header)


def test_a_pack_of_any_other_size_is_refused() -> None:
    header, index, footer = encode_unchecked(GOOD.tobytes(), GOOD.size, END)
    whole = END + len(index) + FOOTER_BYTES
    for size in (0, 1, FOOTER_BYTES, HEADER_BYTES + FOOTER_BYTES, whole - 1, whole + 1, 2**63):
        with pytest.raises(Damaged):
            parse(header, index, footer, size)
    for footer_bytes in (0, 1, FOOTER_BYTES - 1):
        with pytest.raises(Damaged):
            parse(header, index, footer[:footer_bytes], whole)


def test_a_footer_at_the_limits_of_its_fields_is_refused_before_anything_is_allocated() -> None:
    """64 bits of offset and 32 of count cannot be made to wrap round to the pack's size."""
    entries = 2**32 - 1
    offset = (END + FOOTER_BYTES - entries * ENTRY.itemsize) % 2**64
    forged = encode_unchecked(b"", entries, offset)
    with pytest.raises(Damaged):
        format_.parse_footer(PACK, forged[2], END + 2 * FOOTER_BYTES)


@pytest.mark.parametrize("name", ["packs/ab/" + "ab" * 15, "packs/ac/" + "ab" * 16, "manifests/x", "", "packs/../x"])
def test_a_name_that_no_pack_has_is_refused(name: str) -> None:
    with pytest.raises(Damaged):
        format_.pack_id_of(name, b"r" * 16, BLOCK)


def test_a_name_leads_back_to_its_pack() -> None:
    pack = PackId.new(b"r" * 16, BLOCK)
    assert format_.pack_id_of(pack.name, b"r" * 16, BLOCK) == pack

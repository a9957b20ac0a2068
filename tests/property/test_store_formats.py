"""The store's formats under arbitrary contents, cuts and pieces."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hvsnap.errors import Damaged, FormatUnknown
from hvsnap.model import PAGE_BLOCKS, BlockPlace
from hvsnap.store import pack as format_
from hvsnap.store.fetch import GAP_BYTES_MAX, READ_BYTES_MAX, plan_reads
from hvsnap.store.identity import ManifestHead
from hvsnap.store.manifest import ManifestDecoder, ManifestEncoder, ManifestPage
from hvsnap.store.pack import FLAG_ZSTD, FOOTER_BYTES, HEADER_BYTES, PackId
from tests.catalog_kit import a_disk, a_snapshot
from tests.store_kit import BLOCK

KEY = bytes(32)
PACK = PackId(b"r" * 16, b"p" * 16, BLOCK)


@st.composite
def indexes(draw: st.DrawFn) -> tuple[format_.EntryArray, int]:
    """Return a good index, and where it begins."""
    rows = draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, BLOCK), st.binary(min_size=32, max_size=32)),
                         min_size=1, max_size=50))  # fmt: skip
    offsets, end = [], HEADER_BYTES
    for gap, length, _ in rows:
        offsets.append(end + gap)
        end += gap + length
    flags = [0 if length == BLOCK else FLAG_ZSTD for _, length, _ in rows]
    entries = format_.index_entries([digest for *_, digest in rows], offsets, [length for _, length, _ in rows], flags)
    return entries, end + draw(st.integers(0, 5000))


@given(indexes())
def test_every_good_index_comes_back(index: tuple[format_.EntryArray, int]) -> None:
    entries, end = index
    tail = format_.encode_tail(PACK, end, entries, KEY)
    footer = format_.parse_footer(PACK, tail[-FOOTER_BYTES:], end + len(tail))
    assert footer.index_offset == end
    parsed = format_.parse_index(PACK, format_.encode_header(PACK), footer, tail[:-FOOTER_BYTES], KEY)
    assert parsed.tobytes() == entries.tobytes()


@given(st.binary(min_size=FOOTER_BYTES, max_size=FOOTER_BYTES), st.integers(0, 2**63))
def test_any_bytes_for_a_footer_are_refused(data: bytes, pack_bytes: int) -> None:
    for footer in (data, b"HVSNPEND\x01\0\0\0\0\0\x01\0" + b"r" * 16 + b"p" * 16 + data[48:]):
        try:
            parsed = format_.parse_footer(PACK, footer, pack_bytes)
        except (Damaged, FormatUnknown):
            continue
        assert HEADER_BYTES <= parsed.index_offset + parsed.index_bytes + FOOTER_BYTES == pack_bytes


DISK = a_disk()
page_entries = st.dictionaries(st.integers(0, PAGE_BLOCKS - 1), st.binary(min_size=32, max_size=32), min_size=1)


@settings(max_examples=50)
@given(
    st.dictionaries(st.integers(0, 2**20), page_entries, max_size=5),
    st.text(max_size=200),
    st.dictionaries(st.text(max_size=10), st.text(max_size=10), max_size=3),
    st.integers(1, 5000),
)
def test_every_manifest_comes_back_in_pieces_of_any_size(
    contents: dict[int, dict[int, bytes]], text: str, tags: dict[str, str], piece: int
) -> None:
    size_bytes = (2**20 + 1) * PAGE_BLOCKS * BLOCK
    head = ManifestHead(a_snapshot(DISK.id, 7, size_bytes=size_bytes, description=text), DISK, BLOCK, text)
    encoder = ManifestEncoder(head, b"r" * 16, KEY)
    data = encoder.start()
    for number, entries in sorted(contents.items()):
        index = np.array(sorted(entries), np.uint16)
        digests = np.frombuffer(b"".join(entries[int(i)] for i in index), np.uint8).reshape(-1, 32)
        data += encoder.page(ManifestPage(number, index, digests))
    data += encoder.finish()
    decoder = ManifestDecoder(head.name, len(data), b"r" * 16, BLOCK, KEY)
    pages = [page for at in range(0, len(data), piece) for page in decoder.feed(data[at : at + piece])]
    assert decoder.finish() == head
    assert {p.number: dict(zip(p.index.tolist(), map(bytes, p.digests), strict=True)) for p in pages} == contents


@st.composite
def places(draw: st.DrawFn) -> list[BlockPlace]:
    """Return places of blocks in two packs, in any order, some asked for more than once."""
    made: list[BlockPlace] = []
    for pack in ("packs/a", "packs/b"):
        end = HEADER_BYTES
        for length, gap in draw(st.lists(st.tuples(st.integers(1, BLOCK), st.sampled_from([0, 0, 0, 1000, 200_000])))):
            made.append(BlockPlace(len(made) + 1, bytes(32), pack, end + gap, length, FLAG_ZSTD))
            end += gap + length
    return draw(st.lists(st.sampled_from(made))) if made else []


@given(places())
def test_reads_cover_every_position_once_and_stay_small(wanted: list[BlockPlace]) -> None:
    reads = list(plan_reads(enumerate(wanted), BLOCK))
    answered = [
        (position, place)
        for read in reads
        for place, positions in zip(read.places, read.positions, strict=True)
        for position in positions
    ]
    assert sorted(answered, key=lambda pair: pair[0]) == list(enumerate(wanted))
    for read in reads:
        assert read.end - read.start <= READ_BYTES_MAX
        assert len(read.places) <= 64
        assert all(read.start <= p.offset and p.offset + p.length <= read.end for p in read.places)
        assert read.start == read.places[0].offset
        assert all(p.pack == read.pack for p in read.places)
        gaps = [b.offset - a.offset - a.length for a, b in zip(read.places, read.places[1:], strict=False)]
        assert max(gaps, default=0) <= GAP_BYTES_MAX

"""The manifest format's bytes, and what a reader refuses."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import zstandard
from blake3 import blake3

from hvsnap.errors import Damaged, FormatUnknown
from hvsnap.model import GroupId, Impact, Kind, Method, SnapshotId
from hvsnap.store.identity import ManifestHead, ManifestName, encode_document
from hvsnap.store.manifest import ManifestDecoder, ManifestEncoder, ManifestPage
from tests.catalog_kit import a_disk, a_snapshot

BLOCK = 65536
KEY = bytes(range(32))
REPOSITORY = b"r" * 16
DISK = a_disk(guest_name="wéb", serial="S1", source="/images/not-utf-8-\udcff.qcow2")
SNAPSHOT = a_snapshot(
    DISK.id,
    5,
    SnapshotId("s-parent000000"),
    size_bytes=5000 * BLOCK - 512,
    tags={"a": "b", "ü": ""},
    group=GroupId("g-aaaaaaaaaaaa"),
    kind=Kind.INCREMENTAL,
    method=Method.RESCAN,
    reason="the bitmap was lost",
    read_bytes=2**50,
    stored_bytes=17,
    impact=Impact(900.5, 1100.0, 0.0, None, 1.25, 8 << 20),
    skew_ms=12.345,
)
HEAD = ManifestHead(SNAPSHOT, DISK, BLOCK, "<domain>\n</domain>")


def a_page(number: int, *indexes: int) -> ManifestPage:
    digests = np.arange(len(indexes) * 32).astype(np.uint8).reshape(-1, 32)
    digests[::3] = 0
    return ManifestPage(number, np.array(indexes, np.uint16), digests)


PAGES = [a_page(0, 0, 7, 4095), a_page(1, 0, 903)]


def encode(pages: Sequence[ManifestPage] = PAGES, head: ManifestHead = HEAD) -> bytes:
    encoder = ManifestEncoder(head, REPOSITORY, KEY)
    return encoder.start() + b"".join(encoder.page(page) for page in pages) + encoder.finish()


def decode(data: bytes, piece: int = 1 << 20, name: str = HEAD.name) -> tuple[ManifestHead, list[ManifestPage]]:
    decoder = ManifestDecoder(name, len(data), REPOSITORY, BLOCK, KEY)
    pages = [page for at in range(0, len(data), piece) for page in decoder.feed(data[at : at + piece])]
    return decoder.finish(), pages


def same(one: Sequence[ManifestPage], two: Sequence[ManifestPage]) -> bool:
    return [(p.number, p.index.tolist(), p.digests.tolist()) for p in one] == [
        (p.number, p.index.tolist(), p.digests.tolist()) for p in two
    ]


class Forger:
    """Writes a manifest with right digests whatever it says."""

    def __init__(self) -> None:
        self._hasher = blake3(key=KEY)
        self.data = b""

    def add(self, data: bytes) -> Forger:
        digest = self._hasher.update(data).digest()
        self._hasher.update(digest)
        self.data += data + digest
        return self

    def start(self, document: bytes = encode_document(HEAD), **fields: Any) -> Forger:
        values = {"magic": b"HVSNMANI", "version": 1, "flags": 0, "length": len(document), "repository": REPOSITORY}
        return self.add(struct.pack("<8sHHI16s", *(values | fields).values()) + document)

    def page(self, number: int, index: Sequence[int], *, raw: bytes | None = None, **fields: int) -> Forger:
        raw = np.array(index, "<u2").tobytes() + bytes(32 * len(index)) if raw is None else raw
        frame = zstandard.compress(raw)
        values = {"number": number, "count": len(index), "length": len(frame)} | fields
        return self.add(struct.pack("<QII", *values.values()) + frame)

    def end(self, pages: int, entries: int, magic: bytes = b"HVSNMEND") -> bytes:
        return self.add(struct.pack("<8sQQ", magic, pages, entries)).data


def test_what_is_encoded_is_decoded_in_pieces_of_any_size() -> None:
    data = encode()
    for piece in (1, 7, 100, len(data) - 1, len(data)):
        head, pages = decode(data, piece)
        assert head == HEAD
        assert same(pages, PAGES)


def test_a_snapshot_without_pages_is_a_manifest() -> None:
    assert decode(encode([])) == (HEAD, [])
    empty = replace(HEAD, snapshot=replace(SNAPSHOT, size_bytes=0, parent=None, group=None, tags={}), domain_xml="")
    assert decode(encode([], empty)) == (empty, [])


def test_a_manifest_of_before_impacts_and_skews_were_measured_is_read() -> None:
    document = json.loads(encode_document(HEAD))
    del document["snapshot"]["impact"], document["snapshot"]["skew_ms"]
    data = Forger().start(json.dumps(document).encode())
    for page in PAGES:
        data.page(page.number, page.index.tolist(), raw=page.index.astype("<u2").tobytes() + page.digests.tobytes())
    head, _pages = decode(data.end(len(PAGES), sum(page.index.size for page in PAGES)))
    assert head == replace(HEAD, snapshot=replace(SNAPSHOT, impact=None, skew_ms=None))


@pytest.mark.parametrize("changes", [{"slowdown": -1.0}, {"held_iops": "1"}, {"rate_low_bytes_s": 0.5}])
def test_an_impact_that_is_none_is_damage(changes: dict[str, object]) -> None:
    document = json.loads(encode_document(HEAD))
    document["snapshot"]["impact"] |= changes
    with pytest.raises(Damaged):
        decode(Forger().start(json.dumps(document).encode()).end(0, 0))


@pytest.mark.parametrize("skew_ms", [-0.001, "1", True, [1.0]])
def test_a_skew_that_is_none_is_damage(skew_ms: object) -> None:
    document = json.loads(encode_document(HEAD))
    document["snapshot"]["skew_ms"] = skew_ms
    with pytest.raises(Damaged):
        decode(Forger().start(json.dumps(document).encode()).end(0, 0))


def test_the_first_bytes_are_those_of_the_documentation() -> None:
    """Written out once: a change here is another format version."""
    document = encode_document(HEAD)
    start = b"HVSNMANI\x01\0\0\0" + len(document).to_bytes(4, "little") + REPOSITORY + document
    assert encode().startswith(start + blake3(start, key=KEY).digest())
    assert set(json.loads(document)) == {"revision", "block_size", "snapshot", "disk", "domain_xml"}
    assert HEAD.name == f"manifests/{DISK.id}/00000005-{SNAPSHOT.id}"
    assert replace(HEAD, revision=3).name == f"manifests/{DISK.id}/00000005-{SNAPSHOT.id}.0003"


def test_the_forger_of_these_tests_can_make_a_good_manifest() -> None:
    _, pages = decode(Forger().start().page(0, [1, 2]).end(1, 2))
    assert [page.index.tolist() for page in pages] == [[1, 2]]


def test_every_flipped_bit_is_noticed_before_its_page_is_handed_out() -> None:
    """FAULTS 12."""
    data = encode()
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
        decoder = ManifestDecoder(HEAD.name, len(data), REPOSITORY, BLOCK, KEY)
        pages: list[ManifestPage] = []

        def read_all(decoder: ManifestDecoder, damaged: bytes, pages: list[ManifestPage]) -> None:
            for start in range(0, len(damaged), 16):
                pages += decoder.feed(damaged[start : start + 16])
            decoder.finish()

        with pytest.raises((Damaged, FormatUnknown)):
            read_all(decoder, damaged, pages)
        assert same(pages, PAGES[: len(pages)])


def test_a_manifest_cut_at_any_length_is_refused() -> None:
    """FAULTS 12."""
    data = encode()
    for length in range(len(data)):
        with pytest.raises(Damaged):
            decode(data[:length])
    with pytest.raises(Damaged):
        decode(data + b"x")


def test_bytes_that_never_came_are_missed() -> None:
    data = encode()
    decoder = ManifestDecoder(HEAD.name, len(data), REPOSITORY, BLOCK, KEY)
    decoder.feed(data[:-1])
    with pytest.raises(Damaged):
        decoder.finish()


def test_pages_cannot_be_left_out_doubled_or_swapped() -> None:
    encoder = ManifestEncoder(HEAD, REPOSITORY, KEY)
    start, first, second, end = encoder.start(), encoder.page(PAGES[0]), encoder.page(PAGES[1]), encoder.finish()
    for parts in ([first], [second], [second, first], [first, first, second], []):
        with pytest.raises(Damaged):
            decode(start + b"".join(parts) + end)


def test_another_snapshots_manifest_under_this_name_is_refused() -> None:
    for name in (
        ManifestName(DISK.id, 6, SNAPSHOT.id),
        ManifestName(DISK.id, 5, SnapshotId("s-other0000000")),
        ManifestName(DISK.id, 5, SNAPSHOT.id, 1),
    ):
        with pytest.raises(Damaged):
            decode(encode(), name=str(name))
    with pytest.raises(Damaged):
        decode(encode(head=replace(HEAD, block_size=131072)))
    with pytest.raises(Damaged):
        decode(Forger().start(repository=b"s" * 16).end(0, 0))


@pytest.mark.parametrize(
    "pages",
    [
        [(1, [0]), (0, [0])],
        [(0, [0]), (0, [1])],
        [(2, [0])],
        [(2**63, [0])],
        [(2**64 - 1, [0])],
        [(0, [1, 1])],
        [(0, [2, 1])],
        [(0, [4096])],
        [(0, [0, 65535])],
        [(1, [904])],
    ],
)
def test_pages_against_the_rules_are_refused_by_reader_and_writer(pages: list[tuple[int, list[int]]]) -> None:
    forger = Forger().start()
    for number, index in pages:
        forger.page(number, index)
    with pytest.raises(Damaged):
        decode(forger.end(len(pages), sum(len(index) for _, index in pages)))
    with pytest.raises(Damaged):
        encode([a_page(number, *index) for number, index in pages])


@pytest.mark.parametrize(
    "forged",
    [
        Forger().start().page(0, [1], count=0).end(1, 0),
        Forger().start().page(0, [1], count=2).end(1, 2),
        Forger().start().page(0, [1], count=4097).end(1, 1),
        Forger().start().page(0, [1], count=2**32 - 1).end(1, 1),
        Forger().start().page(0, [1], length=0).end(1, 1),
        Forger().start().page(0, [1], length=2**32 - 1).end(1, 1),
        Forger().start().page(0, [1], length=60).end(1, 1),
        Forger().start().page(0, [1], raw=bytes(33)).end(1, 1),
        Forger().start().page(0, [1], raw=bytes(1 << 26)).end(1, 1),
        Forger().start().page(0, [1]).end(1, 2),
        Forger().start().page(0, [1]).end(2, 1),
        Forger().start().page(0, [1]).end(0, 0),
        Forger().start().end(0, 0, magic=b"HVSNMANI"),
        Forger().start(magic=b"HVSNPACK").end(0, 0),
        Forger().start(length=1).end(0, 0),
        Forger().start(length=2**32 - 1).end(0, 0),
        Forger().start(b"{").end(0, 0),
        Forger().start(b"[]").end(0, 0),
        Forger().start(b"{}").end(0, 0),
        Forger().start(b"\xff\xff").end(0, 0),
        Forger().start(b"[" * 100_000).end(0, 0),
    ],
    ids=range(21),
)
def test_sizes_and_counts_that_lie_are_refused(forged: bytes) -> None:
    """FAULTS 30."""
    for piece in (64, 1 << 20):
        with pytest.raises(Damaged):
            decode(forged, piece)


@pytest.mark.parametrize("fields", [{"version": 2}, {"flags": 1}, {"flags": 0x8000}])
def test_later_releases_manifests_are_refused_as_such(fields: dict[str, int]) -> None:
    with pytest.raises(FormatUnknown):
        decode(Forger().start(**fields).end(0, 0))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("snapshot", "sequence", -1),
        ("snapshot", "sequence", True),
        ("snapshot", "sequence", 1e3),
        ("snapshot", "sequence", 10**8),
        ("snapshot", "kind", "other"),
        ("snapshot", "parent", 5),
        ("snapshot", "tags", {"a": 1}),
        ("snapshot", "tags", None),
        ("snapshot", "disk", "d-other0000000"),
        ("snapshot", "created_at", "now"),
        ("snapshot", "size_bytes", None),
        ("disk", "system", 1),
        ("disk", "id", None),
        ("", "block_size", 0),
        ("", "revision", 10000),
        ("", "disk", None),
        ("", "domain_xml", None),
    ],
)
def test_a_document_with_a_wrong_value_is_refused(part: str, key: str, value: object) -> None:
    document = json.loads(encode_document(HEAD))
    (document[part] if part else document)[key] = value
    with pytest.raises(Damaged):
        decode(Forger().start(json.dumps(document).encode()).end(0, 0))


def test_keys_of_later_releases_are_ignored() -> None:
    document = json.loads(encode_document(HEAD))
    document["new"] = document["disk"]["new"] = {"x": 1}
    assert decode(Forger().start(json.dumps(document).encode()).end(0, 0))[0] == HEAD


def test_names_lead_back_and_sort_as_the_snapshots_were_made() -> None:
    names = [ManifestName(DISK.id, *rest) for rest in [(1, "s-b"), (1, "s-b", 1), (2, "s-a"), (10, "s-a", 12)]]
    assert [ManifestName.parse(str(name)) for name in names] == names
    assert sorted(map(str, names)) == [str(name) for name in names]
    for bad in ("manifests/d-a/1-s-a", "manifests/d-a/00000001", "packs/ab/x", "manifests/../00000001-s-a", ""):
        with pytest.raises(Damaged):
            ManifestName.parse(bad)

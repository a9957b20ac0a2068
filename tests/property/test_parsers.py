"""Every parser of what the store holds, under arbitrary bytes and under good ones that were changed somewhere.

Either what was written, or an error of ours: no other content, no other exception, nothing allocated by what they say.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvsnap.catalog import chain, ranges
from hvsnap.errors import CatalogFailed, Damaged, FormatUnknown
from hvsnap.model import BlockPlace, Image, ImageId, Origin
from hvsnap.policy import Keep, Policy, PolicyId
from hvsnap.store import image, keyring
from hvsnap.store import pack as packs
from hvsnap.store import settings as settings_objects
from hvsnap.store.codec import Codec
from hvsnap.store.identity import ManifestHead, ManifestName, decode_document, encode_document
from hvsnap.store.keyring import StoreKey, unwrap, wrap
from hvsnap.store.lease import TTL_S, TTL_S_MAX, Term
from hvsnap.store.manifest import ManifestDecoder, ManifestEncoder, ManifestPage
from hvsnap.store.pack import FLAG_ZSTD, FOOTER_BYTES, HEADER_BYTES, PackId
from hvsnap.store.repository import Repository, encode_config, parse_config, sealed_id
from hvsnap.store.settings import DiskSettings, HostSettings
from tests.catalog_kit import a_disk, a_page, a_snapshot
from tests.store_kit import BLOCK

REFUSED = (Damaged, FormatUnknown, CatalogFailed)
MEMORY_MAX = 64 << 20
REPOSITORY = Repository(b"r" * 16, BLOCK, bytes(range(32)))
SEALED = Repository(b"r" * 16, BLOCK, bytes(range(32)), sealed=True)
RAW = StoreKey("raw.key", raw=bytes(range(32)))
PACK = PackId(REPOSITORY.id, b"p" * 16, BLOCK)
DISK = a_disk()
HEAD = ManifestHead(a_snapshot(DISK.id, 7, size_bytes=5000 * BLOCK, tags={"a": "b"}), DISK, BLOCK, "<domain/>")


def manifest(repository: Repository) -> bytes:
    encoder = ManifestEncoder(HEAD, repository.id, repository.keys.manifest, repository.seal)
    index, digests = np.array([1, 5, 4095], np.uint16), np.arange(96, dtype=np.uint8).reshape(3, 32)
    return encoder.start() + encoder.page(ManifestPage(0, index, digests)) + encoder.finish()


def read_manifest(repository: Repository, data: bytes) -> object:
    keys = repository.keys
    decoder = ManifestDecoder(HEAD.name, len(data), repository.id, BLOCK, keys.manifest, repository.seal)
    pages = [page for at in range(0, len(data), 100) for page in decoder.feed(data[at : at + 100])]
    return decoder.finish(), [(page.number, page.index.tobytes(), page.digests.tobytes()) for page in pages]


INDEX = packs.index_entries([b"d" * 32, b"e" * 32], [64, 164], [100, BLOCK], [FLAG_ZSTD, 0])
PACK_END = 164 + BLOCK


def pack_ends() -> bytes:
    return packs.encode_header(PACK) + packs.encode_tail(PACK, PACK_END, INDEX, REPOSITORY.keys.pack)


def read_pack_ends(data: bytes) -> object:
    header, tail = data[:HEADER_BYTES], data[HEADER_BYTES:]
    footer = packs.parse_footer(PACK, tail[-FOOTER_BYTES:], PACK_END + len(tail))
    return packs.parse_index(PACK, header, footer, tail[:-FOOTER_BYTES], REPOSITORY.keys.pack).tobytes()


TERM = Term("holder", "host", 60.0, False, "n" * 32)
UNKNOWN = Term("?", "an unknown host", TTL_S, False, "")


def read_term(data: bytes) -> object:
    term = Term.decode(data)
    assert 0 < term.ttl_s <= TTL_S_MAX
    if term == UNKNOWN:
        raise Damaged("held by somebody unknown")
    return term


def read_name(data: bytes) -> object:
    text = data.decode(errors="surrogateescape")
    name = ManifestName.parse(text)
    assert str(name) in (text, text.removesuffix(".0000"))
    return name


def read_document(data: bytes) -> object:
    return decode_document(data, "m")


def block_of(repository: Repository) -> tuple[bytes, BlockPlace]:
    content = b"text and more " * (BLOCK // 14) + bytes(BLOCK % 14)
    codec = Codec(BLOCK, 1, repository.keys.block, repository.seal)
    (digest,) = (
        __import__("hvsnap.store.codec", fromlist=["x"])
        .digest_blocks(memoryview(content), BLOCK, repository.keys.block)
        .values()
    )
    batch = codec.compress(memoryview(content), [0], [digest])
    return bytes(batch.pieces[0]), BlockPlace(1, digest, PACK.name, 0, batch.lengths[0], batch.flags[0])


def read_block(repository: Repository, place: BlockPlace, data: bytes) -> object:
    codec = Codec(BLOCK, 1, repository.keys.block, repository.seal)
    return codec.restore(memoryview(data), 0, [place])


def range_blob() -> bytes:
    entries = np.zeros(3, ranges.ENTRY)
    entries["slot"], entries["length"], entries["pack"] = (1, 7, 511), 9, 2
    return ranges.encode(7, entries)


IMAGE = Image(ImageId("i-1"), "debian", "a template", HEAD.snapshot.id, 12.5)
SETTINGS = HostSettings(
    (Policy(PolicyId("p-1"), "Daily", (3, 15), (0, 4), "UTC", 30, Keep(last=3), 12.5),),
    (DiskSettings(DISK.id, PolicyId("p-1"), True),),
    (Origin("/images/b.qcow2", 4711, "i-1", 14.5),),
)
IMAGE_NAME, SETTINGS_NAME = image.object_name(IMAGE.id), "settings/00000001"


def read_image(repository: Repository, data: bytes) -> object:
    return image.decode(data, IMAGE_NAME, repository)


def read_settings(repository: Repository, data: bytes) -> object:
    return settings_objects.decode(data, SETTINGS_NAME, repository)


INDEXES = np.array([3, 4095], np.uint16)
LIVE = ranges.encode_live(np.array([1, 7, 511], np.uint16))


@dataclass(frozen=True)
class Format:
    """A parser and something good for it. ``exact``: every changed byte must be refused, not only what it means."""

    good: bytes
    read: Callable[[bytes], object]
    exact: bool = True


def formats() -> dict[str, Format]:
    made = {
        "configuration": Format(encode_config(REPOSITORY), parse_config, exact=False),
        "sealed configuration": Format(
            encode_config(SEALED), lambda data: (sealed_id(data), parse_config(data, SEALED.secret)), exact=False
        ),
        "key": Format(wrap(bytes(32), b"r" * 16, RAW), lambda data: unwrap(data, "k", b"r" * 16, RAW), exact=False),
        "lease": Format(TERM.encode(), read_term, exact=False),
        "pack": Format(pack_ends(), read_pack_ends),
        "manifest": Format(manifest(REPOSITORY), lambda data: read_manifest(REPOSITORY, data)),
        "sealed manifest": Format(manifest(SEALED), lambda data: read_manifest(SEALED, data)),
        "block map page": Format(chain.encode(a_page({1: 5, 9: 2**40})), lambda data: _page(chain.decode(data))),
        "carried blocks": Format(chain.encode_indexes(INDEXES), lambda data: bytes(chain.decode_indexes(data))),
        "range of blocks": Format(range_blob(), lambda data: ranges.decode(7, LIVE, data).tobytes()),
        "live blocks": Format(LIVE, lambda data: ranges.decode_live(data).tobytes()),
    }
    for sealed, repository in (("", REPOSITORY), ("sealed ", SEALED)):
        data, place = block_of(repository)
        read = partial(read_block, repository, place)
        # In plain, a bit of zstd's own header that means nothing may differ: the content's digest is what counts.
        made[f"{sealed}block"] = Format(data, read, exact=repository.sealed)
        made[f"{sealed}image"] = Format(image.encode(IMAGE, repository), partial(read_image, repository), exact=False)
        settings_data = settings_objects.encode(SETTINGS, SETTINGS_NAME, repository)
        made[f"{sealed}settings"] = Format(settings_data, partial(read_settings, repository), exact=False)
    return made


def _settings_text(data: bytes) -> object:
    """Read settings whose check is right, whatever they say."""
    values = json.loads(settings_objects.encode(SETTINGS, SETTINGS_NAME, REPOSITORY))
    del values["check"]
    values["settings"] = data.decode(errors="replace")
    values["check"] = settings_objects._check(values, REPOSITORY)
    return read_settings(REPOSITORY, json.dumps(values).encode())


def _page(page: chain.Page) -> object:
    return page.index.tobytes(), page.block.tobytes()


FORMATS = formats()
UNCHECKED: dict[str, Callable[[bytes], object]] = {
    "document": read_document,
    "manifest's name": read_name,
    "what settings say": _settings_text,
    "pack's name": lambda data: packs.pack_id_of(data.decode(errors="replace"), b"r" * 16, BLOCK),
}


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if more memory was allocated than any of these may need."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY_MAX
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FORMATS)
def test_each_position_flipped_and_each_length(name: str) -> None:
    """One bit of every byte; of a block some thousand suffice, since all of them go through one digest. FAULTS 12."""
    form = FORMATS[name]
    meant = form.read(form.good)
    step = max(1, len(form.good) // 2000)
    for at in range(0, len(form.good), step):
        changed = form.good[:at] + bytes([form.good[at] ^ (1 << at % 8)]) + form.good[at + 1 :]
        check(form, meant, changed)
    for length in range(0, len(form.good) - 1, step):
        check(form, meant, form.good[:length])


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pieces_changed_moved_doubled_and_left_out(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    meant, changed = form.read(form.good), bytearray(form.good)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(changed)))
        end = data.draw(st.integers(start, min(len(changed), start + 80)))
        at = data.draw(st.integers(0, len(changed)))
        piece = data.draw(st.one_of(st.binary(max_size=40), st.just(bytes(changed[start:end]))))
        changed[at : at + data.draw(st.integers(0, 40))] = piece
    check(form, meant, bytes(changed))


@pytest.mark.parametrize("name", [*FORMATS, *UNCHECKED])
@settings(max_examples=60, deadline=None)
@given(noise=st.binary(max_size=3000), keep=st.integers(0, 60))
def test_noise_with_and_without_a_good_beginning(name: str, noise: bytes, keep: int) -> None:
    form = FORMATS.get(name) or Format(encode_document(HEAD), UNCHECKED[name])
    for data in (noise, form.good[:keep] + noise, noise + form.good[-keep:]):
        with suppress(*REFUSED), bounded():
            form.read(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)
JSON_GOOD = {
    "document": encode_document(HEAD),
    "what settings say": json.dumps(asdict(SETTINGS)).encode(),
    "configuration": encode_config(REPOSITORY),
    "sealed configuration": encode_config(SEALED),
    "key": wrap(bytes(32), b"r" * 16, RAW),
    "lease": TERM.encode(),
    "image": image.encode(IMAGE, REPOSITORY),
    "sealed image": image.encode(IMAGE, SEALED),
    "settings": settings_objects.encode(SETTINGS, SETTINGS_NAME, REPOSITORY),
}
"""Of images and settings the check is made right with the repository's own key."""


@pytest.mark.parametrize("name", JSON_GOOD)
@settings(max_examples=100, deadline=None)
@given(value=json_values, data=st.data())
def test_any_json_in_place_of_any_value(name: str, value: object, data: st.DataObject) -> None:
    """Checked or not: where there is a check, it is made right, as somebody would who means harm. FAULTS 30."""
    read = FORMATS[name].read if name in FORMATS else UNCHECKED[name]
    document = json.loads(JSON_GOOD[name])
    place = document
    key = data.draw(st.sampled_from(sorted(place)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = value
    if name in ("key", "lease"):
        document.pop("check", None)
        with suppress(TypeError, ValueError):
            document["check"] = keyring.blake3(keyring._text(document)).hexdigest()
    for kind, check_of in (("image", image._check), ("settings", settings_objects._check)):
        if name.endswith(kind):
            document.pop("check", None)
            document["check"] = check_of(document, SEALED if name.startswith("sealed") else REPOSITORY)
    with suppress(*REFUSED), bounded():
        read(json.dumps(document).encode())


def check(form: Format, meant: object, changed: bytes) -> None:
    try:
        with bounded():
            got = form.read(changed)
    except REFUSED:
        return
    assert got == meant or got is None  # None: no key of ours
    assert not form.exact or changed == form.good

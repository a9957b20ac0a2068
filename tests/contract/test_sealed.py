"""An encrypted repository: nothing in plain, nothing changed unnoticed, no key no entry."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from blake3 import blake3

from hvsnap.errors import ConfigInvalid, Damaged, FormatUnknown, HvsnapError, Refused
from hvsnap.model import BlockPlace
from hvsnap.store import keyring
from hvsnap.store.blocks import PackedBlocks, open_store
from hvsnap.store.identity import ManifestHead, ManifestName
from hvsnap.store.keyring import StoreKey, change_key, unwrap, wrap
from hvsnap.store.manifest import ManifestPage
from hvsnap.store.objects import LocalObjects
from hvsnap.store.pack import FLAG_SEALED, FLAG_ZSTD
from hvsnap.store.seal import SEAL_BYTES, Seal
from tests.catalog_kit import StoppedClock, a_disk, a_snapshot
from tests.store_kit import BLOCK, MemoryIndex, MemoryObjects, ids_of, read_back
from tests.upkeep_kit import Disks, FusedObjects, House

RAW = StoreKey("raw.key", raw=bytes(range(32)))
OTHER = StoreKey("other.key", raw=bytes(range(1, 33)))
MARKER = b"hvsnap-plaintext-marker-0123456789"
DISK = replace(a_disk(), guest_name="marker-guest-name", source="/marker/source")


@pytest.fixture(autouse=True)
def _quick_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "SCRYPT_N", 1 << 14)


def key_file(tmp_path: Path, text: str, mode: int = 0o600) -> str:
    path = tmp_path / f"key-{len(list(tmp_path.glob('key-*')))}"
    path.write_text(text + "\n")
    path.chmod(mode)
    return str(path)


def blocks() -> bytes:
    noise = bytearray(os.urandom(BLOCK))
    noise[100 : 100 + len(MARKER)] = MARKER
    return bytes(noise) + (MARKER * BLOCK)[:BLOCK] + bytes(BLOCK)


async def pages(store: PackedBlocks, ids: list[int]) -> AsyncIterator[ManifestPage]:
    yield ManifestPage(0, np.arange(len(ids), dtype=np.uint16), await store.digests(np.array(ids, np.uint64)))


def a_head() -> ManifestHead:
    snapshot = a_snapshot(DISK.id, 1, name="marker-snapshot-name", size_bytes=3 * BLOCK)
    return ManifestHead(snapshot, DISK, BLOCK, "<domain>marker-domain-xml</domain>")


async def filled(objects: MemoryObjects | LocalObjects, key: StoreKey | None) -> tuple[PackedBlocks, list[int], bytes]:
    store = await open_store(objects, MemoryIndex(), key=key)
    content = blocks()
    session = store.session()
    ids = ids_of((await session.put(memoryview(content))).ids)
    await session.flush()
    await store.manifests.put(a_head(), pages(store, ids))
    return store, ids, content


async def test_nothing_of_it_is_in_the_store_in_plain(tmp_path: Path) -> None:
    markers = [
        MARKER,
        MARKER[:16],
        b"marker-guest-name",
        b"/marker/source",
        b"marker-snapshot-name",
        b"marker-domain-xml",
    ]
    for key, there in ((None, True), (RAW, False)):
        root = tmp_path / ("plain" if there else "sealed")
        store, ids, content = await filled(LocalObjects(root), key)
        found = {
            marker
            for path in root.rglob("*")
            if path.is_file()
            for marker in markers
            if marker in path.read_bytes() or marker in str(path).encode()
        }
        assert found == (set(markers) if there else set())
        secret = store.repository.secret
        assert any(secret.hex().encode() in path.read_bytes() for path in root.rglob("*.json")) == there
        assert await read_back(store, ids) == content
        await store.close()


async def test_equal_content_in_two_repositories_has_nothing_in_common() -> None:
    digests, stored = set(), set()
    for _ in range(2):
        objects = MemoryObjects()
        store = await open_store(objects, MemoryIndex(), key=RAW)
        session = store.session()
        ids = ids_of((await session.put(memoryview(b"a" * BLOCK))).ids)
        await session.flush()
        (place,) = await store._index.places(ids)
        digests.add(place.digest)
        stored.add(objects.objects[place.pack][place.offset : place.offset + place.length])
        await store.close()
    assert (len(digests), len(stored)) == (2, 2)


async def test_every_byte_of_every_object_counts() -> None:
    """Flipped, cut, swapped: it is noticed by whoever reads it, and never read as something else. FAULTS 12."""
    objects = MemoryObjects()
    store, ids, content = await filled(objects, RAW)
    index = store._index
    await store.close()
    name = (
        ManifestName.parse(a_head().name)
        if False
        else next(ManifestName.parse(one) for one in objects.objects if one.startswith("manifests/"))
    )
    whole = dict(objects.objects)

    async def used() -> tuple[bytes, ManifestHead]:
        opened = await open_store(objects, index, create=False, key=RAW)
        try:
            for pack in [item.name async for item in opened.packs.list()]:
                await opened.packs.index(pack)
            head = await opened.manifests.head(name)
            assert [page async for page in opened.manifests.pages(name)]
            return await read_back(opened, ids), head
        finally:
            await opened.close()

    good = await used()
    assert good[0] == content
    for one, data in whole.items():
        step = max(1, len(data) // 150)
        for position in {*range(0, len(data), step), *range(max(0, len(data) - 160), len(data), 7)}:
            objects.objects[one] = data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]
            try:
                assert await used() == good, "white space alone may differ"
                assert one.endswith(".json") or one.startswith("keys/")
                assert data[position : position + 1] in b" \n"
            except (Damaged, FormatUnknown, Refused):
                pass
        for length in range(0, len(data) - 1, max(1, len(data) // 20)):
            objects.objects[one] = data[:length]
            with pytest.raises(HvsnapError):
                await used()
        objects.objects[one] = data
    assert await used() == good


async def test_a_block_opens_in_its_own_place_only() -> None:
    objects = MemoryObjects()
    store, ids, _content = await filled(objects, RAW)
    one, two = await store._index.places(ids[:2])
    data = objects.objects[one.pack]
    codec = store._fetcher._codec
    with pytest.raises(Damaged, match="seal"):
        codec.restore(memoryview(data), 0, [replace(one, digest=two.digest)])
    with pytest.raises(Damaged, match="seal"):
        codec.restore(memoryview(data), 0, [replace(one, offset=two.offset, length=two.length)])
    plain = os.urandom(BLOCK)
    digest = blake3(plain, key=store.repository.keys.block).digest()
    for flags in (0, FLAG_ZSTD):  # put there by somebody who even knows the digests' key
        with pytest.raises(Damaged, match="in plain"):
            codec.restore(memoryview(plain), 0, [BlockPlace(9, digest, one.pack, 0, BLOCK, flags)])
    await store.close()


@pytest.mark.parametrize("content", [b"", b"x", zstandard.ZstdCompressor().compress(bytes(64 << 20))])
async def test_a_bomb_in_a_seal_costs_nothing(content: bytes) -> None:
    """FAULTS 30."""
    store = await open_store(MemoryObjects(), MemoryIndex(), key=RAW)
    digest = b"d" * 32
    sealed = Seal(store.repository.keys.seal, store.repository.id).seal(b"block", digest, content)
    assert len(sealed) == len(content) + SEAL_BYTES
    place = BlockPlace(1, digest, "p", 0, len(sealed), FLAG_ZSTD | FLAG_SEALED)
    with pytest.raises(Damaged):
        store._fetcher._codec.restore(memoryview(sealed), 0, [place])
    await store.close()


# -- keys -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made_with", "opened_with", "why"),
    [(RAW, None, "no key"), (RAW, OTHER, "not the store's"), (None, RAW, "not encrypted"),
     (RAW, StoreKey("p", passphrase="a passphrase"), "not the store's")],
)  # fmt: skip
async def test_the_wrong_key_is_refused_and_nothing_touched(
    made_with: StoreKey | None, opened_with: StoreKey | None, why: str
) -> None:
    """FAULTS 30."""
    objects = MemoryObjects()
    store, _ids, _content = await filled(objects, made_with)
    await store.close()
    before = dict(objects.objects)
    with pytest.raises(Refused, match=why):
        await open_store(objects, MemoryIndex(), key=opened_with)
    assert objects.objects == before


async def test_a_key_is_changed_without_touching_the_rest() -> None:
    """FAULTS 30."""
    objects = MemoryObjects()
    store, ids, content = await filled(objects, RAW)
    index = store._index
    await store.close()
    before = {name: data for name, data in objects.objects.items() if not name.startswith("keys/")}
    passphrase = StoreKey("p", passphrase="correct horse battery")
    await change_key(objects, RAW, passphrase)
    assert [name for name in objects.objects if name.startswith("keys/")] == ["keys/0002"]
    assert {name: data for name, data in objects.objects.items() if not name.startswith("keys/")} == before
    with pytest.raises(Refused):
        await open_store(objects, index, key=RAW)
    with pytest.raises(Refused):
        await change_key(objects, RAW, OTHER)
    again = await open_store(objects, index, key=passphrase)
    assert await read_back(again, ids) == content
    await again.close()


async def test_an_interrupted_change_leaves_both_keys_and_an_interrupted_creation_none_of_harm() -> None:
    objects = MemoryObjects()
    objects.objects["keys/0001"] = wrap(bytes(32), b"x" * 16, RAW)
    store, _ids, _content = await filled(objects, RAW)
    await keyring.add_key(objects, store.repository, OTHER)
    await store.close()
    for key in (RAW, OTHER):
        await (await open_store(objects, MemoryIndex(), key=key)).close()


def test_what_a_key_file_may_hold(tmp_path: Path) -> None:
    """FAULTS 30."""
    raw = os.urandom(32)
    assert StoreKey.read(key_file(tmp_path, raw.hex())).raw == raw
    assert StoreKey.read(key_file(tmp_path, base64.b64encode(raw).decode())).raw == raw
    assert StoreKey.read(key_file(tmp_path, "a long passphrase")).passphrase == "a long passphrase"
    for text, mode in (("short", 0o600), ("", 0o600), (raw.hex(), 0o644)):
        with pytest.raises(ConfigInvalid):
            StoreKey.read(key_file(tmp_path, text, mode))
    assert raw.hex() not in repr(StoreKey("k", raw=raw, passphrase=raw.hex()))


@pytest.mark.parametrize(
    "values",
    [{"n": 1 << 30}, {"n": 3}, {"n": 2}, {"r": 1 << 20}, {"p": 1 << 20}, {"salt": ""}, {"n": "x"}, {"kdf": "none"},
     {"sealed": "00"}, {"nonce": 1}, {"version": 2}, {"repository": None}],
)  # fmt: skip
def test_parameters_out_of_bounds_are_refused_before_they_cost_anything(values: dict[str, object]) -> None:
    key = StoreKey("p", passphrase="a passphrase")
    changed = json.loads(wrap(bytes(32), b"r" * 16, key)) | values
    del changed["check"]
    changed["check"] = blake3(keyring._text(changed)).hexdigest()
    with pytest.raises((Damaged, FormatUnknown)):
        unwrap(json.dumps(changed).encode(), "keys/0001", b"r" * 16, key)


# -- upkeep -----------------------------------------------------------------------------------------


async def test_packs_are_rewritten_and_the_catalog_rebuilt_as_they_are_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hvsnap.upkeep.rebuild import Rebuild  # noqa: PLC0415
    from tests import upkeep_kit  # noqa: PLC0415

    real = upkeep_kit.open_store
    monkeypatch.setattr(upkeep_kit, "open_store", lambda objects, index: real(objects, index, key=RAW))
    objects = FusedObjects()
    house = await House.open(tmp_path / "old", objects)
    disks = Disks()
    await disks.add(house, "vda")
    for number in range(40):
        disks.write("vda", number, os.urandom(BLOCK))
    first = await disks.take(house, "vda")
    for number in range(36):
        disks.write("vda", number, bytes(BLOCK))
    await disks.take(house, "vda")
    await disks.delete(house, first)

    async def refuse(_name: str, _holes: object) -> bool:
        return False

    objects.punch = refuse  # type: ignore[method-assign,assignment]
    swept = await house.sweeper.sweep()
    assert swept.rewritten_packs == 1
    await disks.check(house)
    await house.close()
    house = await House.open(tmp_path / "new", objects)
    found = await Rebuild(house.catalog, house.store, StoppedClock()).run()
    assert (found.damaged, found.lost, found.damaged_blocks) == ([], [], 0)
    await disks.check(house)
    await house.close()

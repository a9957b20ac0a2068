"""Stored bytes to blocks: whatever lies in a pack, a wrong block never comes out, no lie allocates memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest
import zstandard
from blake3 import blake3

from hvsnap.errors import Damaged, FormatUnknown
from hvsnap.model import BlockPlace
from hvsnap.store.codec import PROBE_WORDS, Codec, digest_blocks, nonzero_blocks
from hvsnap.store.pack import FLAG_SEALED, FLAG_ZSTD
from tests.store_kit import BLOCK

KEY = bytes(range(32))
TEXT = (b"some text, and again " * BLOCK)[:BLOCK]


@pytest.fixture
def codec() -> Codec:
    return Codec(BLOCK, 1, KEY)


def place(stored: bytes, content: bytes, flags: int) -> BlockPlace:
    return BlockPlace(7, blake3(content, key=KEY).digest(), "packs/ab/x", 64, len(stored), flags)


def frame(content: bytes, **options: bool) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(content)


def test_what_is_compressed_is_restored(codec: Codec) -> None:
    noise = random.Random(1).randbytes(BLOCK)
    batch = codec.compress(memoryview(TEXT + noise + TEXT), [1, 0])
    assert batch.flags == [0, FLAG_ZSTD]
    data = b"".join(batch.pieces)
    assert sum(batch.lengths) == batch.size_bytes == len(data)
    places = [
        BlockPlace(1, blake3(noise, key=KEY).digest(), "p", 1000, batch.lengths[0], 0),
        BlockPlace(2, blake3(TEXT, key=KEY).digest(), "p", 1000 + batch.lengths[0], batch.lengths[1], FLAG_ZSTD),
    ]
    assert codec.restore(memoryview(data), 1000, places) == [noise, TEXT]


@pytest.mark.parametrize(
    "stored",
    [
        b"",
        b"\x28\xb5\x2f\xfd",
        frame(TEXT)[:-1],
        frame(TEXT) + b"x",
        frame(TEXT) + frame(TEXT),
        frame(TEXT, write_content_size=False),
        frame(TEXT[:-1]),
        frame(TEXT + b"x"),
        frame(TEXT * 2),
        frame(TEXT[::-1]),
        frame(b""),
        TEXT,
    ],
    ids=range(12),
)
def test_a_frame_that_is_not_the_block_is_damage(codec: Codec, stored: bytes) -> None:
    with pytest.raises(Damaged) as caught:
        codec.restore(memoryview(stored), 64, [place(stored, TEXT, FLAG_ZSTD)])
    assert "block 7 in packs/ab/x" in caught.value.message


@pytest.mark.parametrize("stored", [TEXT[:-1], TEXT + b"x", TEXT[::-1], b"", bytes(BLOCK)])
def test_raw_content_that_is_not_the_block_is_damage(codec: Codec, stored: bytes) -> None:
    with pytest.raises(Damaged):
        codec.restore(memoryview(stored), 64, [place(stored, TEXT, 0)])


def test_a_decompression_bomb_allocates_nothing(codec: Codec) -> None:
    """FAULTS 30."""
    bomb = frame(bytes(1 << 28))
    assert len(bomb) < BLOCK
    tracemalloc.start()
    try:
        with pytest.raises(Damaged):
            codec.restore(memoryview(bomb), 64, [place(bomb, TEXT, FLAG_ZSTD)])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("flags", [FLAG_SEALED, FLAG_SEALED | FLAG_ZSTD, 0x4, 0x8000])
def test_flags_of_later_releases_are_refused(codec: Codec, flags: int) -> None:
    with pytest.raises(FormatUnknown):
        codec.restore(memoryview(TEXT), 64, [place(TEXT, TEXT, flags)])


def test_a_single_byte_anywhere_makes_a_block_not_zero() -> None:
    data = bytearray(BLOCK * 3)
    step = BLOCK // PROBE_WORDS
    for at in [*range(0, 20), *range(step - 9, step + 9), BLOCK // 2 + 5, *range(BLOCK - 9, BLOCK)]:
        data[BLOCK + at] = 1
        assert nonzero_blocks(memoryview(data), BLOCK) == [1], at
        data[BLOCK + at] = 0
    assert nonzero_blocks(memoryview(data), BLOCK) == []


def test_digests_are_keyed_and_of_the_content() -> None:
    digests = digest_blocks(memoryview(bytes(BLOCK) + TEXT), BLOCK, KEY)
    assert digests == {1: blake3(TEXT, key=KEY).digest()}

"""The repository's configuration object."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hvsnap.errors import BadRequest, Damaged, FormatUnknown
from hvsnap.store.repository import Keys, Repository, compression_level, encode_config, parse_config


@pytest.fixture
def repository() -> Repository:
    return Repository(bytes(range(16)), 65536, bytes(range(32)), "zstd:3")


def changed(config: bytes, **values: Any) -> bytes:
    return json.dumps(json.loads(config) | values).encode()


def test_what_is_encoded_is_parsed(repository: Repository) -> None:
    assert parse_config(encode_config(repository)) == repository


def test_its_form_is_that_of_the_documentation(repository: Repository) -> None:
    """Written out once: a change here is another format version."""
    assert json.loads(encode_config(repository)) == {
        "format": "hvsnap-repository",
        "version": 1,
        "repository": "000102030405060708090a0b0c0d0e0f",
        "block_size": 65536,
        "secret": "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f",
        "compression": "zstd:3",
        "features": [],
        "check": json.loads(encode_config(repository))["check"],
    }
    keys = Keys.derive(bytes(range(32)))
    assert len({keys.block, keys.pack, keys.manifest, bytes(range(32))}) == 4


def test_a_flipped_bit_is_noticed_or_changes_nothing(repository: Repository) -> None:
    config = encode_config(repository)
    unnoticed = 0
    for at in range(len(config)):
        for bit in range(8):
            try:
                parsed = parse_config(config[:at] + bytes([config[at] ^ (1 << bit)]) + config[at + 1 :])
            except (Damaged, FormatUnknown):
                continue
            assert parsed == repository
            unnoticed += 1
    assert unnoticed <= 2 * config.count(b"\n") + config.count(b" "), "white space alone means nothing"


def test_every_length_but_the_whole_is_refused(repository: Repository) -> None:
    config = encode_config(repository).rstrip()
    for length in range(len(config)):
        with pytest.raises(Damaged):
            parse_config(config[:length])
    with pytest.raises(Damaged):
        parse_config(config + b" " * 65536)


@pytest.mark.parametrize(
    "values",
    [
        {"format": "other"},
        {"repository": "00"},
        {"repository": None},
        {"secret": "0" * 63},
        {"secret": "G" * 64},
        {"secret": "0" * 64},
        {"block_size": 131072},
        {"compression": "zstd:4"},
        {"check": "0" * 64},
        {"check": None},
        {"something": "added"},
    ],
)
def test_a_changed_value_is_damage(repository: Repository, values: dict[str, Any]) -> None:
    with pytest.raises(Damaged):
        parse_config(changed(encode_config(repository), **values))


@pytest.mark.parametrize("values", [b"", b"[]", b"null", b"\xff", b"[" * 50000, b"{}", b'"hvsnap-repository"'])
def test_what_is_no_configuration_is_damage(values: bytes) -> None:
    with pytest.raises(Damaged):
        parse_config(values)


def test_a_newer_version_is_told_apart_from_damage(repository: Repository) -> None:
    with pytest.raises(FormatUnknown) as caught:
        parse_config(changed(encode_config(repository), version=2))
    assert "newer" in caught.value.hint


@pytest.mark.parametrize("block_size", [0, 32768, 65537, 98304, 2097152, -65536])
def test_a_block_size_out_of_bounds_is_refused(block_size: int) -> None:
    with pytest.raises(BadRequest):
        Repository.new(block_size, "zstd:1")
    with pytest.raises(Damaged):
        parse_config(encode_config(Repository(bytes(16), block_size, bytes(32))))


@pytest.mark.parametrize("compression", ["", "zstd", "zstd:0", "zstd:20", "zstd:-51", "zstd: 1", "zstd:1 ", "lz4:1"])
def test_an_unknown_compression_is_refused(compression: str) -> None:
    with pytest.raises(BadRequest):
        Repository.new(65536, compression)


def test_levels() -> None:
    assert [compression_level(f"zstd:{level}") for level in (1, 19, -5)] == [1, 19, -5]


def test_new_repositories_share_nothing() -> None:
    one, two = (Repository.new(65536, "zstd:1") for _ in range(2))
    assert one.id != two.id
    assert one.secret != two.secret

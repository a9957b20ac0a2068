"""Which file system of a disk is meant, and what is said where none can be."""

from __future__ import annotations

import pytest

from hvsnap.errors import BadRequest, Failed, HvsnapError, NotFound, Refused
from hvsnap.guestfiles.session import choose, trouble

DISK = {"/dev/sda1": "ext4", "/dev/sda2": "swap", "/dev/sda3": "crypto_LUKS", "/dev/sda4": "unknown"}


def test_the_only_one_is_meant_and_of_several_the_one_that_is_wanted() -> None:
    assert choose(DISK, "") == "/dev/sda1"
    assert choose({"/dev/sda": "ext4"}, "/dev/sda") == "/dev/sda"
    several = DISK | {"/dev/vg/one": "xfs"}
    assert choose(several, "/dev/vg/one") == "/dev/vg/one"
    assert choose(several, "") == "", "a system has to tell"


@pytest.mark.parametrize(
    ("kinds", "wanted", "kind", "words", "hint"),
    [
        (DISK, "/dev/sda3", Refused, "only the guest has the key", "disk-create"),
        ({"/dev/sda": "BitLocker"}, "", Refused, "only the guest has the key", "disk-create"),
        (DISK, "/dev/sda2", BadRequest, "holds no files (swap)", "--filesystem /dev/sda1"),
        (DISK, "/dev/sdz", NotFound, "no file system /dev/sdz", "--filesystem /dev/sda1"),
        ({"/dev/sda": "unknown"}, "/dev/sdz", NotFound, "no file system /dev/sdz", "none"),
        ({"/dev/sda": "unknown"}, "", Refused, "no file system that can be read", "snapshot-serve"),
        ({}, "", Refused, "no file system that can be read", "snapshot-serve"),
    ],
)
def test_what_cannot_be_opened_says_why(
    kinds: dict[str, str], wanted: str, kind: type[HvsnapError], words: str, hint: str
) -> None:
    with pytest.raises(kind) as raised:
        choose(kinds, wanted)
    assert words in raised.value.message
    assert hint in raised.value.hint


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("lstatns: /x: No such file or directory", NotFound),
        ("lstatns: /x/y: Not a directory", BadRequest),
        ("download: /x: Input/output error", Failed),
        ("something else", Failed),
    ],
)
def test_what_libguestfs_says_becomes_an_error_with_a_next_step(said: str, kind: type[HvsnapError]) -> None:
    told = trouble("/x", RuntimeError(said))
    assert type(told) is kind
    assert "/x" in told.message
    assert told.hint

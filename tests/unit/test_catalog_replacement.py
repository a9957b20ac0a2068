"""What a new catalog does to the old ones whose place it takes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hvsnap.catalog.replacement import NAME, Replacement


def replace(state: Path, content: bytes) -> Path | None:
    replacement = Replacement(state)
    replacement.directory.mkdir()
    (replacement.directory / NAME).write_bytes(content)
    return replacement.put_in_place()


def test_every_replaced_catalog_is_kept_with_its_log_even_when_it_was_replaced_in_the_same_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "gmtime", lambda: time.struct_time((2026, 1, 2, 3, 4, 5, 4, 2, 0)))
    assert replace(tmp_path, b"0") is None
    for number in range(1, 4):
        (tmp_path / f"{NAME}-wal").write_bytes(b"log of %d" % (number - 1))
        kept = replace(tmp_path, b"%d" % number)
        assert kept is not None
        assert kept.read_bytes() == b"%d" % (number - 1)
    assert (tmp_path / NAME).read_bytes() == b"3"
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != NAME} == {
        f"{NAME}.20260102T030405Z{suffix}{end}": content
        for number, suffix in enumerate(("", "-2", "-3"))
        for end, content in (("", b"%d" % number), ("-wal", b"log of %d" % number))
    }

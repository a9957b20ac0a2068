"""What a new catalog does to the old ones whose place it takes."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvsnap.catalog.replacement import NAME, Replacement
from hvsnap.errors import CatalogFailed
from tests.upkeep_kit import Killed


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


@pytest.mark.parametrize("fault", [Killed(), OSError(5, "Input/output error")], ids=["killed", "failing"])
@pytest.mark.parametrize("number", range(10))
def test_interrupted_anywhere_there_is_the_old_catalog_with_its_log_or_none_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fault: BaseException
) -> None:
    (tmp_path / NAME).write_bytes(b"old")
    (tmp_path / f"{NAME}-wal").write_bytes(b"log")
    left = number

    def interrupted(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise fault
            return call(*arguments, **options)

        return made

    for name in ("link", "unlink", "replace"):
        monkeypatch.setattr(os, name, interrupted(getattr(os, name)))
    monkeypatch.setattr(Replacement, "_sync", interrupted(Replacement._sync))
    with contextlib.suppress(Killed, CatalogFailed):
        replace(tmp_path, b"new")
    now = (tmp_path / NAME).read_bytes() if (tmp_path / NAME).exists() else None
    assert now in (b"old", b"new") or (now is None and isinstance(fault, Killed))
    if now == b"old":
        assert (tmp_path / f"{NAME}-wal").read_bytes() == b"log"
    else:
        (kept,) = tmp_path.glob(f"{NAME}.*Z")
        assert (kept.read_bytes(), Path(f"{kept}-wal").read_bytes()) == (b"old", b"log")
    if now == b"new":
        assert not (tmp_path / f"{NAME}-wal").exists()

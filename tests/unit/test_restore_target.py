"""What is known of a place before something is written there: whether it is the same file, and has room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvsnap.errors import NoSpace
from hvsnap.restore.target import check_growth, file_identity
from tests.store_kit import skip_unless_root

MIB = 1 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    skip_unless_root()
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_file_made_anew_is_another_one_even_with_the_same_number(workdir: Path) -> None:
    path = workdir / "a"
    path.write_bytes(b"one")
    first = file_identity(str(path))
    path.write_bytes(b"two")
    assert file_identity(str(path)) == first != ""
    path.unlink()
    path.write_bytes(b"three")
    assert file_identity(str(path)) != first
    assert [file_identity(str(one)) for one in (workdir, workdir / "none")] == ["", ""]


def test_what_goes_into_holes_must_find_room(small: Path) -> None:
    image = small / "a.raw"
    with image.open("wb") as file:
        file.truncate(64 * MIB)
        file.write(bytes(4 * MIB))
    check_growth(str(image), 4 * MIB, 8 * MIB)
    with pytest.raises(NoSpace, match="would grow by") as caught:
        check_growth(str(image), 4 * MIB, 13 * MIB)
    assert "nothing was written" in caught.value.hint


def test_room_that_an_image_has_already_is_reused(small: Path) -> None:
    """A preallocated image fills its device, and holds nothing."""
    image = small / "a.raw"
    with image.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 15 * MIB)
    check_growth(str(image), 0, 15 * MIB)
    with pytest.raises(NoSpace):
        check_growth(str(image), 4 * MIB, 13 * MIB)

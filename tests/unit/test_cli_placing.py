"""Where copies out of a snapshot go: as with cp(1), but never over what is there, and nothing half is left."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvsnap.cli.files import Place, place_of
from hvsnap.cli.placing import Copies, plan_copies
from hvsnap.errors import BadRequest, NotFound, TargetExists

ID = "s-mfrggzdfmztw"


def made(copies: Copies, *contents: str) -> None:
    """Put something into the passing directory for each source, and give it its name."""
    for (_path, name), content in zip(copies.sources, contents, strict=True):
        (copies.passing / name).write_text(content)
    copies.settle()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_places_in_snapshots() -> None:
    assert place_of(ID) == Place(ID, "")
    assert place_of(f"{ID}:/") == Place(ID, "/")
    assert place_of(f"{ID}:/a:b/c ") == Place(ID, "/a:b/c ")
    for wrong in ("", ":/etc", f"{ID}:", f"{ID}:etc", f"{ID}:/a/../b", f"{ID}:/."):
        with pytest.raises(BadRequest):
            place_of(wrong)


def test_a_copy_goes_into_a_directory_or_to_a_new_name(tmp_path: Path) -> None:
    with plan_copies(ID, ["/etc/fstab", "/etc/hosts/"], str(tmp_path), force=False) as copies:
        assert copies.targets == (tmp_path / "fstab", tmp_path / "hosts")
        assert copies.passing.stat().st_mode & 0o777 == 0o700
        made(copies, "one", "two")
    assert (tmp_path / "hosts").read_text() == "two"
    with plan_copies(ID, ["/etc/fstab"], str(tmp_path / "new"), force=False) as copies:
        made(copies, "three")
    assert (tmp_path / "new").read_text() == "three"
    with plan_copies(ID, ["/"], f"{tmp_path}/", force=False) as copies:
        assert copies.targets == (tmp_path / ID,)
        (copies.passing / "0").mkdir()
        copies.settle()
    assert names(tmp_path) == ["fstab", "hosts", "new", ID]


def test_what_exists_stays_unless_forced_and_a_directory_always(tmp_path: Path) -> None:
    (tmp_path / "fstab").symlink_to("nowhere")
    (tmp_path / "hosts").mkdir()
    with pytest.raises(TargetExists), plan_copies(ID, ["/etc/fstab"], str(tmp_path), force=False):
        pass
    for force in (False, True):
        with pytest.raises(TargetExists, match="directory"), plan_copies(ID, ["/a/hosts"], str(tmp_path), force=force):
            pass
    with plan_copies(ID, ["/etc/fstab"], str(tmp_path), force=True) as copies:
        made(copies, "new")
    assert not (tmp_path / "fstab").is_symlink()
    assert not os.path.lexists(tmp_path / "nowhere")
    assert names(tmp_path) == ["fstab", "hosts"]


def test_what_comes_there_meanwhile_stays(tmp_path: Path) -> None:
    with plan_copies(ID, ["/a"], str(tmp_path / "new"), force=False) as copies:
        (tmp_path / "new").write_text("another's")
        with pytest.raises(TargetExists):
            made(copies, "ours")
    assert (tmp_path / "new").read_text() == "another's"
    with plan_copies(ID, ["/b"], str(tmp_path), force=False) as copies:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "another's").touch()
        (copies.passing / "0").mkdir()
        with pytest.raises(TargetExists):
            copies.settle()
    assert names(tmp_path / "b") == ["another's"]
    assert names(tmp_path) == ["b", "new"]


@pytest.fixture
def nobody(workdir: Path) -> Iterator[Path]:
    """A directory of a user without rights, who we are."""
    os.chown(workdir, 65534, 65534)
    before = os.geteuid()
    os.seteuid(65534)
    yield workdir
    os.seteuid(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_directories_that_their_owner_may_not_write_to_are_moved_and_removed(nobody: Path) -> None:
    def make(copies: Copies) -> None:
        closed = copies.passing / "0" / "closed"
        closed.mkdir(parents=True)
        (closed / "file").touch()
        (copies.passing / "0" / "up").symlink_to(nobody)
        closed.chmod(0)
        (copies.passing / "0").chmod(0o500)

    with plan_copies(ID, ["/a"], str(nobody), force=False) as copies:
        make(copies)
    assert names(nobody) == []
    with plan_copies(ID, ["/a"], str(nobody), force=False) as copies:
        make(copies)
        copies.settle()
    assert names(nobody) == ["a"]
    assert names(nobody / "a") == ["closed", "up"]
    assert stat.S_IMODE((nobody / "a").stat().st_mode) == 0o500


def test_targets_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for kind, paths, target in [
        (NotFound, ["/a", "/b"], str(tmp_path / "none")),
        (NotFound, ["/a"], f"{tmp_path}/none/"),
        (NotFound, ["/a"], str(tmp_path / "none" / "a")),
        (BadRequest, ["/a/x", "/b/x"], str(tmp_path)),
        (BadRequest, ["/a"], f"{ID}:/tmp"),
        (BadRequest, ["/a"], ""),
    ]:
        with pytest.raises(kind), plan_copies(ID, paths, target, force=False):
            pass
    assert names(tmp_path) == []

"""Files of a guest on the host: as they were, and nowhere but where they belong, whatever the stream says."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvsnap.errors import Failed
from hvsnap.guestfiles.unpack import Traits, Tree, parts_of, unpack

NANO = 1_000_000_000


class Stream:
    """A tar stream, member by member, as an honest or a dishonest guest would have it."""

    def __init__(self) -> None:
        self._out = io.BytesIO()
        self._tar = tarfile.TarFile(
            fileobj=self._out, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape"
        )
        self.add("./", tarfile.DIRTYPE, mode=0o755)

    def add(self, name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", **fields: object) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.size, member.mode, member.mtime = kind, len(content), 0o644, 1_700_000_000
        for field, value in fields.items():
            setattr(member, field, value)
        self._tar.addfile(member, io.BytesIO(content))

    def read(self) -> io.BytesIO:
        self._tar.close()
        self._out.seek(0)
        return self._out


@pytest.fixture
def stream() -> Stream:
    return Stream()


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    (tmp_path / "into").mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "precious").write_text("precious")
    one = Tree(str(tmp_path / "into"))
    yield one
    one.close()
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["precious"]
    assert (tmp_path / "outside" / "precious").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into", "outside"]


def got(stream: Stream, tree: Tree) -> None:
    unpack(stream.read(), tree, ["x"], "/x")


def test_files_directories_and_links_are_as_they_were(stream: Stream, tree: Tree, tmp_path: Path) -> None:
    odd = b"not \xff utf-8\n-rf".decode(errors="surrogateescape")
    stream.add("./closed", tarfile.DIRTYPE, mode=0o500, mtime=1_600_000_000)
    stream.add("./closed/a", content=b"a" * 100_000, mode=0o640, uid=1234, gid=4321)
    stream.add(f"./closed/{odd}", content=b"odd")
    stream.add("./closed/" + "n" * 255, content=b"long")
    stream.add("./passwd", tarfile.SYMTYPE, linkname="/etc/passwd")
    stream.add("./up", tarfile.SYMTYPE, linkname="../../../outside")
    stream.add("./again", tarfile.LNKTYPE, linkname="./closed/a")
    got(stream, tree)
    root = tmp_path / "into" / "x"
    assert (root / "closed" / "a").read_bytes() == b"a" * 100_000
    assert (root / "closed" / odd).read_bytes() == b"odd"
    assert (root / "closed" / ("n" * 255)).read_bytes() == b"long"
    assert os.readlink(root / "passwd") == "/etc/passwd"
    assert os.readlink(root / "up") == "../../../outside"
    assert (root / "again").samefile(root / "closed" / "a")
    seen = (root / "closed").lstat()
    assert (stat.S_IMODE(seen.st_mode), seen.st_mtime) == (0o500, 1_600_000_000)
    seen = (root / "closed" / "a").lstat()
    assert (stat.S_IMODE(seen.st_mode), seen.st_mtime) == (0o640, 1_700_000_000)
    if os.geteuid() == 0:
        assert (seen.st_uid, seen.st_gid) == (1234, 4321)
    tally = tree.tally
    assert (tally.files, tally.directories, tally.symlinks, tally.copied_bytes) == (4, 2, 2, 100_007)


def test_what_the_host_would_obey_is_left_out_and_told(stream: Stream, tree: Tree, tmp_path: Path) -> None:
    stream.add("./null", tarfile.CHRTYPE, devmajor=1, devminor=3)
    stream.add("./disk", tarfile.BLKTYPE, devmajor=254)
    stream.add("./pipe", tarfile.FIFOTYPE)
    stream.add("./su", content=b"#!", mode=0o6755)
    stream.add("./shared", tarfile.DIRTYPE, mode=0o2775)
    got(stream, tree)
    root = tmp_path / "into" / "x"
    assert sorted(path.name for path in root.iterdir()) == ["shared", "su"]
    assert stat.S_IMODE((root / "su").lstat().st_mode) == 0o755
    assert tree.tally.skipped == [
        ("/x/null", "character device"),
        ("/x/disk", "block device"),
        ("/x/pipe", "fifo"),
    ]
    assert (tree.tally.left_out, tree.tally.disarmed) == (3, 1)


@pytest.mark.parametrize("name", ["../outside/new", "./a/../../../outside/new", "./..", "/../outside/new"])
def test_names_that_lead_upwards_are_refused(stream: Stream, tree: Tree, name: str) -> None:
    stream.add("./a", tarfile.DIRTYPE)
    stream.add(name, content=b"x")
    with pytest.raises(Failed, match="outside"):
        got(stream, tree)


def test_an_absolute_name_lies_within(stream: Stream, tree: Tree, tmp_path: Path) -> None:
    stream.add("/etc", tarfile.DIRTYPE)
    stream.add("//etc//./passwd", content=b"guest's")
    got(stream, tree)
    assert (tmp_path / "into" / "x" / "etc" / "passwd").read_bytes() == b"guest's"


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])
def test_nothing_goes_through_a_symbolic_link(stream: Stream, tree: Tree, tmp_path: Path, kind: bytes) -> None:
    stream.add("./a", tarfile.SYMTYPE, linkname=str(tmp_path / "outside"))
    stream.add("./a/new", kind, content=b"x" if kind == tarfile.REGTYPE else b"", linkname="x")
    with pytest.raises(Failed, match=r"Not a directory|symbolic links"):
        got(stream, tree)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE])
def test_nothing_is_written_over_not_even_a_link_to_it(stream: Stream, tree: Tree, tmp_path: Path, kind: bytes) -> None:
    stream.add("./a", tarfile.SYMTYPE, linkname=str(tmp_path / "outside" / "precious"))
    stream.add("./a", kind, content=b"x" if kind == tarfile.REGTYPE else b"")
    with pytest.raises(Failed, match="exists"):
        got(stream, tree)


@pytest.mark.parametrize("other", ["./a/precious", "../../outside/precious", "./nowhere"])
def test_no_other_name_is_given_to_what_lies_outside(stream: Stream, tree: Tree, tmp_path: Path, other: str) -> None:
    stream.add("./a", tarfile.SYMTYPE, linkname=str(tmp_path / "outside"))
    stream.add("./b", tarfile.LNKTYPE, linkname=other)
    with pytest.raises(Failed):
        got(stream, tree)


def test_a_link_to_a_link_stays_one(stream: Stream, tree: Tree, tmp_path: Path) -> None:
    stream.add("./a", tarfile.SYMTYPE, linkname=str(tmp_path / "outside" / "precious"))
    stream.add("./b", tarfile.LNKTYPE, linkname="./a")
    got(stream, tree)
    assert (tmp_path / "into" / "x" / "b").is_symlink()


@pytest.mark.parametrize("root", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_the_root_of_a_directory_is_one(tree: Tree, root: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("./")
        member.type, member.linkname = root, "/etc"
        tar.addfile(member)
    out.seek(0)
    with pytest.raises(Failed):
        unpack(out, tree, ["x"], "/x")


def test_a_stream_that_breaks_off_or_is_none_fails(tree: Tree, stream: Stream) -> None:
    stream.add("./a", content=b"x" * 100_000)
    data = stream.read().getvalue()
    for number, wrong in enumerate(
        (data[:50_000], data[:100_352], data[:101_376], b"\xff" * 10_240, data[:512] + os.urandom(10_240))
    ):
        with pytest.raises(Failed):
            unpack(io.BytesIO(wrong), tree, [f"x{number}"], "/x")


def test_times_that_no_file_can_have_do_no_harm(stream: Stream, tree: Tree, tmp_path: Path) -> None:
    stream.add("./a", content=b"x", mtime=2**70)
    stream.add("./b", content=b"x", mtime=-1, uid=2**31, gid=2**32 - 1)
    got(stream, tree)
    assert (tmp_path / "into" / "x" / "b").lstat().st_mtime == -1


def test_zeroes_take_no_space(tree: Tree, tmp_path: Path) -> None:
    content = bytes(3 << 20) + b"end" + bytes(1 << 20)
    tree.file(["a"], Traits(0o600, os.geteuid(), os.getegid(), 5 * NANO), io.BytesIO(content))
    seen = (tmp_path / "into" / "a").lstat()
    assert (tmp_path / "into" / "a").read_bytes() == content
    assert (seen.st_size, seen.st_mtime) == (len(content), 5)
    assert seen.st_blocks * 512 <= 1 << 17


def test_parts_of_names() -> None:
    assert parts_of("./") == parts_of(".") == parts_of("/") == ()
    assert parts_of("./a//b/.") == ("a", "b")
    assert parts_of("./...") == ("...",)

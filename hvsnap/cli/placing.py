"""Where copies go on this host: checked first, made in a directory of their own, and given their names at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvsnap.errors import BadRequest, Failed, NotFound, TargetExists

PASSING = ".hvsnap-copy-"
"""What the name of the directory begins with in which copies are made, beside their target."""

_IN_A_SNAPSHOT = re.compile(r"[si]-[a-z2-7]{12}:")


@dataclass(frozen=True, slots=True)
class Copies:
    """Each path of ``paths`` is copied to a name in ``passing``, and from there to its place in ``targets``."""

    paths: tuple[str, ...]
    targets: tuple[Path, ...]
    passing: Path
    force: bool

    @property
    def sources(self) -> list[tuple[str, str]]:
        """Path and passing name of each."""
        return [(path, str(number)) for number, path in enumerate(self.paths)]

    def settle(self) -> None:
        """Give all of them their names. Raises :class:`TargetExists` for what came there meanwhile."""
        for (_path, name), target in zip(self.sources, self.targets, strict=True):
            _settle(self.passing / name, target, force=self.force)


@contextlib.contextmanager
def plan_copies(snapshot: str, paths: Sequence[str], target: str, *, force: bool) -> Iterator[Copies]:
    """Give where copies go: as with cp(1), into ``target`` if that is a directory, else to it. Nothing half is left.

    Raises :class:`BadRequest`, :class:`NotFound` and :class:`TargetExists` before anything is made.
    """
    if _IN_A_SNAPSHOT.match(target):
        raise BadRequest("nothing is copied into a snapshot", hint="the last argument is a path on this host")
    if not target:
        raise BadRequest("the target is empty", hint="name a directory, or . for this one")
    names = [posixpath.basename(path.rstrip("/")) or snapshot for path in paths]
    inside = os.path.isdir(target)
    if not inside and (len(paths) > 1 or target.endswith("/")):
        raise NotFound(f"there is no directory {target}", hint="make it first")
    if len(set(names)) < len(names):
        raise BadRequest("two of the sources have the same name", hint="copy them to different directories")
    # The last part itself may be a symbolic link, which is then what is there.
    places = [Path(os.path.abspath(os.path.join(target, name) if inside else target)) for name in names]
    for place in places:
        _check_free(place, force=force)
    passing = _passing(places[0].parent)
    try:
        yield Copies(tuple(paths), tuple(places), passing, force)
    finally:
        _remove(passing)


def _check_free(place: Path, *, force: bool) -> None:
    if place.is_dir() and not place.is_symlink():
        hint = "choose another path, or move it away: a directory is never written over"
        raise TargetExists(f"{place} is a directory that exists", hint=hint)
    if os.path.lexists(place) and not force:
        raise TargetExists(f"{place} exists")


def _passing(directory: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=PASSING, dir=directory))
    except FileNotFoundError as error:
        raise NotFound(f"there is no directory {directory}", hint="make it first") from error
    except OSError as error:
        raise Failed(f"{directory}: {error.strerror}", hint="choose a directory that you may write to") from error


def _settle(passing: Path, target: Path, *, force: bool) -> None:
    """Move what was copied to its name, over a file only with ``force``, and never over a directory with content."""
    try:
        if passing.is_dir() and not passing.is_symlink():
            _rename_directory(passing, target)
            return
        if force:
            os.rename(passing, target)
            return
        try:
            # A rename would write over what came there since we looked.
            os.link(passing, target, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            _check_free(target, force=False)  # a file system without links
            os.rename(passing, target)
    except (FileExistsError, IsADirectoryError, NotADirectoryError) as error:
        raise TargetExists(f"{target} has come to exist meanwhile") from error
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise TargetExists(f"{target} has come to exist meanwhile") from error
        raise Failed(f"{target}: {error.strerror}", hint="see what is there") from error


def _rename_directory(passing: Path, target: Path) -> None:
    """Move a directory, also one that its owner may not write to: whoever is not root then has to, for a moment."""
    mode = stat.S_IMODE(passing.lstat().st_mode)
    passing.chmod(mode | 0o700)
    descriptor = os.open(passing, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.rename(passing, target)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def _remove(directory: Path) -> None:
    """Remove what is left, whatever permissions a guest gave its directories. Nobody else can enter it."""
    try:
        shutil.rmtree(directory)
    except OSError:
        for path, names, _files in os.walk(directory):
            for name in names:
                below = Path(path, name)
                if not below.is_symlink():
                    below.chmod(0o700)
        shutil.rmtree(directory, ignore_errors=True)

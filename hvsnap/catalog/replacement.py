"""A catalog that is made beside the present one, and then takes its place."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path

from hvsnap.errors import CatalogFailed

NAME = "catalog.db"
ENDS = ("", "-wal", "-shm")
"""Of the catalog's file and its log's."""


class Replacement:
    """The directory of a new catalog. Methods block: call them in a thread; the state directory's lock is held."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self.directory = state_dir / "rebuild"
        """What :meth:`Catalog.open` is given; it belongs to nobody else."""

    def clear(self) -> None:
        """Remove what an interrupted rebuild left. Raises :class:`CatalogFailed`."""
        try:
            if self.directory.exists():
                shutil.rmtree(self.directory)
        except OSError as error:
            raise _failed(self.directory, error) from error

    def put_in_place(self) -> Path | None:
        """Let the new catalog, closed, take the old one's place; return where the old one is kept, if there was one.

        Killed anywhere, there is the old catalog with its log, none, or the new one; and what is kept has its log.
        """
        new, old = self.directory / NAME, self._state_dir / NAME
        try:
            descriptor = os.open(new, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            kept = self._keep(old)
            try:
                for end in ENDS:
                    # The file before its log: without that it would lack what was committed last, and nobody would
                    # notice. The log must go, too: beside the new file it would be taken for that one's.
                    Path(f"{old}{end}").unlink(missing_ok=True)
                self._sync()
                os.replace(new, old)
            except OSError:
                self._put_back(kept, old)
                raise
            self._sync()
            shutil.rmtree(self.directory)
        except OSError as error:
            raise _failed(old, error) from error
        return kept

    def _keep(self, old: Path) -> Path | None:
        """Give the old catalog and its log a second name, and return it; None if there is no old one."""
        if not old.exists():
            return None
        kept = self._free_name()
        for end in ENDS:
            if Path(f"{old}{end}").exists():
                os.link(f"{old}{end}", f"{kept}{end}")
        self._sync()
        return kept

    def _put_back(self, kept: Path | None, old: Path) -> None:
        """Let the old catalog be where it was; its log first, as above."""
        for end in reversed(ENDS):
            if kept is not None and Path(f"{kept}{end}").exists() and not Path(f"{old}{end}").exists():
                os.link(f"{kept}{end}", f"{old}{end}")

    def _free_name(self) -> Path:
        """Where the old catalog can be kept: named by the second, and numbered when one was kept in it already."""
        stamp = self._state_dir / f"{NAME}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        names = itertools.chain([stamp], (Path(f"{stamp}-{number}") for number in itertools.count(2)))
        return next(name for name in names if not any(Path(f"{name}{end}").exists() for end in ENDS))

    def _sync(self) -> None:
        descriptor = os.open(self._state_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _failed(path: Path, error: OSError) -> CatalogFailed:
    hint = "check the file system and the permissions of state_dir; the present catalog was left as it is"
    return CatalogFailed(f"{path}: {error.strerror}", hint=hint)

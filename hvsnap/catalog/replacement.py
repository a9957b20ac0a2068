"""A catalog that is made beside the present one, and then takes its place."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path

from hvsnap.errors import CatalogFailed

NAME = "catalog.db"
LOGS = ("-wal", "-shm")


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

        The last step is one rename: killed before it, the old catalog is where it was, or none is.
        """
        new, old = self.directory / NAME, self._state_dir / NAME
        try:
            kept = self._free_name()
            descriptor = os.open(new, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            was_there = old.exists()
            if was_there:
                os.link(old, kept)
            for end in LOGS:
                # The old one's log must go with it: beside the new file it would be taken for that one's.
                log = self._state_dir / f"{NAME}{end}"
                if log.exists():
                    os.replace(log, f"{kept}{end}")
            os.replace(new, old)
            self._sync()
            shutil.rmtree(self.directory)
        except OSError as error:
            raise _failed(old, error) from error
        return kept if was_there else None

    def _free_name(self) -> Path:
        """Where the old catalog can be kept: named by the second, and numbered when one was kept in it already."""
        stamp = self._state_dir / f"{NAME}.{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
        names = itertools.chain([stamp], (Path(f"{stamp}-{number}") for number in itertools.count(2)))
        return next(name for name in names if not any(Path(f"{name}{end}").exists() for end in ("", *LOGS)))

    def _sync(self) -> None:
        descriptor = os.open(self._state_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _failed(path: Path, error: OSError) -> CatalogFailed:
    hint = "check the file system and the permissions of state_dir; the present catalog was left as it is"
    return CatalogFailed(f"{path}: {error.strerror}", hint=hint)

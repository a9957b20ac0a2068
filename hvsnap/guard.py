"""What keeps a guest from starting while its disk is half of one state and half of another (SERVICE 6.5).

Markers are small files, ``STATE_DIR/guard/UUID.DISK.WHY``, which libvirt's hook (hooks/qemu.d/50-hvsnap) reads by
itself: it must decide while the daemon is dead, and before one that has just been started has recovered. So a marker is
durable before the first write that it guards, and goes when the last one is durable. The name alone bars the guest; the
content (JSON) is what its owner is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Container, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from hvsnap.errors import Failed, HvsnapError, NoSpace
from hvsnap.model import Disk, DiskId, GuestUuid

DIRECTORY = "guard"
REFUSED = "held-back.json"
"""Names of guests that the hook has kept from starting, in the state directory."""

REFUSED_MAX = 256
ROLLBACK = "rollback"
OVERLAY = "overlay"

_NAME = re.compile(r"(?P<uuid>[0-9A-Za-z-]{1,64})\.(?P<disk>[0-9A-Za-z-]{1,64})\.(?P<why>[a-z]{1,16})")


@dataclass(frozen=True, slots=True)
class Bar:
    """Why a guest may not start.

    ``rollback``: its disk is being set back to ``snapshot``. ``overlay``: its newest writes are in ``overlay``, so that
    it may start from that, and not from ``image``.
    """

    guest_uuid: GuestUuid
    guest: str
    disk: DiskId
    target: str
    image: str
    why: str
    snapshot: str = ""
    overlay: str = ""

    @classmethod
    def of(cls, disk: Disk, why: str, **more: str) -> Bar:
        """Return what bars the guest of a disk."""
        return cls(disk.guest_uuid, disk.guest_name, disk.id, disk.target, disk.source, why, **more)

    @property
    def name(self) -> str:
        """The marker's name."""
        return f"{self.guest_uuid}.{self.disk}.{self.why}"


class StartGuard:
    """The markers of one state directory. Every method is durable on return, and safe to repeat.

    Raises :class:`NoSpace` and :class:`Failed`.
    """

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / DIRECTORY
        # In turn: what is removed as over was looked up before, and whoever bars a guest later comes later.
        self._turn = asyncio.Lock()
        self.on_lift: list[Callable[[], None]] = []
        """Called when guests may start that were barred."""

    async def bar(self, bar: Bar) -> None:
        """Keep a guest from starting from now on."""
        with _explained(bar.name, hint="nothing was touched; check `state_dir` in the configuration"):
            async with self._turn:
                await asyncio.to_thread(self._write, bar)

    async def lift(self, disk: DiskId, why: str) -> None:
        """Let the disk's guest start again, as far as this disk and reason are concerned."""
        hint = f"remove {self._directory}/*.{disk}.{why}: until then its guest does not start"
        with _explained(disk, hint=hint):
            async with self._turn:
                await asyncio.to_thread(self._remove, lambda one, reason: one == disk and reason == why)
        self._tell_lifted()

    async def lift_all_but(self, disks: Container[str], why: str) -> None:
        """Remove the markers that a crash has left of what is over, or never began."""
        with _explained("what is over", hint=f"check {self._directory}"):
            async with self._turn:
                await asyncio.to_thread(self._remove, lambda one, reason: one not in disks and reason == why)
        self._tell_lifted()

    async def barred(self) -> list[str]:
        """Return the names of all markers."""
        return sorted(await asyncio.to_thread(self._names))

    # -- who was refused --------------------------------------------------------------------------

    async def refused(self) -> list[str]:
        """Return the names of guests that were kept from starting and not forgotten since, oldest first."""
        return await asyncio.to_thread(self._refused)

    async def note_refused(self, guest: str) -> None:
        """Remember that a guest was kept from starting; of more than :data:`REFUSED_MAX` the newest."""
        with _explained(guest, hint=f"check {self._directory}"):
            async with self._turn:
                names = [one for one in await asyncio.to_thread(self._refused) if one != guest]
                await asyncio.to_thread(self._keep, self._directory.parent / REFUSED, [*names, guest][-REFUSED_MAX:])

    async def forget_refused(self, guest: str) -> None:
        """Forget it again."""
        with _explained(guest, hint=f"check {self._directory}"):
            async with self._turn:
                names = [one for one in await asyncio.to_thread(self._refused) if one != guest]
                await asyncio.to_thread(self._keep, self._directory.parent / REFUSED, names)

    def _tell_lifted(self) -> None:
        for told in self.on_lift:
            told()

    # -- blocking ---------------------------------------------------------------------------------

    def _refused(self) -> list[str]:
        try:
            told = json.loads((self._directory.parent / REFUSED).read_bytes())
        except (OSError, ValueError, RecursionError):
            return []  # it says who is to be started, and nobody is started on a guess
        return [one for one in told if isinstance(one, str)] if isinstance(told, list) else []

    def _write(self, bar: Bar) -> None:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        _sync(self._directory.parent)
        self._keep(self._directory / bar.name, asdict(bar))

    def _keep(self, path: Path, content: object) -> None:
        """Write a file, durably, whole or not at all."""
        passing = path.parent / f".{path.name}.new"
        fd = os.open(passing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, json.dumps(content).encode())
            os.fsync(fd)
        except BaseException:
            passing.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        passing.rename(path)
        _sync(path.parent)

    def _remove(self, wanted: Callable[[str, str], bool]) -> None:
        gone = False
        for name in self._names():
            found = _NAME.fullmatch(name)
            if found is not None and wanted(found["disk"], found["why"]):
                (self._directory / name).unlink(missing_ok=True)
                gone = True
        if gone:
            _sync(self._directory)

    def _names(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return [name for name in os.listdir(self._directory) if _NAME.fullmatch(name)]
        return []


@contextlib.contextmanager
def _explained(what: str, hint: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind: type[HvsnapError] = NoSpace if error.errno in (errno.ENOSPC, errno.EDQUOT) else Failed
        raise kind(f"the start guard of {what}: {error.strerror or error}", hint=hint) from error


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""What the rooms ask of each other, as protocols: adapters implement them, use cases take them.

No protocol here knows libvirt, SQLite, a file system or MQTT; those live in the adapters.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from hvsnap.errors import HvsnapError
from hvsnap.instant import Ready, Span, alone
from hvsnap.model import Bitmap, BlockPlace, DiskActivity, Event, GuestUuid, GuestView, Progress, SnapshotId
from hvsnap.secret import Passphrase

UInt64Array = npt.NDArray[np.uint64]


class Clock(Protocol):
    """Tells the time; tests bring their own."""

    def now(self) -> float:
        """Return seconds since the epoch, UTC."""
        ...

    def monotonic(self) -> float:
        """Return seconds since some moment, that nobody sets."""
        ...


# -- objects --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """Name and size of one object."""

    name: str
    size_bytes: int


class ObjectWriter(Protocol):
    """An object being written. It exists for nobody before :meth:`commit` returned."""

    async def write(self, *pieces: bytes | memoryview) -> None:
        """Append bytes, piece after piece."""
        ...

    async def commit(self) -> None:
        """Make it durable and visible, all or nothing; an existing object stays: :class:`ObjectExists`."""
        ...

    async def abort(self) -> None:
        """Forget what was written. Safe to call at any time, also after a failed commit."""
        ...


class ObjectStore(Protocol):
    """Immutable objects under strict names: ``[a-z0-9][a-z0-9._-]*`` parts joined by ``/``.

    Raises :class:`~hvsnap.errors.NoSpace`, :class:`~hvsnap.errors.StoreFailed`, and
    :class:`~hvsnap.errors.NotFound` for an object that is not there.
    """

    object_bytes_best: int
    """The largest object that this store takes in one go; what can be cut into objects is not cut larger."""
    reads_at_once: int
    """How many parts of objects, of some MiB each, are best read side by side."""

    async def get(self, name: str) -> bytes:
        """Return a whole object (small ones: configuration, headers)."""
        ...

    async def get_range(self, name: str, start: int, length: int) -> bytes:
        """Return exactly ``length`` bytes from ``start``; fewer in the object is :class:`StoreFailed`."""
        ...

    async def put(self, name: str, data: bytes) -> None:
        """Write a small object, durable on return; an existing object stays: :class:`ObjectExists`."""
        ...

    async def writer(self, name: str) -> ObjectWriter:
        """Start a large object."""
        ...

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        """Yield the objects below ``prefix`` (whole parts; empty: all), in order of their names."""
        ...

    async def size(self, name: str) -> int:
        """Return an object's size in bytes."""
        ...

    async def delete(self, name: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...


@runtime_checkable
class Punching(Protocol):
    """What some object stores can do besides: give the space of parts of an object back at once."""

    async def punch(self, name: str, holes: Sequence[tuple[int, int]]) -> bool:
        """Let ``(start, length)`` parts of an object read as zeroes, and take no space; durable on return.

        False if it cannot be done here after all (the file system): nothing has changed then. Raises
        :class:`~hvsnap.errors.NotFound`.
        """
        ...


# -- blocks ---------------------------------------------------------------------------------------


class PackIndex(Protocol):
    """What takes a durable pack: the block index, or the catalog when blocks move from one pack to another."""

    async def add_pack(self, pack: str, size_bytes: int, blocks: Sequence[BlockPlace]) -> None:
        """Record a durable pack and its blocks in one transaction."""
        ...


class BlockIndex(PackIndex, Protocol):
    """Which blocks are stored, and where: the catalog's side of the block store.

    It holds durable blocks only: a block enters with :meth:`add_pack`, after its pack is durable.
    """

    async def find(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Return the ids of those digests that are stored, and not known to be damaged."""
        ...

    async def damaged(self, digests: Sequence[bytes]) -> dict[bytes, int]:
        """Return the ids of those digests whose stored form is damaged. Added again, these blocks are healed."""
        ...

    async def digests(self, ids: UInt64Array) -> npt.NDArray[np.uint8]:
        """Return digests, ``uint8[n, 32]``, in the order asked for. An unknown id is :class:`Damaged`."""
        ...

    async def places(self, ids: Sequence[int]) -> list[BlockPlace]:
        """Return where blocks lie, in the order asked for. An unknown id is :class:`Damaged`."""
        ...

    async def next_block_id(self) -> int:
        """Return an id greater than any that was ever recorded (read once, at start)."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """Answer of :meth:`BlockStore.put`.

    ``ids`` has one block id for each block of the input, 0 for zeroes. ``new_bytes`` is what had to
    be stored for it (compressed), ``new_blocks`` how many blocks that were.
    """

    ids: UInt64Array
    new_bytes: int
    new_blocks: int


class BlockStore(Protocol):
    """Content-addressed blocks: deduplicated, compressed, verified on the way out.

    This is one user's view of the store: every capture takes its own, since what :meth:`flush` promises, and
    whose failures it reports, are the puts made through this object. After a failure only a new view can put.
    """

    @property
    def block_size(self) -> int:
        """Bytes of a block."""
        ...

    async def put(self, data: memoryview) -> Stored:
        """Store consecutive blocks (a multiple of the block size). Durable only after :meth:`flush`.

        The buffer may be reused as soon as this returns.
        """
        ...

    async def flush(self) -> None:
        """Return when every block put before is durable and in the index; raise if one could not be."""
        ...

    def get(self, ids: Sequence[int]) -> AsyncIterator[tuple[int, bytes]]:
        """Yield ``(position in ids, block)`` in any order, each one's digest checked; ids are not 0.

        Raises :class:`Damaged`, naming the block and its pack.
        """
        ...


# -- a disk that can be read ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NbdExport:
    """A disk behind a private Unix socket: what every way of capturing ends in, and restores write to.

    ``bitmap`` names the dirty bitmap that is exported with it, ``name`` the export where a socket has several. With
    ``give_back``, blocks that nobody will read (any more) are discarded: whoever holds the instant need not keep them.

    For servers that err on what lies on both sides of a border, no read spans one of ``piece_bytes`` (0: it may), and
    what the export named ``also`` shows as data, asked after this one, is data, too, whatever this one says of it.
    """

    socket: str
    bitmap: str | None = None
    name: str = ""
    give_back: bool = False
    piece_bytes: int = 0
    also: str = ""

    @property
    def bitmap_context(self) -> str | None:
        """Name of the bitmap's NBD meta context."""
        return None if self.bitmap is None else f"qemu:dirty-bitmap:{self.bitmap}"


# -- the hypervisor -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobView:
    """A block job on a disk. ``ready`` means an active commit has converged and can pivot."""

    type: str
    done_bytes: int
    total_bytes: int
    ready: bool


@dataclass(frozen=True, slots=True)
class FleecedDisk:
    """One disk to be fleeced. ``snapshot`` is in the name of everything that is made for it in QEMU.

    ``scratch`` is the path of an empty qcow2 image of the disk's size, ``old`` the bitmap to be read (None: none).
    """

    target: str
    snapshot: SnapshotId
    scratch: str
    old: str | None


class Fleecer(Protocol):
    """Holds an instant inside the guest's own QEMU: before a block is overwritten, it is copied to a scratch image.

    Everything made is found again by its name, whatever was interrupted. Raises as :class:`Hypervisor` does.
    """

    async def fleece_check(self, uuid: GuestUuid, targets: Sequence[str]) -> None:
        """Raise :class:`Refused` for disks that cannot be fleeced, with the way out."""
        ...

    async def fleece_prepare(self, uuid: GuestUuid, disks: Sequence[FleecedDisk]) -> None:
        """Put everything in place; no instant is held yet. Raises :class:`Refused`, :class:`ForeignJob`."""
        ...

    async def fleece_hold(self, uuid: GuestUuid, disks: Sequence[FleecedDisk], ready: Ready = alone) -> Span:
        """Hold the instant of all disks, at once or not at all; tells when that was."""
        ...

    async def fleece_export(self, uuid: GuestUuid, disks: Sequence[FleecedDisk]) -> dict[str, NbdExport]:
        """Make the held instants readable: target → export, with the disk's bitmap where one is asked for."""
        ...

    async def fleece_undo(self, uuid: GuestUuid, disks: Sequence[FleecedDisk]) -> None:
        """Remove everything of these disks' fleece from QEMU, whatever there is of it; the guest must be running."""
        ...


@dataclass(frozen=True, slots=True)
class Census:
    """All guests that could be seen, and why others could not: name of a guest or of a hypervisor → reason."""

    guests: list[GuestView]
    silent: dict[str, HvsnapError]


class Hypervisor(Protocol):
    """Guests and what hvsnap asks of them. Every call looks at the present; nothing is cached.

    Raises :class:`HypervisorFailed`, :class:`HypervisorUnreachable`, :class:`GuestUnknown`. A mutation that
    raises may have happened all the same: look again before deciding.
    """

    async def guests(self) -> list[GuestView]:
        """Return all guests, running or not; those of a hypervisor that does not answer may be missing."""
        ...

    async def census(self) -> Census:
        """Return all guests, and what kept others from being seen."""
        ...

    async def guest(self, uuid: GuestUuid) -> GuestView:
        """Return one guest."""
        ...

    async def bitmaps(self, uuid: GuestUuid, target: str) -> list[Bitmap]:
        """Return the bitmaps of the running guest's active image."""
        ...

    async def activity(self, uuid: GuestUuid, targets: Sequence[str]) -> dict[str, DiskActivity]:
        """Return what the running guest has asked of these disks so far; asked for again and again, so it is cheap."""
        ...

    async def definition(self, uuid: GuestUuid) -> str:
        """Return what the guest would be started from next (libvirt: its XML), without secrets."""
        ...

    async def bitmap_add(self, uuid: GuestUuid, names: Mapping[str, str], granularity: int) -> None:
        """Add a persistent recording bitmap (target → name) to the active image of every target, or of none."""
        ...

    async def bitmap_remove(self, uuid: GuestUuid, target: str, name: str) -> None:
        """Remove a bitmap from the active image; one that is not there is no error."""
        ...

    async def switch_to_overlays(self, uuid: GuestUuid, overlays: dict[str, str], ready: Ready = alone) -> Span:
        """Redirect the writes of all targets to their overlay files at one instant, or of none; tells when that was."""
        ...

    async def commit_start(self, uuid: GuestUuid, target: str, base: str) -> None:
        """Start the active commit of the overlay into exactly ``base``."""
        ...

    async def commit_pivot(self, uuid: GuestUuid, target: str) -> None:
        """Finish a ready commit: the guest writes to the base again."""
        ...

    async def job(self, uuid: GuestUuid, target: str) -> JobView | None:
        """Return the block job on a disk, if there is one."""
        ...

    async def freeze(self, uuid: GuestUuid, timeout_s: float) -> int:
        """Freeze file systems through the agent, return how many; raises :class:`AgentUnavailable`."""
        ...

    async def thaw(self, uuid: GuestUuid, timeout_s: float) -> None:
        """Thaw file systems; thawed ones are no error."""
        ...

    async def redefine_source(self, uuid: GuestUuid, target: str, layer_path: str, layer_format: str) -> None:
        """Point the persistent definition of a shut-off guest's disk at an image (after an offline commit)."""
        ...

    async def passphrase(self, secret: str) -> Passphrase | None:
        """Return what opens an encrypted image (:attr:`DiskView.secret`); None for a secret of no name.

        Raises :class:`Refused` where the hypervisor does not give it out.
        """
        ...

    async def fleecer(self, uuid: GuestUuid) -> Fleecer:
        """Return who fleeces the guest's disks; raises :class:`HypervisorFailed` where nobody can."""
        ...

    async def resume_after_error(self, uuid: GuestUuid) -> None:
        """Let a guest go on that was stopped by an I/O error of its disk; any other one is left as it is."""
        ...

    async def start(self, uuid: GuestUuid) -> None:
        """Start a guest that is shut off."""
        ...

    async def shutdown(self, uuid: GuestUuid, timeout_s: float) -> None:
        """Shut a guest down gracefully; raises if it is still there at the deadline."""
        ...


class GuestMemory(Protocol):
    """Remembers what a bare guest looked like: nobody else knows its disks while it is off."""

    async def recall(self, guest: str) -> dict[str, Any] | None:
        """Return what was remembered of a guest (JSON)."""
        ...

    async def remember(self, guest: str, seen: dict[str, Any]) -> None:
        """Remember it, durably."""
        ...


class Publisher(Protocol):
    """Takes what happened to whoever listens (the API's streams; MQTT reads the stored events itself)."""

    def event(self, event: Event) -> None:
        """Announce an event that has been committed."""
        ...

    def progress(self, progress: Progress) -> None:
        """Announce progress; it is never stored."""
        ...

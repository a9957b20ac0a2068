"""Frozen values that every room speaks of: ids, what a hypervisor shows, what the catalog holds.

Nothing here does anything. Times are seconds since the epoch, UTC (``float``); sizes are bytes; block
numbers count blocks of the store's block size from the start of the disk.
"""

from __future__ import annotations

import base64
import enum
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NewType

from hvsnap.alarm import Alarm

DiskId = NewType("DiskId", str)
SnapshotId = NewType("SnapshotId", str)
GroupId = NewType("GroupId", str)
ImageId = NewType("ImageId", str)
OperationId = NewType("OperationId", str)
GuestUuid = NewType("GuestUuid", str)

BLOCK_SIZE_DEFAULT = 65536
"""Bytes of a block: bitmap granularity, qcow2 cluster, unit of dedup (docs/architecture.md)."""

PAGE_BLOCKS = 4096
"""Blocks that one page of a block map covers: 256 MiB at the default block size."""

ZERO_BLOCK = 0
"""Block id that says "this block reads as zeroes". Stored blocks count from 1."""


def new_id(prefix: str) -> str:
    """Return ``prefix-`` and twelve random characters of lower-case base32 (60 bits)."""
    return f"{prefix}-{base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]}"


# -- what a hypervisor shows ----------------------------------------------------------------------


class GuestState(enum.StrEnum):
    """Whether the guest's QEMU exists, and whether its CPUs run."""

    RUNNING = "running"
    PAUSED = "paused"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A dirty bitmap of a disk image, as QEMU or qemu-img reports it."""

    name: str
    granularity: int
    recording: bool
    persistent: bool
    inconsistent: bool
    busy: bool = False
    dirty_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """One image of a backing chain."""

    path: str
    format: str


@dataclass(frozen=True, slots=True)
class DiskView:
    """One disk of a guest as the hypervisor shows it at this moment.

    ``layers[0]`` is the image that takes the guest's writes, its backing files follow.
    ``skip_reason`` says why the disk cannot be captured (empty: it can). ``secret`` names what the hypervisor opens an
    encrypted image with (:meth:`hvsnap.ports.Hypervisor.passphrase`); empty: it knows of none.
    """

    target: str
    bus: str
    serial: str
    layers: tuple[Layer, ...]
    system: bool
    skip_reason: str = ""
    iothread: bool = False
    secret: str = ""

    @property
    def top(self) -> Layer:
        """The image that takes the guest's writes."""
        return self.layers[0]


@dataclass(frozen=True, slots=True)
class GuestView:
    """A guest as the hypervisor shows it at this moment.

    ``fleece``: its images must stay current while it runs, so that it is captured by fleece and not by redirecting.
    ``instance`` names the QEMU process of a guest whose launcher knows nothing of overlays: another one is on the image
    that it was always started from. None: the hypervisor itself keeps which image the guest is on.
    ``autostart``: it is off, and libvirt starts it with the host.
    ``saved``: it is off, and its memory is kept in a file, which goes with its disks as they are now.
    """

    uuid: GuestUuid
    name: str
    state: GuestState
    persistent: bool
    disks: tuple[DiskView, ...]
    fleece: bool = False
    saved: bool = False
    instance: str | None = None
    autostart: bool = False

    @property
    def active(self) -> bool:
        """Whether a QEMU process exists for it."""
        return self.state is not GuestState.OFF


@dataclass(frozen=True, slots=True)
class Traits:
    """What a hypervisor's host is like: model of confinement → the label of its guests, guest → others' checkpoints."""

    labels: Mapping[str, str]
    checkpoints: Mapping[GuestUuid, Sequence[str]]


@dataclass(frozen=True, slots=True)
class DiskActivity:
    """What a guest has asked of one of its disks since its QEMU started: requests done, and nanoseconds they took."""

    reads: int = 0
    read_ns: int = 0
    writes: int = 0
    write_ns: int = 0
    flushes: int = 0
    flush_ns: int = 0


# -- what the catalog holds -----------------------------------------------------------------------


class Kind(enum.StrEnum):
    """Whether a snapshot is the first of its chain or builds on another (SERVICE 2.1)."""

    FULL = "full"
    INCREMENTAL = "incremental"


class Method(enum.StrEnum):
    """How the blocks to store were found."""

    FULL = "full"  # everything allocated, nothing to compare with
    BITMAP = "bitmap"  # what the dirty bitmap names
    RESCAN = "rescan"  # everything allocated, compared with the chain


class Consistency(enum.StrEnum):
    """What the guest's file systems were told (SERVICE 2.8)."""

    AUTO = "auto"  # only in requests: app if it can be had, else crash
    APP = "app"
    CRASH = "crash"


class State(enum.StrEnum):
    """Life of a snapshot (SERVICE 2.4)."""

    PROGRESSING = "progressing"
    ACCOMPLISHED = "accomplished"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Impact:
    """What a guest felt of a capture: its requests to the disk at rest before it, and while its instant was held.

    IOPS count reads and writes; write latencies are means, None where nothing was written. ``slowdown`` is how many
    times as long its requests took as the same ones would have taken at rest. ``rate_low_bytes_s`` is the lowest rate
    that the capture was held down to for the guest's sake; None: it was not.
    """

    rest_iops: float
    rest_write_us: float | None
    held_iops: float
    held_write_us: float | None
    slowdown: float
    rate_low_bytes_s: int | None = None


@dataclass(frozen=True, slots=True)
class Disk:
    """A disk that hvsnap knows: its chain has the same id.

    ``head`` is the snapshot that the disk's present state continues from, ``bitmap`` the dirty bitmap
    that records what was written since; both are empty before the first snapshot. ``source`` is the path of
    the image that takes the guest's writes while no capture is open. ``policy`` is the id of the policy that makes its
    automatic snapshots; with ``delete_auto_with_disk`` these go when the disk is released. ``encrypted``: it is never
    stored in plain. ``gone_since``: when it was first seen to be gone from its guest, which may come back.
    """

    id: DiskId
    guest_uuid: GuestUuid
    guest_name: str
    target: str
    serial: str
    source: str
    format: str
    size_bytes: int
    system: bool
    created_at: float
    released: bool = False
    head: SnapshotId | None = None
    bitmap: str | None = None
    policy: str | None = None
    delete_auto_with_disk: bool = False
    encrypted: bool = False
    gone_since: float | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """What a disk was made of here: the id of a snapshot or image, which may be gone by now.

    ``inode`` is that of the file that was made, so that another one at its path is not taken for it; None: a block
    device.
    """

    path: str
    inode: int | None
    made_of: str
    created_at: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One node of a chain, in any of its states.

    ``parent`` is the snapshot whose view this one's entries are laid over. ``read_bytes`` were read from the
    guest's disk, ``changed_bytes`` differ from the parent, ``stored_bytes`` is what the store grew by
    (after deduplication and compression). ``reason`` says why the method was chosen, if it is not the obvious one.
    ``automatic``: a policy made it; ``expires_at`` and ``retention`` (a rule of counts, JSON) say how long it stays.
    ``impact`` is None where the guest was off, or did too little to tell. ``alarm``: it is unusual. ``held_until``: no
    rule lets it go before, since a later one was unusual; its owner may delete it all the same. ``skew_ms``: how far
    apart the instants of its group's guests are at most; None where it was of one guest alone.
    """

    id: SnapshotId
    disk: DiskId
    sequence: int
    parent: SnapshotId | None
    name: str
    description: str
    kind: Kind
    method: Method
    reason: str
    consistency: Consistency
    state: State
    size_bytes: int
    created_at: float
    accomplished_at: float | None = None
    error: str = ""
    group: GroupId | None = None
    read_bytes: int = 0
    changed_bytes: int = 0
    stored_bytes: int = 0
    tags: dict[str, str] = field(default_factory=dict)
    automatic: bool = False
    expires_at: float | None = None
    retention: str = ""
    locked_until: float | None = None
    impact: Impact | None = None
    alarm: Alarm | None = None
    held_until: float | None = None
    skew_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """A snapshot of a system disk that was promoted to a template for new disks (SERVICE 7.4).

    It holds nothing of its own: what it is made of is the snapshot, which stays as long as the image is there.
    """

    id: ImageId
    name: str
    description: str
    snapshot: SnapshotId
    created_at: float


@dataclass(frozen=True, slots=True)
class ChainUsage:
    """What one chain holds (SERVICE 9.1). Stored bytes are after compression."""

    disk: DiskId
    snapshots: int
    logical_bytes: int
    stored_bytes: int
    exclusive_bytes: dict[SnapshotId, int]
    """For each snapshot the stored bytes that only it refers to."""


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """Where a stored block lies: ``length`` bytes (as stored) at ``offset`` of the pack object ``pack``."""

    id: int
    digest: bytes
    pack: str
    offset: int
    length: int
    flags: int


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack as the catalog knows it. ``to_sweep`` counts changes that no sweep has looked at yet."""

    number: int
    name: str
    size_bytes: int
    live_blocks: int
    live_bytes: int
    to_sweep: int
    verified_at: float | None


@dataclass(frozen=True, slots=True)
class DamagedBlock:
    """A block whose stored form is not what was stored."""

    id: int
    why: str
    found_at: float


@dataclass(frozen=True, slots=True)
class ManifestState:
    """What the catalog knows of an accomplished snapshot's manifest; ``changes`` were made since it was written."""

    snapshot: SnapshotId
    revision: int
    changes: int


@dataclass(frozen=True, slots=True)
class Operation:
    """An open entry of the journal: what was about to be done when it was written.

    ``step`` names the intent; ``facts`` (JSON) hold what undoing or finishing it needs.
    """

    id: OperationId
    kind: str
    guest_uuid: GuestUuid
    step: str
    facts: dict[str, object]
    created_at: float

    @property
    def payload(self) -> dict[str, object]:
        """What its events tell, of those facts."""
        told = self.facts["payload"]
        return dict(told) if isinstance(told, dict) else {}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened (SERVICE 10). ``id`` is unique for ever and the key for deduplication.

    ``sequence`` orders the events of a host; it is 0 before the event is stored.
    """

    id: str
    type: str
    at: float
    payload: dict[str, object]
    sequence: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a capture or restore is. ``eta_s`` is None until there is a rate to tell it by."""

    id: str
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float
    eta_s: float | None

    @property
    def percent(self) -> int:
        """0 to 100; 100 only when all is done."""
        if self.total_bytes == 0:
            return 100
        return min(100, self.done_bytes * 100 // self.total_bytes)

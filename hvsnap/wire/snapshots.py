"""Snapshots: made, looked at, changed, served, verified, deleted."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from hvsnap.alarm import Level
from hvsnap.model import Consistency, Kind, Method, State
from hvsnap.wire.base import Answer, Name, Request
from hvsnap.wire.drills import Drill


class Impact(Answer):
    """What a guest felt of a capture: its requests to the disk at rest before it, and while it was held and read."""

    rest_iops: float = Field(description="reads and writes a second")
    rest_write_us: float | None = Field(description="mean latency of its writes; null: there were none")
    held_iops: float
    held_write_us: float | None
    slowdown: float = Field(description="how many times as long its requests took as the same ones take at rest")
    rate_low_bytes_s: int | None = Field(description="what the reader was slowed down to for it; null: never")


class Alarm(Answer):
    """Why a snapshot is unusual: how its disk changed up to it, beside what is usual for that disk (SERVICE 12)."""

    level: Level = Field(description="severe: both signs at once, as when a guest's files are being encrypted")
    faster: bool = Field(description="a sign: it changed far more than ever")
    denser: bool = Field(description="a sign: what changed no longer compresses")
    changed_bytes_h: float = Field(description="changed per hour, blocks of zeroes left out")
    usual_bytes_h: float = Field(description="the second highest that the disk has shown before")
    stored_share: float = Field(ge=0, le=1, description="stored of each changed byte; near 1: it does not compress")
    usual_share: float = Field(ge=0, le=1)
    acknowledged_at: AwareDatetime | None = Field(description="when somebody said that all is well; null: nobody has")


class Snapshot(Answer):
    """One node of a chain, in any of its states."""

    id: str = Field(examples=["s-mfrggzdfmztw"])
    disk: str
    guest: str = Field(description="name of the guest when it was last seen")
    target: str
    sequence: int = Field(description="place in the chain, from 1")
    parent: str | None
    name: str
    description: str
    tags: dict[str, str]
    kind: Kind
    method: Method
    reason: str = Field(description="why this method; empty: the obvious one")
    consistency: Consistency
    state: State
    error: str = Field(description="why it failed; empty unless failed")
    size_bytes: int
    read_bytes: int
    changed_bytes: int
    stored_bytes: int = Field(description="what the store grew by")
    created_at: AwareDatetime
    accomplished_at: AwareDatetime | None
    group: str | None
    skew_ms: float | None = Field(
        description="how far apart the instants of the group's guests are at most; null: of one guest, or not yet known"
    )
    automatic: bool = Field(description="a policy made it")
    encrypted: bool = Field(description="its disk is encrypted: it is kept in encrypted stores only")
    expires_at: AwareDatetime | None = Field(description="null: not by time")
    locked_until: AwareDatetime | None
    held_until: AwareDatetime | None = Field(
        default=None,
        description="no rule lets it go before, since a later one is unusual; its owner may delete it",
    )
    drill: Drill | None = Field(default=None, description="its newest restore drill; null: it had none")
    alarm: Alarm | None = Field(default=None, description="null: nothing is unusual about it")
    impact: Impact | None = Field(description="null: not measured, since the guest was off or did too little to tell")
    progress: int = Field(ge=0, le=100, description="percent")
    done_bytes: int | None = Field(description="what is read of total_bytes; null unless it is being read")
    total_bytes: int | None = Field(description="what is to be read")
    rate_bytes_s: float | None = Field(description="null unless it is being read")
    eta_s: float | None


class SnapshotList(Answer):
    """Snapshots, newest first (of a create: in the order of the disks)."""

    snapshots: list[Snapshot]


class GuestDisks(Request):
    """Disks of a guest; none named: every eligible one."""

    guest: Name
    disks: list[Name] = Field(default=[], max_length=256)


class SnapshotCreate(Request):
    """Make a snapshot of each of ``disks`` (none named: of every eligible disk of the guest)."""

    guest: Name
    disks: list[Name] = Field(default=[], max_length=256)
    name: str = Field(default="", max_length=4096, description="empty: one is made from the time")
    description: str = Field(default="", max_length=65536)
    tags: dict[str, str] = Field(default={}, max_length=1024)
    consistency: Consistency = Consistency.AUTO
    group: bool = Field(default=False, description="all disks at the same instant")
    others: list[GuestDisks] = Field(
        default=[], max_length=63, description="further guests, held at the same instant: all disks are one group"
    )
    wait: bool = Field(default=False, description="queue behind a running capture instead of being refused")


class SnapshotDelete(Request):
    """Delete snapshots, all of them or none."""

    ids: list[Name] = Field(min_length=1, max_length=4096)
    dry_run: bool = False


class Freed(Answer):
    """What deleting this one alone would free, and what else it means."""

    id: str
    freed_bytes: int
    disks: list[str] = Field(
        default=[],
        description="made of it, and no longer to be re-initialised without it: GUEST/TARGET, or the path of a disk",
    )


class Deletion(Answer):
    """What was deleted, or with ``dry_run`` would be.

    ``freed_bytes`` is what goes when all of them go: more than the sum, if they share blocks with nobody else.
    """

    dry_run: bool
    snapshots: list[Freed]
    freed_bytes: int


class SnapshotEdit(Request):
    """Change what people call a snapshot; what is left out stays."""

    name: str | None = Field(default=None, max_length=4096)
    description: str | None = Field(default=None, max_length=65536)
    tags: dict[str, str] | None = Field(default=None, max_length=1024)
    usual: bool = Field(default=False, description="the alarm about it is over: what its guest did is all right")


class SnapshotLock(Request):
    """Lock a snapshot against deletion until a time."""

    until: AwareDatetime


class SnapshotServe(Request):
    """Serve a snapshot as a disk; ``writable``: what clients write is kept aside, and lost when it ends."""

    writable: bool = False


class Served(Answer):
    """A snapshot that clients of NBD can open as a disk."""

    snapshot: str
    guest: str
    target: str
    uri: str = Field(examples=["nbd+unix:///?socket=/run/hvsnap/served/s-mfrggzdfmztw.sock"])
    socket: str
    writable: bool
    size_bytes: int
    since: AwareDatetime
    stays: bool = Field(description="until it is ended; else as long as somebody looks into it")
    lookers: int = Field(description="how many clients hold it, each by a request of its own")


class ServedList(Answer):
    """All snapshots that are served, oldest first."""

    served: list[Served]


class AffectedSnapshot(Answer):
    """A snapshot that does not restore, as long as some of its blocks are damaged or missing."""

    id: str
    disk: str
    guest: str
    target: str
    name: str
    blocks: int = Field(description="how many of its blocks are")


class DamagedBlock(Answer):
    """A stored block that is not what was stored."""

    block: int
    detail: str


class SnapshotsVerified(Answer):
    """What became of a SnapshotVerify. All is well if ``damaged`` and ``affected`` are empty."""

    kind: Literal["snapshot-verify"] = "snapshot-verify"
    snapshots: int = Field(description="that were verified")
    packs: int
    blocks: int
    read_bytes: int
    damaged_blocks: int
    damaged: list[DamagedBlock] = Field(description="at most 1000 of them")
    healed_blocks: int = Field(description="that were damaged when they were last read, and are whole now")
    rewritten: list[str] = Field(description="manifests and indexes of packs that were damaged, and are written anew")
    affected: list[AffectedSnapshot]


class SnapshotVerify(Request):
    """Read every block of these snapshots again, or of all that is stored."""

    ids: list[Name] = Field(default=[], max_length=4096)
    all: bool = False

"""What events tell, by kind: the payloads of :mod:`hvsnap.mqtt.messages`, under the same rules."""

from __future__ import annotations

from pydantic import AwareDatetime, BaseModel, Field

from hvsnap.alarm import Level
from hvsnap.drill import Outcome
from hvsnap.model import Consistency, Kind, Method, State


class GuestPayload(BaseModel):
    """Which guest."""

    guest: str
    guest_uuid: str


class GuestFailedPayload(GuestPayload):
    """A guest that could not be started, and why."""

    error: str


class DiskPayload(GuestPayload):
    """Which disk."""

    disk: str
    target: str


class SnapshotPayload(DiskPayload):
    """A snapshot at that moment. Byte counts are final once it is accomplished."""

    snapshot: str
    name: str
    state: State
    kind: Kind
    method: Method
    reason: str = Field(description="why this method; empty: the obvious one")
    consistency: Consistency
    group: str | None
    skew_ms: float | None = Field(
        description="how far apart the instants of the group's guests are at most; null: of one guest, or not yet known"
    )
    size_bytes: int
    read_bytes: int
    changed_bytes: int
    stored_bytes: int
    error: str = Field(description="why it failed; empty unless it did")


class UnusualPayload(SnapshotPayload):
    """A snapshot up to which its disk has changed as it never does, and the last one before that."""

    level: Level = Field(description="severe: both signs at once")
    faster: bool = Field(description="a sign: it changed far more than ever")
    denser: bool = Field(description="a sign: what changed no longer compresses")
    changed_bytes_h: float = Field(ge=0, description="changed per hour, blocks of zeroes left out")
    usual_bytes_h: float = Field(ge=0, description="the second highest that the disk has shown before")
    stored_share: float = Field(ge=0, le=1, description="stored of each changed byte; near 1: it does not compress")
    usual_share: float = Field(ge=0, le=1)
    last_good: str | None = Field(description="the newest snapshot before it that is not under suspicion")
    held_until: AwareDatetime | None = Field(description="until when no rule lets that one go; null: no rule would")


class NewDiskPayload(BaseModel):
    """A disk made of a snapshot; ``disk`` and ``guest`` are those that the snapshot is of."""

    snapshot: str
    disk: str
    guest: str
    path: str = Field(description="of the new disk")


class NewDiskFailedPayload(NewDiskPayload):
    """What could not be done with a new disk."""

    error: str


class ImagePayload(DiskPayload):
    """An image; the disk is the one that its snapshot is of."""

    image: str
    name: str
    snapshot: str


class RollbackPayload(DiskPayload):
    """A disk that is set back to a snapshot."""

    snapshot: str


class RollbackFailedPayload(RollbackPayload):
    """A rollback that was interrupted: the disk is neither the old nor the new one until it is resumed."""

    error: str


class PolicyRunPayload(DiskPayload):
    """A policy's run on one disk."""

    policy: str = Field(description="its name")
    snapshot: str
    name: str = Field(description="of the snapshot")


class PolicyMissedPayload(BaseModel):
    """Hours that passed without a run."""

    policy: str = Field(description="its name")
    missed: int = Field(ge=1, description="how many")
    last: AwareDatetime = Field(description="the last one of them")


class PolicyFailedPayload(DiskPayload):
    """A policy's run on one disk that did not begin, or did not end well."""

    policy: str = Field(description="its name")
    error: str


class DrillPayload(DiskPayload):
    """A restore drill: a snapshot that was restored for trial."""

    snapshot: str
    outcome: Outcome = Field(description="damaged: it does not restore; failed: the drill could not be carried out")
    written_bytes: int = Field(ge=0, description="what was restored")
    duration_s: float
    error: str = Field(description="why it did not pass; empty if it did")


class VerificationPayload(BaseModel):
    """What was read again, and is not what was stored."""

    snapshots: list[str] = Field(description="that do not restore as long as that is so; at most 100")
    blocks: int = Field(ge=0, description="damaged ones, of all that were read")
    detail: str = Field(description="the first reason")


class IncompletePayload(BaseModel):
    """What the catalog knows and the store does not hold: a part of it was lost, or an older copy put back."""

    missing: list[str] = Field(description="packs and manifests; at most 100")
    count: int = Field(ge=1)


class SpacePayload(BaseModel):
    """The device of the store."""

    free_bytes: int = Field(ge=0)
    total_bytes: int = Field(ge=0)
    days_to_full: float | None = Field(ge=0, description="at the pace of the last week; null: it is not to be told")


class DaemonPayload(BaseModel):
    """The daemon itself."""

    host: str
    version: str = Field(description="of the software")

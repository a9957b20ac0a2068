"""Disks: made of snapshots, set back, changed, released."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from hvsnap.wire.base import Answer, Name, Request


class Attach(Request):
    """Where a new disk is to be attached, through libvirt."""

    guest: Name
    target: str = Field(max_length=64, examples=["vdb"])


class DiskCreate(Request):
    """Make a new disk of a snapshot or image."""

    snapshot: Name = Field(description="id of a snapshot, or id or name of an image")
    path: Name = Field(description="absolute; with ``pool`` the name of the new volume")
    format: Literal["qcow2", "raw"] = "qcow2"
    force: bool = Field(default=False, description="write over a file that is there, or a block device")
    pool: str = Field(default="", max_length=4096, description="libvirt's storage pool that gets the new volume")
    attach: Attach | None = None
    instant: bool = Field(default=False, description="it can be used when the answer comes; the task fills it")


class Reinit(Request):
    """Bring a disk back to the snapshot or image that it was made of (SERVICE 7.3)."""

    stop: bool = Field(default=False, description="shut the guest down gracefully first")
    start: bool = Field(default=False, description="start the guest afterwards")
    safety_snapshot: bool = Field(default=True, description="make a snapshot of the present state first")
    dry_run: bool = False


class DiskEdit(Request):
    """Change what holds for a disk; what is left out stays."""

    delete_auto_with_disk: bool | None = Field(default=None, description="its release deletes its automatic snapshots")
    encrypted: bool | None = Field(default=None, description="it is never stored in plain")


class DiskRelease(Request):
    """Forget a disk that is gone from its guest (SERVICE 5.6)."""

    dry_run: bool = False


class Disk(Answer):
    """A disk that hvsnap knows."""

    id: str = Field(examples=["d-mfrggzdfmztw"])
    guest: str
    guest_uuid: str
    target: str
    path: str
    format: str
    size_bytes: int
    system: bool
    released: bool = Field(description="it is forgotten; its snapshots that are left can make new disks")
    gone_since: AwareDatetime | None = Field(description="when it was first seen to be gone from its guest")
    policy: str | None = Field(description="its name")
    delete_auto_with_disk: bool
    encrypted: bool
    origin: str | None = Field(description="the snapshot or image that hvsnap made it of")


class DiskReleased(Answer):
    """A disk that was released, or with ``dry_run`` would be."""

    dry_run: bool
    disk: Disk
    deleted: list[str] = Field(description="its automatic snapshots that go with it")
    freed_bytes: int
    kept: int = Field(description="snapshots that stay")


class Rollback(Request):
    """Set a disk back to one of its snapshots (SERVICE 6)."""

    snapshot: Name
    stop: bool = Field(default=False, description="shut the guest down gracefully first")
    start: bool = Field(default=False, description="start the guest afterwards")
    safety_snapshot: bool = Field(default=True, description="make a snapshot of the present state first")
    dry_run: bool = False


class RollbackPlan(Answer):
    """What a rollback would do, as of now."""

    disk: str
    guest: str
    target: str
    snapshot: str
    path: str
    method: str = Field(description="how the blocks that differ are found")
    write_bytes: int | None = Field(description="at most so much is written; null: known only once the disk is read")
    stop: bool = Field(description="the guest runs and would be shut down")
    safety_snapshot: bool
    start: bool
    notes: list[str] = Field(description="what its user should know, one line each")


class DiskCreated(Answer):
    """What became of a DiskCreate."""

    kind: Literal["disk-create"] = "disk-create"
    snapshot: str
    made_of: str = Field(description="the snapshot, or the image that it is behind")
    path: str
    format: str
    size_bytes: int
    written_bytes: int
    attached: str | None = Field(description="GUEST/TARGET; null: it was not asked for")
    disk: str | None = Field(description="its id, where it was attached")


class SetBack(Answer):
    """What a rollback or re-initialisation has done."""

    disk: str
    snapshot: str
    written_bytes: int
    safety_snapshot: str | None = Field(description="id of the snapshot of the state that was replaced")
    started: bool
    notes: list[str]


class RolledBack(SetBack):
    """What became of a Rollback."""

    kind: Literal["disk-rollback"] = "disk-rollback"


class Reinitialised(SetBack):
    """What became of a Reinit."""

    kind: Literal["disk-reinit"] = "disk-reinit"
    origin: str = Field(description="the snapshot or image that the disk was made of")

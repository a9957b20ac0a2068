"""Guests and their disks, as they are listed."""

from __future__ import annotations

from enum import StrEnum

from pydantic import AwareDatetime, Field

from hvsnap.model import GuestState
from hvsnap.wire.base import Answer


class Protection(StrEnum):
    """Whether a disk has snapshots, or can have any."""

    PROTECTED = "protected"  # at least one accomplished snapshot
    UNPROTECTED = "unprotected"  # eligible, but none yet
    SKIPPED = "skipped"  # cannot be captured, see skip_reason


class BitmapHealth(StrEnum):
    """Whether the next snapshot can be read by the dirty bitmap."""

    NONE = "none"  # no snapshot yet, or the image cannot hold one
    RECORDING = "recording"  # the bitmap records since the chain's head
    LOST = "lost"  # expected, but missing or inconsistent: the next snapshot re-reads the disk
    UNKNOWN = "unknown"  # the guest is off, or did not answer


class GuestDisk(Answer):
    """One disk of a guest."""

    target: str = Field(examples=["vda"])
    id: str | None = Field(description="disk and chain id (d-…); null before the first snapshot")
    bus: str
    path: str = Field(description="the image that takes the guest's writes while no capture is open")
    format: str
    size_bytes: int | None = Field(description="null if it cannot be learnt")
    system: bool
    protection: Protection
    last_snapshot: str | None = Field(description="id of the newest accomplished snapshot")
    last_snapshot_at: AwareDatetime | None
    snapshots: int = Field(description="accomplished snapshots in the chain")
    policy: str | None
    bitmap: BitmapHealth
    capturing: bool
    skip_reason: str = Field(description="why the disk cannot be captured; empty: it can")


class Guest(Answer):
    """One guest of the hypervisor."""

    name: str
    uuid: str
    state: GuestState
    disks: list[GuestDisk]


class GuestList(Answer):
    """All guests, by name."""

    guests: list[Guest]
    notes: list[str] = Field(default=[], description="which hypervisor or guest could not be looked at, and why")

"""What is asked of the service, as values: unchecked words of the user, in the form that the rules take them.

And what the service's parts ask of captures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from hvsnap.model import Consistency, DiskId, Progress, Snapshot, SnapshotId


@dataclass(frozen=True, slots=True)
class Automatic:
    """What a policy's run says of its snapshot: how long it stays (SERVICE 5.3)."""

    expires_at: float | None
    retention: str


@dataclass(frozen=True, slots=True)
class GuestDisks:
    """Disks of a guest, by target, path or id; none: every disk that can be captured."""

    guest: str
    disks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """Make snapshots of a guest's disks (SERVICE 2).

    ``disks`` are named by target, path or id; none: every disk of the guest that can be captured. ``group`` holds all
    of them at the same instant; those of ``others``, further guests, are held with them, which makes a group in any
    case. ``wait`` queues behind a running capture of a disk instead of being refused. ``automatic`` marks a policy's
    run, whose name is of the reserved kind.
    """

    guest: str
    disks: tuple[str, ...] = ()
    name: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    consistency: Consistency = Consistency.AUTO
    group: bool = False
    others: tuple[GuestDisks, ...] = ()
    wait: bool = False
    automatic: Automatic | None = None

    @property
    def together(self) -> bool:
        """Whether all disks are to be held at one instant."""
        return self.group or bool(self.others)

    @property
    def members(self) -> tuple[GuestDisks, ...]:
        """All guests with their disks."""
        return (GuestDisks(self.guest, self.disks), *self.others)


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """Set a disk back to one of its snapshots (SERVICE 6)."""

    disk: str
    snapshot: str
    stop: bool = False
    start: bool = False
    safety_snapshot: bool = True


@dataclass(frozen=True, slots=True)
class ReinitRequest:
    """Bring a disk back to what it was made of (SERVICE 7.3)."""

    disk: str
    stop: bool = False
    start: bool = False
    safety_snapshot: bool = True


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """Make a new disk of a snapshot or image (SERVICE 7.1).

    ``path`` is absolute and must not exist, or only with ``force``; with ``pool`` it is the name of a new volume.
    ``attach`` is a guest and a target. ``instant``: it can be used at once, and is filled meanwhile (SERVICE 7.2).
    """

    snapshot: str
    path: str
    format: str = "qcow2"
    force: bool = False
    pool: str = ""
    attach: tuple[str, str] | None = None
    instant: bool = False


class CapturesPort(Protocol):
    """What the rest of the service asks of captures; implemented by :class:`hvsnap.service.captures.Captures`."""

    async def create(self, request: SnapshotRequest) -> list[Snapshot]:
        """Check the request, start the captures, and return their snapshots in state ``progressing``."""
        ...

    async def wait(self, ids: Sequence[SnapshotId]) -> list[Snapshot]:
        """Return the snapshots when all of them have ended, well or badly."""
        ...

    async def cancel(self, snapshot_id: SnapshotId) -> None:
        """Give a running capture up; its snapshot ends as failed."""
        ...

    async def settled(self, disks: Sequence[DiskId]) -> None:
        """Return when no capture is at work on these disks any more."""
        ...

    def busy_disks(self) -> set[DiskId]:
        """Return the disks that are being captured."""
        ...

    def progress(self, snapshot_id: SnapshotId) -> Progress | None:
        """Return how far a running capture is."""
        ...

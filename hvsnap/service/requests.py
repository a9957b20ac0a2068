"""What is asked of the service, as values: unchecked words of the user, in the form that the rules take them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hvsnap.model import Consistency


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """Make snapshots of a guest's disks (SERVICE 2).

    ``disks`` are named by target, path or id; none: every disk of the guest that can be captured. ``group`` holds all
    of them at the same instant. ``wait`` queues behind a running capture of a disk instead of being refused.
    """

    guest: str
    disks: tuple[str, ...] = ()
    name: str = ""
    description: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    consistency: Consistency = Consistency.AUTO
    group: bool = False
    wait: bool = False


@dataclass(frozen=True, slots=True)
class RollbackRequest:
    """Set a disk back to one of its snapshots (SERVICE 6)."""

    disk: str
    snapshot: str
    stop: bool = False
    start: bool = False
    safety_snapshot: bool = True


@dataclass(frozen=True, slots=True)
class DiskRequest:
    """Make a new disk of a snapshot (SERVICE 7.1). ``path`` is absolute and must not exist."""

    snapshot: str
    path: str
    format: str = "qcow2"

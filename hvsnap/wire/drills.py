"""Restore drills: snapshots restored for trial."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from hvsnap.drill import Outcome
from hvsnap.wire.base import Answer, Name, Request


class SnapshotDrill(Request):
    """Restore a snapshot for trial, or the newest one of a disk; one of both is named."""

    snapshot: Name = ""
    disk: Name = ""


class Drill(Answer):
    """A restore drill that was made, and what came of it."""

    snapshot: str
    began_at: AwareDatetime
    duration_s: float
    outcome: Outcome = Field(description="damaged: it does not restore; failed: the drill could not be carried out")
    written_bytes: int = Field(description="what was restored")
    error: str = Field(description="why it did not pass; empty if it did")


class SnapshotDrilled(Answer):
    """What became of a SnapshotDrill: every block that was restored is what the manifests say."""

    kind: Literal["snapshot-drill"] = "snapshot-drill"
    snapshot: str
    disk: str
    guest: str
    target: str
    size_bytes: int = Field(description="of the disk that was restored")
    written_bytes: int
    compared_blocks: int = Field(description="that were read back; the image says of all others that they are zeroes")
    duration_s: float

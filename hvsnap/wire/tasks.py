"""Long work that goes on in the daemon."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import AwareDatetime, Field

from hvsnap.wire.base import Answer, Error
from hvsnap.wire.disks import DiskCreated, Reinitialised, RollbackPlan, RolledBack
from hvsnap.wire.drills import SnapshotDrilled
from hvsnap.wire.images import ImageExported
from hvsnap.wire.snapshots import Snapshot, SnapshotsVerified
from hvsnap.wire.store import StoreChecked, StoreCompacted


class TaskState(StrEnum):
    """Life of a task."""

    RUNNING = "running"
    ACCOMPLISHED = "accomplished"
    FAILED = "failed"
    CANCELLED = "cancelled"


TaskResult = (
    DiskCreated
    | RolledBack
    | Reinitialised
    | ImageExported
    | SnapshotsVerified
    | SnapshotDrilled
    | StoreChecked
    | StoreCompacted
)
"""What work returns, by its kind."""


class Task(Answer):
    """Long work that goes on in the daemon, whoever asked for it."""

    id: str = Field(examples=["t-mfrggzdfmztw"])
    kind: str = Field(examples=["disk-create", "disk-rollback", "disk-reinit", "image-export", "snapshot-verify"])
    subject: str = Field(description="what it works on, for people")
    state: TaskState
    step: str = Field(description="what it is doing now, for people")
    progress: int = Field(ge=0, le=100, description="percent")
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float | None
    eta_s: float | None
    created_at: AwareDatetime
    finished_at: AwareDatetime | None
    error: Error | None
    result: Annotated[TaskResult, Field(discriminator="kind")] | None


class TaskList(Answer):
    """Tasks, newest first."""

    tasks: list[Task]


class Work(Answer):
    """Work that is under way, or was: snapshots being made, and tasks."""

    snapshots: list[Snapshot]
    tasks: list[Task]


class RollbackAnswer(Answer):
    """``plan`` always; ``task`` unless it was a dry run."""

    plan: RollbackPlan
    task: Task | None

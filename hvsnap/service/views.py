"""Values of the inside as answers of the API; pure."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime

from hvsnap import wire
from hvsnap.alarm import Alarm
from hvsnap.drill import Drill
from hvsnap.model import Disk, Event, Progress, Snapshot, State
from hvsnap.service.tasks import TaskView


def when(seconds: float) -> datetime:
    """Return a time, given in seconds since the epoch."""
    return datetime.fromtimestamp(seconds, UTC)


def when_or_none(seconds: float | None) -> datetime | None:
    """Return a time, or None for none."""
    return None if seconds is None else when(seconds)


def alarm(value: Alarm) -> wire.Alarm:
    """Return an alarm."""
    return wire.Alarm(**asdict(value) | {"acknowledged_at": when_or_none(value.acknowledged_at)})


def drill(value: Drill | None) -> wire.Drill | None:
    """Return a restore drill, or None for none."""
    if value is None:
        return None
    return wire.Drill(
        snapshot=value.snapshot,
        began_at=when(value.began_at),
        duration_s=value.ended_at - value.began_at,
        outcome=value.outcome,
        written_bytes=value.written_bytes,
        error=value.error,
    )


def snapshot(
    row: Snapshot, disk: Disk, progress: Progress | None = None, drilled: Drill | None = None
) -> wire.Snapshot:
    """Return a snapshot; ``progress`` is that of its running capture, ``drilled`` its newest drill."""
    if row.state is not State.PROGRESSING:
        progress = None
    # 100 is for what is durable, not for what was read (SERVICE 2.4).
    percent = 100 if row.state is State.ACCOMPLISHED else 0 if progress is None else min(99, progress.percent)
    return wire.Snapshot(
        id=row.id,
        disk=row.disk,
        guest=disk.guest_name,
        target=disk.target,
        sequence=row.sequence,
        parent=row.parent,
        name=row.name,
        description=row.description,
        tags=row.tags,
        kind=row.kind,
        method=row.method,
        reason=row.reason,
        consistency=row.consistency,
        state=row.state,
        error=row.error,
        size_bytes=row.size_bytes,
        read_bytes=row.read_bytes,
        changed_bytes=row.changed_bytes,
        stored_bytes=row.stored_bytes,
        created_at=when(row.created_at),
        accomplished_at=when_or_none(row.accomplished_at),
        group=row.group,
        skew_ms=row.skew_ms,
        automatic=row.automatic,
        encrypted=disk.encrypted,
        expires_at=when_or_none(row.expires_at),
        locked_until=when_or_none(row.locked_until),
        held_until=when_or_none(row.held_until),
        drill=drill(drilled),
        alarm=None if row.alarm is None else alarm(row.alarm),
        impact=None if row.impact is None else wire.Impact(**asdict(row.impact)),
        progress=percent,
        done_bytes=None if progress is None else progress.done_bytes,
        total_bytes=None if progress is None else progress.total_bytes,
        rate_bytes_s=None if progress is None else progress.rate_bytes_s,
        eta_s=None if progress is None else progress.eta_s,
    )


def task(view: TaskView) -> wire.Task:
    """Return a task. Its result is what its work returned: one of the answers that :class:`wire.Task` names."""
    progress = view.progress
    done = view.state is wire.TaskState.ACCOMPLISHED
    running = view.state is wire.TaskState.RUNNING
    result = view.result if isinstance(view.result, wire.TaskResult) else None
    return wire.Task(
        id=view.id,
        kind=view.kind,
        subject=view.subject,
        state=view.state,
        step=view.step,
        progress=100 if done else min(99, progress.percent) if progress is not None else 0,
        done_bytes=0 if progress is None else progress.done_bytes,
        total_bytes=0 if progress is None else progress.total_bytes,
        rate_bytes_s=progress.rate_bytes_s if progress is not None and running else None,
        eta_s=progress.eta_s if progress is not None and running else None,
        created_at=when(view.created_at),
        finished_at=when_or_none(view.finished_at),
        error=None if view.error is None else wire.Error.of(view.error),
        result=result,
    )


def event(row: Event) -> wire.Event:
    """Return a stored event."""
    return wire.Event(sequence=row.sequence, id=row.id, type=row.type, at=when(row.at), payload=row.payload)


def progress(value: Progress) -> wire.Progress:
    """Return progress."""
    return wire.Progress(
        id=value.id,
        progress=value.percent,
        done_bytes=value.done_bytes,
        total_bytes=value.total_bytes,
        rate_bytes_s=value.rate_bytes_s,
        eta_s=value.eta_s,
    )

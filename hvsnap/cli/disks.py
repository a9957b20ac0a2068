"""Commands that make disks and set them back: tasks of the daemon, followed to their end."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import Client, DaemonError, body, place
from hvsnap.cli.complaints import INTERRUPTED, complain
from hvsnap.cli.follow import Sight, follow
from hvsnap.cli.session import Session
from hvsnap.cli.snapshots import cancel
from hvsnap.errors import Failed, HvsnapError


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `disk-rollback` was told, as typed; of a `disk-reinit` no snapshot."""

    disk: str
    snapshot: str
    stop: bool
    start: bool
    safety: bool
    dry_run: bool


@dataclass(frozen=True, slots=True)
class NewDisk:
    """What `disk-create` was told, as typed; ``attach`` is a guest and a target, or two empty words."""

    snapshot: str
    target: str
    format: str
    pool: str
    attach: tuple[str, str]
    force: bool
    instant: bool = False


def create(session: Session, wanted: NewDisk, *, detach: bool) -> int:
    """Make a disk; return the exit status. Its target may be relative to where the command runs."""
    # The daemon has a working directory of its own. An empty target stays one, for the daemon to refuse.
    path = os.path.abspath(wanted.target) if wanted.target and not wanted.pool else wanted.target
    guest, target = wanted.attach
    request = body(
        wire.DiskCreate,
        snapshot=wanted.snapshot,
        path=path,
        format=wanted.format,
        pool=wanted.pool,
        force=wanted.force,
        instant=wanted.instant,
        attach={"guest": guest, "target": target} if guest or target else None,
    )
    with session.client() as client:
        task = client.post("/disks", wire.Task, request)
        if detach:
            session.answer(task, task.id)
            return 0
        if wanted.instant:
            session.answer(task, path)
            session.remark(f"it can be used now, and is filled in the background: {task.id}; `hvsnap watch` tells when")
            return 0
        return _finish(session, client, task, "disk-create", lambda ended: ended)


def rollback(session: Session, wanted: Wanted, *, detach: bool) -> int:
    """Set a disk back, or tell what that would do; return the exit status."""
    request = body(
        wire.Rollback,
        snapshot=wanted.snapshot,
        stop=wanted.stop,
        start=wanted.start,
        safety_snapshot=wanted.safety,
        dry_run=wanted.dry_run,
    )
    return _set_back(session, wanted, "rollback", request, detach=detach)


def reinitialise(session: Session, wanted: Wanted, *, detach: bool) -> int:
    """Bring a disk back to its origin, or tell what that would do; return the exit status."""
    request = body(
        wire.Reinit, stop=wanted.stop, start=wanted.start, safety_snapshot=wanted.safety, dry_run=wanted.dry_run
    )
    return _set_back(session, wanted, "reinit", request, detach=detach)


def _set_back(session: Session, wanted: Wanted, call: str, request: BaseModel, *, detach: bool) -> int:
    with session.client() as client:
        answer = client.post(place("disks", wanted.disk, call), wire.RollbackAnswer, request)
        if answer.task is None:
            session.answer(answer, render.plan(answer.plan))
            return 0
        if detach:
            session.answer(answer, answer.task.id)
            return 0

        def told(ended: wire.Task) -> BaseModel:
            return wire.RollbackAnswer(plan=answer.plan, task=ended)

        return _finish(session, client, answer.task, f"disk-{call}", told)


def edit(session: Session, disk: str, delete_auto_with_disk: bool | None, encrypted: bool | None) -> None:
    """Change what holds for a disk, and show it."""
    given = {"delete_auto_with_disk": delete_auto_with_disk, "encrypted": encrypted}
    request = body(wire.DiskEdit, **{key: value for key, value in given.items() if value is not None})
    with session.client() as client:
        answer = client.post(place("disks", disk, "edit"), wire.Disk, request)
    session.answer(answer, answer.id if session.quiet else render.disk(answer))


def release(session: Session, disk: str, *, dry_run: bool) -> None:
    """Forget a disk, or tell what would go with it."""
    request = body(wire.DiskRelease, dry_run=dry_run)
    with session.client() as client:
        answer = client.post(place("disks", disk, "release"), wire.DiskReleased, request)
    session.answer(answer, answer.disk.id if session.quiet else render.released(answer))


def _finish(
    session: Session, client: Client, task: wire.Task, what: str, told: Callable[[wire.Task], BaseModel]
) -> int:
    """Follow a task and tell how it ended; ``told`` makes the object that `--json` shows of it."""
    now = followed(session, client, task)
    if now is None:
        return INTERRUPTED
    if now.state is wire.TaskState.ACCOMPLISHED:
        session.answer(told(now), render.done(now, quiet=session.quiet))
        return 0
    also = told(now).model_dump(mode="json")
    return complain(task_error(now), what, as_json=session.json, also=also if "task" in also else {"task": also})


def followed(session: Session, client: Client, task: wire.Task) -> wire.Task | None:
    """Follow a task to its end and return it; None if the user left it."""
    now = task

    def look() -> list[Sight]:
        nonlocal now
        now = client.get(place("tasks", task.id), wire.Task)
        return [_sight(now)]

    hint = "`hvsnap watch` shows its progress and its end"
    try:
        follow(
            client,
            look,
            quiet=session.quiet,
            cancel=lambda: cancel(client, "tasks", task.id, wire.Task),
            leave_hint=hint,
        )
    except KeyboardInterrupt:
        return None
    return now


def task_error(task: wire.Task) -> HvsnapError:
    """Return why a task did not succeed."""
    if task.error is None:
        return Failed(f"task {task.id} is {task.state}", hint="the daemon's log says more")
    return DaemonError(task.error)


def _sight(task: wire.Task) -> Sight:
    return Sight(
        id=task.id,
        title=f"{task.subject}: {task.step}" if task.step else task.subject,
        done_bytes=task.done_bytes,
        total_bytes=task.total_bytes,
        percent=task.progress,
        rate_bytes_s=task.rate_bytes_s,
        eta_s=task.eta_s,
        ended=task.state is not wire.TaskState.RUNNING,
    )

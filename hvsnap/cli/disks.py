"""Commands that make disks and set them back: tasks of the daemon, followed to their end."""

from __future__ import annotations

import os
from dataclasses import dataclass

from pydantic import BaseModel

from hvsnap import wire
from hvsnap.cli import render
from hvsnap.cli.client import body, place
from hvsnap.cli.session import Session
from hvsnap.cli.tasks import finished


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
        if wanted.instant and not detach:
            session.answer(task, path)
            session.remark(f"it can be used now, and is filled in the background: {task.id}; `hvsnap watch` tells when")
            return 0
        return finished(session, client, task, "disk-create", detach=detach)


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

        def told(task: wire.Task) -> BaseModel:
            return wire.RollbackAnswer(plan=answer.plan, task=task)

        return finished(session, client, answer.task, f"disk-{call}", detach=detach, told=told)


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

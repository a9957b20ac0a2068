"""Following the daemon's tasks to their ends, and telling what they came to."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from hvsnap import wire
from hvsnap.cli.client import Client, DaemonError, place
from hvsnap.cli.complaints import INTERRUPTED, complain
from hvsnap.cli.follow import Sight, cancel, follow
from hvsnap.cli.outcomes import damage, outcome
from hvsnap.cli.session import Session
from hvsnap.errors import Failed, HvsnapError


def finished(
    session: Session,
    client: Client,
    task: wire.Task,
    what: str,
    *,
    detach: bool,
    told: Callable[[wire.Task], BaseModel] | None = None,
) -> int:
    """Follow a task and tell how it ended; return the exit status. With ``detach`` only its id is told, at once.

    ``what`` is the command; ``told`` makes the object that `--json` shows of the task. Damage that it found is an
    error, with all that is known of it.
    """
    if detach:
        session.answer(told(task) if told else task, task.id)
        return 0
    now = followed(session, client, task)
    if now is None:
        return INTERRUPTED
    shown = told(now) if told else now
    also = {"task": now.model_dump(mode="json")} if shown is now else shown.model_dump(mode="json")
    error = task_error(now)
    if error is None:
        session.answer(shown, outcome(now, quiet=session.quiet))
        return 0
    if now.state is wire.TaskState.ACCOMPLISHED and not session.json:
        session.answer(shown, outcome(now, quiet=session.quiet))
    return complain(error, what, as_json=session.json, also=also)


def followed(session: Session, client: Client, task: wire.Task) -> wire.Task | None:
    """Follow a task to its end and return it; None if the user left it."""
    now = task

    def look() -> list[Sight]:
        nonlocal now
        now = client.get(place("tasks", task.id), wire.Task)
        return [sight(now)]

    hint = f"`hvsnap task-wait {task.id}` follows it again"
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


def task_error(task: wire.Task) -> HvsnapError | None:
    """Return why a task did not succeed, or what it found damaged; None if all is well."""
    if task.state is wire.TaskState.ACCOMPLISHED:
        return damage(task.result)
    if task.error is None:
        return Failed(f"task {task.id} is {task.state}", hint="the daemon's log says more")
    return DaemonError(task.error)


def sight(task: wire.Task) -> Sight:
    """Return how far a task is."""
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

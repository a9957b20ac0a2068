"""Commands about what goes on in the daemon: captures, by their snapshots' ids, and tasks, by theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hvsnap import wire
from hvsnap.cli import render, snapshots, tasks
from hvsnap.cli.client import Client, DaemonError, place
from hvsnap.cli.complaints import INTERRUPTED, complain
from hvsnap.cli.follow import Sight, cancel, follow
from hvsnap.cli.outcomes import outcome
from hvsnap.cli.session import Session
from hvsnap.cli.text import safe
from hvsnap.errors import BadRequest, Failed, HvsnapError, Refused
from hvsnap.model import State

LIST_MAX = 1000
CAPTURE = "snapshot-create"

One = wire.Snapshot | wire.Task


def listing(session: Session, *, everything: bool) -> None:
    """Show what is under way, newest first; ``everything``: and the tasks that have ended."""
    with session.client() as client:
        captures = client.get("/snapshots", wire.SnapshotList, state=State.PROGRESSING, limit=LIST_MAX).snapshots
        known = client.get("/tasks", wire.TaskList).tasks
    shown = [one for one in known if everything or one.state is wire.TaskState.RUNNING]
    headers = ("ID", "WORK", "ON", "STATE", "DONE", "LEFT", "SINCE")
    both: list[One] = [*captures, *shown]
    rows = [_row(one) for one in sorted(both, key=lambda one: one.created_at, reverse=True)]
    answer = wire.Work(snapshots=captures, tasks=shown)
    session.answer(answer, render.table(headers, rows, headers=not session.quiet))


def wait(session: Session, ids: Sequence[str]) -> int:
    """Follow work to its end and tell what it came to; return the exit status: whether all of it succeeded."""
    with session.client() as client:
        ended = _followed(session, client, _looked_up(client, ids))
    if ended is None:
        return INTERRUPTED
    told = [_outcome(one, quiet=session.quiet) for one in ended if _accomplished(one)]
    errors = {one.id: error for one in ended if (error := _error(one)) is not None}
    return _tell(session, "task-wait", ended, told, errors)


def give_up(session: Session, ids: Sequence[str]) -> int:
    """Cancel work, and wait until it is undone; return the exit status: whether all of it was cancelled."""
    errors: dict[str, HvsnapError] = {}
    with session.client() as client:
        found = _looked_up(client, ids)
        for one in found:
            try:
                client.post(place(_room(one), one.id, "cancel"), type(one))
            except DaemonError as error:
                errors[one.id] = error
        ended = _followed(session, client, [one for one in found if one.id not in errors])
    if ended is None:
        return INTERRUPTED
    late = [one.id for one in ended if _accomplished(one)]
    errors |= {name: Refused("it was accomplished before it could be cancelled") for name in late}
    gone = [one for one in ended if one.id not in late]
    told = [one.id if session.quiet else f"{one.id}  cancelled: {_title(one)}" for one in gone]
    return _tell(session, "task-cancel", ended, told, errors)


def _tell(
    session: Session, what: str, ended: Sequence[One], told: Sequence[str], errors: Mapping[str, HvsnapError]
) -> int:
    """Print what came of it, and below it what did not; return the exit status, a single error's own."""
    answer = wire.Work(
        snapshots=[one for one in ended if isinstance(one, wire.Snapshot)],
        tasks=[one for one in ended if isinstance(one, wire.Task)],
    )
    if not errors or not session.json:
        session.answer(answer, "\n".join(line for line in told if line))
    if not errors:
        return 0
    error, *others = errors.values()
    if others:
        error = Failed("; ".join(f"{name}: {one.message}" for name, one in errors.items()))
    return complain(error, what, as_json=session.json, also=answer.model_dump(mode="json"))


def _looked_up(client: Client, ids: Sequence[str]) -> list[One]:
    """Return all of them as they are now, each once; raises for one that is not there, before anything is done."""
    return [_look(client, name) for name in dict.fromkeys(ids)]


def _look(client: Client, name: str) -> One:
    if name.startswith("s-"):
        return client.get(place("snapshots", name), wire.Snapshot)
    if name.startswith("t-"):
        return client.get(place("tasks", name), wire.Task)
    hint = "an id begins with s- for a snapshot that is being made, with t- for a task: `hvsnap task-list` shows them"
    raise BadRequest(f"{name[:100]!a} is no id of work", hint=hint)


def _followed(session: Session, client: Client, found: Sequence[One]) -> list[One] | None:
    """Return all when they have ended; None if the user left them."""
    now = list(found)

    def look() -> list[Sight]:
        now[:] = [one if _ended(one) else _look(client, one.id) for one in now]
        return [_sight(one) for one in now]

    def stop() -> None:
        for one in now:
            if not _ended(one):
                cancel(client, _room(one), one.id, type(one))

    hint = f"`hvsnap task-wait {' '.join(one.id for one in found)}` follows it again"
    try:
        follow(client, look, quiet=session.quiet, cancel=stop, leave_hint=hint)
    except KeyboardInterrupt:
        return None
    return now


# -- one of them ----------------------------------------------------------------------------------


def _room(one: One) -> str:
    """Return where it is in the API."""
    return "tasks" if isinstance(one, wire.Task) else "snapshots"


def _ended(one: One) -> bool:
    return one.state not in (State.PROGRESSING, wire.TaskState.RUNNING)


def _accomplished(one: One) -> bool:
    return one.state in (State.ACCOMPLISHED, wire.TaskState.ACCOMPLISHED)


def _error(one: One) -> HvsnapError | None:
    if isinstance(one, wire.Task):
        return tasks.task_error(one)
    if _accomplished(one):
        return None
    hint = f"nothing is left of it but its record: `hvsnap snapshot-info {one.id}`"
    return Failed(f"{one.id} of {one.guest}/{one.target} failed: {one.error or one.state}", hint=hint)


def _outcome(one: One, *, quiet: bool) -> str:
    return outcome(one, quiet=quiet) if isinstance(one, wire.Task) else render.made([one], quiet=quiet)


def _sight(one: One) -> Sight:
    return tasks.sight(one) if isinstance(one, wire.Task) else snapshots.sight(one)


def _title(one: One) -> str:
    if isinstance(one, wire.Task):
        return f"{one.kind} {safe(one.subject)}"
    return f"{CAPTURE} {safe(one.guest)}/{safe(one.target)}"


def _row(one: One) -> tuple[str, ...]:
    if isinstance(one, wire.Task):
        work, on, state = one.kind, one.subject, one.step or one.state
    else:
        work, on, state = CAPTURE, f"{one.guest}/{one.target}", one.state
    left = "" if one.eta_s is None or _ended(one) else render.duration(one.eta_s)
    return one.id, work, on, state, f"{one.progress} %", left, render.when(one.created_at)

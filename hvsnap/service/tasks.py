"""Long work that goes on in the daemon whoever asked for it: named tasks, their progress, their end.

A task never takes the daemon down with it: what it raises becomes its state. Finished ones are remembered, as many as
:data:`FINISHED_MAX`, until the daemon ends; what must outlive it is in the journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from hvsnap.errors import Busy, Failed, HvsnapError, NotFound, Refused, Stopping
from hvsnap.model import Progress, new_id
from hvsnap.ports import Clock, Publisher
from hvsnap.wire import TaskState

log = logging.getLogger(__name__)

RUNNING_MAX = 32
"""More than a host's disks can serve at once; a flood of requests must not become a flood of work."""

FINISHED_MAX = 200


@dataclass(frozen=True, slots=True)
class TaskView:
    """A task as it is at this moment: ``guest`` is the UUID of its guest, ``result`` what its work returned."""

    id: str
    kind: str
    subject: str
    state: TaskState
    created_at: float
    guest: str = ""
    step: str = ""
    progress: Progress | None = None
    finished_at: float | None = None
    error: HvsnapError | None = None
    result: object = None


class TaskRun:
    """What work is given to tell how far it is."""

    def __init__(self, view: TaskView, publisher: Publisher) -> None:
        self.view = view
        self.task: asyncio.Task[None] | None = None
        self.cancelled = False
        self.no_return = ""
        self._publisher = publisher

    def step(self, text: str) -> None:
        """Say what is being done now, in a few words for people."""
        self.view = replace(self.view, step=text)

    def final(self, why: str) -> None:
        """Say that the work cannot be cancelled any more, and why; the daemon's own end still interrupts it."""
        self.no_return = why

    def progress(self, progress: Progress) -> None:
        """Say how far the bytes are; whatever the progress was called, it is the task's."""
        progress = replace(progress, id=self.view.id)
        self.view = replace(self.view, progress=progress)
        self._publisher.progress(progress)


Work = Callable[[TaskRun], Awaitable[object]]


class Tasks:
    """The registry. Its tasks run in ``group``, which therefore outlives them."""

    def __init__(self, group: asyncio.TaskGroup, clock: Clock, publisher: Publisher) -> None:
        self._group = group
        self._clock = clock
        self._publisher = publisher
        self._running: dict[str, TaskRun] = {}
        self._finished: OrderedDict[str, TaskView] = OrderedDict()
        self._stopping = False

    @property
    def running(self) -> int:
        """How many tasks run."""
        return len(self._running)

    def start(self, kind: str, subject: str, work: Work, *, guest: str = "") -> TaskView:
        """Start work and return its task at once. Raises :class:`Busy` and :class:`Stopping`."""
        self.check_room()
        view = TaskView(new_id("t"), kind, subject, TaskState.RUNNING, self._clock.now(), guest=guest)
        run = TaskRun(view, self._publisher)
        self._running[view.id] = run
        run.task = self._group.create_task(self._run(run, work), name=f"{kind} {view.id}")
        # A task that is cancelled before its first step never enters its own handlers.
        run.task.add_done_callback(lambda _task: self._ended(run))
        return view

    def check_room(self) -> None:
        """Raise :class:`Busy` or :class:`Stopping` where :meth:`start` would."""
        if self._stopping:
            raise Stopping("the daemon is stopping")
        if len(self._running) >= RUNNING_MAX:
            raise Busy(f"{len(self._running)} tasks are running already", hint="try again when one has finished")

    def get(self, task_id: str) -> TaskView:
        """Return a task, running or finished; raises :class:`NotFound`."""
        run = self._running.get(task_id)
        if run is not None:
            return run.view
        try:
            return self._finished[task_id]
        except KeyError:
            hint = f"the last {FINISHED_MAX} finished tasks are remembered, until the daemon ends"
            raise NotFound(f"there is no task {task_id[:64]}", hint=hint) from None

    def all(self) -> list[TaskView]:
        """Return all tasks that are known, newest first."""
        views = [*self._finished.values(), *(run.view for run in self._running.values())]
        return sorted(views, key=lambda view: view.created_at, reverse=True)

    def cancel(self, task_id: str) -> TaskView:
        """Ask a task to end; it undoes what it has begun, which may take a moment. Raises :class:`Refused`."""
        run = self._running.get(task_id)
        if run is None:
            view = self.get(task_id)
            raise Refused(f"task {view.id} is {view.state} already", hint="nothing is left to cancel")
        if run.no_return:
            raise Refused(f"task {task_id} cannot be cancelled any more", hint=run.no_return)
        self._cancel(run)
        return run.view

    async def wait(self, task_id: str) -> TaskView:
        """Return the task when it has ended; a caller that goes away does not disturb it."""
        run = self._running.get(task_id)
        if run is not None and run.task is not None:
            await asyncio.wait([run.task])
            self._ended(run)
        return self.get(task_id)

    async def shutdown(self, timeout_s: float) -> None:
        """Refuse new tasks, cancel those that run, and wait for their ends at most ``timeout_s``."""
        self._stopping = True
        for run in list(self._running.values()):
            self._cancel(run)
        tasks = [run.task for run in self._running.values() if run.task is not None]
        if tasks:
            _done, late = await asyncio.wait(tasks, timeout=timeout_s)
            for task in late:
                log.warning("task %s did not end within %.0f s", task.get_name(), timeout_s)

    # -- inside -----------------------------------------------------------------------------------

    def _cancel(self, run: TaskRun) -> None:
        # Once: a second cancellation would break into the undo that the first one set off.
        if run.task is not None and not run.cancelled:
            run.cancelled = True
            run.step("cancelling")
            run.task.cancel()

    async def _run(self, run: TaskRun, work: Work) -> None:
        """Do the work; whatever it raises stays in the task's view."""
        view = run.view
        with contextlib.suppress(asyncio.CancelledError):
            try:
                result = await work(run)
            except HvsnapError as error:
                self._end(run, TaskState.FAILED, error=error)
            except Exception:
                log.exception("%s %s failed", view.kind, view.id)
                fault = Failed(f"{view.kind} failed by a fault in hvsnap", hint="the daemon's log has the details")
                self._end(run, TaskState.FAILED, error=fault)
            else:
                self._end(run, TaskState.ACCOMPLISHED, result=result)

    def _ended(self, run: TaskRun) -> None:
        """Settle a task that ended without saying how: it was cancelled."""
        if run.view.state is TaskState.RUNNING:
            error = Failed("it was cancelled")
            self._end(run, TaskState.CANCELLED, error=error)

    def _end(self, run: TaskRun, state: TaskState, *, error: HvsnapError | None = None, result: object = None) -> None:
        run.view = replace(run.view, state=state, finished_at=self._clock.now(), error=error, result=result, step="")
        self._running.pop(run.view.id, None)
        self._finished[run.view.id] = run.view
        while len(self._finished) > FINISHED_MAX:
            self._finished.popitem(last=False)

"""Long work: how it is seen, how it ends, what it never takes with it."""

import asyncio

import pytest

from hvsnap.errors import Busy, NoSpace, NotFound, Refused, Stopping
from hvsnap.model import Progress
from hvsnap.service import tasks as tasks_module
from hvsnap.service.tasks import TaskRun, Tasks
from hvsnap.wire import TaskState
from tests.catalog_kit import StoppedClock
from tests.service_kit import Heard


async def forever(_run: TaskRun) -> None:
    await asyncio.Event().wait()


async def test_a_task_tells_its_steps_and_progress_and_returns_its_result() -> None:
    heard = Heard()
    go_on = asyncio.Event()

    async def work(run: TaskRun) -> str:
        run.step("reading")
        run.progress(Progress("inner", 25, 100, 5.0, 15.0))
        await go_on.wait()
        return "done"

    async with asyncio.TaskGroup() as group:
        tasks = Tasks(group, StoppedClock(), heard)
        started = tasks.start("disk-create", "a disk", work, guest="some-guest")
        assert started.state is TaskState.RUNNING
        await asyncio.sleep(0)
        seen = tasks.get(started.id)
        assert (seen.step, seen.guest) == ("reading", "some-guest")
        assert seen.progress == Progress(started.id, 25, 100, 5.0, 15.0)
        assert heard.progresses == [seen.progress]
        go_on.set()
        ended = await tasks.wait(started.id)
    assert (ended.state, ended.result, ended.finished_at) == (TaskState.ACCOMPLISHED, "done", 1000.0)
    assert tasks.running == 0


async def test_what_a_task_raises_becomes_its_state_and_leaves_others_alone() -> None:
    async def no_space(_run: TaskRun) -> None:
        raise NoSpace("the device is full")

    async def fault(_run: TaskRun) -> None:
        raise ZeroDivisionError

    async with asyncio.TaskGroup() as group:
        tasks = Tasks(group, StoppedClock(), Heard())
        other = tasks.start("other", "", forever)
        failed = await tasks.wait(tasks.start("one", "", no_space).id)
        faulty = await tasks.wait(tasks.start("two", "", fault).id)
        assert failed.state is faulty.state is TaskState.FAILED
        assert failed.error is not None
        assert failed.error.code == "no-space"
        assert faulty.error is not None
        assert "fault in hvsnap" in faulty.error.message
        assert tasks.get(other.id).state is TaskState.RUNNING
        tasks.cancel(other.id)


@pytest.mark.parametrize("begun", [True, False])
async def test_a_cancelled_task_undoes_its_work_before_it_ends(begun: bool) -> None:
    undone = []

    async def work(_run: TaskRun) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            undone.append(True)

    async with asyncio.TaskGroup() as group:
        tasks = Tasks(group, StoppedClock(), Heard())
        task = tasks.start("disk-create", "", work)
        if begun:
            await asyncio.sleep(0)
        tasks.cancel(task.id)
        tasks.cancel(task.id)  # a second time must not break into the undoing
        ended = await tasks.wait(task.id)
    assert ended.state is TaskState.CANCELLED
    assert undone == ([True] if begun else [])
    with pytest.raises(Refused, match="cancelled already"):
        tasks.cancel(task.id)


async def test_work_that_could_not_be_cancelled_any_more_is_accomplished() -> None:
    async def work(_run: TaskRun) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "it was done already"
        return ""

    async with asyncio.TaskGroup() as group:
        tasks = Tasks(group, StoppedClock(), Heard())
        task = tasks.start("disk-create", "", work)
        await asyncio.sleep(0)
        tasks.cancel(task.id)
        assert (await tasks.wait(task.id)).state is TaskState.ACCOMPLISHED


async def test_a_flood_of_requests_does_not_become_a_flood_of_work() -> None:
    async with asyncio.TaskGroup() as group:
        tasks = Tasks(group, StoppedClock(), Heard())
        for _ in range(tasks_module.RUNNING_MAX):
            tasks.start("disk-create", "", forever)
        with pytest.raises(Busy):
            tasks.start("disk-create", "", forever)
        await tasks.shutdown(5)
    assert tasks.running == 0


async def test_finished_tasks_are_remembered_up_to_a_bound() -> None:
    async def nothing(_run: TaskRun) -> None:
        return

    async with asyncio.TaskGroup() as group:
        tasks = Tasks(group, StoppedClock(), Heard())
        ids = []
        for _ in range(tasks_module.FINISHED_MAX + 1):
            ids.append(tasks.start("x", "", nothing).id)
            await tasks.wait(ids[-1])
    with pytest.raises(NotFound):
        tasks.get(ids[0])
    assert tasks.get(ids[1]).state is TaskState.ACCOMPLISHED
    assert len(tasks.all()) == tasks_module.FINISHED_MAX


async def test_after_a_shutdown_nothing_runs_and_nothing_starts() -> None:
    async with asyncio.TaskGroup() as group:
        tasks = Tasks(group, StoppedClock(), Heard())
        task = tasks.start("x", "", forever)
        await asyncio.sleep(0)
        await tasks.shutdown(5)
        assert tasks.get(task.id).state is TaskState.CANCELLED
        with pytest.raises(Stopping):
            tasks.start("x", "", forever)


async def test_a_waiter_that_goes_away_does_not_disturb_the_task() -> None:
    go_on = asyncio.Event()

    async def work(_run: TaskRun) -> None:
        await go_on.wait()

    async with asyncio.TaskGroup() as group:
        tasks = Tasks(group, StoppedClock(), Heard())
        task = tasks.start("x", "", work)
        waiter = asyncio.create_task(tasks.wait(task.id))
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.gather(waiter, return_exceptions=True)
        go_on.set()
        assert (await tasks.wait(task.id)).state is TaskState.ACCOMPLISHED

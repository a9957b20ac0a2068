"""Work that must come to its end, whoever waits for it."""

from __future__ import annotations

import asyncio

import pytest

from hvsnap.store.uninterrupted import to_its_end, uninterrupted


async def test_a_cancelled_caller_waits_for_the_end_and_only_then_is_cancelled_or_gets_the_result() -> None:
    for wrapper, cancelled in ((uninterrupted, True), (to_its_end, False)):
        go, done = asyncio.Event(), []

        async def work(go: asyncio.Event = go, done: list[int] = done) -> int:
            await go.wait()
            done.append(1)
            return 7

        caller = asyncio.create_task(wrapper(work(), name="work"))
        for _ in range(3):  # also one that is cancelled again while it waits
            await asyncio.sleep(0)
            caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()
        go.set()
        if cancelled:
            with pytest.raises(asyncio.CancelledError):
                await caller
        else:
            assert await caller == 7
        assert done == [1]


async def test_errors_of_the_work_reach_its_caller() -> None:
    async def work() -> int:
        raise ValueError("no")

    for wrapper in (uninterrupted, to_its_end):
        with pytest.raises(ValueError, match="no"):
            await wrapper(work(), name="work")

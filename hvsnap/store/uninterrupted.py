"""Awaiting work that must end before its caller is let go, even a cancelled one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def uninterrupted(work: Coroutine[Any, Any, T], name: str) -> T:
    """Run ``work`` to its end and return what it returns; a cancellation is raised only then.

    For work in threads that holds the caller's buffer, or half of a file: a thread cannot be cancelled, and letting go
    of its caller would hand the buffer to somebody else while it is being read. ``name`` names the task.
    """
    task = asyncio.create_task(work, name=name)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # seen, so that asyncio does not complain; the cancellation goes first
        raise cancelled
    return task.result()


async def to_its_end(work: Coroutine[Any, Any, T], name: str) -> T:
    """Run ``work`` to its end and return what it returns, even to a caller that was cancelled meanwhile.

    For what cannot be half done, and is told of as done: a file that gets its name, a disk that is attached.
    """
    task = asyncio.create_task(work, name=name)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()

"""The stream of events: without a gap, resumable, bounded, for one guest or all."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import Busy, Stopping
from hvsnap.model import Event, Progress
from hvsnap.service import feed as feed_module
from hvsnap.service.feed import Feed, newest_sequence
from hvsnap.service.tasks import Tasks
from tests.catalog_kit import StoppedClock, a_disk, add_chain
from tests.service_kit import Heard, a_catalog


@pytest.fixture
async def catalog(workdir: Path) -> AsyncIterator[Catalog]:
    async with a_catalog(workdir) as opened:
        yield opened


@pytest.fixture
async def tasks() -> AsyncIterator[Tasks]:
    async with asyncio.TaskGroup() as group:
        yield Tasks(group, StoppedClock(), Heard())


async def connected(catalog: Catalog, tasks: Tasks, keep_alive_s: float = 60.0) -> Feed:
    made = Feed(catalog, tasks, await newest_sequence(catalog), keep_alive_s=keep_alive_s)
    catalog.on_event.append(made.event)
    return made


async def emit(catalog: Catalog, count: int = 1, **payload: Any) -> None:
    async with catalog.write() as tx:
        for _ in range(count):
            await tx.emit("snapshot.created", payload)


async def take(stream: AsyncIterator[Any], count: int) -> list[Any]:
    async with asyncio.timeout(10):
        return [await anext(stream) for _ in range(count)]


async def test_a_reader_gets_every_event_in_order_whenever_it_resumes(catalog: Catalog, tasks: Tasks) -> None:
    await emit(catalog, 3)
    feed = await connected(catalog, tasks)
    stream = feed.open(1)
    await emit(catalog, 2)
    assert [event.sequence for event in await take(stream, 4)] == [2, 3, 4, 5]
    waiting = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await emit(catalog)
    async with asyncio.timeout(10):
        assert (await waiting).sequence == 6
    again = feed.open(4)
    assert [event.sequence for event in await take(again, 2)] == [5, 6]


async def test_without_a_number_the_stream_starts_with_what_happens_next(catalog: Catalog, tasks: Tasks) -> None:
    await emit(catalog, 3)
    feed = await connected(catalog, tasks)
    stream = feed.open(None)
    await emit(catalog)  # after the opening, before the first read
    assert [event.sequence for event in await take(stream, 1)] == [4]


async def test_a_number_of_the_future_means_now(catalog: Catalog, tasks: Tasks) -> None:
    await emit(catalog, 2)
    feed = await connected(catalog, tasks)
    stream = feed.open(10**18)
    await emit(catalog)
    assert [event.sequence for event in await take(stream, 1)] == [3]


async def test_a_slow_reader_loses_outdated_progress_but_no_event(catalog: Catalog, tasks: Tasks) -> None:
    feed = await connected(catalog, tasks)
    stream = feed.open(0)
    await emit(catalog)
    await take(stream, 1)
    many = 3 * feed_module.BATCH
    for done in range(101):
        feed.progress(Progress("s-1", done, 100, 1.0, None))
    await emit(catalog, many)
    items = await take(stream, many + 1)
    progress = [item for item in items if isinstance(item, Progress)]
    assert [item.done_bytes for item in progress] == [100]
    assert [item.sequence for item in items if isinstance(item, Event)] == list(range(2, many + 2))


async def test_a_guest_s_stream_has_its_own_events_and_progress_alone(catalog: Catalog, tasks: Tasks) -> None:
    web, mail = a_disk(), a_disk(guest_uuid="u-mail", guest_name="mail")
    (of_web,), (of_mail,) = await add_chain(catalog, web, {}), await add_chain(catalog, mail, {})
    feed = await connected(catalog, tasks)
    for name in ("mail", "u-mail"):
        stream = feed.open(None, name)
        waiting = asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await asyncio.sleep(0)  # now it listens: progress before that is not for it
        for snapshot in (of_web, "s-unknown", "t-unknown", of_mail):
            feed.progress(Progress(snapshot, 1, 2, 1.0, None))
        async with asyncio.timeout(10):
            assert (await waiting).id == of_mail
        await emit(catalog, guest="web01", guest_uuid=web.guest_uuid)
        await emit(catalog)
        await emit(catalog, guest="mail", guest_uuid="u-mail")
        (event,) = await take(stream, 1)
        assert event.payload["guest"] == "mail"


async def test_a_quiet_stream_shows_that_it_is_alive(catalog: Catalog, tasks: Tasks) -> None:
    feed = await connected(catalog, tasks, keep_alive_s=0.01)
    assert await take(feed.open(None), 3) == [None, None, None]


async def test_streams_end_when_the_daemon_does(catalog: Catalog, tasks: Tasks) -> None:
    feed = await connected(catalog, tasks)
    stream = feed.open(None)
    waiting = asyncio.create_task(anext(stream, "ended"))  # type: ignore[arg-type,call-overload]
    await asyncio.sleep(0)
    feed.close()
    async with asyncio.timeout(10):
        assert await waiting == "ended"
    with pytest.raises(Stopping):
        feed.open(None)


async def test_readers_are_bounded_and_one_that_left_makes_room(
    catalog: Catalog, tasks: Tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed_module, "READERS_MAX", 2)
    await emit(catalog)
    feed = await connected(catalog, tasks)
    one, two = feed.open(0), feed.open(0)
    await take(one, 1)
    await take(two, 1)
    with pytest.raises(Busy):
        feed.open(0)
    await one.aclose()  # type: ignore[attr-defined]
    await take(feed.open(0), 1)

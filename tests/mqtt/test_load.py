"""Much at once: an hour's events after an outage, and the hosts of a site on one broker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from hvsnap.catalog.catalog import Catalog
from hvsnap.model import Progress
from tests.mqtt.broker import Broker
from tests.mqtt.conftest import Publish
from tests.mqtt.kit import add_disk, emit
from tests.mqtt.listener import listening, until
from tests.ports import free_port
from tests.service_kit import a_catalog

HOSTS = 100
EVENTS_EACH = 30


async def test_an_hour_of_events_waits_and_arrives_in_order_within_its_bounds(
    make_broker: Callable[..., Broker], catalog: Catalog, publish: Publish
) -> None:
    """Two events a second for an hour while the broker is away; 2,000 of them fit."""
    running = await publish(f"mqtt://127.0.0.1:{free_port()}")
    sequences: list[int] = []
    for minute in range(60):
        sequences += await emit(catalog, 120)
        running.publisher.progress(Progress("s-aaaaaaaaaaaa", minute, 60, 1.0, None))
        async with catalog.write() as tx:
            await tx.trim_events(keep=5000, keep_unpublished=2000)
        assert await catalog.unpublished_count() <= 2000
    await until(lambda: running.publisher.status().pending == 2000, "the count")
    await running.stop()
    broker = make_broker()
    async with listening(broker.port, max_queued_incoming_messages=0) as listener:
        running = await publish(broker.url)
        await listener.until(lambda heard: len(heard.heard) >= 2000 and sequences[-1] in heard.sequences(), "all", 60)
        await until(lambda: running.publisher.status().pending == 0, "noting")
    assert listener.sequences() == sequences[-2000:]


async def test_a_hundred_hosts_share_a_broker_that_is_restarted_meanwhile(
    broker: Broker, publish: Publish, workdir: Path
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        catalogs = {}
        for number in range(HOSTS):
            catalog = await stack.enter_async_context(a_catalog(workdir / f"host{number}"))
            await add_disk(catalog)
            await emit(catalog, EVENTS_EACH - 1)
            catalogs[f"host{number}"] = catalog
        hosts = [await publish(broker.url, host=host, of=catalog) for host, catalog in catalogs.items()]
        await until(lambda: sum(host.publisher.status().pending == 0 for host in hosts) > HOSTS / 10, "a part", 60)
        broker.stop()
        broker.start()
        async with listening(broker.port, max_queued_incoming_messages=0) as listener:
            await listener.until(lambda heard: len({one.topic for one in heard.heard}) >= HOSTS, "all hosts", 60)
            for catalog in catalogs.values():
                await emit(catalog, EVENTS_EACH)
            await until(lambda: all(host.publisher.status().pending == 0 for host in hosts), "all events", 60)
            last = 2 * EVENTS_EACH
            await listener.until(lambda heard: heard.sequences().count(last) == HOSTS, "the last event of each", 60)
        await asyncio.gather(*(host.stop() for host in hosts))
    for host in catalogs:
        heard = [one.json["sequence"] for one in listener.on(f"hvsnap/{host}/event")]
        assert heard == list(range(heard[0], last + 1)), host
        assert heard[0] <= EVENTS_EACH + 1
    states = [one for one in listener.heard if "/disk/" in one.topic]
    assert len({one.topic for one in states}) == HOSTS

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hvsnap import config
from hvsnap.catalog.catalog import Catalog
from hvsnap.mqtt.connection import Timings
from hvsnap.mqtt.publisher import MqttPublisher
from tests.catalog_kit import StoppedClock
from tests.mqtt.broker import Broker
from tests.service_kit import a_catalog

FAST = Timings(
    answer_s=1.0, keepalive_s=1, pause_min_s=0.05, pause_max_s=0.2, status_s=0.5, farewell_s=2.0, progress_s=0.2
)


@pytest.fixture(autouse=True)
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No task or future ends with an error that nobody looked at."""
    yield
    gc.collect()
    records = [*caplog.get_records("call"), *caplog.get_records("teardown")]
    left = [record.getMessage() for record in records if record.name == "asyncio"]
    assert not left, left


@pytest.fixture
def make_broker(workdir: Path) -> Iterator[Callable[..., Broker]]:
    made: list[Broker] = []

    def make(*lines: str, **options: bool) -> Broker:
        broker = Broker(workdir / f"broker{len(made)}", *lines, **options)
        made.append(broker)
        return broker.start()

    yield make
    for broker in made:
        broker.stop()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    return make_broker()


@pytest.fixture
async def catalog(workdir: Path) -> AsyncIterator[Catalog]:
    async with a_catalog(workdir / "state") as opened:
        yield opened


class Running:
    """A publisher and the task that it runs in."""

    def __init__(self, publisher: MqttPublisher) -> None:
        self.publisher = publisher
        self.task = asyncio.create_task(publisher.run(), name="mqtt")

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


Publish = Callable[..., Awaitable[Running]]


@pytest.fixture
async def publish(catalog: Catalog) -> AsyncIterator[Publish]:
    """Start publishers of the catalog; keywords are settings of ``[mqtt]``."""
    started: list[Running] = []

    async def start(
        url: str, *, host: str = "kvm1", timings: Timings = FAST, of: Catalog = catalog, **settings: Any
    ) -> Running:
        publisher = MqttPublisher(config.Mqtt(url=url, **settings), host, of, StoppedClock(), timings)
        await publisher.check()
        of.on_event.append(publisher.event)
        running = Running(publisher)
        started.append(running)
        return running

    yield start
    for running in started:
        await running.stop()

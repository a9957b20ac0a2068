"""A process that emits events and publishes them, to be killed: ``STATE_DIR URL``."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path

from hvsnap import config
from hvsnap.mqtt.publisher import MqttPublisher
from tests.catalog_kit import StoppedClock
from tests.mqtt.conftest import FAST
from tests.mqtt.kit import emit
from tests.service_kit import a_catalog


async def main(state_dir: str, url: str) -> None:
    async with a_catalog(Path(state_dir)) as catalog:
        publisher = MqttPublisher(config.Mqtt(url=url), "kvm1", catalog, StoppedClock(), FAST)
        catalog.on_event.append(publisher.event)
        running = asyncio.create_task(publisher.run())
        emitting = asyncio.create_task(emit_for_ever(catalog))
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await stop.wait()
        for task in (emitting, running):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def emit_for_ever(catalog):  # type: ignore[no-untyped-def]
    while True:
        await emit(catalog, 10)


asyncio.run(main(*sys.argv[1:]))

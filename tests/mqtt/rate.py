"""How many events a second go to a mosquitto on this machine: ``python -m tests.mqtt.rate``."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time

from hvsnap import config
from hvsnap.mqtt.publisher import MqttPublisher
from tests.catalog_kit import StoppedClock
from tests.conftest import short_directory
from tests.mqtt.broker import Broker
from tests.mqtt.kit import emit
from tests.mqtt.listener import until
from tests.service_kit import a_catalog

EVENTS = 10_000


async def main() -> None:
    directory = short_directory()
    broker = Broker(directory / "broker").start()
    try:
        async with a_catalog(directory / "state") as catalog:
            await emit(catalog, EVENTS)
            publisher = MqttPublisher(config.Mqtt(url=broker.url), "kvm1", catalog, StoppedClock())
            began = time.monotonic()
            running = asyncio.create_task(publisher.run())
            await until(lambda: publisher.status().connected and publisher.status().pending == 0, "the end", 600)
            lasted_s = time.monotonic() - began
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running
    finally:
        broker.stop()
        shutil.rmtree(directory)
    print(f"{EVENTS} events in {lasted_s:.1f} s: {EVENTS / lasted_s:.0f} a second")


if __name__ == "__main__":
    asyncio.run(main())

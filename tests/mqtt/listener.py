"""A subscriber that remembers everything it receives, and tests that wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import aiomqtt

DEADLINE_S = 20.0


@dataclass(frozen=True)
class Heard:
    topic: str
    payload: bytes
    retained: bool
    qos: int
    properties: dict[str, Any]

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.payload)  # type: ignore[no-any-return]


class Listener:
    """Messages in the order in which they came."""

    def __init__(self) -> None:
        self.heard: list[Heard] = []
        self._news = asyncio.Event()

    async def read(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            properties = message.properties.json() if message.properties else {}  # type: ignore[no-untyped-call]
            payload = message.payload
            assert isinstance(payload, bytes)
            self.heard.append(Heard(str(message.topic), payload, message.retain, message.qos, properties))
            self._news.set()

    def on(self, topic: str) -> list[Heard]:
        return [one for one in self.heard if one.topic == topic]

    def events(self) -> list[dict[str, Any]]:
        return [one.json for one in self.heard if one.topic.endswith("/event")]

    def sequences(self) -> list[int]:
        return [event["sequence"] for event in self.events()]

    async def until(self, condition: Callable[[Listener], Any], what: str, deadline_s: float = DEADLINE_S) -> None:
        """Return when the condition holds of what was heard."""
        try:
            async with asyncio.timeout(deadline_s):
                while not condition(self):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            last = [(one.topic, one.payload[:100]) for one in self.heard[-5:]]
            raise AssertionError(f"{what} was not heard; the last of {len(self.heard)} messages: {last}") from None


@contextlib.asynccontextmanager
async def listening(port: int, *topics: str, **options: Any) -> AsyncIterator[Listener]:
    """Listen with MQTT 5 until the end of the block; a broker that goes away ends it silently."""
    listener = Listener()
    options.setdefault("protocol", aiomqtt.ProtocolVersion.V5)
    client = aiomqtt.Client("127.0.0.1", port, **options)
    try:
        async with client:
            for topic in topics or ("#",):
                await client.subscribe(topic, qos=1)
            reading = asyncio.create_task(listener.read(client), name="listener")
            try:
                yield listener
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
    except aiomqtt.MqttError:
        if not listener.heard:
            raise


async def until(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Return when the condition holds."""
    try:
        async with asyncio.timeout(deadline_s):
            while not condition():  # noqa: ASYNC110 (what is looked at has no event)
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what} did not happen within {deadline_s:.0f} s") from None

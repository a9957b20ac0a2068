"""The listening side, for `hvsnap watch --mqtt`: what many hosts publish, over connections that are made again.

It publishes nothing, and its sessions leave nothing behind on the broker.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass

import aiomqtt
from aiomqtt import ProtocolVersion

from hvsnap import config
from hvsnap.errors import Failed
from hvsnap.mqtt import credentials
from hvsnap.mqtt.backoff import Backoff
from hvsnap.mqtt.connection import BrokerClient, BrokerFailed, Timings, explain

QUEUE_MAX = 20_000
"""Messages that wait to be looked at: at a new connection the retained states of all disks come at once."""

_FAILURE = 0x80
"""MQTT 3.1.1, 3.9.3: from here on a subscription is refused."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """A message, as it came."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Link:
    """The connection came about (``error`` is empty) or was lost; it is tried again after ``pause_s``."""

    error: str = ""
    pause_s: float = 0.0


def filters(prefix: str) -> list[str]:
    """Return what is subscribed to."""
    below = ["status", "event", "snapshot/+/progress", "task/+/progress", "guest/+/disk/+/state"]
    return [f"{prefix}/+/{one}" for one in below]


async def subscribe(settings: config.Mqtt, timings: Timings | None = None) -> AsyncIterator[Arrived | Link]:
    """Yield what is published, until cancelled. The first connection must come about: else :class:`Failed` is raised.

    Raises :class:`ConfigInvalid` for files that cannot be used.
    """
    timings = timings or Timings()
    backoff = Backoff(timings.pause_min_s, timings.pause_max_s)
    ever = False
    while True:
        known = await asyncio.to_thread(credentials.load, settings)
        try:
            async with _client(known, timings) as client:
                await _subscribe(client, settings.topic_prefix)
                ever = True
                backoff.reset()
                yield Link()
                async for message in client.messages:
                    if isinstance(message.payload, bytes):
                        yield Arrived(message.topic.value, message.payload)
        except aiomqtt.MqttError as error:
            why = explain(error, tls=known.endpoint.tls, user=known.username)
        except BrokerFailed as error:
            why = error
        if not ever:
            raise Failed(f"{known.endpoint}: {why}", hint="check the URL, the user and that the broker runs") from why
        pause_s = backoff.long_pause_s() if why.lasting else backoff.pause_s()
        yield Link(str(why), pause_s)
        await asyncio.sleep(pause_s)


async def _subscribe(client: BrokerClient, prefix: str) -> None:
    for one in filters(prefix):
        for code in await client.subscribe(one, qos=1):
            if (code if isinstance(code, int) else code.value) >= _FAILURE:
                raise BrokerFailed(f"the broker does not let us listen to {one}", lasting=True)


def _client(known: credentials.Credentials, timings: Timings) -> BrokerClient:
    return BrokerClient(
        known.endpoint.host,
        known.endpoint.port,
        username=known.username,
        password=known.password,
        # Several may watch: each is somebody else to the broker.
        identifier=f"hvsnap-watch-{secrets.token_hex(6)}",
        protocol=ProtocolVersion.V311,
        clean_session=True,
        timeout=timings.answer_s,
        keepalive=timings.keepalive_s,
        max_queued_incoming_messages=QUEUE_MAX,
        tls_context=known.tls,
    )

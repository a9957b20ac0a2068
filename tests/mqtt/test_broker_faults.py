"""A broker that is away, restarted, paused, flapping, deaf or of another version: events are kept, and nobody waits.

FAULTS 16.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.transaction import Transaction
from hvsnap.errors import NoSpace
from hvsnap.model import Progress
from hvsnap.mqtt import outbox as outbox_module
from tests.guest.libvirtd import wait_for
from tests.mqtt.broker import Broker
from tests.mqtt.conftest import Publish
from tests.mqtt.kit import emit
from tests.mqtt.listener import Listener, listening, until
from tests.mqtt.proxy import CONNECT, DISCONNECT, PUBACK, PUBLISH, Packet, kind, protocol_level, proxied
from tests.ports import free_port


async def test_all_events_are_delivered_in_order_once_the_broker_is_back(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    async with listening(broker.port, "hvsnap/kvm1/event") as listener:
        running = await publish(broker.url)
        await emit(catalog, 5)
        await listener.until(lambda heard: len(heard.events()) == 5, "the first events")
    broker.stop()
    await until(lambda: not running.publisher.status().connected, "noticing that the broker is away")
    sequences = [sequence for _ in range(25) for sequence in await emit(catalog, 20)]
    assert running.publisher.status().pending == 500
    await until(lambda: "cannot be reached" in running.publisher.status().error, "the error in the status")
    # Without sessions a subscriber must be there before the events are: this one comes first.
    async with subscriber_first(broker) as listener:
        await listener.until(lambda heard: len(heard.events()) >= 500, "all that had waited")
    assert listener.sequences() == sequences
    await until(lambda: running.publisher.status().pending == 0, "noting")
    assert running.publisher.status().error == ""


def subscriber_first(broker: Broker):  # type: ignore[no-untyped-def]
    """Start a broker and subscribe; the event loop, and the publisher in it, does not go on before there is a session.

    What comes until the listener takes the session over waits in it.
    """
    broker.start()
    lasting = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    lasting.SessionExpiryInterval = 600
    subscribed: list[int] = []
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, "first", protocol=paho.MQTTv5)
    client.on_connect = lambda *_told: client.subscribe("hvsnap/kvm1/event", qos=1)
    client.on_subscribe = lambda *_told: subscribed.append(1)
    client.connect("127.0.0.1", broker.port, clean_start=True, properties=lasting)
    wait_for(lambda: client.loop(0.01) == 0 and subscribed != [], "the subscription")
    client.disconnect()
    return listening(broker.port, "hvsnap/kvm1/event", identifier="first", clean_start=False)


async def test_an_outbox_that_was_cut_loses_the_oldest_events_alone(
    make_broker: Callable[..., Broker], catalog: Catalog, publish: Publish
) -> None:
    sequences = await emit(catalog, 300)
    running = await publish(f"mqtt://127.0.0.1:{free_port()}")
    await until(lambda: running.publisher.status().pending == 300, "the count")
    async with catalog.write() as tx:
        assert await tx.trim_events(keep=1000, keep_unpublished=50) == 250
    await until(lambda: running.publisher.status().pending == 50, "the count after forgetting")
    await running.stop()
    broker = make_broker()
    async with listening(broker.port) as listener:
        await publish(broker.url)
        await listener.until(lambda heard: len(heard.events()) == 50, "the rest")
    assert listener.sequences() == sequences[250:]


async def test_a_paused_broker_is_noticed_and_nothing_waits_for_it(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    async with listening(broker.port, "hvsnap/kvm1/event", keepalive=60) as listener:
        running = await publish(broker.url)
        await emit(catalog)
        await listener.until(lambda heard: len(heard.events()) == 1, "the first event")
        broker.pause()
        try:
            lag = asyncio.create_task(worst_lag_s())
            sequences = await emit(catalog, 200)
            for done in range(200):
                running.publisher.progress(Progress(f"s-{done}", 1, 2, 1.0, None))
            await until(lambda: not running.publisher.status().connected, "noticing the pause")
            await until(lambda: "in time" in running.publisher.status().error, "an attempt during the pause")
            lag.cancel()
            assert await lag < 0.8, "who waited for the broker would have waited for a second"
        finally:
            broker.resume()
        await listener.until(lambda heard: len(set(heard.sequences())) == 201, "all events")
    # The one that was under way when the broker stopped may come twice, with the same id and sequence.
    heard = listener.sequences()
    assert sorted(set(heard)) == [1, *sequences]
    assert heard == sorted(heard)
    assert len(heard) <= 202


async def worst_lag_s() -> float:
    """Return how late the event loop ever was, until cancelled."""
    loop = asyncio.get_running_loop()
    worst = 0.0
    try:
        while True:
            due = loop.time() + 0.01
            await asyncio.sleep(0.01)
            worst = max(worst, loop.time() - due)
    except asyncio.CancelledError:
        return worst


async def test_a_paused_broker_is_noticed_without_any_event(broker: Broker, catalog: Catalog, publish: Publish) -> None:
    running = await publish(broker.url)
    await until(lambda: running.publisher.status().connected, "the connection")
    broker.pause()
    await until(lambda: not running.publisher.status().connected, "noticing the pause")
    broker.resume()
    await until(lambda: running.publisher.status().connected, "the connection after it")


async def test_stopping_does_not_wait_for_a_broker_that_hangs(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    running = await publish(broker.url)
    await until(lambda: running.publisher.status().connected, "the connection")
    broker.pause()
    await emit(catalog, 10)
    async with asyncio.timeout(15):  # the farewell's two seconds, and what a busy machine adds
        await running.stop()
    assert len(await catalog.unpublished(100)) == 10


async def test_stopping_while_a_connection_is_being_opened_leaves_none(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    broker.pause()
    running = await publish(broker.url)
    await until(lambda: len(connections(broker.port)) == 1, "the attempt")
    await running.stop()
    broker.resume()
    await until(lambda: not connections(broker.port), "the end of the attempt")


def connections(port: int) -> list[str]:
    """Return this process's established connections to a port."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(os.readlink(entry))
        except OSError:
            continue
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return [row[9] for row in rows if row[2].endswith(f":{port:04X}") and f"socket:[{row[9]}]" in inodes]


async def test_a_lost_acknowledgement_repeats_the_event_with_its_id_and_never_goes_back(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    acknowledged = 0

    def lose_every_seventh(packet: Packet) -> Packet | None:
        nonlocal acknowledged
        if kind(packet) == PUBACK:
            acknowledged += 1
            if acknowledged % 7 == 0:
                return None
        return packet

    async with proxied(broker.port) as proxy, listening(broker.port, "hvsnap/kvm1/event") as listener:
        proxy.to_client = lose_every_seventh
        await emit(catalog, 40)
        running = await publish(f"mqtt://127.0.0.1:{proxy.port}")
        await listener.until(lambda heard: 40 in heard.sequences(), "all events")
        await until(lambda: running.publisher.status().pending == 0, "noting")
        await running.stop()
    heard = listener.sequences()
    assert heard == sorted(heard), "an event came after a later one"
    assert set(heard) == set(range(1, 41))
    assert len(heard) > 40, "no acknowledgement was lost: the test proves nothing"
    assert len({event["id"] for event in listener.events()}) == 40


async def test_a_flapping_broker_delays_events_and_loses_none(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    passed = 0

    def cut_now_and_then(packet: Packet) -> Packet | None:
        nonlocal passed
        passed += kind(packet) == PUBLISH
        return None if kind(packet) == PUBLISH and passed % 9 == 0 else packet

    async with proxied(broker.port) as proxy, listening(broker.port, "hvsnap/kvm1/event") as listener:
        proxy.to_broker = cut_now_and_then
        await publish(f"mqtt://127.0.0.1:{proxy.port}")
        sequences = [sequence for _ in range(10) for sequence in await emit(catalog, 6)]
        await listener.until(lambda heard: len(set(heard.sequences())) == 60, "all events")
        assert len(proxy.connects) > 3
    assert listener.sequences() == sequences


async def test_a_broker_of_3_1_1_is_spoken_to_in_its_version(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    for refusal in (
        b"\x20\x02\x00\x01",  # CONNACK of 3.1.1: unacceptable protocol version
        b"\x20\x03\x00\x84\x00",  # CONNACK of 5: unsupported protocol version
        b"",  # hangs up
    ):
        async with proxied(broker.port) as proxy, listening(broker.port, "#") as listener:
            proxy.answer = lambda connect, answer=refusal: answer if protocol_level(connect) == 5 else None  # type: ignore[misc]
            running = await publish(f"mqtt://127.0.0.1:{proxy.port}")
            running.publisher.progress(Progress("t-1", 1, 2, 1.0, None))
            (sequence,) = await emit(catalog)
            await listener.until(lambda heard, last=sequence: last in heard.sequences(), "the event")  # type: ignore[misc]
            assert [protocol_level(connect) for connect in proxy.connects] == [5, 4]
            (event,) = listener.on("hvsnap/kvm1/event")
            assert event.qos == 1
            await running.stop()
            await listener.until(lambda heard: heard.heard[-1].json.get("reason") == "stopped", "the end")


async def test_a_broker_of_no_known_version_is_told_of(broker: Broker, catalog: Catalog, publish: Publish) -> None:
    async with proxied(broker.port) as proxy:
        proxy.answer = lambda connect: b"\x20\x02\x00\x01" if protocol_level(connect) == 5 else b""
        running = await publish(f"mqtt://127.0.0.1:{proxy.port}")
        await until(lambda: running.publisher.status().error, "the error")
        assert "MQTT" in running.publisher.status().error


async def test_a_server_that_says_nothing_is_given_up(catalog: Catalog, publish: Publish) -> None:
    async with proxied(1) as proxy:
        proxy.silent = True
        running = await publish(f"mqtt://127.0.0.1:{proxy.port}")
        await until(lambda: "in time" in running.publisher.status().error, "giving up")


async def test_a_server_that_talks_nonsense_is_given_up(catalog: Catalog, publish: Publish) -> None:
    async with proxied(1) as proxy:
        for nonsense in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff" * 200, b"\x20\x00", b"\x20\x7f" + b"\x00" * 127):
            proxy.answer = lambda connect, answer=nonsense: answer  # type: ignore[misc]
            running = await publish(f"mqtt://127.0.0.1:{proxy.port}")
            await until(lambda one=running: one.publisher.status().error, "giving up")  # type: ignore[misc]
            assert not running.task.done()
            await running.stop()


async def test_two_hosts_of_the_same_name_are_told_of(broker: Broker, catalog: Catalog, publish: Publish) -> None:
    running = [await publish(broker.url), await publish(broker.url)]
    await until(lambda: any("host_id kvm1, too?" in one.publisher.status().error for one in running), "the error")


async def test_a_broker_that_says_why_it_ends_the_connection_is_understood(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    async with proxied(broker.port) as proxy:
        for code, words in ((0x8E, "is host_id used twice?"), (0x8B, "Server shutting down")):
            farewell = bytes([DISCONNECT << 4, 2, code, 0])
            # After the first acknowledgement, in its place.
            proxy.to_client = lambda packet, last=farewell: last if kind(packet) == PUBACK else packet  # type: ignore[misc]
            running = await publish(f"mqtt://127.0.0.1:{proxy.port}")
            await until(lambda one=running, said=words: said in one.publisher.status().error, "the error")  # type: ignore[misc]
            await running.stop()


async def test_a_name_that_is_not_found_is_tried_again(catalog: Catalog, publish: Publish) -> None:
    running = await publish("mqtt://no-such-host.invalid")
    await until(lambda: "resolved" in running.publisher.status().error, "the error")
    assert not running.task.done()


async def test_what_cannot_be_noted_is_not_published_again_and_again(
    broker: Broker, catalog: Catalog, publish: Publish, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "CATALOG_RETRY_S", 0.05)
    tries = 0
    noting = Transaction.mark_published

    async def full(self: Transaction, up_to_sequence: int) -> None:
        nonlocal tries
        tries += 1
        if tries <= 4:
            raise NoSpace("the device is full")
        await noting(self, up_to_sequence)

    monkeypatch.setattr(Transaction, "mark_published", full)
    async with listening(broker.port, "hvsnap/kvm1/event") as listener:
        await emit(catalog, 3)
        running = await publish(broker.url)
        await until(lambda: running.publisher.status().pending == 0, "noting at last")
        await emit(catalog)
        await listener.until(lambda heard: 4 in heard.sequences(), "what came after")
    assert listener.sequences() == [1, 2, 3, 4]


def _publishing(workdir: Path, url: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tests.mqtt.publishing_process", str(workdir / "other"), url])


async def test_a_killed_daemon_is_reported_offline_and_goes_on_where_it_was(broker: Broker, workdir: Path) -> None:
    def online(heard: Listener) -> bool:
        status = heard.on("hvsnap/kvm1/status")
        return bool(status) and status[-1].json["state"] == "online"

    async with listening(broker.port) as listener:
        process = _publishing(workdir, broker.url)
        try:
            await listener.until(lambda heard: online(heard) and len(heard.events()) > 200, "events")
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        await listener.until(lambda heard: heard.on("hvsnap/kvm1/status")[-1].json["state"] == "offline", "the will")
        will = listener.on("hvsnap/kvm1/status")[-1].json
        assert (will["reason"], will["at"]) == ("lost", None)
        killed_after = max(listener.sequences())
        process = _publishing(workdir, broker.url)
        try:
            await listener.until(lambda heard: max(heard.sequences()) > killed_after + 100, "more events")
        finally:
            process.terminate()
            process.wait(10)
        await listener.until(lambda heard: heard.heard[-1].json.get("reason") == "stopped", "the end")
    heard = listener.sequences()
    assert sorted(set(heard)) == list(range(1, max(heard) + 1)), "an event was lost"
    repeated = len(heard) - len(set(heard))
    assert repeated <= outbox_module.BATCH
    assert len({event["id"] for event in listener.events()}) == len(set(heard))


async def test_a_connection_that_is_cut_is_no_goodbye(broker: Broker, catalog: Catalog, publish: Publish) -> None:
    sent: list[int] = []

    def deaf(packet: Packet) -> Packet | None:
        sent.append(kind(packet))
        return b"" if kind(packet) == PUBLISH and len(sent) > 3 else packet

    async with proxied(broker.port) as proxy, listening(broker.port, "hvsnap/kvm1/status") as listener:
        proxy.to_broker = deaf
        running = await publish(f"mqtt://127.0.0.1:{proxy.port}")
        await until(lambda: running.publisher.status().connected, "the connection")
        await emit(catalog, 10)
        await listener.until(lambda heard: heard.heard and heard.heard[-1].json["reason"] == "lost", "the will")
    assert DISCONNECT not in sent
    assert CONNECT not in sent  # the proxy passes it on by itself

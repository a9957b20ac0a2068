"""Events, states, progress and status as a real mosquitto receives them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from hvsnap.catalog.catalog import Catalog
from hvsnap.happenings import EventType, disk_payload
from hvsnap.model import Progress, State
from tests.mqtt.broker import Broker
from tests.mqtt.conftest import Publish
from tests.mqtt.forms import check
from tests.mqtt.kit import add_disk, add_snapshot, emit
from tests.mqtt.listener import listening, until


async def test_events_arrive_in_order_with_what_the_catalog_says(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    before = await emit(catalog, 3)
    async with listening(broker.port) as listener:
        running = await publish(broker.url)
        await listener.until(lambda heard: len(heard.events()) == 3, "what had waited")
        after = await emit(catalog, 150, note="a/+#\0 ü")
        await listener.until(lambda heard: len(heard.events()) == 153, "all events")
    assert listener.sequences() == before + after
    stored = await catalog.events(0)
    assert [event["id"] for event in listener.events()] == [event.id for event in stored]
    first = listener.events()[0]
    assert first == {
        "version": 1,
        "host": "kvm1",
        "sequence": 1,
        "id": stored[0].id,
        "at": "1970-01-01T00:16:40Z",
        "type": "guest.attached",
        "payload": stored[0].payload,
    }
    assert listener.events()[-1]["payload"]["note"] == "a/+#\0 ü"
    (one, *_rest) = listener.on("hvsnap/kvm1/event")
    assert (one.qos, one.retained, one.properties["ContentType"]) == (1, False, "application/json")
    await until(lambda: running.publisher.status().pending == 0, "noting")
    assert await catalog.unpublished(10) == []


async def test_the_status_is_retained_renewed_and_ends_in_good_order(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    async with listening(broker.port, "hvsnap/kvm1/status") as listener:
        running = await publish(broker.url)
        await listener.until(lambda heard: len(heard.heard) >= 2, "the status and its renewal")
        assert listener.heard[0].json["state"] == "online"
        assert running.publisher.status().connected
        await running.stop()
        await listener.until(lambda heard: heard.heard[-1].json["state"] == "offline", "the end")
        assert listener.heard[-1].json["reason"] == "stopped"
    assert not running.publisher.status().connected
    async with listening(broker.port, "hvsnap/kvm1/status") as later:
        await later.until(lambda heard: heard.heard, "the retained status")
        assert later.heard[0].retained
        assert later.heard[0].json == listener.heard[-1].json


async def test_what_is_emitted_last_is_still_delivered(broker: Broker, catalog: Catalog, publish: Publish) -> None:
    async with listening(broker.port) as listener:
        running = await publish(broker.url)
        await listener.until(lambda heard: heard.on("hvsnap/kvm1/status"), "the status")
        await emit(catalog, 300)
        await running.stop()
        assert await catalog.unpublished(1) == []
        # One may have been under way when the end came, and comes twice.
        await listener.until(lambda heard: len(set(heard.sequences())) == 300, "the last events")
        assert listener.sequences() == sorted(listener.sequences())
        await listener.until(lambda heard: heard.on("hvsnap/kvm1/status")[-1].json["state"] == "offline", "the end")
        assert listener.heard[-1].topic == "hvsnap/kvm1/status"


async def test_the_state_of_a_disk_is_retained_and_follows_its_chain(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    disk = await add_disk(catalog)
    topic = f"hvsnap/kvm1/guest/web01/disk/{disk.id}/state"
    async with listening(broker.port, topic) as listener:
        await publish(broker.url)
        await listener.until(lambda heard: heard.heard, "the first state")
        assert listener.heard[-1].json["health"] == "unprotected"
        assert listener.heard[-1].json["last_snapshot"] is None
        one = await add_snapshot(catalog, disk, EventType.SNAPSHOT_ACCOMPLISHED)
        await listener.until(lambda heard: heard.heard[-1].json["snapshots"] == 1, "the state with a snapshot")
        state = listener.heard[-1].json
        assert (state["health"], state["last_snapshot"]["id"], state["stored_bytes"]) == ("ok", one.id, 0)
        bad = await add_snapshot(catalog, disk, EventType.SNAPSHOT_FAILED, state=State.FAILED, error="no space")
        await listener.until(lambda heard: heard.heard[-1].json["health"] == "failed", "the state with a failure")
        state = listener.heard[-1].json
        assert (state["last_snapshot"]["id"], state["last_failure"]["id"]) == (one.id, bad.id)
        assert state["last_failure"]["error"] == "no space"
        await add_snapshot(catalog, disk, EventType.SNAPSHOT_CREATED, state=State.PROGRESSING)  # changes nothing
        await add_snapshot(catalog, disk, EventType.SNAPSHOT_ACCOMPLISHED)
        await listener.until(lambda heard: heard.heard[-1].json["health"] == "ok", "the state after a success")
        assert listener.heard[-1].json["last_failure"] is None
        assert len(listener.heard) == 4
    async with listening(broker.port, topic) as later:
        await later.until(lambda heard: heard.heard, "the retained state")
        assert (later.heard[0].retained, later.heard[0].json) == (True, listener.heard[-1].json)


async def test_a_renamed_guest_and_a_released_disk_leave_no_retained_state(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    disk = await add_disk(catalog)
    other = await add_disk(catalog, target="vdb")
    async with listening(broker.port, "hvsnap/kvm1/guest/#") as listener:
        await publish(broker.url)
        await listener.until(lambda heard: len(heard.heard) >= 2, "both states")
        async with catalog.write() as tx:
            await tx.update_disk(disk.id, guest_name="shop")
            await tx.emit(EventType.SNAPSHOT_CREATED, {"disk": disk.id})
            await tx.update_disk(other.id, released=True)
            await tx.emit(EventType.SNAPSHOT_CREATED, {"disk": other.id})
        shop = f"hvsnap/kvm1/guest/shop/disk/{disk.id}/state"
        await listener.until(lambda heard: heard.on(shop), "the state under the new name")
        gone = f"hvsnap/kvm1/guest/web01/disk/{other.id}/state"
        await listener.until(lambda heard: heard.on(gone)[-1].payload == b"", "the end of the released disk's state")
    async with listening(broker.port, "hvsnap/kvm1/#") as later:
        await later.until(lambda heard: not heard.heard[-1].retained if heard.heard else False, "all that is retained")
        assert {one.topic for one in later.heard if "/guest/" in one.topic} == {shop}


async def test_progress_is_the_latest_limited_in_rate_and_expires(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    disk = await add_disk(catalog)
    snapshot = await add_snapshot(catalog, disk, EventType.SNAPSHOT_CREATED, state=State.PROGRESSING)
    async with listening(broker.port) as listener:
        running = await publish(broker.url)
        await listener.until(lambda heard: len(heard.events()) == 2, "the events")
        topic = f"hvsnap/kvm1/snapshot/{snapshot.id}/progress"
        loop = asyncio.get_running_loop()
        began = loop.time()
        for done in range(101):
            running.publisher.progress(Progress(snapshot.id, done, 100, 10.0, 1.0))
            running.publisher.progress(Progress("t-1", done, 100, 10.0, None))
            await asyncio.sleep(0.01)
        lasted = loop.time() - began
        await listener.until(lambda heard: heard.on(topic)[-1].json["progress"] == 100, "the last progress")
        reports = listener.on(topic)
        assert len(reports) <= lasted / 0.2 + 2
        assert [one.json["done_bytes"] for one in reports] == sorted(one.json["done_bytes"] for one in reports)
        assert (reports[0].json["disk"], reports[0].json["guest"]) == (disk.id, "web01")
        assert (reports[0].qos, reports[0].retained) == (0, False)
        assert 0 < reports[0].properties["MessageExpiryInterval"] <= 10
        tasks = listener.on("hvsnap/kvm1/task/t-1/progress")
        assert tasks[0].json["guest"] is None


async def test_progress_of_what_has_ended_is_not_told_after_its_end(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    disk = await add_disk(catalog)
    async with listening(broker.port) as listener:
        running = await publish(broker.url)
        await listener.until(lambda heard: len(heard.events()) == 1, "the start")
        running.publisher.progress(Progress("s-aaaaaaaaaaaa", 1, 2, 1.0, None))
        topic = "hvsnap/kvm1/snapshot/s-aaaaaaaaaaaa/progress"
        await listener.until(lambda heard: heard.on(topic), "progress")
        running.publisher.progress(Progress("s-aaaaaaaaaaaa", 2, 2, 1.0, None))  # not due yet
        async with catalog.write() as tx:
            await tx.emit(EventType.SNAPSHOT_ACCOMPLISHED, {"disk": disk.id, "snapshot": "s-aaaaaaaaaaaa"})
        await listener.until(lambda heard: len(heard.events()) == 2, "the end")
        running.publisher.progress(Progress("t-marker", 1, 2, 1.0, None))
        before = len(listener.on("hvsnap/kvm1/status"))
        await listener.until(lambda heard: len(heard.on("hvsnap/kvm1/status")) > before + 1, "some time")
        assert len(listener.on(topic)) == 1


async def test_names_of_any_kind_become_one_level_of_a_topic(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    nasty = "$a/b+c#d%\x01\x7f\x85\ufffe ü"
    disk = await add_disk(catalog, guest_name=nasty)
    async with listening(broker.port) as listener:
        await publish(broker.url, host=nasty, topic_prefix="site/hvsnap")
        await listener.until(lambda heard: [one for one in heard.heard if "/disk/" in one.topic], "the state")
    escaped = "%24a%2Fb%2Bc%23d%25%01%7F%C2%85%EF%BF%BE ü"
    topics = {one.topic for one in listener.heard}
    assert topics == {
        f"site/hvsnap/{escaped}/status",
        f"site/hvsnap/{escaped}/event",
        f"site/hvsnap/{escaped}/guest/{escaped}/disk/{disk.id}/state",
    }
    assert {one.json["host"] for one in listener.heard} == {nasty}


async def test_it_subscribes_to_nothing(broker: Broker, catalog: Catalog, publish: Publish, workdir: Path) -> None:
    running = await publish(broker.url)
    await until(lambda: running.publisher.status().connected, "the connection")
    await running.stop()
    log = broker.log.read_text()
    assert "Received CONNECT" in log or "New client connected" in log
    assert "Received SUBSCRIBE" not in log


# -- discovery ------------------------------------------------------------------------------------


async def test_hosts_and_disks_are_announced_where_that_is_wanted(
    broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    """With the form that is documented, and taken back when the disk is released."""
    disk = await add_disk(catalog, guest_name="db/1")
    async with listening(broker.port, "#") as listener:
        running = await publish(broker.url, host="kvm 1", discovery_prefix="homeassistant")
        await listener.until(
            lambda heard: [x for x in heard.heard if "/device/" in x.topic and disk.id in x.topic], "it"
        )
        announced = [one for one in listener.heard if one.topic.startswith("homeassistant/")]
        assert len({one.topic for one in announced}) == 2
        states = {one.topic for one in listener.heard if not one.topic.startswith("homeassistant/")}
        for one in announced:
            components = check(one.topic, one.payload)["components"]
            assert {component["state_topic"] for component in components.values()} <= states
            assert b"null" not in one.payload
        (of_disk,) = [one.topic for one in announced if disk.id in one.topic]
        async with catalog.write() as tx:
            await tx.update_disk(disk.id, released=True)
            await tx.emit(EventType.DISK_ATTACHED, disk_payload(disk))
        await listener.until(lambda heard: any(not one.payload for one in heard.on(of_disk)), "the end of the disk")
        await running.stop()


async def test_a_broker_that_refuses_announcements_gets_the_rest(
    make_broker: Callable[..., Broker], workdir: Path, catalog: Catalog, publish: Publish
) -> None:
    (workdir / "acl").write_text("topic readwrite hvsnap/#\n")
    narrow = make_broker(f"acl_file {workdir / 'acl'}")
    await add_disk(catalog)
    async with listening(narrow.port) as listener:
        await publish(narrow.url, discovery_prefix="homeassistant")
        await listener.until(lambda heard: any(one.topic.endswith("/state") for one in heard.heard), "the state")
        await listener.until(lambda heard: heard.events(), "the event")

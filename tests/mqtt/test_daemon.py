"""The real daemon with a real guest and a real mosquitto: what is published, and that captures do not need it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from hvsnap import wire
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd
from tests.mqtt.broker import Broker
from tests.mqtt.forms import check, kind_of
from tests.mqtt.listener import listening
from tests.ports import free_port


def _work(daemon: Daemon, guest: Guest, workdir: Path) -> tuple[str, str]:
    """Let happen what a daemon tells of; return the ids of the snapshots."""
    guest.run("stress random /dev/vda 1 100 300000")
    (one,) = daemon.snapshot(guest.name, ["vda"], name="monday")
    guest.run("stress random /dev/vda 2 100 300000")
    (two,) = daemon.snapshot(guest.name, ["vda"], name="tuesday")
    assert daemon.create_disk(two.id, workdir / "copy.qcow2").state == "accomplished"
    with daemon.client() as client:
        client.post("/snapshots/delete", wire.Deletion, wire.SnapshotDelete(ids=[one.id]))
    guest.shutdown()
    task = daemon.roll_back(f"{guest.name}/vda", two.id, safety_snapshot=False)
    assert task.state == "accomplished", task.error
    return one.id, two.id


async def test_everything_that_a_daemon_publishes_has_its_documented_form(
    workdir: Path, libvirtd: Libvirtd, make_guest: Callable[..., Guest], guest_image: GuestImage, broker: Broker
) -> None:
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "64M"))], guest_image)
    await asyncio.to_thread(guest.start)
    daemon = Daemon(workdir, libvirtd.uri, mqtt=f'url = "{broker.url}"')
    async with listening(broker.port) as listener:
        try:
            await asyncio.to_thread(daemon.start)
            one, two = await asyncio.to_thread(_work, daemon, guest, workdir)
            assert daemon.status().mqtt == wire.MqttStatus(configured=True, connected=True, pending=0, error="")
        finally:
            await asyncio.to_thread(daemon.stop)
        await listener.until(lambda heard: heard.heard[-1].json.get("reason") == "stopped", "the end")
    for message in listener.heard:
        check(message.topic, message.payload)
    assert {kind_of(message.topic) for message in listener.heard} == {"status", "event", "progress", "disk-state"}
    types = [event["type"] for event in listener.events()]
    assert listener.sequences() == list(range(1, len(types) + 1))
    assert types[-1] == "daemon.offline"
    assert set(types) == {
        "daemon.online",
        "guest.attached",
        "disk.attached",
        "snapshot.created",
        "snapshot.accomplished",
        "snapshot.deleted",
        "disk.created",
        "rollback.started",
        "rollback.finished",
        "daemon.offline",
    }
    states = [message.json for message in listener.heard if kind_of(message.topic) == "disk-state"]
    assert (states[-1]["snapshots"], states[-1]["last_snapshot"]["id"]) == (1, two)
    assert states[-1]["stored_bytes"] > 0
    assert one in {event["payload"].get("snapshot") for event in listener.events()}
    topics = {message.topic.split("/")[2] for message in listener.heard if kind_of(message.topic) == "progress"}
    assert topics == {"snapshot", "task"}


async def test_captures_do_not_wait_for_a_broker(
    workdir: Path, libvirtd: Libvirtd, make_guest: Callable[..., Guest], broker: Broker
) -> None:
    """A broker that is away, and one that hangs: snapshots take as long as without, and all is told afterwards.

    FAULTS 16.
    """
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "64M"))])
    await asyncio.to_thread(guest.start)
    daemon = Daemon(workdir, libvirtd.uri, mqtt=f'url = "{broker.url}"')
    async with listening(broker.port, keepalive=600) as listener:
        try:
            await asyncio.to_thread(daemon.start)
            await listener.until(lambda heard: heard.events(), "the start")
            broker.pause()
            for _ in range(3):
                await asyncio.to_thread(daemon.snapshot, guest.name)
            status = daemon.status()
            assert (status.snapshots, status.mqtt.pending >= 6) == (3, True)
            broker.resume()
            done = "snapshot.accomplished"
            await listener.until(
                lambda heard: len({one["id"] for one in heard.events() if one["type"] == done}) == 3, "the events", 60
            )
        finally:
            await asyncio.to_thread(daemon.stop)
    assert listener.sequences() == sorted(listener.sequences())


def test_a_daemon_with_settings_that_cannot_be_right_does_not_start(workdir: Path, libvirtd: Libvirtd) -> None:
    secret = workdir / "secret"
    secret.write_text("s3cret")
    secret.chmod(0o644)
    lines = [f'url = "mqtt://127.0.0.1:{free_port()}"', 'username = "hvsnap"', f'password_file = "{secret}"']
    daemon = Daemon(workdir, libvirtd.uri, mqtt="\n".join(lines))
    daemon.start(wait=False)
    assert daemon.wait_dead() != 0
    log = daemon.log.read_text()
    assert "mqtt.password_file" in log
    assert "open to others" in log
    assert "s3cret" not in log

"""`hvsnap watch --mqtt`: many hosts through a real mosquitto, on a terminal, as lines, as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiomqtt
import pexpect
import pytest

from hvsnap.catalog.catalog import Catalog
from hvsnap.happenings import EventType
from hvsnap.model import Progress, SnapshotId, State
from hvsnap.mqtt.board import LIVE_S, SILENT_S, Board, read
from hvsnap.mqtt.messages import Absence, HostStatus, Presence, ProgressReport, PublishedEvent
from tests.catalog_kit import a_disk
from tests.cli_kit import HVSNAP
from tests.mqtt.broker import Broker
from tests.mqtt.conftest import Publish
from tests.mqtt.kit import add_disk, add_snapshot
from tests.mqtt.test_forms import PAYLOADS
from tests.service_kit import a_catalog

AT = "2026-05-01T12:00:00Z"
MakeBroker = Callable[..., Broker]


def an_event(kind: EventType, ident: str = "x", host: str = "kvm2", sequence: int = 1) -> PublishedEvent:
    raw = {"host": host, "sequence": sequence, "id": ident, "at": AT, "type": kind, "payload": PAYLOADS[kind]}
    return PublishedEvent.model_validate(raw)


async def shout(broker: Broker, *messages: tuple[str, bytes]) -> None:
    """Publish as a host would that is not hvsnap, or not this release."""
    async with aiomqtt.Client("127.0.0.1", broker.port) as client:
        for topic, payload in messages:
            await client.publish(topic, payload, 1)


async def away(function: Callable[..., Any], *arguments: Any) -> Any:
    return await asyncio.to_thread(function, *arguments)


def terminal(broker: Broker, *options: str) -> pexpect.spawn[str]:
    # The size is the terminal's, whatever a runner of tests says of its own.
    inherited = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
    environment = {**inherited, "TERM": "xterm", "TZ": "UTC", "NO_COLOR": "1"}
    return pexpect.spawn(
        HVSNAP, ["watch", "--mqtt", broker.url, *options], env=environment, dimensions=(60, 160), encoding="utf-8",
        timeout=30,
    )  # fmt: skip


class Watcher:
    """`watch --mqtt` without a terminal."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.lines: list[str] = []

    async def until(self, pattern: str) -> str:
        """Return the first line from here on in which the pattern is."""
        stdout = self._process.stdout
        assert stdout is not None
        async with asyncio.timeout(30):
            while line := (await stdout.readline()).decode():
                self.lines.append(line.rstrip("\n"))
                if re.search(pattern, line):
                    return self.lines[-1]
        raise AssertionError(f"it ended without {pattern}: {self.lines}")

    async def stands(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        async with asyncio.timeout(30):
            assert "watching" in (await stderr.readline()).decode()

    async def interrupted(self) -> int:
        self._process.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            return await self._process.wait()


Watch = Callable[..., Awaitable[Watcher]]


@pytest.fixture
async def watch(broker: Broker) -> Any:
    started = []

    async def start(*options: str) -> Watcher:
        process = await asyncio.create_subprocess_exec(
            HVSNAP, *options, "watch", "--mqtt", broker.url, stdout=-1, stderr=-1, env={**os.environ, "TZ": "UTC"}
        )
        started.append(process)
        return Watcher(process)

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.wait()


# -- through the broker ---------------------------------------------------------------------------


async def test_a_terminal_shows_hosts_chains_what_runs_and_what_failed(
    workdir: Path, broker: Broker, catalog: Catalog, publish: Publish
) -> None:
    disk = await add_disk(catalog)
    await add_snapshot(catalog, disk, EventType.SNAPSHOT_ACCOMPLISHED, state=State.ACCOMPLISHED, stored_bytes=7 << 20)
    one = await publish(broker.url)
    async with a_catalog(workdir / "second") as second:
        torn = await add_disk(second, target="vdb", guest_name="\x1b[31mevil[bold]")
        await add_snapshot(second, torn, EventType.SNAPSHOT_FAILED, state=State.FAILED, error="no space left")
        other = await publish(broker.url, host="kvm2", of=second)
        shown = await away(terminal, broker)
        for pattern in (r"kvm1 +online", r"kvm2 +online", r"web01 +vda +ok", r"vdb +failed", "no space left"):
            await away(shown.expect, pattern)
        making = await add_snapshot(second, torn, EventType.SNAPSHOT_CREATED, state=State.PROGRESSING)
        other.publisher.progress(Progress(SnapshotId(making.id), 1 << 30, 4 << 30, 1e8, 32.0))
        await away(shown.expect, rf"{making.id} +25 %")
        await add_snapshot(second, torn, EventType.SNAPSHOT_FAILED, state=State.FAILED, error="it burns")
        await away(shown.expect, r"snapshot\.failed")
        await other.stop()
        await away(shown.expect, r"kvm2 +offline \(stopped\)")
        assert "\x1b[31mevil" not in shown.before
    broker.stop()
    await away(shown.expect, "lost|reached|closed")
    broker.start()
    await away(shown.expect, "connected")
    shown.sendintr()
    await away(shown.expect, pexpect.EOF)
    await away(shown.close)
    assert shown.exitstatus == 130
    await one.stop()


async def test_lines_tell_events_once_and_hosts_that_come_and_go(broker: Broker, watch: Watch) -> None:
    watcher = await watch()
    await watcher.stands()
    failed = an_event(EventType.SNAPSHOT_FAILED).to_json()
    gone = HostStatus(host="kvm2", state=Presence.OFFLINE, reason=Absence.LOST, at=None, hvsnap="0.1.0").to_json()
    await shout(
        broker,
        ("hvsnap/kvm2/event", failed),
        ("hvsnap/kvm2/event", failed),
        ("hvsnap/kvm2/event", b"\xff not JSON"),
        ("hvsnap/kvm2/event", b'{"version": 9}'),
        ("hvsnap/kvm2/status", gone),
        ("hvsnap/kvm2/status", gone),
        ("hvsnap/kvm2/event", an_event(EventType.POLICY_MISSED, "y", sequence=2).to_json()),
    )
    await watcher.until(r"policy\.missed policy=nightly")
    assert watcher.lines == [
        "2026-05-01 12:00:00 kvm2 snapshot.failed guest=web01 target=vda snapshot="
        f"{PAYLOADS[EventType.SNAPSHOT_FAILED]['snapshot']} name={PAYLOADS[EventType.SNAPSHOT_FAILED]['name']} "
        "error=no space",
        "- kvm2 offline (lost)",
        "2026-05-01 12:00:00 kvm2 policy.missed policy=nightly",
    ]
    assert await watcher.interrupted() == 130


async def test_json_is_what_was_published(broker: Broker, watch: Watch) -> None:
    watcher = await watch("--json")
    await watcher.stands()
    event = an_event(EventType.SNAPSHOT_ACCOMPLISHED)
    await shout(broker, ("hvsnap/kvm2/event", event.to_json()))
    line = json.loads(await watcher.until("snapshot.accomplished"))
    assert line == {"kind": "event", "message": json.loads(event.to_json())}
    assert await watcher.interrupted() == 130


async def test_a_broker_that_does_not_let_us_listen_is_an_error(make_broker: MakeBroker, workdir: Path) -> None:
    closed = make_broker(anonymous=False)
    process = await asyncio.create_subprocess_exec(HVSNAP, "watch", "--mqtt", closed.url, stderr=-1)
    _out, err = await process.communicate()
    assert process.returncode == 1
    assert b"the broker refuses connections without a user name" in err
    (workdir / "acl").write_text("topic read hvsnap/+/status\n")
    narrow = make_broker(f"acl_file {workdir / 'acl'}")
    process = await asyncio.create_subprocess_exec(HVSNAP, "watch", "--mqtt", narrow.url, stderr=-1, stdout=-1)
    # mosquitto grants what is asked for and filters later: it is no error, and nothing comes.
    assert process.stderr is not None
    assert b"watching" in await process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert await process.wait() == 130


# -- the board ------------------------------------------------------------------------------------


def test_what_is_under_way_ends_with_its_event_or_in_silence() -> None:
    board = Board("hvsnap")
    snapshot = PAYLOADS[EventType.SNAPSHOT_ACCOMPLISHED]["snapshot"]
    report = ProgressReport(
        host="kvm2", at=AT, id=snapshot, disk="d-a", guest="web01", guest_uuid="u", target="vda", progress=3,
        done_bytes=3, total_bytes=100, rate_bytes_s=1.0, eta_s=None,
    )  # type: ignore[arg-type]  # fmt: skip
    topic = f"hvsnap/kvm2/snapshot/{snapshot}/progress"
    board.take(topic, report.to_json(), 10.0)
    assert [one.id for one in board.live(11.0)] == [snapshot]
    assert board.live(10.0 + LIVE_S) == []
    board.take(topic, report.to_json(), 50.0)
    board.take("hvsnap/kvm2/event", an_event(EventType.SNAPSHOT_ACCOMPLISHED).to_json(), 51.0)
    assert board.live(51.0) == []
    online = HostStatus(host="kvm2", state=Presence.ONLINE, reason=None, at=AT, hvsnap="1")  # type: ignore[arg-type]
    board.take("hvsnap/kvm2/status", online.to_json(), 60.0)
    assert [board.hosts["kvm2"].presence(60.0 + after) for after in (0, SILENT_S)] == ["online", "silent"]


def test_what_is_none_of_ours_is_counted_and_left() -> None:
    board = Board("site/hvsnap")
    event = an_event(EventType.GUEST_LOST).to_json()
    for topic in ("hvsnap/kvm2/event", "site/hvsnap/kvm2/x/event", "site/hvsnap/event", "site/hvsnap/kvm2/state"):
        assert board.take(topic, event, 0.0) is None
    assert board.unreadable == 4
    assert isinstance(read("site/hvsnap", "site/hvsnap/kvm2/event", event), PublishedEvent)


def test_a_board_is_bounded() -> None:
    board = Board("hvsnap")
    for number in range(1200):
        event = an_event(EventType.SNAPSHOT_FAILED, f"e{number}", f"host{number}")
        board.take(f"hvsnap/host{number}/event", event.to_json(), 0.0)
    assert (len(board.hosts), len(board.troubles)) == (1000, 100)


def test_released_disks_are_forgotten() -> None:
    board = Board("hvsnap")
    disk = a_disk()
    state = {
        "host": "kvm2", "at": AT, "guest": "db/1", "guest_uuid": "u", "disk": disk.id, "target": "vda", "system": True,
        "size_bytes": 1, "health": "ok", "snapshots": 1, "stored_bytes": 5, "last_snapshot": None, "last_failure": None,
    }  # fmt: skip
    topic = f"hvsnap/kvm2/guest/db%2F1/disk/{disk.id}/state"
    board.take(topic, json.dumps(state).encode(), 0.0)
    board.take(f"hvsnap/kvm2/guest/old/disk/{disk.id}/state", b"", 0.0)
    assert [one.guest for one in board.of_host("kvm2")] == ["db/1"]
    board.take(topic, b"", 0.0)
    assert board.attention() == []

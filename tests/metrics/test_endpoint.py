"""The real daemon, scraped, and read by Prometheus's own parsers."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from hvsnap import __version__, config, wire
from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.figures import Figures
from hvsnap.happenings import EventType
from hvsnap.house import SystemClock
from hvsnap.metrics import FIGURES_S, Metrics, Sources
from tests.api_kit import a_house
from tests.catalog_kit import StoppedClock, a_disk, a_snapshot
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd
from tests.ports import free_port

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]
LABELS = {"level", "guest", "target", "disk", "kind", "why", "outcome", "operation", "le", "version", "host"}
OPEN = "application/openmetrics-text; version=1.0.0"


class Scraped(Daemon):
    """A daemon with a metrics endpoint."""

    def __init__(self, directory: Path, libvirt_uri: str = "", **config: str) -> None:
        self.port = free_port()
        super().__init__(directory, libvirt_uri, metrics=f'listen = "127.0.0.1:{self.port}"', **config)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/metrics"

    def samples(self) -> Samples:
        answer = httpx.get(self.url, timeout=20)
        assert answer.status_code == 200
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in parse(answer.text)
            for sample in family.samples
        }


@pytest.fixture
def daemon(workdir: Path) -> Iterator[Scraped]:
    one = Scraped(workdir)
    one.start()
    yield one
    one.stop()


def test_what_a_daemon_does_is_told(workdir: Path, libvirtd: Libvirtd, make_guest: Callable[..., Guest]) -> None:
    guest = make_guest([DiskSpec(make_image(workdir / "a.qcow2", "64M"))])
    guest.start()
    daemon = Scraped(workdir, libvirtd.uri)
    began = time.time()
    try:
        daemon.start()
        before = daemon.samples()
        assert before["hvsnap_build_info", (("host", "test-host"), ("version", __version__))] == 1
        assert before["hvsnap_snapshot_failures_total", ()] == 0
        assert before["hvsnap_open_operations", (("kind", "rollback"),)] == 0
        guest.qemu_io(0, "write -P 7 0 4M")
        (one,) = daemon.snapshot(guest.name)
        guest.qemu_io(0, "write -P 8 0 1M")
        (two,) = daemon.snapshot(guest.name)
        (bad,) = daemon.ended(daemon.begin(guest.name, consistency="app"))
        assert bad.state == "failed"
        daemon.settled()
        told = daemon.samples()
        disk = (("disk", str(one.disk)), ("guest", guest.name), ("target", "vda"))
        assert told["hvsnap_snapshots", disk] == 2
        assert told["hvsnap_last_snapshot_timestamp_seconds", disk] == pytest.approx(
            two.created_at.timestamp(), abs=0.01
        )
        assert began < told["hvsnap_last_snapshot_timestamp_seconds", disk] < time.time()
        assert told["hvsnap_last_snapshot_failed", disk] == 1
        assert told["hvsnap_disk_size_bytes", disk] == 64 << 20
        assert told["hvsnap_disk_has_policy", disk] == 0
        assert told["hvsnap_snapshots_accomplished_total", (("kind", "full"),)] == 1
        assert told["hvsnap_snapshots_accomplished_total", (("kind", "incremental"),)] == 1
        assert told["hvsnap_snapshot_failures_total", ()] == 1
        assert told["hvsnap_capture_duration_seconds_count", ()] == 2
        assert 0 < told["hvsnap_capture_duration_seconds_sum", ()] < time.time() - began
        assert told["hvsnap_capture_read_bytes_total", ()] == one.read_bytes + two.read_bytes
        assert told["hvsnap_capture_stored_bytes_total", ()] == one.stored_bytes + two.stored_bytes
        with daemon.client() as client:
            store = client.get("/store", wire.StoreInfo)
        assert told["hvsnap_store_stored_bytes", ()] == store.live_bytes > 0
        assert told["hvsnap_store_blocks", ()] == store.live_blocks == 2
        assert told["hvsnap_store_device_bytes", ()] == store.total_bytes
        assert told["hvsnap_start_time_seconds", ()] == pytest.approx(daemon.status().started_at.timestamp(), abs=60)
        guest.destroy()
        task = daemon.roll_back(f"{guest.name}/vda", one.id, safety_snapshot=False)
        assert task.state == "accomplished"
        with daemon.client() as client:
            client.post("/snapshots/delete", wire.Deletion, wire.SnapshotDelete(ids=[two.id]))
        told = daemon.samples()
        assert told["hvsnap_rollbacks_total", (("outcome", "finished"),)] == 1
        assert told["hvsnap_snapshots_deleted_total", (("why", "deleted"),)] == 1
        assert told["hvsnap_snapshots", disk] == 1
    finally:
        daemon.stop()


def test_both_formats_are_spoken_and_nothing_else_is_there(daemon: Scraped) -> None:
    answer = httpx.get(daemon.url, headers={"Accept": OPEN})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in parse_open(answer.text)} >= {"hvsnap_snapshot_failures", "hvsnap_snapshots"}
    assert httpx.head(daemon.url).text == ""
    for path, method, status in (("/", "GET", 404), ("/v1/status", "GET", 404), ("/metrics", "POST", 405)):
        assert httpx.request(method, f"http://127.0.0.1:{daemon.port}{path}").status_code == status


def test_names_and_units_are_by_convention(daemon: Scraped) -> None:
    families = list(parse(httpx.get(daemon.url).text))
    assert len([one for one in families if one.name.startswith("hvsnap_")]) > 25
    for family in families:
        assert re.fullmatch(r"(hvsnap|process)_[a-z_]+", family.name), family.name
        assert family.documentation, family.name
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            assert set(sample.labels) <= LABELS
    if shutil.which("promtool"):
        text = httpx.get(daemon.url).text
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        ours = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("hvsnap_")]
        assert ours == []


def test_without_a_broker_nothing_is_told_of_one(daemon: Scraped) -> None:
    assert not [name for name, _labels in daemon.samples() if "mqtt" in name]


def test_a_broker_that_is_away_is_told(workdir: Path) -> None:
    daemon = Scraped(workdir, mqtt=f'url = "mqtt://127.0.0.1:{free_port()}"')
    daemon.start()
    try:
        told = daemon.samples()
        assert told["hvsnap_mqtt_connected", ()] == 0
        deadline = time.monotonic() + 20
        while daemon.samples()["hvsnap_mqtt_pending_events", ()] < 1:  # daemon.online
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        daemon.stop()


def test_a_port_that_is_taken_stops_the_start_and_says_so(workdir: Path) -> None:
    daemon = Scraped(workdir)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", daemon.port))
        taken.listen()
        daemon.start(wait=False)
        assert daemon.wait_dead() == 1
    assert f"cannot listen at 127.0.0.1 port {daemon.port}: Address already in use" in daemon.log.read_text()
    assert "check metrics.listen" in daemon.log.read_text()


def test_it_ends_with_its_daemon_also_while_somebody_reads(daemon: Scraped) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port)) as idle:
        idle.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")  # and no end
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 15


async def test_a_large_catalog_is_summed_up_quickly(workdir: Path) -> None:
    """200 disks with 64 snapshots each: what a reading costs at most, in figures (`pytest -s`)."""
    catalog = await Catalog.open(workdir, SystemClock())
    async with catalog.write() as tx:
        for number in range(200):
            disk = a_disk(guest_name=f"web{number:03}")
            await tx.add_disk(disk)
            for sequence in range(64):
                await tx.add_snapshot(a_snapshot(disk.id, sequence))
    began = time.monotonic()
    figures = await catalog.figures()
    print(f"200 disks, 12,800 snapshots: {1000 * (time.monotonic() - began):.0f} ms")
    assert [(one.snapshots, one.last_at, one.failed) for one in figures.disks] == [(64, 63.0, False)] * 200
    await catalog.close()
    assert time.monotonic() - began < 5


async def test_sums_are_made_only_when_something_has_happened(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with a_house(workdir) as house:
        reads = 0
        figures = house.catalog.figures

        async def counting() -> Figures:
            nonlocal reads
            reads += 1
            return await figures()

        monkeypatch.setattr(house.catalog, "figures", counting)
        clock = StoppedClock()
        metrics = Metrics(Sources(house.catalog, house.service, None, config.parse("", "x"), clock))
        house.catalog.on_event.append(metrics.event)
        transport = httpx.ASGITransport(metrics)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for _ in range(5):
                assert (await client.get("/metrics")).status_code == 200
            assert reads == 1
            async with house.catalog.write() as tx:
                await tx.emit(EventType.POLICY_MISSED, {})
            answers = await asyncio.gather(*(client.get("/metrics") for _ in range(5)))
            assert reads == 2
            assert all('hvsnap_policy_runs_total{outcome="missed"} 1.0' in answer.text for answer in answers)
            clock.at += FIGURES_S + 1
            await client.get("/metrics")
            assert reads == 3


async def test_names_of_guests_are_escaped(workdir: Path) -> None:
    name = 'we"b\\\n01 \u202e{x="y"} 1\nhvsnap_evil 1'
    async with a_house(workdir) as house:
        disk = a_disk(guest_name=name)
        async with house.catalog.write() as tx:
            await tx.add_disk(disk)
        metrics = Metrics(Sources(house.catalog, house.service, None, config.parse("", "x"), StoppedClock()))
        transport = httpx.ASGITransport(metrics)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            text = (await client.get("/metrics")).text
    families = {family.name: family for family in parse(text)}
    assert "hvsnap_evil" not in families
    (sample,) = families["hvsnap_snapshots"].samples
    assert sample.labels["guest"] == name

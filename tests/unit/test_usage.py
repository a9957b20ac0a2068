"""What was stored over time: samples of a real catalog, the answer, the command, the plots."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hvsnap import wire
from hvsnap.catalog.usage import DEVICE, HOST
from hvsnap.cli import plotting
from hvsnap.cli.usage import parse_time
from hvsnap.errors import BadRequest, NoSpace
from hvsnap.metering import DAY_S, GIB, HOUR_S, MONTH_HOURS, Sample, gib_hours, meter
from hvsnap.service import findings, sampling
from hvsnap.service.usage import Tariff, UsageReports
from tests.api_kit import House
from tests.catalog_kit import StoppedClock, a_block, a_disk, add_chain
from tests.cli_kit import Desk, a_desk

NOW = 1_780_000_000.0


@pytest.fixture
async def desk(workdir: Path) -> AsyncIterator[Desk]:
    async with a_desk(workdir) as one:
        clock_of(one.house).at = NOW
        yield one


def clock_of(house: House) -> StoppedClock:
    clock = house.catalog._clock
    assert isinstance(clock, StoppedClock)
    return clock


async def stored(house: House, changed: dict[str, int], at: float) -> None:
    """Say what was stored from a moment on."""
    await house.catalog.usage.add(at, changed)


async def report(house: House, since: float, until: float, *, by: str = "chain", points: int = 0) -> wire.Usage:
    return await house.service.usage.report(since, until, by, points)  # type: ignore[arg-type]


# -- samples --------------------------------------------------------------------------------------


async def test_s9_2_a_sample_notes_each_chain_the_host_and_the_device_and_only_what_has_changed(desk: Desk) -> None:
    house, sampler = desk.house, desk.house.service.usage._sampler
    await house.catalog.add_pack("p", 10**6, [a_block(1, 100), a_block(2, 200), a_block(3, 300)])
    one, two = await add_chain(house.catalog, a_disk(), {0: {0: 1}}, {0: {0: 2}})
    await add_chain(house.catalog, other := a_disk(target="vdb"), {0: {0: 1}})
    disk = (await house.catalog.snapshot(one)).disk
    await sampler.sample()
    series = await house.catalog.usage.series()
    assert series.pop(DEVICE)[0].value > 0
    assert series == {HOST: [Sample(NOW, 600)], disk: [Sample(NOW, 300)], other.id: [Sample(NOW, 100)]}
    clock_of(house).at += 300
    await sampler.sample()
    assert {subject for subject, one in (await house.catalog.usage.series()).items() if len(one) > 1} <= {DEVICE}
    async with house.catalog.write() as tx:
        await tx.delete_snapshot(one)
        await tx.delete_snapshot(two)
    clock_of(house).at += 300
    await sampler.sample()
    assert await house.catalog.usage.of(disk) == [Sample(NOW, 300), Sample(NOW + 600, 0)]
    # A new daemon goes on from what the last one has noted.
    again = sampling.Sampler(house.catalog, clock_of(house), None)
    clock_of(house).at += 300
    await again.sample()
    assert (await house.catalog.usage.of(disk))[-1] == Sample(NOW + 600, 0)


async def test_s9_2_old_samples_are_averaged_in_the_catalog(desk: Desk) -> None:
    house = desk.house
    old = NOW - 50 * DAY_S
    for minute in range(0, 180, 5):
        await stored(house, {HOST: minute * GIB}, old + minute * 60)
    before = meter(await house.catalog.usage.of(HOST), old - 10 * DAY_S, old + 30 * DAY_S)
    assert await house.catalog.usage.thin(NOW) > 30
    assert len(await house.catalog.usage.of(HOST)) <= 4
    assert await house.catalog.usage.thin(NOW) == 0
    after = await report(house, old - 10 * DAY_S, old + 30 * DAY_S, by="host")
    assert after.total.gib_hours == pytest.approx(gib_hours(before.byte_s), rel=1e-6)


# -- the answer -----------------------------------------------------------------------------------


async def test_s9_3_the_host_is_billed_beyond_what_is_prepaid_and_chains_share_it(desk: Desk) -> None:
    house = desk.house
    web, mail = a_disk(), a_disk(guest_name="mail", released=True)
    for disk in (web, mail):
        async with house.catalog.write() as tx:
            await tx.add_disk(disk)
    start = NOW - 20 * HOUR_S
    await stored(house, {HOST: 4 * GIB, web.id: 3 * GIB, mail.id: 3 * GIB}, start)
    await stored(house, {HOST: 2 * GIB, mail.id: 0}, start + 10 * HOUR_S)
    answer = await report(house, start - 10 * HOUR_S, NOW)
    total, (first, second) = answer.total, answer.lines
    assert (total.gib_hours, total.billable_gib_hours) == (60.0, 40.0)  # one GiB is prepaid
    assert total.cost == pytest.approx(40 / MONTH_HOURS * 0.5)
    assert (first.subject, first.guest, first.gib_hours, first.billable_gib_hours) == (
        web.id,
        "web01",
        60,
        40 * 60 / 90,
    )
    assert (second.subject, second.guest, second.last_bytes, second.peak_bytes) == (mail.id, "mail", 0, 3 * GIB)
    assert first.cost is not None
    assert second.cost is not None
    assert first.cost + second.cost == pytest.approx(total.cost)
    assert (answer.estimate, answer.known_since) == (True, datetime.fromtimestamp(start, UTC))
    assert (await report(house, start, NOW, by="host")).lines == [(await report(house, start, NOW)).total]
    later = await report(house, NOW - 10 * HOUR_S, NOW)
    assert [line.subject for line in later.lines] == [web.id]
    free = UsageReports(house.catalog, house.service.usage._sampler, clock_of(house), Tariff(0.0, "", 0.0))
    unpriced = await free.report(start, NOW, "host", 0)
    assert (unpriced.price_per_gib_month, unpriced.total.cost, unpriced.total.billable_gib_hours) == (None, None, 60.0)


async def test_an_interval_that_is_empty_is_refused_and_one_to_come_ends_now(desk: Desk) -> None:
    for since, until in ((NOW, NOW), (NOW + 10, None), (NOW - 10, NOW - 20)):
        with pytest.raises(BadRequest):
            await desk.house.service.usage.report(since, until, "host", 0)
    answer = await report(desk.house, NOW - 10, NOW + DAY_S)
    assert answer.until.timestamp() == NOW


async def test_a_full_device_keeps_nobody_from_seeing_what_was_stored(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_arguments: object) -> None:
        raise NoSpace("the device is full")

    await stored(desk.house, {HOST: GIB}, NOW - DAY_S)
    monkeypatch.setattr(desk.house.catalog.usage, "add", full)
    assert (await report(desk.house, NOW - DAY_S, NOW)).total.gib_hours == 24


async def test_s9_2_days_to_full_are_in_status_doctor_event_and_answer(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = desk.house
    for hour in range(7 * 24):
        await stored(house, {DEVICE: 50 * GIB + hour * GIB // 24}, NOW - (7 * 24 - hour) * HOUR_S)
    space = (2 * GIB, 60 * GIB)
    monkeypatch.setattr(sampling, "device_space", lambda _directory: space)
    house.service.usage._sampler._noted = {DEVICE: space[1] - space[0]}
    days = (await report(house, NOW - DAY_S, NOW)).days_to_full
    assert days is not None
    assert days == pytest.approx(2, rel=0.1)
    assert (await house.service.status.status()).days_to_full == days
    found = [one for one in (await house.service.doctor.examine()).findings if one.check == "store-filling"]
    assert [(one.severity, f"in {days:.1f} days" in one.evidence) for one in found] == [("warning", True)]
    assert findings.filling(100.0) == findings.filling(None) == []
    monkeypatch.setattr("hvsnap.service.housekeeping.device_space", lambda _directory: space)
    await house.service.store._housekeeping._look_at_space()
    (event,) = await house.catalog.events(0)
    assert event.payload == {"free_bytes": space[0], "total_bytes": space[1], "days_to_full": days}
    assert f"in {days:.1f} days" in (await desk.hvsnap("status")).out


# -- the command ----------------------------------------------------------------------------------


async def a_month(house: House, chains: int = 2) -> None:
    """Thirty days of chains that grow."""
    for number in range(chains):
        disk = a_disk(guest_name=f"guest$_{number}", source=f"/images/{number}")
        async with house.catalog.write() as tx:
            await tx.add_disk(disk)
        for day in range(30):
            await stored(house, {disk.id: (number + 1) * day * GIB // 10}, NOW - (30 - day) * DAY_S)
    for day in range(30):
        await stored(house, {HOST: chains * day * GIB // 10}, NOW - (30 - day) * DAY_S)


async def test_s9_2_usage_is_a_table_json_and_says_that_it_estimates(desk: Desk) -> None:
    await a_month(desk.house)
    since = datetime.fromtimestamp(NOW - 10 * DAY_S, UTC).isoformat()
    ran = await desk.hvsnap("usage", "--since", since)
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].split()[:3] == ["CHAIN", "GUEST", "DISK"]
    assert [line.split()[1] for line in lines[1:4]] == ["guest$_1", "guest$_0", "-"]
    assert "Estimate, not a bill: " in ran.out
    assert "at 0.5000 EUR a GiB·month (730 hours), 1 GiB prepaid." in ran.out
    ran = await desk.hvsnap("usage", "--since", since, "--by", "host", "-q")
    assert ran.out.split()[0] == "host"
    answer = wire.Usage.model_validate((await desk.hvsnap("usage", "--since", since, "--json")).object)
    assert (answer.estimate, answer.by, len(answer.lines), answer.lines[0].points) == (True, "chain", 2, [])
    assert answer.until - answer.since == timedelta(days=10)
    assert (await desk.hvsnap("usage", "--since", "yesterday")).status == 2
    assert (await desk.hvsnap("usage", "--since", since, "--until", since)).status == 2


@pytest.mark.parametrize("ending", ["png", "svg"])
async def test_s9_2_a_plot_is_a_new_file_of_its_kind(desk: Desk, ending: str) -> None:
    await a_month(desk.house, 12)
    path = desk.directory / f"usage.{ending}"
    ran = await desk.hvsnap("usage", "--since", "2026-05-01", "--plot", str(path))
    assert (ran.status, ran.err) == (0, f"hvsnap: drawn: {path}\n")
    data = path.read_bytes()
    if ending == "png":
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(data) > 10_000
    else:
        assert ElementTree.fromstring(data).tag.endswith("svg")
        assert len(re.findall(rb"<!-- (guest|2 others|host)", data)) >= 12
    ran = await desk.hvsnap("usage", "--plot", str(path), "--json")
    assert (ran.status, ran.object["code"]) == (4, "target-exists")
    assert path.read_bytes() == data
    for wrong in ("usage.gif", "nowhere/usage.png"):
        assert (await desk.hvsnap("usage", "--plot", wrong)).status == 2
    assert sorted(one.name for one in desk.directory.iterdir() if "usage" in one.name) == [path.name]


async def test_s9_2_a_plot_of_the_terminal_has_a_curve_for_each_chain(desk: Desk) -> None:
    await a_month(desk.house)
    ran = await desk.hvsnap("usage", "--since", "2026-05-01", "--plot", "-")
    plot, table = ran.out.split("\n\n", 1)
    assert table.startswith("CHAIN")
    assert "\x1b" not in ran.out
    for word in ("guest$_0/vda", "guest$_1/vda", "host", "GiB", "┤"):
        assert word in plot
    assert json.loads((await desk.hvsnap("usage", "--plot", "-", "--json")).out)["by"] == "chain"


async def test_without_the_libraries_a_plot_is_refused_with_what_to_install(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plotting, "find_spec", lambda _name: None)
    for plot in ("-", "usage.svg"):
        ran = await desk.hvsnap("usage", "--plot", plot)
        assert ran.status == 1
        assert "hint: pip install 'hvsnap[plot]'" in ran.err
    assert (await desk.hvsnap("usage")).status == 0


def test_the_command_line_loads_no_library_of_plots_before_one_is_asked_for() -> None:
    code = "import sys; import hvsnap.cli.usage; print({'matplotlib', 'plotext'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_moments_are_dates_times_or_so_long_ago() -> None:
    now = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
    assert parse_time("", now) is None
    assert parse_time("36h", now) == datetime(2026, 11, 23, 0, 0, tzinfo=UTC)
    assert parse_time("2w", now) == datetime(2026, 11, 10, 12, 0, tzinfo=UTC)
    assert parse_time("2026-11-01T00:00+00:00", now) == datetime(2026, 11, 1, tzinfo=UTC)
    for wrong in ("d", "-1d", "2026-13-01", "999999w", "0001-01-01x", "soon"):
        with pytest.raises(BadRequest):
            parse_time(wrong, now)

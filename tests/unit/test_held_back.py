"""Who was kept from starting is started once nothing keeps them: only those that libvirt would start, and once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import HypervisorFailed, HypervisorUnreachable
from hvsnap.guard import REFUSED_MAX, ROLLBACK, Bar, StartGuard
from hvsnap.happenings import EventType
from hvsnap.model import DiskId, GuestState
from hvsnap.service.held_back import HeldBack
from tests.catalog_kit import StoppedClock
from tests.service_kit import WEB, FakeHypervisor, a_guest


@dataclass
class Stage:
    guard: StartGuard
    hypervisor: FakeHypervisor
    catalog: Catalog
    held: HeldBack

    async def events(self) -> list[EventType]:
        kinds = {EventType.GUEST_STARTED, EventType.GUEST_START_FAILED}
        return [event.type for event in await self.catalog.events(0) if event.type in kinds]


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    guard, hypervisor = StartGuard(tmp_path), FakeHypervisor(a_guest(state=GuestState.OFF, autostart=True))
    catalog = await Catalog.open(tmp_path, StoppedClock())
    yield Stage(guard, hypervisor, catalog, HeldBack(guard, hypervisor, catalog))
    await catalog.close()


def a_bar() -> Bar:
    return Bar(WEB, "web01", DiskId("d-aaaaaaaaaaaa"), "vda", "/vm/a.qcow2", ROLLBACK)


async def test_s6_5_a_guest_that_was_refused_starts_when_its_last_marker_goes(stage: Stage) -> None:
    await stage.guard.bar(a_bar())
    await stage.held.refused("web01")
    await stage.held.settle()
    assert stage.hypervisor.log == []
    await stage.guard.lift(a_bar().disk, ROLLBACK)
    await stage.held.settle()
    await stage.held.settle()
    assert stage.hypervisor.log == ["start web01"]
    assert await stage.events() == [EventType.GUEST_STARTED]
    assert await stage.guard.refused() == []


async def test_what_was_refused_outlives_the_daemon(stage: Stage, tmp_path: Path) -> None:
    await stage.held.refused("web01")
    guard = StartGuard(tmp_path)
    await HeldBack(guard, stage.hypervisor, stage.catalog).settle()
    assert stage.hypervisor.log == ["start web01"]


@pytest.mark.parametrize(
    "changes", [{"autostart": False}, {"state": GuestState.RUNNING}], ids=["not marked", "running by now"]
)
async def test_others_are_left_as_they_are_and_forgotten(stage: Stage, changes: dict[str, object]) -> None:
    stage.hypervisor.shown[WEB] = a_guest(**{"state": GuestState.OFF, "autostart": True, **changes})
    await stage.held.refused("web01")
    await stage.held.refused("gone")
    await stage.held.settle()
    assert stage.hypervisor.log == []
    assert await stage.guard.refused() == []


async def test_whose_hypervisor_is_silent_waits(stage: Stage) -> None:
    stage.hypervisor.silent["other"] = HypervisorUnreachable("no answer")
    await stage.held.refused("not-seen")
    await stage.held.settle()
    assert await stage.guard.refused() == ["not-seen"]


async def test_a_start_that_fails_is_told_of_and_not_tried_for_ever(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_uuid: object) -> None:
        raise HypervisorFailed("no network")

    monkeypatch.setattr(stage.hypervisor, "start", fail)
    await stage.held.refused("web01")
    await stage.held.settle()
    assert await stage.events() == [EventType.GUEST_START_FAILED]
    assert await stage.guard.refused() == []


async def test_the_list_is_bounded_and_a_broken_one_starts_nobody(stage: Stage, tmp_path: Path) -> None:
    for number in range(REFUSED_MAX + 2):
        await stage.guard.note_refused(f"g{number}")
    kept = await stage.guard.refused()
    assert (len(kept), kept[0]) == (REFUSED_MAX, "g2")
    (tmp_path / "held-back.json").write_text('["web01"')
    await stage.held.settle()
    assert stage.hypervisor.log == []

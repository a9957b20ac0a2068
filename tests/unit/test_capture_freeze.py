"""Freezing: bounded, one at a time, and thawed for certain; with an agent that does what the test wants."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from hvsnap.capture.freeze import KIND, Freezer
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import AgentMissing, AgentUnavailable, GuestUnknown, HypervisorFailed
from hvsnap.model import GuestState, GuestUuid
from tests.catalog_kit import StoppedClock
from tests.service_kit import MAIL, FakeHypervisor, a_guest

GUEST = a_guest(state=GuestState.RUNNING)


OTHER = a_guest(uuid=MAIL, name="mail01", state=GuestState.RUNNING)


class Agents(FakeHypervisor):
    """Two guests with an agent each; the freeze of one that is in ``hangs`` takes all the time that it is given."""

    def __init__(self) -> None:
        super().__init__(GUEST, OTHER)
        self.frozen: set[GuestUuid] = set()
        self.hangs: set[GuestUuid] = set()
        self.given_s: list[float] = []
        self.error: Exception | None = None

    async def freeze(self, uuid: GuestUuid, timeout_s: float) -> int:
        self.given_s.append(timeout_s)
        if uuid in self.hangs:
            await asyncio.sleep(timeout_s)
            raise AgentUnavailable("no answer")
        if self.error is not None:
            raise self.error
        self.frozen.add(uuid)
        return 1

    async def thaw(self, uuid: GuestUuid, timeout_s: float) -> None:
        self.frozen.discard(uuid)


class Agent(FakeHypervisor):
    """A guest whose agent may hang: a freeze that it was asked for is done later, as soon as it answers again."""

    def __init__(self) -> None:
        super().__init__(GUEST)
        self.frozen = False
        self.hangs = False
        self.missing = False
        self.asked: list[str] = []

    async def freeze(self, uuid: GuestUuid, timeout_s: float) -> int:
        self.asked.append("freeze")
        if self.missing:
            raise AgentMissing("no agent")
        if self.hangs:
            raise AgentUnavailable("no answer")
        if self.frozen:
            raise AgentUnavailable("the agent is in frozen state")
        self.frozen = True
        return 1

    async def thaw(self, uuid: GuestUuid, timeout_s: float) -> None:
        self.asked.append("thaw")
        if self.hangs:
            raise HypervisorFailed("no answer")
        self.frozen = False

    def answers_again(self) -> None:
        """Do what was asked for while it hung."""
        self.hangs = False
        self.frozen = True


@pytest.fixture
async def catalog(tmp_path: Path) -> AsyncIterator[Catalog]:
    catalog = await Catalog.open(tmp_path, StoppedClock())
    yield catalog
    await catalog.close()


@contextlib.asynccontextmanager
async def looping(freezer: Freezer) -> AsyncIterator[None]:
    task = asyncio.create_task(freezer.run())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def thawed(agent: Agent, catalog: Catalog) -> None:
    """Return when nothing is owed any more."""
    async with asyncio.timeout(10):
        while agent.frozen or await catalog.operations(KIND):  # noqa: ASYNC110 - two things are waited for
            await asyncio.sleep(0.01)


async def test_frozen_for_as_long_as_it_lasts(catalog: Catalog) -> None:
    agent = Agent()
    async with Freezer(agent, catalog).frozen([GUEST.uuid], 5.0) as freezes:
        assert agent.frozen
        assert freezes[GUEST.uuid].in_force
    assert not agent.frozen
    assert not freezes[GUEST.uuid].expired


@pytest.mark.parametrize("error", [HypervisorFailed("no"), asyncio.CancelledError()], ids=["error", "cancelled"])
async def test_thawed_when_what_is_done_meanwhile_fails(catalog: Catalog, error: BaseException) -> None:
    agent = Agent()
    with pytest.raises(type(error)):
        async with Freezer(agent, catalog).frozen([GUEST.uuid], 5.0):
            raise error
    assert not agent.frozen


async def test_thawed_at_the_deadline(catalog: Catalog) -> None:
    agent = Agent()
    async with Freezer(agent, catalog).frozen([GUEST.uuid], 0.01) as freezes:
        await thawed(agent, catalog)
    assert freezes[GUEST.uuid].expired
    assert not freezes[GUEST.uuid].in_force


async def test_freeze_that_happens_late_is_thawed_as_soon_as_the_agent_answers(catalog: Catalog) -> None:
    """FAULTS 18."""
    agent = Agent()
    agent.hangs = True
    freezer = Freezer(agent, catalog)
    async with looping(freezer):
        async with freezer.frozen([GUEST.uuid], 5.0) as freezes:
            assert not freezes[GUEST.uuid].in_force
        assert len(await catalog.operations(KIND)) == 1
        agent.answers_again()
        await thawed(agent, catalog)


async def test_thaw_that_is_owed_survives_the_daemon(catalog: Catalog) -> None:
    """FAULTS 18."""
    agent = Agent()
    agent.hangs = True
    async with Freezer(agent, catalog).frozen([GUEST.uuid], 5.0) as freezes:
        assert isinstance(freezes[GUEST.uuid].error, AgentUnavailable)
    later = Freezer(agent, catalog)
    ((_operation, error),) = await later.recover()
    assert error is not None
    agent.answers_again()
    async with looping(later):
        await thawed(agent, catalog)
    assert await later.recover() == []


async def test_nothing_is_owed_to_a_guest_without_an_agent(catalog: Catalog) -> None:
    agent = Agent()
    agent.missing = agent.hangs = True
    async with Freezer(agent, catalog).frozen([GUEST.uuid], 5.0) as freezes:
        assert isinstance(freezes[GUEST.uuid].error, AgentMissing)
    assert agent.asked == ["freeze"]
    assert await catalog.operations(KIND) == []


async def test_nothing_is_owed_to_a_guest_that_is_off(catalog: Catalog) -> None:
    agent = Agent()
    agent.hangs = True
    agent.shown[GUEST.uuid] = a_guest(state=GuestState.OFF)
    await Freezer(agent, catalog).thaw(GUEST.uuid)
    assert await catalog.operations(KIND) == []


async def test_freezes_of_one_guest_come_one_after_the_other(catalog: Catalog) -> None:
    """Two disks captured side by side: neither finds the guest frozen by the other, or thawed under its hands."""
    agent = Agent()
    freezer = Freezer(agent, catalog)

    async def one() -> None:
        async with freezer.frozen([GUEST.uuid], 5.0):
            for _ in range(20):
                await asyncio.sleep(0)
                assert agent.frozen

    await asyncio.gather(one(), one(), one(), freezer.thaw(GUEST.uuid))
    assert agent.asked.count("freeze") == 3


# -- several guests -------------------------------------------------------------------------------

BOTH = [GUEST.uuid, OTHER.uuid]


async def test_all_are_frozen_at_once_and_thawed_together(catalog: Catalog) -> None:
    agents = Agents()
    async with Freezer(agents, catalog).frozen(BOTH, 5.0) as freezes:
        assert agents.frozen == set(BOTH)
        assert all(freeze.in_force for freeze in freezes.values())
    assert agents.frozen == set()


async def test_an_agent_that_hangs_does_not_use_up_the_time_of_the_others(catalog: Catalog) -> None:
    agents = Agents()
    agents.hangs = {OTHER.uuid}
    async with Freezer(agents, catalog).frozen(BOTH, 2.0) as freezes:
        assert freezes[GUEST.uuid].in_force  # still, after the other one has not answered
        assert not freezes[OTHER.uuid].in_force
    assert agents.given_s == [1.0, 1.0]
    assert agents.frozen == set()


async def test_a_guest_that_vanishes_lets_the_others_be_thawed(catalog: Catalog) -> None:
    agents = Agents()
    agents.hangs, agents.error = {OTHER.uuid}, GuestUnknown("it is gone")
    with pytest.raises(GuestUnknown):
        async with Freezer(agents, catalog).frozen(BOTH, 0.1):
            raise AssertionError("one of them is not there")
    assert agents.frozen == set()


async def test_two_that_freeze_the_same_guests_in_other_orders_do_not_wait_for_each_other(catalog: Catalog) -> None:
    agents = Agents()
    freezer = Freezer(agents, catalog)

    async def one(guests: list[GuestUuid]) -> None:
        async with freezer.frozen(guests, 5.0) as freezes:
            await asyncio.sleep(0)
            assert agents.frozen == set(BOTH)
            assert all(freeze.in_force for freeze in freezes.values())

    async with asyncio.timeout(10):
        await asyncio.gather(*(one(order) for order in (BOTH, BOTH[::-1]) * 5))

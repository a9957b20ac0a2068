"""A guest is asked in every way, again and again, and what was tried is told."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from hvsnap.errors import AgentUnavailable, HypervisorFailed, Refused
from hvsnap.hypervisor import shutting_down
from hvsnap.hypervisor.shutting_down import Ways, shut_down
from hvsnap.model import GuestState, GuestUuid, GuestView
from hvsnap.service.rollbacks import check_can_stop

QUICK = {"POLL_S": 0.001, "PRESS_AGAIN_S": 0.004, "AGENT_PATIENCE_S": 0.05}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setattr(shutting_down, name, value)


@dataclass
class FakeGuest:
    """A guest that goes off at a certain press, or by its agent; the agent may be none."""

    off_at_press: int = 1 << 30
    has_agent: bool = True
    agent_ends_it: bool = True
    presses: int = 0
    asked: int = 0
    log: list[str] = field(default_factory=list)

    async def active(self) -> bool:
        by_agent = self.has_agent and self.agent_ends_it and self.asked > 0
        return not by_agent and self.presses < self.off_at_press

    async def agent(self) -> None:
        if not self.has_agent:
            raise AgentUnavailable("none is running in it")
        self.asked += 1
        self.log.append("agent")

    async def press(self) -> None:
        self.presses += 1
        self.log.append("button")

    async def shut_down(self, timeout_s: float = 5.0) -> None:
        await shut_down("web01", Ways(self.active, self.agent, self.press, "`virsh destroy web01`"), timeout_s)


async def test_an_agent_that_obeys_is_all_that_is_needed() -> None:
    guest = FakeGuest()
    await guest.shut_down()
    assert guest.log == ["agent"]


async def test_without_an_agent_the_button_is_pressed_until_somebody_sees_it() -> None:
    guest = FakeGuest(off_at_press=3, has_agent=False)
    await guest.shut_down()
    assert guest.log == ["button"] * 3


async def test_where_an_agent_promises_and_nothing_happens_the_button_comes_after_it() -> None:
    guest = FakeGuest(off_at_press=2, agent_ends_it=False)
    await guest.shut_down()
    assert guest.log[0] == "agent"
    assert guest.log.count("button") == 2


async def test_a_guest_that_is_off_is_asked_nothing() -> None:
    guest = FakeGuest(off_at_press=0)
    await guest.shut_down()
    assert guest.log == []


async def test_at_the_deadline_is_told_what_was_tried_and_what_is_left() -> None:
    guest = FakeGuest(has_agent=False)
    with pytest.raises(HypervisorFailed) as caught:
        await guest.shut_down(0.03)
    assert "guest web01 did not shut down within 0 s: its agent could not be asked (none is running in it)" in str(
        caught.value
    )
    assert "its power button was pressed" in str(caught.value)
    assert "virsh destroy web01" in caught.value.hint


@pytest.mark.parametrize(
    ("state", "persistent", "why"),
    [(GuestState.PAUSED, True, "is paused"), (GuestState.RUNNING, False, "no definition that outlives its shutdown")],
)
def test_a_guest_that_cannot_be_stopped_is_refused_beforehand(state: GuestState, persistent: bool, why: str) -> None:
    guest = GuestView(GuestUuid("0b5a1d7e-0000-4000-8000-000000000001"), "web01", state, persistent, ())
    with pytest.raises(Refused, match=why) as caught:
        check_can_stop(guest)
    assert "virsh" in caught.value.hint

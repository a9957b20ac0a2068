"""Shutting a guest down: ask its agent, press its power button, and ask again until it is off.

One question is not enough. A guest that is still booting has no driver for its button yet, an agent may hang, and a
desktop may show a dialogue; a press while a guest is shutting down changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from hvsnap.errors import AgentUnavailable, HypervisorFailed

POLL_S = 0.2
PRESS_AGAIN_S = 5.0
AGENT_PATIENCE_S = 20.0
"""An agent that took the request gets so long before the button is pressed as well; one that did not is asked again."""


@dataclass(frozen=True, slots=True)
class Ways:
    """What a guest can be asked by: ``agent`` raises :class:`AgentUnavailable` where there is none, or it is silent.

    ``force`` is what its owner would do who gives up on it.
    """

    is_active: Callable[[], Awaitable[bool]]
    agent: Callable[[], Awaitable[None]]
    button: Callable[[], Awaitable[None]]
    force: str


async def shut_down(name: str, ways: Ways, timeout_s: float) -> None:
    """Return when the guest is off; raises :class:`HypervisorFailed` if it is still there at the deadline."""
    began = time.monotonic()
    deadline = began + timeout_s
    agent, taken, presses = "", False, 0
    next_agent = next_press = began
    while await ways.is_active():
        now = time.monotonic()
        if now > deadline:
            raise HypervisorFailed(
                f"guest {name} did not shut down within {timeout_s:.0f} s: {_asked(agent, presses)}",
                hint=f"shut it down from inside, or {ways.force} if what it has not saved may be lost; then try again",
            )
        if now >= next_agent:
            next_agent = now + AGENT_PATIENCE_S
            try:
                await ways.agent()
                if not taken:
                    agent, taken, next_press = "its agent was asked", True, now + AGENT_PATIENCE_S
            except AgentUnavailable as error:
                agent = agent or f"its agent could not be asked ({error.message})"
            continue  # asking may have taken a while
        if now >= next_press:
            next_press = now + PRESS_AGAIN_S
            presses += 1
            await ways.button()
        await asyncio.sleep(POLL_S)


def _asked(agent: str, presses: int) -> str:
    pressed = f"its power button was pressed {presses} times" if presses != 1 else "its power button was pressed once"
    return f"{agent}, {pressed}" if agent else pressed

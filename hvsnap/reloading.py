"""The configuration read again while the daemon runs (SIGHUP): who may use the API at once, the rest later.

It is taken whole or not at all: of a file that is wrong nothing is taken, and the log has file, key and expectation.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from hvsnap.api.peers import Access, Doorkeeper
from hvsnap.config import Settings
from hvsnap.errors import HvsnapError

log = logging.getLogger(__name__)

AT_ONCE = ("api.",)
"""What keys begin with that are obeyed without a restart."""


class Reloader:
    """Reads the configuration when it is asked to. ``started`` is what the daemon runs with."""

    def __init__(self, read: Callable[[], Settings], started: Settings, doorkeeper: Doorkeeper) -> None:
        self._read = read
        self._started = started
        self._doorkeeper = doorkeeper
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """Read it again soon; for a signal."""
        self._asked.set()

    async def run(self) -> None:
        """Read it whenever it is asked for, until cancelled."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self._reload()

    async def _reload(self) -> None:
        try:
            new = await asyncio.to_thread(self._read)
            access = Access.of(new.api)
        except HvsnapError as error:
            log.error(
                "the configuration stays as it was: %s%s", error.message, f" ({error.hint})" if error.hint else ""
            )
            return
        self._doorkeeper.access = access
        later = [key for key in differing(self._started, new) if not key.startswith(AT_ONCE)]
        if later:
            log.warning("the configuration is read again; from the next start on: %s", ", ".join(later))
        else:
            log.info("the configuration is read again")


def differing(one: Settings, other: Settings) -> list[str]:
    """Return the keys, dotted, whose values are not the same."""
    return _differing(one.model_dump(), other.model_dump(), "")


def _differing(one: Any, other: Any, prefix: str) -> list[str]:
    if not isinstance(one, dict) or not isinstance(other, dict):
        return [] if one == other else [prefix.rstrip(".")]
    names = dict.fromkeys([*one, *other])
    return [key for name in names for key in _differing(one.get(name), other.get(name), f"{prefix}{name}.")]

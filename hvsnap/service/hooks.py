"""What libvirt's hook tells (hooks/qemu.d/50-hvsnap): on the socket, or in the spool if nobody answered there.

libvirt's own events say the same, but for those that come while its connection is down, or before the daemon was there.
So a call is a reason to look at the guests, and never taken for the truth about them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path

from pydantic import ValidationError

from hvsnap.model import GuestUuid
from hvsnap.wire import HookCall, HookTaken

log = logging.getLogger(__name__)

SPOOL_LOOK_S = 30.0
START_WAIT_S = 0.25
"""How long a guest's start is kept waiting for work on its images; the hook itself waits for 0.35 s."""

SPOOL = ("spool", "hooks")
HUNG = ".hung"
"""The hook's note that we did not answer: it does not wait for us as long as that is new."""

FILE_BYTES_MAX = 2 << 20
SEEN_MAX = 1024

CHANGES = {"started", "stopped", "release", "restore", "reconnect", "migrate", "attach"}
"""Operations after which a guest, or what it is on, is another."""

OPERATIONS = CHANGES | {"prepare", "start"}
"""What is counted by its name; the rest is counted together, since its names are anybody's."""

OTHER = "other"

_UUID = re.compile(r"<uuid>\s*([0-9A-Fa-f-]{36})\s*</uuid>")


class Hooks:
    """Takes the hook's calls.

    ``wake`` has the guests looked at, ``refused`` is told who was kept from starting, and ``starts`` whose QEMU comes
    next: it returns when nothing stands in its way any more, or after the seconds it is given.
    """

    def __init__(
        self,
        state_dir: Path,
        wake: Callable[[], None],
        refused: Callable[[str], Awaitable[None]] | None = None,
        starts: Callable[[GuestUuid, float], Awaitable[None]] | None = None,
    ) -> None:
        self._spool = state_dir.joinpath(*SPOOL)
        self._wake = wake
        self._refused = refused
        self._starts = starts
        self._seen: OrderedDict[str, None] = OrderedDict()
        self.calls: Counter[str] = Counter()
        self.refused = 0
        self.spooled = 0

    async def receive(self, call: HookCall) -> HookTaken:
        """Take one call, on whichever way it came, and remember durably who was refused."""
        if call.refused and self._refused is not None:
            await self._refused(call.guest)
        return self.take(call)

    async def answer(self, call: HookCall) -> HookTaken:
        """Take one call of a hook that waits for the answer: with it, the guest's start."""
        taken = await self.receive(call)
        found = _UUID.search(call.xml)
        if call.operation == "prepare" and not call.refused and found is not None and self._starts is not None:
            await self._starts(GuestUuid(found[1].lower()), START_WAIT_S)
        return taken

    def take(self, call: HookCall) -> HookTaken:
        """Take one call. One that came before, on the other way, changes nothing."""
        if call.id in self._seen:
            return HookTaken(known=True)
        self._seen[call.id] = None
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)
        self.calls[call.operation if call.operation in OPERATIONS else OTHER] += 1
        if call.refused:
            self.refused += 1
            log.warning("guest %.100s was kept from starting by its open rollback or overlay", ascii(call.guest))
        if call.operation in CHANGES or call.refused:
            self._wake()
        return HookTaken(known=False)

    async def run(self) -> None:
        """Read the spool now and then, until cancelled."""
        while True:
            taken = await self.read_spool()
            if taken:
                log.info("%d calls of libvirt's hook were found in the spool", taken)
            await asyncio.sleep(SPOOL_LOOK_S)

    async def read_spool(self) -> int:
        """Take what is in the spool, oldest first; return how much that was."""
        taken = 0
        for name in await asyncio.to_thread(self._names):
            call = await asyncio.to_thread(self._read, name)
            if call is not None:
                taken += not (await self.receive(call)).known
                self.spooled += 1
            await asyncio.to_thread(self._remove, name)
        return taken

    # -- blocking ---------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        self._remove(HUNG)
        with contextlib.suppress(OSError):
            return sorted(name for name in os.listdir(self._spool) if name.endswith(".json"))
        return []

    def _read(self, name: str) -> HookCall | None:
        path = self._spool / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                return HookCall.model_validate_json(file.read(FILE_BYTES_MAX))
        except (OSError, ValidationError) as error:
            log.warning("%s is no call of the hook, and is removed: %.200s", path, error)
            return None

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            (self._spool / name).unlink()

"""Short work on images whose guests are off: merging an overlay, removing a bitmap.

QEMU's image locks keep a guest from being started meanwhile, and libvirt does not try again. So whoever hears that a
guest is about to start can wait for the end of it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from hvsnap.model import GuestUuid


class OfflineWork:
    """Knows whose images are being worked on while their guests are off."""

    def __init__(self) -> None:
        self._at_work: dict[asyncio.Future[None], GuestUuid] = {}

    @contextlib.contextmanager
    def on(self, guest: GuestUuid) -> Iterator[None]:
        """Work on a guest's images for as long as the context lasts."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._at_work[ended] = guest
        try:
            yield
        finally:
            del self._at_work[ended]
            ended.set_result(None)

    async def ended(self, guest: GuestUuid, timeout_s: float) -> None:
        """Return when nothing is at work on a guest's images any more, or after ``timeout_s``."""
        at_work = [one for one, whose in self._at_work.items() if whose == guest]
        if at_work:
            await asyncio.wait(at_work, timeout=timeout_s)

"""Watching the space that open overlays and scratch images use: a snapshot is given up before a guest's write fails."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

from hvsnap.errors import NoSpace

WATCH_S = 0.5


@dataclass(frozen=True, slots=True)
class SpaceLimits:
    """``reserve_bytes`` must stay free beside the overlays; an overlay may grow to ``overlay_bytes`` (0: no limit)."""

    reserve_bytes: int
    overlay_bytes: int


def room(overlays: Sequence[str], limits: SpaceLimits) -> int:
    """Return how many bytes the guest may still write before :func:`check` gives the capture up. Blocking."""
    left = []
    for overlay in overlays:
        seen = os.statvfs(os.path.dirname(overlay))
        left.append(seen.f_bavail * seen.f_frsize - limits.reserve_bytes)
        if limits.overlay_bytes:
            used_bytes = os.stat(overlay).st_blocks * 512 if os.path.exists(overlay) else 0
            left.append(limits.overlay_bytes - used_bytes)
    return min(left)


def check(overlays: Sequence[str], limits: SpaceLimits) -> None:
    """Raise :class:`NoSpace` if an overlay, or the file system it lies on, is past its limit. Blocking."""
    for overlay in overlays:
        seen = os.statvfs(os.path.dirname(overlay))
        free_bytes = seen.f_bavail * seen.f_frsize
        if free_bytes < limits.reserve_bytes:
            raise NoSpace(
                f"{os.path.dirname(overlay)} has only {free_bytes} bytes left for the guest's writes",
                hint="free some space there, name another place with capture.overlay_dir, or lower "
                "capture.space_reserve_bytes",
            )
        if limits.overlay_bytes and os.path.exists(overlay):
            used_bytes = os.stat(overlay).st_blocks * 512
            if used_bytes > limits.overlay_bytes:
                raise NoSpace(
                    f"the overlay {overlay} grew to {used_bytes} bytes",
                    hint="take the snapshot when the guest writes less, or raise capture.overlay_limit_bytes",
                )


async def watch(overlays: Sequence[str], limits: SpaceLimits) -> None:
    """Check again and again, until cancelled; raises :class:`NoSpace`."""
    while True:
        await asyncio.to_thread(check, overlays, limits)
        await asyncio.sleep(WATCH_S)

"""What the daemon tells systemd (sd_notify(3)): that it is ready, what it is doing, that its event loop turns."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

PINGS = 3
"""Pings in one watchdog interval: a busy moment that swallows one or two is no reason to be killed."""


def notify(state: str) -> None:
    """Tell systemd; nothing happens where it did not start us. ``state`` is lines of ``NAME=VALUE``."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.setblocking(False)
        channel.connect("\0" + address[1:] if address.startswith("@") else address)
        channel.send(state.encode())


def ping_interval_s(environment: Mapping[str, str], pid: int) -> float | None:
    """Return how often systemd wants to hear from process ``pid``; None: it does not (sd_watchdog_enabled(3))."""
    try:
        if int(environment.get("WATCHDOG_PID", pid)) != pid:
            return None
        interval_us = int(environment["WATCHDOG_USEC"])
    except (KeyError, ValueError):
        return None
    return interval_us / 1e6 / PINGS if interval_us > 0 else None


async def keep_alive() -> None:
    """Ping systemd's watchdog from the event loop, until cancelled: a loop that stands still is restarted."""
    interval_s = ping_interval_s(os.environ, os.getpid())
    if interval_s is None:
        await asyncio.Event().wait()  # one of the daemon's loops, none of which ends by itself
        return
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)

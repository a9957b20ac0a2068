"""What the daemon tells systemd: that it is ready, that its event loop turns (sd_notify(3)), and its log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Mapping

PINGS = 3
"""Pings in one watchdog interval: a busy moment that swallows one or two is no reason to be killed."""


_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))


class JournalFormatter(logging.Formatter):
    """Begins every line with its priority, which journald takes off again (sd-daemon(3)); it adds the time itself."""

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's lines, a traceback's included, each of which becomes an entry of the journal."""
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), 7)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def logs_to_journal(environment: Mapping[str, str], fd: int) -> bool:
    """Whether a file descriptor is the journal's: as systemd.exec(5) says, by what it was told of it."""
    with contextlib.suppress(OSError):
        seen = os.fstat(fd)
        return environment.get("JOURNAL_STREAM", "") == f"{seen.st_dev}:{seen.st_ino}"
    return False


STANDARD_ERROR = 2
"""Its descriptor, which the journal's is told by, whatever object Python writes to."""


def set_up_logging() -> None:
    """Log to standard error, as the journal wants it where that is the journal."""
    handler = logging.StreamHandler(sys.stderr)
    if logs_to_journal(os.environ, STANDARD_ERROR):
        handler.setFormatter(JournalFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO)


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

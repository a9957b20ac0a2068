"""Ports for servers of tests."""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a loopback port that nobody has, below those that the kernel gives to connections.

    One of theirs may be taken while its server is restarted, or before it has started: by any connection, and even by
    one that is tried to the very server, which then is connected to itself.
    """
    end = int(RANGE.read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(end // 2, end)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port

"""A share of the processors for one process, as ``CPUWeight=`` of its systemd unit would give it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

WEIGHT = 20
"""Of 100, which everybody else has: what docs/performance.md advises where processors are scarce."""

ROOTS = {
    Path("/sys/fs/cgroup"): ("cpu.weight", WEIGHT),
    Path("/sys/fs/cgroup/cpu"): ("cpu.shares", WEIGHT * 1024 // 100),
}
"""Where control groups of version 2 and of version 1 are, and what sets the weight."""


@contextlib.contextmanager
def low_weight(pid: int) -> Iterator[bool]:
    """Keep a process and what it starts in a group of low weight; gives False where that cannot be had."""
    for root, (key, value) in ROOTS.items():
        group = root / f"hvsnap-bench-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / key).write_text(str(value))
            (group / "cgroup.procs").write_text(str(pid))
        except OSError:  # the controller is not switched on here
            group.rmdir()
            continue
        try:
            yield True
        finally:
            for member in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    (root / "cgroup.procs").write_text(member)
            with contextlib.suppress(OSError):
                group.rmdir()
        return
    yield False

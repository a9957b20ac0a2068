"""A daemon that kills itself, or a guest's QEMU, at one of the acts of a capture: ``python -m … CONFIG``.

Acts are counted while the file ``KILL_DIR/armed`` exists: before and after each command that changes something in QEMU
(of a guest of libvirt: each call by which a capture does so), and after each commit of the catalog. The file names the
act (by its number or name; 0: none) and the process (0: this one) that gets SIGKILL. What was counted is in
``KILL_DIR/acts``, a line each.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from hvsnap.catalog.catalog import Catalog
from hvsnap.catalog.transaction import Transaction
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.hypervisor.qmp_connection import QmpConnection
from tests import run_daemon
from tests.e2e import doctored_daemon

PLACE = Path(os.environ["KILL_DIR"])
ASKING = ("query-", "qom-get", "x-debug-")


def act(what: str) -> None:
    try:
        at, victim = (PLACE / "armed").read_text().splitlines()
    except FileNotFoundError:
        return
    with (PLACE / "acts").open("a+") as file:
        file.write(f"{what}\n")
        file.seek(0)
        counted = len(file.readlines())
    if at in (str(counted), what):
        (PLACE / "armed").unlink()
        os.kill(int(victim) or os.getpid(), signal.SIGKILL)


def count(owner: Any, method: str) -> None:
    """Let a method be two acts."""
    function = getattr(owner, method)

    @functools.wraps(function)
    async def counted(*arguments: Any) -> Any:
        act(f"before {method}")
        answer = await function(*arguments)
        act(f"after {method}")
        return answer

    setattr(owner, method, counted)


def install() -> None:
    execute, write = QmpConnection.execute, Catalog.write

    async def counted_execute(self: QmpConnection, command: str, /, **arguments: Any) -> Any:
        if command.startswith(ASKING):
            return await execute(self, command, **arguments)
        act(f"before {command}")
        answer = await execute(self, command, **arguments)
        act(f"after {command}")
        return answer

    @contextlib.asynccontextmanager
    async def counted_write(self: Catalog) -> AsyncIterator[Transaction]:
        async with write(self) as tx:
            yield tx
        act("after a commit")

    for method in ("bitmap_add", "bitmap_remove", "switch_to_overlays", "commit_start", "commit_pivot"):
        count(LibvirtHypervisor, method)
    QmpConnection.execute = counted_execute  # type: ignore[method-assign]
    Catalog.write = counted_write  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    install()
    doctored_daemon.install_gates()
    sys.exit(run_daemon.main())

"""A daemon that tests can hold at a point, or that has a fault: ``python -m tests.e2e.doctored_daemon CONFIG``.

``E2E_GATES`` names a directory: while it holds a file ``NAME.closed``, whoever comes to the gate NAME leaves a file
``NAME.reached.WHO`` there and waits. ``E2E_FAULT`` names a function of :mod:`tests.e2e.broken` that breaks the product.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from hvsnap.capture.record import DiskPlan, Recorder
from hvsnap.hypervisor.libvirt import LibvirtHypervisor
from hvsnap.instant import Span
from hvsnap.restore.fill import Filler
from hvsnap.restore.instant import InstantDisks
from hvsnap.restore.rollback import Rollback
from tests import run_daemon
from tests.e2e import broken

GATES = os.environ.get("E2E_GATES", "")


async def pass_gate(name: str, who: str) -> None:
    """Wait while the gate is closed."""
    if not GATES or not (closed := Path(GATES, f"{name}.closed")).exists():
        return
    Path(GATES, f"{name}.reached.{who}").touch()
    while closed.exists():  # noqa: ASYNC110 - another process opens it
        await asyncio.sleep(0.005)


def install_gates() -> None:
    """Put gates before a disk is read, disks are switched, a snapshot is accomplished; in rollbacks, before fills."""
    record, switch, accomplish = Recorder.record, LibvirtHypervisor.switch_to_overlays, Recorder.accomplish

    async def gated_record(self: Recorder, plan: DiskPlan) -> Any:
        await pass_gate("read", plan.snapshot.id)
        return await record(self, plan)

    async def gated_switch(self: LibvirtHypervisor, uuid: Any, *rest: Any) -> Span:
        await pass_gate("switch", uuid)
        return await switch(self, uuid, *rest)

    async def gated_accomplish(self: Recorder, operations: Any, *rest: Any) -> None:
        await pass_gate("accomplish", operations[0])
        await accomplish(self, operations, *rest)

    until_whole = InstantDisks._until_whole

    async def gated_until_whole(self: InstantDisks, operation: Any, *rest: Any) -> None:
        await pass_gate("fill", operation.id)
        await until_whole(self, operation, *rest)

    InstantDisks._until_whole = gated_until_whole  # type: ignore[method-assign]

    verify, start_bitmap = Filler.verify, Rollback._start_bitmap

    async def gated_verify(self: Filler, *rest: Any) -> None:
        await pass_gate("verify", self._snapshot.id)
        await verify(self, *rest)

    async def gated_start_bitmap(self: Rollback, operation: Any, *rest: Any) -> Any:
        await pass_gate("written", operation.facts["snapshot"])
        return await start_bitmap(self, operation, *rest)

    Filler.verify = gated_verify  # type: ignore[method-assign]
    Rollback._start_bitmap = gated_start_bitmap  # type: ignore[method-assign]
    Recorder.record = gated_record  # type: ignore[method-assign]
    LibvirtHypervisor.switch_to_overlays = gated_switch  # type: ignore[method-assign]
    Recorder.accomplish = gated_accomplish  # type: ignore[method-assign]


if __name__ == "__main__":
    # The fault first: gates go around what it leaves.
    if fault := os.environ.get("E2E_FAULT", ""):
        broken.FAULTS[fault]()
    install_gates()
    sys.exit(run_daemon.main())

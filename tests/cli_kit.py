"""The command line against a service on a real socket: in a thread, as a process, or at a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pexpect

from hvsnap.cli.main import run
from hvsnap.model import Consistency, DiskId, Progress, Snapshot, SnapshotId, State
from hvsnap.service.requests import SnapshotRequest
from tests.api_kit import House, a_house, served
from tests.catalog_kit import a_block, a_disk, a_snapshot, add_chain
from tests.service_kit import a_guest, a_view, known

HVSNAP = str(Path(sys.executable).parent / "hvsnap")
MOVES_AND_COLOURS = r"\x1b\[[0-9;?]*[A-Za-z]"
TIMEOUT_S = 20


@dataclass(frozen=True)
class Ran:
    """What a command line did."""

    status: int
    out: str
    err: str

    @property
    def object(self) -> Any:
        """The JSON that it printed, and nothing else beside."""
        return json.loads(self.out)


@dataclass
class Desk:
    """A service, its socket, and a configuration that names it."""

    house: House
    directory: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.directory / "hvsnap.toml"

    @property
    def env(self) -> dict[str, str]:
        return {
            **os.environ,
            "HVSNAP_CONFIG": str(self.config),
            "XDG_STATE_HOME": str(self.directory / "home"),
            "TERM": "xterm",
            "COLUMNS": "120",
            "TZ": "UTC",
            **self.environment,
        }

    async def hvsnap(self, *arguments: str) -> Ran:
        """Run a command line in a thread of this process; no terminal."""
        return await asyncio.to_thread(in_process, "--config", str(self.config), *arguments)

    async def process(self, *arguments: str, stdin: int = subprocess.DEVNULL, **env: str) -> Ran:
        """Run a command line as a process of its own, without a terminal."""

        def work() -> Ran:
            done = subprocess.run(
                [HVSNAP, *arguments],
                env=self.env | env,
                stdin=stdin,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                cwd=self.directory,
            )
            return Ran(done.returncode, done.stdout, done.stderr)

        return await asyncio.to_thread(work)

    def terminal(self, *arguments: str) -> pexpect.spawn[str]:
        """Start a command line at a terminal."""
        return pexpect.spawn(
            HVSNAP,
            list(arguments),
            env=self.env,  # type: ignore[arg-type]
            encoding="utf-8",
            timeout=TIMEOUT_S,
            dimensions=(40, 120),
            cwd=str(self.directory),
        )


def in_process(*arguments: str) -> Ran:
    """Run a command line here."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(list(arguments))
    return Ran(status, out.getvalue(), err.getvalue())


@contextlib.asynccontextmanager
async def a_desk(directory: Path) -> AsyncIterator[Desk]:
    """Serve a house below ``directory``."""
    socket = directory / "hvsnap.sock"
    lines = [f"socket = {json.dumps(str(socket))}", f"state_dir = {json.dumps(str(directory / 'state'))}"]
    lines += ["[hypervisor]", 'libvirt_uri = "test:///default"']
    lines += ["[store]", f"url = {json.dumps(f'file://{directory}/state/store')}"]
    (directory / "hvsnap.toml").write_text("\n".join(lines) + "\n")
    async with a_house(directory / "state") as house, served(house, socket):
        yield Desk(house, directory)


async def two_snapshots(house: House) -> list[SnapshotId]:
    """Put a chain of two snapshots on the guest's disk: 100 and 200 bytes stored."""
    await house.catalog.add_pack("p", 10**6, [a_block(1, 100), a_block(2, 200)])
    disk = a_disk(**known(a_view(), a_guest()))
    return await add_chain(house.catalog, disk, {0: {0: 1}}, {0: {0: 2}})


class Making:
    """Captures whose end the test decides: each create adds a snapshot for every disk named in ``disks``."""

    def __init__(self, house: House, disk: DiskId, count: int = 1) -> None:
        self.house = house
        self.disk = disk
        self.count = count
        self.made: list[Snapshot] = []
        self.asked = asyncio.Event()
        house.captures.create_with = self.create

    async def create(self, request: SnapshotRequest) -> list[Snapshot]:
        made = []
        async with self.house.catalog.write() as tx:
            for _ in range(self.count):
                row = a_snapshot(
                    self.disk,
                    await tx.next_sequence(self.disk),
                    state=State.PROGRESSING,
                    name=request.name or "made",
                    consistency=request.consistency,
                )
                await tx.add_snapshot(row)
                made.append(row)
        self.made = made
        self.asked.set()
        return made

    def progress(self, done_bytes: int, total_bytes: int, number: int = 0) -> None:
        """Let one of them be so far."""
        progress = Progress(self.made[number].id, done_bytes, total_bytes, 100e6, 3.0)
        self.house.captures.progresses[progress.id] = progress
        self.house.service.feed.progress(progress)

    async def end(self, number: int = 0, **changes: Any) -> None:
        """Let one of them end; accomplished unless ``changes`` say otherwise."""
        row = self.made[number]
        fields = {
            "state": State.ACCOMPLISHED,
            "consistency": Consistency.CRASH,
            "read_bytes": 5 << 20,
            "stored_bytes": 3 << 20,
        } | changes
        async with self.house.catalog.write() as tx:
            await tx.update_snapshot(row.id, **fields)
            await tx.emit("snapshot.accomplished", {"snapshot": row.id, "guest": "web01"})
        self.made[number] = replace(row, **fields)

    async def end_at_once(self, **changes: Any) -> None:
        """Wait until they are asked for, and end them all."""
        await self.asked.wait()
        for number in range(self.count):
            await self.end(number, **changes)


async def a_making(house: House, count: int = 1) -> Making:
    """Put a disk with one snapshot in place, and captures that the test ends."""
    disk = a_disk(**known(a_view(), a_guest()))
    await add_chain(house.catalog, disk, {})
    return Making(house, disk.id, count)

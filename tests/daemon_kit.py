"""A real daemon as a process of its own, in a short directory, and the calls that tests make."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hvsnap import wire
from hvsnap.cli.client import Client
from hvsnap.errors import DaemonUnreachable
from tests.guest.libvirtd import wait_for

START_TIMEOUT_S = 60.0
CAPTURE_TIMEOUT_S = 180.0


class Daemon:
    """``hvsnap daemon`` with its configuration, state, store and socket below ``directory``."""

    module = "tests.run_daemon"

    def __init__(self, directory: Path, libvirt_uri: str, **config: str) -> None:
        self.directory = directory
        self.socket = directory / "run" / "hvsnap.sock"
        self.store = directory / "state" / "store"
        self.config = directory / "hvsnap.toml"
        self.log = directory / "daemon.log"
        self._uri = libvirt_uri
        self._process: subprocess.Popen[bytes] | None = None
        self.configure(**config)

    def configure(self, **tables: str) -> None:
        """Write the configuration; each keyword is a table, its value the lines of it."""
        lines = [
            f"state_dir = {json.dumps(str(self.directory / 'state'))}",
            f"socket = {json.dumps(str(self.socket))}",
            'host_id = "test-host"',
        ]
        tables = {"hypervisor": f"libvirt_uri = {json.dumps(self._uri)}", **tables}
        if "impact_budget_pct" not in tables.get("capture", ""):
            # What guests of tests feel is for the tests that are about it; on a busy machine it is anything.
            tables["capture"] = f"impact_budget_pct = 0\n{tables.get('capture', '')}"
        tables.setdefault("store", f"url = {json.dumps('file://' + str(self.store))}")
        for name, body in tables.items():
            lines.append(f"[{name}]\n{body}")
        self.config.write_text("\n".join(lines) + "\n")

    # -- the process ------------------------------------------------------------------------------

    def start(self, *arguments: str, wait: bool = True, environment: dict[str, str] | None = None) -> Daemon:
        """Start it; ``arguments`` are for :mod:`tests.faults.killing_daemon` instead of the plain one."""
        module = ["-m", "tests.faults.killing_daemon", *arguments] if arguments else ["-m", self.module]
        with self.log.open("ab") as out:
            self._process = subprocess.Popen(
                [sys.executable, *module, str(self.config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(environment or {})},
            )
        if wait:
            wait_for(self.answers, "the start of the daemon", START_TIMEOUT_S)
        return self

    def answers(self) -> bool:
        """Whether it answers; one that ended is a failure, with its log."""
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"the daemon ended with {self._process.returncode}: {self.log.read_text()[-3000:]}")
        with contextlib.suppress(DaemonUnreachable), self.client() as client:
            client.get("/status", wire.Status)
            return True
        return False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def wait_dead(self, timeout_s: float = 60.0) -> int:
        """Return its exit status once it has ended by itself."""
        assert self._process is not None
        return self._process.wait(timeout_s)

    def stop(self, timeout_s: float = 60.0) -> int:
        """SIGTERM; return the exit status."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    # -- its catalog ------------------------------------------------------------------------------

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return committed rows of its catalog, whoever has it open."""
        path = self.directory / "state" / "catalog.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)) as connection:
            return connection.execute(sql, values).fetchall()

    def events(self, key: str, value: str) -> list[str]:
        """Return the types of the events whose payload says so."""
        rows = self.query("SELECT type, payload FROM events ORDER BY sequence")
        return [str(kind) for kind, payload in rows if json.loads(payload).get(key) == value]

    def check_told(self, snapshot: wire.Snapshot) -> None:
        """A snapshot that has ended was told of twice: when it was begun, and how it ended."""
        told = [kind for kind in self.events("snapshot", snapshot.id) if kind.startswith("snapshot.")]
        assert told == ["snapshot.created", f"snapshot.{snapshot.state}"], told

    # -- its calls --------------------------------------------------------------------------------

    @contextlib.contextmanager
    def client(self) -> Iterator[Client]:
        client = Client(str(self.socket))
        try:
            yield client
        finally:
            client.close()

    def begin(self, guest: str, disks: Sequence[str] = (), **options: Any) -> list[wire.Snapshot]:
        """Ask for snapshots; they are progressing."""
        with self.client() as client:
            body = wire.SnapshotCreate(guest=guest, disks=list(disks), **options)
            return client.post("/snapshots", wire.SnapshotList, body).snapshots

    def info(self, snapshot_id: str) -> wire.Snapshot:
        with self.client() as client:
            return client.get(f"/snapshots/{snapshot_id}", wire.Snapshot)

    def ended(self, snapshots: Sequence[wire.Snapshot], timeout_s: float = CAPTURE_TIMEOUT_S) -> list[wire.Snapshot]:
        """Return the snapshots when none is progressing any more."""
        deadline = time.monotonic() + timeout_s
        while True:
            now = [self.info(snapshot.id) for snapshot in snapshots]
            if all(snapshot.state != "progressing" for snapshot in now):
                return now
            if time.monotonic() > deadline:
                raise TimeoutError(f"{now[0].id} is still {now[0].state}: {self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    def settled(self, timeout_s: float = CAPTURE_TIMEOUT_S) -> None:
        """Return when nothing is at work: guests are back on their images."""
        wait_for(lambda: self.status().captures == 0 and self.status().open_operations == 0, "settling", timeout_s)

    def status(self) -> wire.Status:
        with self.client() as client:
            return client.get("/status", wire.Status)

    def snapshot(self, guest: str, disks: Sequence[str] = (), **options: Any) -> list[wire.Snapshot]:
        """Make snapshots, and return them accomplished, the guest back on its images."""
        made = self.ended(self.begin(guest, disks, **options))
        bad = [snapshot for snapshot in made if snapshot.state != "accomplished"]
        if bad:
            raise RuntimeError(f"{bad[0].id} failed: {bad[0].error}\n{self.log.read_text()[-3000:]}")
        self.settled()
        return made

    def task(self, task: wire.Task, timeout_s: float = CAPTURE_TIMEOUT_S) -> wire.Task:
        """Return a task when it has ended."""
        deadline = time.monotonic() + timeout_s
        with self.client() as client:
            while (now := client.get(f"/tasks/{task.id}", wire.Task)).state == "running":
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{now.subject} is still at {now.step}")
                time.sleep(0.05)
        return now

    def create_disk(self, snapshot_id: str, path: Path, image_format: str = "qcow2") -> wire.Task:
        """Make a disk; the task has ended."""
        with self.client() as client:
            body = wire.DiskCreate(snapshot=snapshot_id, path=str(path), format=image_format)  # type: ignore[arg-type]
            return self.task(client.post("/disks", wire.Task, body))

    def restored(self, snapshot_id: str, scratch: Path) -> bytes:
        """Return what a snapshot restores to."""
        path = scratch / f"{snapshot_id}.raw"
        task = self.create_disk(snapshot_id, path, "raw")
        if task.state != "accomplished":
            raise RuntimeError(f"{snapshot_id}: {task.error}")
        data = path.read_bytes()
        path.unlink()
        return data

    def roll_back(self, disk: str, snapshot_id: str, **options: Any) -> wire.Task:
        """Roll back; the task has ended."""
        with self.client() as client:
            body = wire.Rollback(snapshot=snapshot_id, **options)
            answer = client.post(f"/disks/{disk}/rollback", wire.RollbackAnswer, body)
            assert answer.task is not None
            return self.task(answer.task)

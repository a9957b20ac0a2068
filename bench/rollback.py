"""A rollback beside a whole restore of the same snapshot: what is written, and how long it takes.

What differs is counted by itself, from two plain copies of the disk; what is written is what the kernel has counted for
the daemon and the programs that it ran (``/proc/PID/io``), beside what hvsnap says.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

import numpy as np

from bench.disk import BenchDisk
from bench.stage import Stage, clock, run, settle_disk, stage
from hvsnap import wire

BLOCK = 64 << 10
CHUNK = 64 << 20
PIECE_BYTES = (4 << 10, 64 << 10, 1 << 20)
"""What is written in one go by turns: a database's page, a block, a piece of a new file."""

POLL_S = 0.01
WRITTEN_MAX = 1.05
TIME_MAX = 0.1


@dataclass(frozen=True, slots=True)
class Difference:
    """In how many bytes two states of a disk differ, and in how many blocks of 64 KiB."""

    bytes: int
    blocks: int


@dataclass
class Rolling:
    """Runs rounds, each on a fresh copy of the disk, and keeps the figures by their names."""

    disk: BenchDisk
    say: Callable[[str], None]
    share: float = 0.01
    figures: dict[str, list[float]] = field(default_factory=dict)

    def rounds(self, count: int) -> None:
        """Run rounds: with the dirty bitmap, with a safety snapshot, and after a lost bitmap."""
        for number in range(count):
            self.say(f"round {number + 1} of {count}")
            with stage(self.disk.path) as one:
                made = self._snapshot(one)
                before = self._plain(one, "before.raw")
                restore = self._restore(one, made)
                for name, safety, lose in (
                    ("bitmap", False, False),
                    ("safety snapshot", True, False),
                    ("no bitmap", False, True),
                ):
                    self._roll(one, name, made, before, number, restore, safety=safety, lose=lose)

    def summary(self) -> dict[str, float]:
        """Return the medians."""
        return {name: median(values) for name, values in self.figures.items()}

    def _note(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)
        self.say(f"  {name:<44} {value:10.3f}")

    def _snapshot(self, one: Stage) -> str:
        one.hvsnap("snapshot-create", one.guest.name)
        (made,) = json.loads(one.hvsnap("--json", "snapshot-list"))["snapshots"]
        return str(made["id"])

    def _plain(self, one: Stage, name: str) -> Path:
        """Return a sparse plain copy of the disk as it is."""
        path = one.directory / name
        run(["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(one.disk), str(path)])
        return path

    def _restore(self, one: Stage, made: str) -> tuple[float, float]:
        """Restore the whole disk; return the seconds by the clock and of the processors."""
        target = one.directory / "restored.qcow2"
        settle_disk()
        cpu_s = processor_s(one.daemon.pid)
        with clock() as took:
            one.hvsnap("disk-create", made, str(target))
        cpu_s = processor_s(one.daemon.pid) - cpu_s
        target.unlink()
        self._note("whole restore s", took[0])
        self._note("whole restore, processor s", cpu_s)
        return took[0], cpu_s

    def _change(self, one: Stage, seed: int, *, lose: bool) -> None:
        """Let the guest's device write to places all over the disk, and end the guest: in good order, or not."""
        if not one.guest.active:
            one.guest.start()
        random, data = Random(seed), data_extents(self.disk.path)
        weights = [length for _start, length in data]
        left, turn = int(self.disk.size_bytes * self.share), 0
        while left > 0:
            length = PIECE_BYTES[turn % len(PIECE_BYTES)]
            turn += 1
            if turn % 4:  # most of what is written was there before; a quarter goes anywhere, where mostly nothing is
                start, room = random.choices(data, weights)[0]
                offset = (start + random.randrange(room)) // length * length
            else:
                offset = random.randrange(self.disk.size_bytes // length) * length
            one.guest.qemu_io(0, f"write -P {random.randrange(1, 256)} {offset} {length}")
            left -= -(-length // BLOCK) * BLOCK
        one.guest.qemu_io(0, "flush")
        if lose:
            one.guest.kill()
        else:
            one.guest.destroy()

    def _roll(
        self,
        one: Stage,
        name: str,
        made: str,
        before: Path,
        number: int,
        restore: tuple[float, float],
        *,
        safety: bool,
        lose: bool,
    ) -> None:
        self._change(one, 100 * number + len(name), lose=lose)
        after = self._plain(one, "after.raw")
        wrong = difference(before, after)
        settle_disk()
        io, cpu_s = written_bytes(one.daemon.pid), processor_s(one.daemon.pid)
        spent, done = self._timed(one, made, safety=safety)
        io, cpu_s = written_bytes(one.daemon.pid) - io, processor_s(one.daemon.pid) - cpu_s
        run(["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(one.disk), str(before)])
        after.unlink()
        own_s = sum(seconds for step, seconds in spent.items() if "safety" not in step)
        for step, seconds in spent.items():
            self._note(f"{name}: {step} s", seconds)
        self._note(f"{name}: differs MiB", wrong.bytes / 2**20)
        self._note(f"{name}: differs in blocks MiB", wrong.blocks * BLOCK / 2**20)
        self._note(f"{name}: written or zeroed / blocks that differ", done.written_bytes / (wrong.blocks * BLOCK))
        if not safety:  # what that one writes is in the same account
            self._note(f"{name}: sent to storage / blocks that differ", io / (wrong.blocks * BLOCK))
            self._note(f"{name}: rollback / whole restore, processor time", cpu_s / restore[1])
        self._note(f"{name}: rollback / whole restore", own_s / restore[0])

    def _timed(self, one: Stage, made: str, *, safety: bool) -> tuple[dict[str, float], wire.RolledBack]:
        """Roll back; return the seconds of each of its steps, and its answer."""
        spent: dict[str, float] = {}
        with one.daemon.client() as client:
            body = wire.Rollback(snapshot=made, safety_snapshot=safety)
            last = time.monotonic()
            task = client.post(f"/disks/{one.guest.name}/vda/rollback", wire.RollbackAnswer, body).task
            assert task is not None
            while task.state == "running":
                time.sleep(POLL_S)
                step = task.step or "beginning"
                task = client.get(f"/tasks/{task.id}", wire.Task)
                now = time.monotonic()
                spent[step] = spent.get(step, 0.0) + now - last
                last = now
        if not isinstance(task.result, wire.RolledBack):
            raise RuntimeError(f"the rollback failed: {task.error}")
        return spent, task.result


def data_extents(image: Path) -> list[tuple[int, int]]:
    """Return ``(offset, length)`` of what an image has data in."""
    told = json.loads(run(["qemu-img", "map", "--output=json", "-f", "qcow2", str(image)]))
    return [(one["start"], one["length"]) for one in told if one["data"] and not one["zero"]]


def difference(one: Path, other: Path) -> Difference:
    """Count in what two plain images of the same size differ, byte by byte."""
    found = blocks = 0
    with one.open("rb") as left, other.open("rb") as right:
        while data := left.read(CHUNK):
            against = right.read(CHUNK)
            if data == against:
                continue
            wrong = np.frombuffer(data, np.uint8) != np.frombuffer(against, np.uint8)
            found += int(np.count_nonzero(wrong))
            blocks += int(np.count_nonzero(np.add.reduceat(wrong, np.arange(0, wrong.size, BLOCK), dtype=np.int64)))
    return Difference(found, blocks)


def processor_s(pid: int) -> float:
    """Return the processor time of a process and of those that it has run to their ends."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def written_bytes(pid: int) -> int:
    """Return the bytes that a process, and those that it has run to their ends, have sent to storage."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("write_bytes:"):
            return int(line.split()[1])
    raise RuntimeError(f"process {pid} shows no write_bytes")

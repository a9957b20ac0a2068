"""How long snapshots and restores take beside what others take for the same disk, and what they store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from bench.disk import BenchDisk
from bench.peers import Virtnbdbackup
from bench.stage import Stage, clock, memory_bytes, run, settle_disk, stage, tree_bytes

Figures = dict[str, list[float]]

IDLE_INCREMENTALS = 3
"""Incrementals of a disk that nobody wrote to, one after another: they are short, and their median is noted."""


@dataclass(frozen=True)
class Ratio:
    """Two figures of one run, and what their ratio should not exceed."""

    name: str
    ours: str
    theirs: str
    limit: float | None


RATIOS = (
    Ratio("full snapshot / virtnbdbackup -l full", "hvsnap full s", "virtnbdbackup full s", 0.6),
    Ratio("full snapshot / virtnbdbackup -l full and sync", "hvsnap full s", "virtnbdbackup full, synced s", None),
    Ratio("stored bytes / virtnbdbackup's", "hvsnap stored MiB", "virtnbdbackup stored MiB", 0.45),
    Ratio("full snapshot / qemu-img convert -c (zstd)", "hvsnap full s", "qemu-img convert s", 0.5),
    Ratio("stored bytes / qemu-img convert's", "hvsnap stored MiB", "qemu-img stored MiB", None),
    Ratio("idle incremental / virtnbdbackup -l inc", "hvsnap inc s", "virtnbdbackup inc s", 0.7),
    Ratio("restore / virtnbdrestore", "hvsnap restore s", "virtnbdrestore s", 0.6),
    Ratio("full snapshot / virtnbdbackup -l full -z (lz4)", "hvsnap full s", "virtnbdbackup -z full s", None),
    Ratio("stored bytes / virtnbdbackup -z's", "hvsnap stored MiB", "virtnbdbackup -z stored MiB", None),
    Ratio("full snapshot / nbdcopy to null", "hvsnap full s", "nbdcopy null s", None),
)


@dataclass
class Copying:
    """Runs rounds of all contestants, each round on a fresh copy of the disk, and keeps the figures."""

    disk: BenchDisk
    say: Callable[[str], None]
    figures: Figures = field(default_factory=dict)

    def rounds(self, count: int) -> None:
        """Run rounds; who goes first alternates."""
        for number in range(count):
            self.say(f"round {number + 1} of {count}")
            with stage(self.disk.path) as one:
                self._transport(one)
                contestants = [self._hvsnap, self._virtnbdbackup]
                for contestant in contestants if number % 2 == 0 else reversed(contestants):
                    contestant(one)
                self._convert(one)

    def ratios(self) -> list[tuple[Ratio, float]]:
        """Return the median of each ratio, taken round by round."""
        found = []
        for ratio in RATIOS:
            pairs = zip(self.figures[ratio.ours], self.figures[ratio.theirs], strict=True)
            found.append((ratio, median(ours / theirs for ours, theirs in pairs)))
        return found

    def _note(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(value)
        self.say(f"  {name:<28} {value:8.2f}")

    def _timed(self, name: str, work: Callable[[], object], times: int = 1) -> None:
        """Note how long something takes: the median of some times."""
        seconds = []
        for _ in range(times):
            settle_disk()
            with clock() as took:
                work()
            seconds += took
        self._note(name, median(seconds))

    def _transport(self, one: Stage) -> None:
        """What a mere read through the same server and library takes."""
        copy = one.directory / "copy.qcow2"
        shutil.copyfile(self.disk.path, copy)
        read = ["nbdcopy", "--", "[", "qemu-nbd", "--read-only", "-f", "qcow2", str(copy), "]", "null:"]
        run(read)  # so that all read from the page cache
        self._timed("nbdcopy null s", lambda: run(read))
        copy.unlink()

    def _hvsnap(self, one: Stage) -> None:
        idle_bytes = memory_bytes(one.daemon.pid, "VmRSS")
        self._timed("hvsnap full s", lambda: one.hvsnap("snapshot-create", one.guest.name, "--name", "full"))
        self._note("hvsnap stored MiB", one.stored_bytes() / 2**20)
        # Its own libraries are there before; what a capture takes on top of them is bounded.
        self._note("hvsnap memory MiB", (memory_bytes(one.daemon.pid, "VmHWM") - idle_bytes) / 2**20)
        self._timed("hvsnap inc s", lambda: one.hvsnap("snapshot-create", one.guest.name), IDLE_INCREMENTALS)
        made = json.loads(one.hvsnap("--json", "snapshot-list"))["snapshots"]
        target = one.directory / "restored.qcow2"
        self._timed("hvsnap restore s", lambda: one.hvsnap("disk-create", made[0]["id"], str(target)))
        run(["qemu-img", "compare", "-U", "-f", "qcow2", "-F", "qcow2", str(self.disk.path), str(target)])
        target.unlink()
        shutil.rmtree(one.daemon.store / "packs", ignore_errors=True)

    def _virtnbdbackup(self, one: Stage) -> None:
        out, restored = one.directory / "vnb", one.directory / "vnb-restored"
        backup = Virtnbdbackup(one)
        settle_disk()
        with clock() as took:
            backup("full", out)
        with clock() as synced:
            settle_disk()  # it leaves the backup in the page cache, while a snapshot is durable
        self._note("virtnbdbackup full s", took[0])
        self._note("virtnbdbackup full, synced s", took[0] + synced[0])
        self._note("virtnbdbackup stored MiB", tree_bytes(out) / 2**20)
        self._timed("virtnbdbackup inc s", lambda: backup("inc", out), IDLE_INCREMENTALS)
        self._timed("virtnbdrestore s", lambda: backup.restore(out, restored))
        shutil.rmtree(out)
        shutil.rmtree(restored)
        self._timed("virtnbdbackup -z full s", lambda: backup("full", out, "-z"))
        self._note("virtnbdbackup -z stored MiB", tree_bytes(out) / 2**20)
        backup.clear()
        shutil.rmtree(out)

    def _convert(self, one: Stage) -> None:
        target = one.directory / "converted.qcow2"
        options = ["-c", "-O", "qcow2", "-o", "compression_type=zstd"]
        convert = ["qemu-img", "convert", *options, "-f", "qcow2", str(self.disk.path), str(target)]
        self._timed("qemu-img convert s", lambda: run(convert))
        self._note("qemu-img stored MiB", target.stat().st_size / 2**20)

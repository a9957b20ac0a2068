"""How long snapshots and restores take beside what others take for the same disk, and what they store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from bench.disk import BenchDisk
from bench.stage import Stage, clock, run, settle_disk, stage, tree_bytes

Figures = dict[str, list[float]]


@dataclass(frozen=True)
class Ratio:
    """Two figures of one run, and what their ratio should not exceed."""

    name: str
    ours: str
    theirs: str
    limit: float | None


RATIOS = (
    Ratio("full snapshot / virtnbdbackup -l full", "hvsnap full s", "virtnbdbackup full s", 0.6),
    Ratio("stored bytes / virtnbdbackup's", "hvsnap stored MiB", "virtnbdbackup stored MiB", 0.45),
    Ratio("full snapshot / qemu-img convert -c (zstd)", "hvsnap full s", "qemu-img convert s", 0.5),
    Ratio("stored bytes / qemu-img convert's", "hvsnap stored MiB", "qemu-img stored MiB", None),
    Ratio("idle incremental / virtnbdbackup -l inc", "hvsnap inc s", "virtnbdbackup inc s", 0.7),
    Ratio("restore / virtnbdrestore", "hvsnap restore s", "virtnbdrestore s", 0.6),
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

    def _transport(self, one: Stage) -> None:
        """What a mere read through the same server and library takes."""
        copy = one.directory / "copy.qcow2"
        shutil.copyfile(self.disk.path, copy)
        for warm in (False, True):
            with clock() as took:
                run(["nbdcopy", "--", "[", "qemu-nbd", "--read-only", "-f", "qcow2", str(copy), "]", "null:"])
            if warm:
                self._note("nbdcopy null s", took[0])
        copy.unlink()

    def _hvsnap(self, one: Stage) -> None:
        settle_disk()
        with clock() as took:
            one.hvsnap("snapshot-create", one.guest.name, "--name", "full", "--consistency", "crash")
        self._note("hvsnap full s", took[0])
        self._note("hvsnap stored MiB", one.stored_bytes() / 2**20)
        settle_disk()
        with clock() as took:
            one.hvsnap("snapshot-create", one.guest.name, "--name", "incremental", "--consistency", "crash")
        self._note("hvsnap inc s", took[0])
        made = json.loads(one.hvsnap("--json", "snapshot-list"))["snapshots"]
        target = one.directory / "restored.qcow2"
        settle_disk()
        with clock() as took:
            one.hvsnap("disk-create", made[0]["id"], str(target))
        self._note("hvsnap restore s", took[0])
        target.unlink()
        shutil.rmtree(one.daemon.store / "packs", ignore_errors=True)

    def _virtnbdbackup(self, one: Stage) -> None:
        out, scratch = one.directory / "vnb", one.directory / "scratch"
        scratch.mkdir(mode=0o777)
        scratch.chmod(0o777)
        # It takes a URI with a socket for a remote one: in libvirtd's own namespace the plain one serves.
        inside = ["nsenter", "--target", str(one.libvirtd.pids()[0]), "--mount", "--"]
        common = [*inside, "virtnbdbackup", "-d", one.guest.name, "-o", str(out), "-S", str(scratch), "-n"]
        common += ["-f", str(scratch / "socket")]
        settle_disk()
        with clock() as took:
            run([*common, "-l", "full"])
        self._note("virtnbdbackup full s", took[0])
        self._note("virtnbdbackup stored MiB", tree_bytes(out) / 2**20)
        settle_disk()
        with clock() as took:
            run([*common, "-l", "inc"])
        self._note("virtnbdbackup inc s", took[0])
        restored = one.directory / "vnb-restored"
        settle_disk()
        with clock() as took:
            run([*inside, "virtnbdrestore", "-i", str(out), "-o", str(restored), "-n"])
        self._note("virtnbdrestore s", took[0])
        for path in (out, scratch, restored):
            shutil.rmtree(path, ignore_errors=True)
        for checkpoint in one.guest.domain().listAllCheckpoints():
            checkpoint.delete()

    def _convert(self, one: Stage) -> None:
        target = one.directory / "converted.qcow2"
        settle_disk()
        options = ["-c", "-O", "qcow2", "-o", "compression_type=zstd"]
        with clock() as took:
            run(["qemu-img", "convert", *options, "-f", "qcow2", str(self.disk.path), str(target)])
        self._note("qemu-img convert s", took[0])
        self._note("qemu-img stored MiB", target.stat().st_size / 2**20)

"""What a capture may cost the host: memory that does not grow with the disk, and a daemon that always answers."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.oracle import BLOCK
from tests.e2e.rig import DoctoredDaemon
from tests.guest.domain import DiskSpec, Guest

MIB = 1 << 20
DATA_BYTES = 2048 * MIB
MEMORY_BYTES_MAX = 200 * MIB
ANSWER_S_MAX = 1.0


def peak_bytes(pid: int | str) -> int:
    """Return the most memory that a process has ever had resident."""
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", status)
    return int(kib) * 1024


def bare_interpreter_bytes() -> int:
    """Return the peak of an interpreter that has imported what the daemon imports."""
    read = "print(open('/proc/self/status').read())"
    out = subprocess.run([sys.executable, "-c", f"import tests.run_daemon; {read}"], check=True, capture_output=True)
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", out.stdout.decode())
    return int(kib) * 1024


def make_big_disk(path: Path) -> Path:
    """Write 2 GiB of blocks, none like another and none compressible, into a sparse file of 8 GiB."""
    chunk = np.frombuffer(np.random.default_rng(5).bytes(64 * MIB), np.uint64).copy()
    heads = chunk.reshape(-1, BLOCK // 8)[:, 0]
    with path.open("wb") as file:
        for number in range(DATA_BYTES // chunk.nbytes):
            heads[:] = np.arange(heads.size, dtype=np.uint64) + np.uint64(number * heads.size + 1)
            file.seek(4 * number * chunk.nbytes)
            file.write(memoryview(chunk))
        file.truncate(4 * DATA_BYTES + 512)
    return path


class Sampler:
    """Asks the daemon for its status again and again, and notes how long each answer took."""

    def __init__(self, daemon: DoctoredDaemon) -> None:
        self._daemon = daemon
        self._stop = threading.Event()
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._run, name="sampler")

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            began = time.monotonic()
            self._daemon.status()
            self.seconds.append(time.monotonic() - began)


@pytest.mark.timeout(170)
def test_full_capture_of_a_large_disk_is_bounded_in_memory_and_never_deaf(
    make_guest: Callable[..., Guest], make_daemon: Callable[..., DoctoredDaemon], workdir: Path
) -> None:
    guest = make_guest([DiskSpec(make_big_disk(workdir / "big.raw"), "raw")], agent=False).start()
    daemon = make_daemon()
    bare = bare_interpreter_bytes()
    with Sampler(daemon) as sampler:
        began = time.monotonic()
        (made,) = daemon.snapshot(guest.name)
        seconds = time.monotonic() - began
    peak = peak_bytes(daemon.pid)
    answers = sorted(sampler.seconds)
    print(
        f"{made.read_bytes / MIB:.0f} MiB in {seconds:.1f} s; peak {peak / MIB:.0f} MiB, bare {bare / MIB:.0f} MiB; "
        f"{len(answers)} answers, the median one in {answers[len(answers) // 2] * 1000:.0f} ms, "
        f"the slowest in {answers[-1] * 1000:.0f} ms"
    )
    assert made.read_bytes == DATA_BYTES
    assert made.stored_bytes >= DATA_BYTES
    assert peak - bare <= MEMORY_BYTES_MAX
    assert answers[-1] <= ANSWER_S_MAX

"""Faults and delays in the system calls of a process that runs, by strace."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator

from tests.guest.libvirtd import wait_for


@contextlib.contextmanager
def injected(pid: int, what: str) -> Iterator[None]:
    """Have strace inject something into the system calls of a process, which goes on without it afterwards."""
    calls = what.partition(":")[0]
    argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", f"inject={what}", "-p", str(pid)]
    tracer = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: traced(pid), "strace")
        yield
    finally:
        tracer.send_signal(signal.SIGINT)
        try:
            tracer.wait(10)
        except subprocess.TimeoutExpired:  # it may hang over a tracee that was killed, which nobody can reap then
            tracer.kill()
            tracer.wait()


def traced(pid: int) -> bool:
    """Whether somebody traces a process."""
    with open(f"/proc/{pid}/status") as status:
        return any(line.startswith("TracerPid:") and int(line.split()[1]) != 0 for line in status)

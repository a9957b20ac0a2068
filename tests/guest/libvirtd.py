"""A libvirtd of one's own, beside a host's: private directories, gone without a trace.

It runs in a mount and PID namespace, with private directories bound over libvirt's own; QEMU runs as Debian's
``libvirt-qemu`` with images chowned to it, as on a real host. When the process that started it dies, the kernel ends
the whole namespace, guests included. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt

START_TIMEOUT_S = 60.0
BOUND = {
    "etc": "/etc/libvirt",
    "run": "/run/libvirt",
    "lib": "/var/lib/libvirt",
    "log": "/var/log/libvirt",
    "cache": "/var/cache/libvirt",
}

# The namespace's first process: it stays when libvirtd dies, and starts it again unless told not to.
_INIT = """
mount --make-rprivate /
mount -t proc proc /proc
{binds}
while :; do
    if [ -e {directory}/down ]; then sleep 0.05; continue; fi
    libvirtd --config {directory}/libvirtd.conf --pid-file {directory}/libvirtd.pid >> {directory}/libvirtd.out 2>&1 &
    wait $!
done
"""


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return when the condition holds; raise at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(0.02)


def host_pids(*words: str) -> list[int]:
    """Return the processes whose command line contains all these words."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if all(word in command for word in words):
                found.append(int(entry.name))
    return found


def quiet(_context: object, _error: object) -> None:
    """libvirt prints errors by itself; they are raised as well."""


class Libvirtd:
    """Starts with :meth:`start`, ends with :meth:`stop`; :attr:`uri` reaches it from outside its namespace."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        self._config = directory / "libvirtd.conf"
        self.uri = f"qemu+unix:///system?socket={directory}/run/libvirt-sock"
        libvirt.registerErrorHandler(quiet, None)

    def __enter__(self) -> Libvirtd:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        self._config.write_text('unix_sock_group = "root"\nunix_sock_rw_perms = "0770"\nauth_unix_rw = "none"\n')
        binds = []
        for name, target in BOUND.items():
            (self.directory / name).mkdir(exist_ok=True)
            (self.directory / name).chmod(0o755)
            Path(target).mkdir(parents=True, exist_ok=True)
            binds.append(f"mount --bind {self.directory / name} {target}")
        qemu = 'security_driver = "none"\nstdio_handler = "file"\n'
        (self.directory / "etc" / "qemu.conf").write_text(qemu)
        script = _INIT.format(binds="\n".join(binds), directory=self.directory)
        self._process = subprocess.Popen(
            [
                *[
                    "setpriv",
                    "--pdeathsig",
                    "KILL",
                    "unshare",
                    "--mount",
                    "--pid",
                    "--fork",
                    "--kill-child=KILL",
                    "bash",
                    "-c",
                ],
                script,
            ],
            stdin=subprocess.DEVNULL,
        )
        wait_for(self._answers, "the start of libvirtd")

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"libvirtd's namespace ended: {(self.directory / 'libvirtd.out').read_text()[-2000:]}")
        with contextlib.suppress(libvirt.libvirtError):
            libvirt.open(self.uri).close()
            return True
        return False

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """Kill libvirtd (not its guests), and bring it back afterwards."""
        (self.directory / "down").touch()
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        try:
            wait_for(lambda: not self.pids(), "the end of libvirtd")
            yield
        finally:
            (self.directory / "down").unlink()
            wait_for(self._answers, "the return of libvirtd")

    def pids(self) -> list[int]:
        """Return libvirtd's process, as the host numbers it."""
        return [pid for pid in host_pids("--config", str(self._config)) if _name(pid) == "libvirtd"]

    def stop(self) -> None:
        """End libvirtd and all its guests."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""

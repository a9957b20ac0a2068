"""nbdkit as a process: how a snapshot becomes a disk that any client of NBD can open."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvsnap.errors import Failed, HypervisorFailed
from hvsnap.hypervisor.nbd_server import START_TIMEOUT_S, listens
from hvsnap.hypervisor.tools import bound_to_us

POLL_S = 0.02
END_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Nbdkit:
    """What to start: a Python plugin with its parameters, at a socket. ``writable``: into scratch that is lost again.

    ``outlives`` us: it goes on when the daemon ends, and is found again by its ``pid_file``. ``path`` is where the
    plugin's modules are found. ``owner`` (uid, gid; -1: the daemon's own) may connect, besides root.
    """

    socket: str
    plugin: str
    parameters: Mapping[str, str]
    path: str
    writable: bool = False
    outlives: bool = False
    owner: tuple[int, int] = (-1, -1)
    mode: int = 0o600

    @property
    def pid_file(self) -> str:
        """Where its process id stands."""
        return f"{self.socket}.pid"

    def argv(self) -> list[str]:
        """Return the command."""
        mode = ["--filter=cow"] if self.writable else ["--readonly"]
        place = ["--unix", self.socket, "--pidfile", self.pid_file]
        parameters = [f"{key}={value}" for key, value in self.parameters.items()]
        # In the foreground nbdkit asks the kernel to be ended with its parent.
        life = [] if self.outlives else ["--foreground"]
        return ["nbdkit", *life, *mode, *place, "--threads", "16", "python", self.plugin, *parameters]


def check_installed() -> None:
    """Raise :class:`Failed`, with what to install, where there is no nbdkit."""
    if shutil.which("nbdkit") is None:
        raise Failed("nbdkit is not installed", hint="install it: apt-get install nbdkit nbdkit-plugin-python")


async def start(what: Nbdkit) -> int:
    """Start nbdkit and return its process id once it listens; its complaints go where ours do.

    Raises :class:`Failed` where it is not installed, :class:`HypervisorFailed` if it does not come up.
    """
    await asyncio.to_thread(check_installed)
    await asyncio.to_thread(_clear, what)
    argv = what.argv() if what.outlives else bound_to_us(what.argv())
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": what.path, "PYTHONDONTWRITEBYTECODE": "1"},
        start_new_session=what.outlives,
    )
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while (pid := await asyncio.to_thread(_up, what, process.pid)) is None:
                if process.returncode is not None and (process.returncode or not what.outlives):
                    why = f"nbdkit ended with status {process.returncode}"
                    raise HypervisorFailed(why, hint="is nbdkit-plugin-python installed? Its own words are in our log")
                await asyncio.sleep(POLL_S)
        await asyncio.to_thread(_open_to, what)
    except TimeoutError as error:
        await end(running(what) or process.pid, what)
        raise HypervisorFailed(f"nbdkit did not come up within {START_TIMEOUT_S:.0f} s") from error
    except BaseException:
        await asyncio.shield(_give_up(process, what))
        raise
    return pid


async def _give_up(process: asyncio.subprocess.Process, what: Nbdkit) -> None:
    """End what was being started; in the background it is another process than the one that we have started."""
    if what.outlives:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), END_GRACE_S)
    pid = await asyncio.to_thread(running, what)
    await end(process.pid if pid is None else pid, what)


def _up(what: Nbdkit, pid: int) -> int | None:
    """Return the process id of what serves at the socket, once it does. In the background that is not ours."""
    if what.outlives:
        return running(what)
    return pid if listens(what.socket) else None


def _clear(what: Nbdkit) -> None:
    """Remove what a dead one has left of its socket."""
    for path in (what.socket, what.pid_file):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _open_to(what: Nbdkit) -> None:
    os.chown(what.socket, *what.owner)
    os.chmod(what.socket, what.mode)


def running(what: Nbdkit) -> int | None:
    """Return the process id of an nbdkit that serves at this socket, whoever started it; None: none does. Blocking."""
    try:
        pid = int(Path(what.pid_file).read_text())
        # The number may be somebody else's by now.
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(what.socket) in words and listens(what.socket) else None


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie. Blocking."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def end(pid: int, what: Nbdkit) -> None:
    """End it, and return when it and its socket are gone."""
    await _signal_until_gone(pid, (signal.SIGTERM, signal.SIGKILL))
    await asyncio.to_thread(_clear, what)


async def _signal_until_gone(pid: int, signals: Sequence[signal.Signals]) -> None:
    for number in signals:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_GRACE_S):
                await _gone(pid)
                return


async def _gone(pid: int) -> None:
    """Return when a process is gone: what an earlier daemon has started is nobody's child that could be waited for."""
    while await asyncio.to_thread(alive, pid):  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)

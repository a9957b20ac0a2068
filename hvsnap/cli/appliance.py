"""The process that reads a snapshot's files (:mod:`hvsnap.guestfiles`), from the side of the command."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, cast

from hvsnap import wire
from hvsnap.cli.client import DaemonError
from hvsnap.errors import Failed

END_S = 10.0
"""How long it may take to end QEMU and to clear up, before it is killed."""

POLL_S = 0.02


def check_installed() -> None:
    """Raise :class:`Failed`, with what to install, where libguestfs' binding is missing."""
    if importlib.util.find_spec("guestfs") is None:
        hint = "install it: apt-get install python3-guestfs; `hvsnap snapshot-serve` does without"
        raise Failed("libguestfs, which reads a guest's file systems, is not installed", hint=hint)


class Appliance:
    """The running process. Every method raises :class:`Failed`, and what the process itself refuses."""

    def __init__(self, requests: IO[str], answers: IO[str], stderr: Path) -> None:
        self._requests = requests
        self._answers = answers
        self._stderr = stderr

    def ask(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a request and yield what is answered; the last message is under ``done``."""
        self.send(request)
        yield from self.messages()

    def send(self, request: dict[str, Any]) -> None:
        """Send a line; of a process that has ended the messages tell."""
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()

    def messages(self) -> Iterator[dict[str, Any]]:
        """Yield messages up to one with ``done``."""
        for line in self._answers:
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise DaemonError(wire.Error.model_validate(message["error"]))
            yield message
            if "done" in message:
                return
        said = self._stderr.read_text(errors="backslashreplace").strip().rpartition("\n")[2]
        raise Failed("what reads the files has ended unexpectedly", hint=f"it said: {said}" if said else "")


@contextlib.contextmanager
def appliance(uri: str, outputs: Sequence[int] = ()) -> Iterator[Appliance]:
    """Start it over the disk at ``uri``, and end it afterwards, whatever it is doing.

    It is not up yet: the first messages tell when it is. ``outputs`` are descriptors that it may write to.
    """
    scratch = Path(tempfile.mkdtemp(prefix="hvsnap-files-"))
    stderr = scratch / "stderr"
    try:
        with stderr.open("w") as complaints:
            process = subprocess.Popen(
                # -P: nothing that lies in the working directory is taken for a module.
                [sys.executable, "-P", "-m", "hvsnap.guestfiles"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaints,
                text=True,
                env={**os.environ, "PYTHONUTF8": "1"},
                pass_fds=outputs,
                # Ctrl-C is for us to act on; QEMU is of its group, not of ours.
                start_new_session=True,
            )
        requests, answers = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
        try:
            one = Appliance(requests, answers, stderr)
            one.send({"uri": uri, "scratch": str(scratch)})
            yield one
        finally:
            with contextlib.suppress(OSError):
                requests.close()
            _end(process)
            answers.close()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _end(process: subprocess.Popen[str]) -> None:
    """Wait until it has ended and cleared up, and kill what is left of it then."""
    deadline = time.monotonic() + END_S
    try:
        # Not reaped yet, so that the group's number is nobody else's when it is killed.
        while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

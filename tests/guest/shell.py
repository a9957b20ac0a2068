"""Talking to a test guest through its virtio ports, however its QEMU was started."""

from __future__ import annotations

import secrets
import shlex
import socket
import time
from pathlib import Path

BOOT_TIMEOUT_S = 60.0


class Shell:
    """The shell behind a guest's command port, and the lines that its background commands print."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory
        self._command: socket.socket | None = None
        self.log = directory / f"{name}.log"
        self.ports = directory / f"{name}.ports"

    def wait_ready(self) -> None:
        """Return when the guest's shell answers."""
        self._connect()
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        seen = b""
        while b"hvsnap-guest-ready" not in seen:
            seen += self._receive(deadline)

    def reconnect(self) -> None:
        """Return when the shell answers of a guest that somebody else has started anew."""
        self._disconnect()
        self.wait_ready()

    def run(self, command: str, timeout_s: float = 120.0) -> str:
        """Run a shell command in the guest and return its output; a failing one raises with it."""
        mark = secrets.token_hex(8)
        self._connect()
        assert self._command is not None
        self._command.sendall(f"{{ {command}\n}} 2>&1 </dev/null; status=$?; echo; echo {mark}=$status\n".encode())
        deadline = time.monotonic() + timeout_s
        seen = b""
        while f"\n{mark}=".encode() not in seen or not seen.endswith(b"\n"):
            seen += self._receive(deadline)
        output, _, status = seen.decode(errors="replace").rpartition(f"\n{mark}=")
        output = output.removesuffix("\n")
        if int(status) != 0:
            raise RuntimeError(f"in guest {self.name}: {command!r} ended with {status.strip()}: {output}")
        return output

    def spawn(self, command: str) -> None:
        """Start a command in the background; what it prints reaches :attr:`log` line by line, as it is printed."""
        # A program of its own, not a part of this shell: that would keep the command port open when the shell ends, as
        # when its guest is saved, and the next one could not have it.
        self.run(f"sh -c {shlex.quote(command)} > /dev/virtio-ports/hvsnap.log 2>&1 < /dev/null &")

    def logged(self) -> list[str]:
        """Return the whole lines that background commands have printed so far."""
        text = self.log.read_text() if self.log.exists() else ""
        return text[: text.rfind("\n") + 1].splitlines()

    def _connect(self) -> None:
        if self._command is None:
            self._command = socket.socket(socket.AF_UNIX)
            self._command.connect(str(self.ports / "command"))

    def _disconnect(self) -> None:
        if self._command is not None:
            self._command.close()
            self._command = None

    def _receive(self, deadline: float) -> bytes:
        assert self._command is not None
        left = deadline - time.monotonic()
        if left <= 0:
            console = self._directory / f"{self.name}.console"
            tail = console.read_text(errors="replace")[-1000:] if console.exists() else ""
            raise TimeoutError(f"guest {self.name} does not answer; its console ends: {tail}")
        self._command.settimeout(left)
        try:
            data = self._command.recv(65536)
        except TimeoutError:
            return b""
        if not data:
            self._disconnect()
            raise ConnectionError(f"guest {self.name} closed its command port")
        return data

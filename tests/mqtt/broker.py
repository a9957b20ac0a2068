"""A real mosquitto on a free loopback port, and what makes it hard to talk to: TLS, passwords, ACLs, pauses."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

from tests.guest.libvirtd import wait_for
from tests.ports import free_port

MOSQUITTO = "/usr/sbin/mosquitto"


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Broker:
    """One mosquitto; ``lines`` are added to its configuration. It keeps its port over a restart."""

    def __init__(self, directory: Path, *lines: str, anonymous: bool = True, persistent: bool = False) -> None:
        directory.mkdir(exist_ok=True)
        self.port = free_port()
        self.config = directory / "mosquitto.conf"
        self.log = directory / "mosquitto.log"
        settings = [
            f"listener {self.port} 127.0.0.1",
            *lines,
            f"allow_anonymous {'true' if anonymous else 'false'}",
            # It would leave root, and then could not read the test's files.
            "user root",
            "log_type all",
            f"persistence {'true' if persistent else 'false'}",
            f"persistence_location {directory}/",
            # Tests are to find out what the publisher loses, not what the broker drops for a slow listener.
            "max_queued_messages 0",
        ]
        self.config.write_text("\n".join(settings) + "\n")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> Broker:
        with self.log.open("ab") as out:
            self._process = subprocess.Popen([MOSQUITTO, "-c", str(self.config)], stdout=out, stderr=out)
        wait_for(self._up, "the start of mosquitto")
        return self

    def _up(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"mosquitto ended: {self.log.read_text()[-2000:]}")
        return accepts(self.port)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, also when it is paused."""
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.send_signal(signal.SIGCONT)
        self._process.wait(10)
        self._process = None

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)


def password_file(path: Path, **users: str) -> Path:
    """Write a password file of mosquitto."""
    path.write_text("".join(f"{user}:{password}\n" for user, password in users.items()))
    path.chmod(0o600)
    subprocess.run(["mosquitto_passwd", "-U", str(path)], check=True)
    return path

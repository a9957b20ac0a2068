"""A shell on the host that documents speak of, in which the commands of a page are typed.

What stands for what: `/srv/vm`, `/etc/hvsnap`, `/run/hvsnap`, `/var/lib/hvsnap` and libvirt's hooks are below the
host's directory; `systemctl` starts and stops the test's own daemon; libvirt is a private one. The rest is real.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import IO

import pexpect

from tests.cli_kit import HVSNAP, MOVES_AND_COLOURS
from tests.documents.blocks import Block
from tests.documents.host import Host
from tests.documents.transcript import INTERRUPT, Exchange, Ids, exchanges

COMMAND_TIMEOUT_S = 120.0
PROGRESS = re.compile(r"^.+: \d+ %(?: of [\d.]+ \w+)?(?:, .*)?$")
"""A remark that a slow machine brings."""

_SHELL = """
exec 2>&1
hvsnap() {{
    case $1 in
        hook-*) command hvsnap "$@" --directory {hooks} ;;
        install) command hvsnap "$@" --prefix {root} ;;
        *) command hvsnap "$@" ;;
    esac
}}
systemctl() {{ echo "systemctl $*" > {orders}; while [ -e {orders} ]; do sleep 0.02; done; }}
systemd-sysusers() {{ command systemd-sysusers --root={root}; }}
systemd-tmpfiles() {{ command systemd-tmpfiles --root={root} "$@"; }}
export -f hvsnap systemctl systemd-sysusers systemd-tmpfiles
"""


class Stage:
    """A host, with the shell of somebody who reads a page on it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.ids = Ids()
        self._shell: subprocess.Popen[str] | None = None
        self._over = threading.Event()
        self._systemctl = threading.Thread(target=self._obey)

    def __enter__(self) -> Stage:
        """Begin a page: nothing was typed yet."""
        self.host.begin()
        self._systemctl.start()
        self._shell = subprocess.Popen(
            ["bash", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.host.directory,
            env=self.environment, start_new_session=True,
        )  # fmt: skip
        self._input.write(self._prelude)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._shell is not None:
            os.killpg(self._shell.pid, signal.SIGKILL)
            self._shell.wait()
        self._over.set()
        self._systemctl.join()
        self.host.end()

    @property
    def environment(self) -> dict[str, str]:
        """What commands inherit."""
        inherited = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
        return {
            **inherited,
            "HVSNAP_CONFIG": str(self.host.daemon.config),
            "PATH": f"{Path(HVSNAP).parent}:{os.environ['PATH']}",
            "LIBVIRT_DEFAULT_URI": self.host.libvirtd.uri,
            "HOME": str(self.host.directory),
            "SSL_CERT_FILE": str(self.host.directory / "ca.pem"),
            "TZ": "UTC",
        }

    @property
    def _prelude(self) -> str:
        places = {name: self.host.directory / name for name in ("hooks", "root", "orders")}
        return _SHELL.format(**places)

    @property
    def _input(self) -> IO[str]:
        assert self._shell is not None
        assert self._shell.stdin is not None
        return self._shell.stdin

    # -- a page -----------------------------------------------------------------------------------

    def play(self, block: Block) -> None:
        """Run a block, and hold what it shows against what comes."""
        for line in block.before:
            self._hidden(line)
        if block.kind == "sh":
            self._type(block.text, str(block), any_status=block.any_status)
            return
        for exchange in exchanges(block.text):
            if any(line.startswith("hvsnap> ") for line in exchange.shown):
                came = self._at_a_terminal(exchange)
            elif exchange.interrupted:
                came = self._until_interrupted(block, exchange)
            else:
                came, status = self._command(exchange.command)
                self._in_the_background(exchange.command)
                refused = any(line.startswith("hvsnap: ") for line in exchange.shown)
                assert status == 0 or refused or block.any_status, (str(block), exchange.command, status, came)
            self._compare(block, exchange, came)

    def _compare(self, block: Block, exchange: Exchange, came: list[str]) -> None:
        shown = "\n".join(line.rstrip() for line in exchange.shown).strip("\n")
        really = self.host.there("\n".join(line.rstrip() for line in came if not PROGRESS.match(line))).strip("\n")
        if not self.ids.same(shown, really):
            raise AssertionError(f"{block}: $ {exchange.command}\n-- shown:\n{shown}\n-- came:\n{really}")

    def _really(self, command: str) -> str:
        return self.ids.real(self.host.here(command))

    # -- the shell --------------------------------------------------------------------------------

    def _in_the_background(self, command: str) -> None:
        """Wait for a daemon that a page leaves in the background, as somebody who types takes longer than it does."""
        named = re.search(r"hvsnap --config (\S+) daemon .*&$", command)
        if named:
            self._type(f"until hvsnap --config {named[1]} status > /dev/null; do sleep 0.1; done", command)

    def _type(self, script: str, where: str, *, any_status: bool = False) -> list[str]:
        # Where a line of a script fails, the shell ends with it, and that is told.
        came, status = self._command(script if any_status else f"set -e\n{script}\nset +e")
        assert status == 0 or any_status, (where, script, status, came)
        return came

    def _command(self, command: str) -> tuple[list[str], int]:
        """Type a command; return what it shows, and its status."""
        assert self._shell is not None
        assert self._shell.stdout is not None
        mark = f"mark-{time.monotonic_ns()}"
        self._input.write(f"{{ {self._really(command)}\n}} < /dev/null; echo; echo {mark} $?\n")
        self._input.flush()
        came: list[str] = []
        deadline = time.monotonic() + COMMAND_TIMEOUT_S
        for line in self._shell.stdout:
            if line.startswith(mark):
                return came[:-1], int(line.split()[1])
            came.append(line.rstrip("\n"))
            assert time.monotonic() < deadline, (command, came)
        raise AssertionError(f"the shell has ended: {command}: {came}")

    def _hidden(self, line: str) -> None:
        """Do what a comment asks for: `% name words` on the host, `s-… = command` names an id, all else is typed."""
        if line.startswith("% "):
            name, *words = shlex.split(line[2:])
            self.host.deed(name)(*words)
        elif not line.startswith("& "):
            told = re.fullmatch(r"(?P<id>[sdgpti]-[a-z2-7]{12}) = (?P<command>.*)", line)
            nobody = told is not None and told["command"] == "nobody"
            came = [told["id"]] if told and nobody else self._type(told["command"] if told else line, line)
            assert told is None or self.ids.same(told["id"], came[0]), (line, came)

    def _obey(self) -> None:
        """Do what `systemctl` was asked for, until the page ends."""
        orders = self.host.directory / "orders"
        while not self._over.wait(0.02):
            words = orders.read_text().split() if orders.exists() else []
            if len(words) < 2:
                continue
            try:
                if words[1] in ("stop", "restart"):
                    self.host.daemon.stop()
                if words[1] in ("start", "restart"):
                    self.host.daemon.start()
            finally:
                orders.unlink()

    def _until_interrupted(self, block: Block, exchange: Exchange) -> list[str]:
        """Run a command at a terminal, at which somebody presses Ctrl-C once all is there that is shown above it."""
        at = self._terminal(["bash", "-c", self._prelude + self._really(exchange.command)])
        above, came = exchange.shown.index(INTERRUPT), ""
        meanwhile = [line[2:] for line in block.before if line.startswith("& ")]
        try:
            while came.count("\n") < above:
                came += at.read_nonblocking(1 << 16, timeout=COMMAND_TIMEOUT_S)
                while meanwhile and "\n" in came:
                    self._hidden(meanwhile.pop(0))
            at.sendintr()
            at.expect(pexpect.EOF)
        finally:
            at.close(force=True)
        lines = (came + at.before).replace("\r\n", "\n").replace(INTERRUPT, INTERRUPT + "\n").split("\n")
        # What was overwritten in its place nobody sees any more.
        return [re.sub(MOVES_AND_COLOURS, "", line.rpartition("\r\x1b[K")[2]) for line in lines]

    def _at_a_terminal(self, exchange: Exchange) -> list[str]:
        """Run a command that asks; what follows its prompt in the document is typed."""
        prompt = "hvsnap> "
        at = self._terminal([HVSNAP, *shlex.split(self._really(exchange.command))[1:]])
        came = ""
        for line in exchange.shown:
            if line.startswith(prompt):
                at.expect_exact(prompt)
                came += at.before + prompt
                at.sendline(self._really(line.removeprefix(prompt)))
        at.expect(pexpect.EOF)
        at.close()
        assert at.exitstatus == 0
        return re.sub(MOVES_AND_COLOURS, "", came + at.before).replace("\r", "").splitlines()

    def _terminal(self, words: list[str]) -> pexpect.spawn[str]:
        return pexpect.spawn(
            words[0], words[1:], cwd=str(self.host.directory), encoding="utf-8", dimensions=(40, 200), timeout=30,
            env={**self.environment, "TERM": "dumb"},
        )  # fmt: skip

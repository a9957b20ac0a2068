"""Where libvirt's hook is put, and what is to be seen there: for who installs it, and for the doctor."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hvsnap import wire
from hvsnap.config import Settings
from hvsnap.errors import Failed, Refused

DIRECTORY = "/etc/libvirt/hooks"
SCRIPT = "50-hvsnap"
BESIDE = "hvsnap.json"
OURS = b"libvirt's hook for guests: tells hvsnap's daemon what happens"
"""In the script's first lines; a file without it is somebody else's."""

LIBVIRT_MIN = (6, 5)
"""The first libvirt that looks into qemu.d (https://libvirt.org/hooks.html)."""

DAEMONS = {"libvirtd", "virtqemud"}
TOOL_TIMEOUT_S = 10.0


def shipped() -> Path:
    """Return the script as it comes with hvsnap: in the package, or in the source tree beside it."""
    package = Path(__file__).parent
    found = [package / "shipped" / SCRIPT, package.parent / "hooks" / "qemu.d" / SCRIPT]
    for path in found:
        if path.is_file():
            return path
    raise Failed(f"the hook does not come with this installation: {found[0]}", hint="install hvsnap again")


class HookPlace:
    """A directory of hooks, and what of it is ours."""

    def __init__(self, directory: str, settings: Settings) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.scripts = self.directory / "qemu.d"
        self.script = self.scripts / SCRIPT
        self.beside = self.directory / BESIDE
        self._settings = settings

    def check(self) -> None:
        """Raise :class:`Refused` where the hook cannot work, or its place is taken."""
        if not self.directory.parent.is_dir():
            hint = "install libvirt first, or name its directory of hooks with --directory"
            raise Refused(f"{self.directory.parent} is not there", hint=hint)
        if self._there() and OURS not in self._content(self.script):
            raise Refused(f"{self.script} is not hvsnap's", hint="move it away; its name is the one that ours needs")
        version = _libvirt_version()
        if version is not None and version < LIBVIRT_MIN:
            shown = ".".join(map(str, version))
            raise Refused(f"libvirt {shown} does not look into qemu.d", hint="use libvirt 6.5 or later")

    def told(self) -> bytes:
        """Return what the script is told of the daemon."""
        return json.dumps({"state_dir": self._settings.state_dir, "socket": self._settings.socket}).encode() + b"\n"

    def report(self) -> wire.HookReport:
        """Look at it."""
        others = self._others()
        installed = self._there() and OURS in self._content(self.script)
        problems = list(self._problems()) if installed else []
        guard = Path(self._settings.state_dir, "guard")
        barred: set[str] = set()
        with contextlib.suppress(OSError):
            barred = {name.partition(".")[0] for name in os.listdir(guard) if not name.startswith(".")}
        return wire.HookReport(
            installed=installed,
            script=str(self.script),
            state_dir=self._settings.state_dir,
            socket=self._settings.socket,
            others=[str(path) for path in others],
            restart_libvirtd=installed and not others and self._libvirtd_is_older(),
            barred=sorted(barred),
            problems=problems,
        )

    def _problems(self) -> Iterator[str]:
        if not os.access(self.script, os.X_OK):
            yield "it is not executable, so libvirt passes it over; `hvsnap hook-install` puts that right"
        if self._content(self.script) != shipped().read_bytes():
            yield "it is another release's; `hvsnap hook-install` brings it up to date"
        if self._content(self.beside) != self.told():
            yield "it looks for the daemon in another place than the configuration says; `hvsnap hook-install` tells it"

    def _others(self) -> list[Path]:
        """Return the hooks for guests that are not ours and that libvirt runs."""
        found = [self.directory / "qemu"]
        with contextlib.suppress(OSError):
            found += sorted(self.scripts.iterdir())
        return [path for path in found if path != self.script and path.is_file() and os.access(path, os.X_OK)]

    def _libvirtd_is_older(self) -> bool:
        """Whether a libvirtd runs that was started before the script was put there."""
        placed = self.script.stat().st_ctime
        return any(started < placed for started in _daemons_started())

    def _there(self) -> bool:
        return os.path.lexists(self.script)

    def _content(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise Failed(f"{path}: {error.strerror}", hint="run it as root") from error


def _daemons_started() -> Iterator[float]:
    """Yield when each libvirt daemon of this host was started, in seconds since the epoch."""
    ticks = os.sysconf("SC_CLK_TCK")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/stat").read_text().splitlines()
        booted = float(next(line.split()[1] for line in lines if line.startswith("btime")))
        own = os.readlink("/proc/self/ns/pid")
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if not entry.name.isdigit() or (entry / "comm").read_text().strip() not in DAEMONS:
                    continue
                # One in a container has hooks of its own.
                if os.readlink(entry / "ns" / "pid") == own:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    yield booted + int(fields[19]) / ticks


def _libvirt_version() -> tuple[int, ...] | None:
    try:
        done = subprocess.run(
            ["virsh", "--version"], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"\d+(?:\.\d+)+", done.stdout.strip())
    return None if found is None else tuple(int(part) for part in found[0].split("."))

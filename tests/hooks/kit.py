"""What the tests of the hook share: the script as libvirt runs it, in a hooks directory of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "hooks" / "qemu.d" / "50-hvsnap"
WEB = "0b5a1d7e-0000-4000-8000-000000000001"


def domain_xml(*sources: str, uuid: str = WEB, name: str = "web01") -> bytes:
    """Return a definition as libvirt prints it, with disks that have these sources."""
    disks = "".join(f"<disk type='file'><source file='{source}'/><target dev='vda'/></disk>" for source in sources)
    text = f"<domain type='kvm'>\n  <name>{name}</name>\n  <uuid>{uuid}</uuid>\n  <devices>{disks}</devices>\n</domain>"
    return text.encode()


@dataclass(frozen=True)
class Ran:
    """What became of one run."""

    status: int
    err: str
    took_s: float


class Hook:
    """The script, installed beside a configuration that names this state directory and socket."""

    def __init__(self, directory: Path) -> None:
        self.state = directory / "state"
        self.socket = directory / "hvsnap.sock"
        self.hooks = directory / "hooks"
        (self.hooks / "qemu.d").mkdir(parents=True)
        self.state.mkdir(mode=0o700)
        self.script = self.hooks / "qemu.d" / SCRIPT.name
        shutil.copy(SCRIPT, self.script)
        told = {"state_dir": str(self.state), "socket": str(self.socket)}
        (self.hooks / "hvsnap.json").write_text(json.dumps(told))

    def run(self, *words: str | bytes, xml: bytes = b"") -> Ran:
        """Run it as libvirt does."""
        began = time.monotonic()
        done = subprocess.run([self.script, *words], input=xml, capture_output=True, timeout=20)
        took_s = time.monotonic() - began
        assert done.stdout == b""
        return Ran(done.returncode, done.stderr.decode(), took_s)

    def prepare(self, xml: bytes, name: str = "web01") -> Ran:
        return self.run(name, "prepare", "begin", "-", xml=xml)

    def forget(self) -> None:
        """Begin anew: nothing was spooled, and no daemon was found to hang."""
        shutil.rmtree(self.state / "spool", ignore_errors=True)

    def spooled(self) -> list[dict[str, object]]:
        """Return what is in the spool, oldest first."""
        spool = self.state / "spool" / "hooks"
        return [json.loads(path.read_text()) for path in sorted(spool.glob("*.json"))]

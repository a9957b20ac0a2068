"""The service put in place: units, group, directories, a first configuration. Planned first, so it can be shown."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvsnap import wire
from hvsnap.cli.session import Session
from hvsnap.cli.text import safe
from hvsnap.config import DEFAULT_PATH, Settings
from hvsnap.errors import BadRequest, Failed

UNITS = Path(__file__).parents[1] / "units"


@dataclass(frozen=True, slots=True)
class Shipped:
    """A file that comes with hvsnap, and where it goes. ``owners``: its owner changes it, so it is never replaced."""

    name: str
    path: str
    owners: bool = False


FILES = (
    Shipped("hvsnapd.service", "/etc/systemd/system/hvsnapd.service"),
    Shipped("hvsnap-recover.service", "/etc/systemd/system/hvsnap-recover.service"),
    Shipped("sysusers.conf", "/etc/sysusers.d/hvsnap.conf"),
    Shipped("tmpfiles.conf", "/etc/tmpfiles.d/hvsnap.conf"),
    Shipped("hvsnap.toml", str(DEFAULT_PATH), owners=True),
    Shipped("hvsnap.1", "/usr/local/share/man/man1/hvsnap.1"),
)

NEXT = (
    "systemd-sysusers",
    "systemd-tmpfiles --create",
    "systemctl daemon-reload",
    "hvsnap hook-install",
    "systemctl enable --now hvsnapd hvsnap-recover",
    "hvsnap doctor",
)


def install(session: Session, prefix: str, *, dry_run: bool) -> None:
    """Put everything in place, or tell what that would be."""
    if prefix and not os.path.isabs(prefix):
        prefix = os.path.abspath(prefix)
    program = Path(sys.argv[0] if Path(sys.argv[0]).name == "hvsnap" else Path(sys.executable).with_name("hvsnap"))
    program = Path(os.path.abspath(program))
    if any(character.isspace() for character in str(program)):
        raise BadRequest(f"{program} has a space in its path", hint="systemd's units take none: install it elsewhere")
    planned = [_plan(one, prefix, program, Settings()) for one in FILES]
    if not dry_run:
        for content, file in planned:
            if file.action in ("create", "update"):
                _write(Path(file.path), content)
    answer = wire.Installed(dry_run=dry_run, files=[file for _content, file in planned], next=list(NEXT))
    session.answer(answer, told(answer))


def _plan(one: Shipped, prefix: str, program: Path, settings: Settings) -> tuple[bytes, wire.InstalledFile]:
    """Return a file's content, and what is to be done with it."""
    path = Path(prefix + one.path)
    text = (UNITS / one.name).read_text()
    content = text.replace("@HVSNAP@", str(program)).replace("@STATE@", settings.state_dir).encode()
    action: Literal["create", "update", "keep"]
    try:
        present = path.read_bytes()
    except FileNotFoundError:
        action = "create"
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}", hint="run it as root, or give --prefix") from error
    else:
        action = "keep" if one.owners or present == content else "update"
    return content, wire.InstalledFile(path=str(path), action=action)


def _write(path: Path, content: bytes) -> None:
    """Write a file, all or nothing."""
    passing = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with passing.open("wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
            file.flush()
            os.fsync(file.fileno())
        passing.rename(path)
    except OSError as error:
        passing.unlink(missing_ok=True)
        raise Failed(f"{path}: {error.strerror}", hint="run it as root, or give --prefix") from error


def told(answer: wire.Installed) -> str:
    """Return what was done for people."""
    words = {"create": "created", "update": "updated", "keep": "left as it is"}
    if answer.dry_run:
        words = {"create": "would be created", "update": "would be updated", "keep": "would be left as it is"}
    lines = [f"{safe(file.path)}: {words[file.action]}" for file in answer.files]
    return "\n".join([*lines, "", "Next:", *(f"  {line}" for line in answer.next)])

"""How the doctor looks at the host: files, the kernel, other users' rights. What it means is judged elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
from pathlib import Path

from hvsnap.errors import HvsnapError
from hvsnap.hypervisor.tools import run
from hvsnap.service.findings_host import AA_HELPER, Rules

TOOL_TIMEOUT_S = 10.0
CONNECT_S = 5.0

_TIME_ERROR = 5
"""adjtimex(2): the clock is not synchronised."""

_TIMEX_BYTES = 512
"""More than any kernel's struct timex; all zero it asks, and sets nothing."""


async def answer(*argv: str) -> str | None:
    """Return what a tool prints; None if it is missing or does not answer."""
    with contextlib.suppress(HvsnapError, TimeoutError, OSError):
        return (await asyncio.wait_for(run(*argv), TOOL_TIMEOUT_S)).decode(errors="replace")
    return None


def clock_is_synchronised() -> bool | None:
    """Return what the kernel says; None if it does not. Blocking, for microseconds."""
    with contextlib.suppress(OSError, AttributeError):
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_BYTES))
        return None if state < 0 else bool(state != _TIME_ERROR)
    return None


def file_system(path: str) -> str:
    """Return the type of the file system that a directory lies on; empty if that is not to be seen. Blocking."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            if before.split()[2] == wanted:
                return after.split()[0]
    return ""


def head(path: str, length: int) -> bytes:
    """Return the first bytes of an image; empty if it cannot be read. Blocking."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return os.read(fd, length)
        finally:
            os.close(fd)
    return b""


def helper_rules() -> Rules | None:
    """Return what AppArmor lets libvirt's helper read; None where there is no such profile. Blocking."""
    try:
        profile = Path(AA_HELPER)
        texts = [profile.read_text(errors="replace")]
    except OSError:
        return None
    with contextlib.suppress(OSError):
        texts.append((profile.parent / "local" / profile.name).read_text(errors="replace"))
    return Rules("\n".join(texts))


async def passes(label: str, directory: str) -> tuple[str, bool] | None:
    """Return the user that a label of libvirt's names (``+UID:+GID``), and whether that one gets into a directory.

    None where it cannot be tried: only root may be somebody else.
    """
    ids = re.fullmatch(r"\+?(\d+):\+?(\d+)", label)
    if ids is None or os.geteuid() != 0:
        return None
    user, group = ids.groups()
    argv = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "test", "-x", directory]
    return f"uid {user}, gid {group}", await answer(*argv) is not None


async def connects(host: str, port: int) -> str:
    """Return why nobody answers on a port; empty if somebody does."""
    try:
        _reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), CONNECT_S)
    except TimeoutError:
        return f"no answer within {CONNECT_S:.0f} s"
    except OSError as error:
        return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ""

"""Running QEMU's command-line tools: one way, with bounded output and errors that name the cause."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from hvsnap.errors import HypervisorFailed, NoSpace
from hvsnap.hypervisor.image_key import handed_over
from hvsnap.secret import Passphrase

STDERR_BYTES_MAX = 4096
"""How much of a tool's complaint is kept: enough for its last lines, bounded against a flood."""


def last_line(stderr: bytes) -> str:
    """Return the last line that says something, without the tool's own name in front."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("qemu-img: ").removeprefix("qemu-nbd: ") if lines else "no message"


def failure(argv: Sequence[str], status: int | None, stderr: bytes) -> HypervisorFailed | NoSpace:
    """Return the error for a tool that ended with ``status``: a full device is told apart."""
    text = last_line(stderr[-STDERR_BYTES_MAX:])
    if "No space left" in text or "Disk quota exceeded" in text:
        return NoSpace(f"{argv[0]}: {text}")
    return HypervisorFailed(f"{argv[0]} failed with status {status}: {text}")


def bound_to_us(argv: Sequence[str]) -> list[str]:
    """Return ``argv`` so that the kernel ends the process when the daemon dies, even by SIGKILL.

    ``setpriv`` is part of util-linux, which every Debian has; a ``preexec_fn`` is not safe with threads.
    """
    return ["setpriv", "--pdeathsig", "KILL", "--", *argv]


async def end(process: asyncio.subprocess.Process, grace_s: float = 10.0) -> None:
    """End a process that we started: SIGTERM, then SIGKILL after ``grace_s``; returns when it is gone."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    try:
        await asyncio.wait_for(process.wait(), grace_s)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def run(*argv: str, key: Passphrase | None = None) -> bytes:
    """Run a tool to its end and return its output; it is killed when the caller is cancelled.

    A ``key`` is handed to the tool behind its sub-command. Raises :class:`HypervisorFailed` with the tool's last line,
    or :class:`NoSpace`.
    """
    with handed_over(key) as (arguments, inherited):
        process = await asyncio.create_subprocess_exec(
            *bound_to_us([*argv[:2], *arguments, *argv[2:]]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            pass_fds=inherited,
        )
    try:
        stdout, stderr = await process.communicate()
    except asyncio.CancelledError:
        await asyncio.shield(end(process, grace_s=1.0))
        raise
    if process.returncode != 0:
        raise failure(argv, process.returncode, stderr)
    return stdout

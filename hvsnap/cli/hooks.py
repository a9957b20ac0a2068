"""libvirt's hook put in place, looked at, removed: beside whatever hooks there are.

libvirt looks whether there is any hook for guests only when it starts; from then on it looks for the scripts at every
call. So only the first hook of a host needs libvirtd to be restarted once, which leaves guests running.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hvsnap import hook_place, wire
from hvsnap.cli.session import Session
from hvsnap.cli.text import safe
from hvsnap.errors import Failed
from hvsnap.hook_place import HookPlace


def install(session: Session, directory: str) -> None:
    """Put the hook in place, or bring it up to date."""
    place = HookPlace(directory, session.settings())
    place.check()
    with _explained(place.directory):
        place.scripts.mkdir(mode=0o755, parents=True, exist_ok=True)
        _put(place.beside, place.told(), 0o644)
        _put(place.script, hook_place.shipped().read_bytes(), 0o755)
    _show(session, place)


def status(session: Session, directory: str) -> int:
    """Show whether the hook is in place; return 1 if it is not, or not as it should be."""
    report = _show(session, HookPlace(directory, session.settings()))
    return 0 if report.installed and not report.problems else 1


def remove(session: Session, directory: str) -> None:
    """Remove what :func:`install` has put there, and nothing else."""
    place = HookPlace(directory, session.settings())
    place.check()
    with _explained(place.directory):
        place.script.unlink(missing_ok=True)
        place.beside.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            place.scripts.rmdir()  # others' hooks keep it
    _show(session, place)


def _put(path: Path, content: bytes, mode: int) -> None:
    """Write a file, all or nothing: libvirt may run it at any moment."""
    fd, passing = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            os.fchmod(fd, mode)
            file.flush()
            os.fsync(fd)
        os.rename(passing, path)
    except BaseException:
        os.unlink(passing)
        raise


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failed(f"{error.filename or directory}: {error.strerror}", hint="run it as root") from error


def _show(session: Session, place: HookPlace) -> wire.HookReport:
    report = place.report()
    session.answer(report, told(report))
    return report


def told(report: wire.HookReport) -> str:
    """Return a report for people."""
    lines = [f"Hook:      {safe(report.script) if report.installed else 'not installed'}"]
    if report.installed:
        lines.append(f"Daemon:    {safe(report.socket)}")
        lines.append(f"State:     {safe(report.state_dir)}")
    lines += [f"Beside:    {safe(path)}, which stays" for path in report.others]
    lines += [
        f"Barred:    guest {safe(uuid)}, until its rollback is finished (`hvsnap recover`)" for uuid in report.barred
    ]
    lines += [f"Problem:   {safe(problem)}" for problem in report.problems]
    if report.restart_libvirtd:
        lines.append(
            "To do:     restart libvirtd once (systemctl restart libvirtd): it was started when there was no hook"
        )
    return "\n".join(lines)

"""Commands about the daemon and the host: those that also work, or only work, without a running daemon."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from urllib.parse import quote, urlsplit

from hvsnap import wire
from hvsnap.cli import render_host
from hvsnap.cli.client import DaemonAbsent
from hvsnap.cli.complaints import complain
from hvsnap.cli.outcomes import count
from hvsnap.cli.session import Session
from hvsnap.cli.text import safe
from hvsnap.config import Settings
from hvsnap.errors import ConfigInvalid, DaemonUnreachable, Damaged, Failed, StoreBusy

LIBVIRT_TIMEOUT_S = 15.0
BUSY_S = 20.0
"""How long a guest's start waits for a daemon that is just starting or ending."""

BUSY_RETRY_S = 0.5


def daemon(session: Session) -> None:
    """Run the daemon until SIGTERM."""
    from hvsnap import daemon as daemon_module  # noqa: PLC0415 - it brings every room of the house

    daemon_module.run(session.settings(), session.settings)


# -- recovery -------------------------------------------------------------------------------------


def recover(session: Session, image: str = "") -> int:
    """Settle what a crash left open: the running daemon does it, or we do; return the exit status."""
    if image:
        image = os.path.abspath(image)
    answer = _recover(session, image)
    left = [one for one in answer.operations if one.outcome == "still-open"]
    if not left:
        session.answer(answer, render_host.recovery(answer))
        return 0
    if not session.json:
        session.answer(answer, render_host.recovery(answer))
    why = f"{len(left)} of {len(answer.operations)} open operations cannot be settled yet: {left[0].detail}"
    error = Failed(why, hint="do what it says and try again; `hvsnap doctor` says more")
    return complain(error, "recover", as_json=session.json, also=answer.model_dump(mode="json"))


def _recover(session: Session, image: str) -> wire.Recovery:
    deadline = time.monotonic() + BUSY_S
    while True:
        try:
            with session.client(dispensable=True) as client:
                answer = client.post(f"/recover?image={quote(image, safe='')}" if image else "/recover", wire.Recovery)
            session.remark_connect()
        except DaemonAbsent:
            try:
                return _recover_here(session.settings(), image)
            except StoreBusy:
                # A daemon that is just starting or ending: it answers, or lets go, soon.
                if not image or time.monotonic() > deadline:
                    raise
                time.sleep(BUSY_RETRY_S)
        else:
            return answer


def _recover_here(settings: Settings, image: str) -> wire.Recovery:
    from hvsnap import daemon as daemon_module  # noqa: PLC0415 - as above
    from hvsnap import prestart  # noqa: PLC0415 - as above

    # What is logged on the way stands in the answer, too.
    logging.getLogger("hvsnap").addHandler(logging.NullHandler())
    return prestart.recover_image(settings, image) if image else daemon_module.recover(settings)


# -- the store, without a daemon ------------------------------------------------------------------


def rebuild(session: Session, *, force: bool) -> int:
    """Make the catalog from the store alone; return the exit status."""
    from hvsnap import rebuilding  # noqa: PLC0415 - as above

    answer = rebuilding.rebuild(session.settings(), force=force)
    text = rebuilt(answer)
    if not (answer.damaged or answer.lost or answer.affected or answer.damaged_blocks):
        session.answer(answer, text)
        return 0
    if not session.json:
        session.answer(answer, text)
    why = f"the store is damaged; lost snapshots: {len(answer.lost)}, not to be restored: {len(answer.affected)}"
    hint = "the rest is as it was; before the daemon starts, put back what a copy of the store has, and rebuild again"
    return complain(Damaged(why, hint=hint), "store-rebuild", as_json=session.json, also=answer.model_dump(mode="json"))


def rekey(session: Session, new_key_file: str) -> None:
    """Change the key of an encrypted store."""
    from hvsnap import rebuilding  # noqa: PLC0415 - as above

    path = os.path.abspath(new_key_file)
    rebuilding.rekey(session.settings(), path)
    answer = wire.StoreRekeyed(key_file=path)
    session.answer(answer, f"the store opens with {safe(path)} only: name it in store.encryption.key_file now")


def rebuilt(answer: wire.StoreRebuilt) -> str:
    """Return what a rebuild found."""
    what = f"{count(answer.snapshots, 'snapshot')} of {count(answer.disks, 'disk')}"
    what += f", {count(answer.images, 'image')}" if answer.images else ""
    lines = [f"{what}; {count(answer.blocks, 'block')} in {count(answer.packs, 'pack')}"]
    lines += [f"damaged: {safe(what)}" for what in answer.damaged]
    lines += [f"lost: {snapshot}" for snapshot in answer.lost]
    lines += [f"does not restore: {one.id} ({one.blocks} blocks)" for one in answer.affected]
    if answer.kept:
        lines.append(f"the catalog that was there is {safe(answer.kept)}")
    return "\n".join(lines)


# -- the doctor -----------------------------------------------------------------------------------


def doctor(session: Session) -> int:
    """Show what the daemon finds, or what can be found without one; return 1 if the worst is an error."""
    try:
        with session.client(dispensable=True) as client:
            report = client.get("/doctor", wire.DoctorReport)
        session.remark_connect()
    except DaemonUnreachable as error:
        report = asyncio.run(_examine_here(session.settings(), error))
    except ConfigInvalid as error:
        report = asyncio.run(_examine_unconfigured(error))
    session.answer(report, render_host.doctor(report, all_of_it=not session.quiet))
    return 1 if report.worst is wire.Severity.ERROR else 0


async def _examine_here(settings: Settings, error: DaemonUnreachable) -> wire.DoctorReport:
    """Look at the host and at libvirt; the journal and the catalog belong to the daemon."""
    from hvsnap.service import doctor as rooms  # noqa: PLC0415 - only where there is no daemon

    found = [_no_daemon(error)]
    found += await rooms.host_findings(rooms.premises(settings))
    found += await _look_at_hypervisor(settings.hypervisor.libvirt_uri)
    found += await _look_at_broker(settings.mqtt.url)
    return rooms.report(found)


async def _examine_unconfigured(error: ConfigInvalid) -> wire.DoctorReport:
    """Look at what can be seen without knowing where anything is."""
    from hvsnap.service import doctor as rooms  # noqa: PLC0415 - only where there is no daemon
    from hvsnap.service import findings_host  # noqa: PLC0415 - as above

    return rooms.report([findings_host.unreadable(error), *await rooms.host_findings(rooms.Premises([], ""))])


async def _look_at_broker(url: str) -> list[wire.Finding]:
    """See whether anybody answers on the broker's port; whether it takes us is the daemon's to say."""
    from hvsnap.service import doctor_looks, findings  # noqa: PLC0415 - only where there is no daemon

    if not url:
        return []
    parts = urlsplit(url)
    port = parts.port or (8883 if parts.scheme == "mqtts" else 1883)
    problem = await doctor_looks.connects(parts.hostname or "", port)
    return [findings.broker(url, problem)]


def _no_daemon(error: DaemonUnreachable) -> wire.Finding:
    """Judge that the daemon does not answer: an error, since nothing is protected meanwhile."""
    return wire.Finding(
        severity=wire.Severity.ERROR,
        check="daemon",
        what="the daemon does not answer: no snapshot can be made",
        evidence=error.message,
        remedy=error.hint,
    )


async def _look_at_hypervisor(uri: str) -> list[wire.Finding]:
    from hvsnap.service import doctor as rooms  # noqa: PLC0415 - only where there is no daemon
    from hvsnap.service import findings  # noqa: PLC0415

    if not uri:
        return []
    try:
        from hvsnap.hypervisor.libvirt import LibvirtHypervisor  # noqa: PLC0415 - its library may be missing
    except ImportError:
        return [findings.tool("libvirt", "libvirt's Python binding", None, "python3-libvirt")]
    hypervisor = LibvirtHypervisor(uri)
    try:
        async with asyncio.timeout(LIBVIRT_TIMEOUT_S):
            found, _answered = await rooms.version_findings(hypervisor, uri)
    except TimeoutError:
        return [findings.libvirt(None, f"no answer within {LIBVIRT_TIMEOUT_S:.0f} s", uri)]
    finally:
        try:
            async with asyncio.timeout(LIBVIRT_TIMEOUT_S):
                await hypervisor.close()
        except TimeoutError:
            pass
    return found

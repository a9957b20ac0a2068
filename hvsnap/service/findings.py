"""What the doctor concludes from what it saw: pure functions, evidence in, findings out."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass

from hvsnap.errors import HvsnapError
from hvsnap.model import GuestView, Operation
from hvsnap.wire import BitmapHealth, Finding, GuestList, MqttStatus, Severity

Version = tuple[int, ...]

QEMU_MIN: Version = (5, 2)
"""The first QEMU whose qcow2 has sub-clusters (extended_l2), which overlays are made with."""

QEMU_NBD_IOTHREAD_FIXED: Version = (9, 0)
"""Before it, a QEMU with the fix of CVE-2024-7409 aborts when the client of its own NBD server disconnects from a disk
with an iothread (``nbd_blockdev_client_closed: Assertion qemu_in_main_thread()``)."""

LIBVIRT_TESTED: Version = (9, 0)
"""The oldest libvirt that the tests run with (Debian 12)."""

FREE_BYTES_MIN = 2 << 30
FREE_SHARE_MIN = 0.05

FULL_DAYS_MIN = 14.0
"""Days that are left for somebody to see to a store that fills up."""


def parse_version(text: str) -> Version | None:
    """Return the first dotted number in a tool's answer; None if there is none."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return None if found is None else tuple(int(part) for part in found.group().split("."))


def dotted(version: Version) -> str:
    """Return a version as text."""
    return ".".join(str(part) for part in version)


def size(count: float) -> str:
    """Return bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def tool(check: str, program: str, answer: str | None, package: str) -> Finding:
    """Judge whether a program that is needed is there; ``answer`` is what it says of its version."""
    if answer is None:
        what, evidence = f"{program} is missing", f"{program}: not found"
        remedy = f"install it: apt-get install {package}"
        return Finding(severity=Severity.ERROR, check=check, what=what, evidence=evidence, remedy=remedy)
    evidence = answer.strip().splitlines()[0] if answer.strip() else "it says nothing of its version"
    return Finding(severity=Severity.OK, check=check, what=f"{program} is there", evidence=evidence, remedy="")


def qemu(version: Version | None) -> list[Finding]:
    """Judge the QEMU that runs guests."""
    if version is None:
        remedy = "install it: apt-get install qemu-system-x86; guests that run from elsewhere are served all the same"
        what = "no QEMU was found on this host"
        return [Finding(severity=Severity.WARNING, check="qemu", what=what, evidence="version unknown", remedy=remedy)]
    evidence = f"QEMU {dotted(version)}"
    if version < QEMU_MIN:
        remedy = f"use QEMU {dotted(QEMU_MIN)} or later"
        what = "this QEMU is too old: its qcow2 has no sub-clusters, which overlays need"
        return [Finding(severity=Severity.ERROR, check="qemu", what=what, evidence=evidence, remedy=remedy)]
    found = [Finding(severity=Severity.OK, check="qemu", what="QEMU can hold snapshots", evidence=evidence, remedy="")]
    if version < QEMU_NBD_IOTHREAD_FIXED:
        found.append(
            Finding(
                severity=Severity.INFO,
                check="qemu-nbd-iothread",
                what="this QEMU can abort a guest whose disks have iothreads when a tool reads them through QEMU's own "
                "NBD server; hvsnap does not do it, other backup tools do",
                evidence=evidence,
                remedy=f"keep other backup tools away from such guests, or use QEMU {dotted(QEMU_NBD_IOTHREAD_FIXED)}",
            )
        )
    return found


def libvirt(version: Version | None, problem: str, uri: str) -> Finding:
    """Judge libvirt; ``problem`` says why it did not answer. Without a URI it is switched off."""
    if not uri:
        what = "libvirt is switched off; only bare guests are looked after"
        evidence = "hypervisor.libvirt_uri is empty"
        return Finding(severity=Severity.INFO, check="libvirt", what=what, evidence=evidence, remedy="")
    if problem or version is None:
        return Finding(
            severity=Severity.ERROR,
            check="libvirt",
            what="libvirt does not answer",
            evidence=f"{uri}: {problem or 'it does not tell its version'}",
            remedy="start libvirtd (or virtqemud), and check hypervisor.libvirt_uri and who may use it",
        )
    evidence = f"libvirt {dotted(version)} at {uri}"
    if version < LIBVIRT_TESTED:
        return Finding(
            severity=Severity.WARNING,
            check="libvirt",
            what="this libvirt is older than any that hvsnap is tested with",
            evidence=evidence,
            remedy=f"use libvirt {dotted(LIBVIRT_TESTED)} or later",
        )
    return Finding(severity=Severity.OK, check="libvirt", what="libvirt answers", evidence=evidence, remedy="")


def kvm(*, device: bool, cpu_flags: frozenset[str]) -> Finding:
    """Judge whether guests can run at full speed: /dev/kvm may exist and not work (nested clouds)."""
    flag = next((name for name in ("vmx", "svm") if name in cpu_flags), None)
    evidence = f"/dev/kvm {'exists' if device else 'is absent'}, the CPU shows {flag or 'neither vmx nor svm'}"
    if device and flag:
        return Finding(severity=Severity.OK, check="kvm", what="KVM is usable", evidence=evidence, remedy="")
    if device:
        what = "/dev/kvm exists but cannot work: guests started with it hang"
        remedy = "start guests with <domain type='qemu'>, or enable nested virtualisation of this machine"
        return Finding(severity=Severity.WARNING, check="kvm", what=what, evidence=evidence, remedy=remedy)
    return Finding(
        severity=Severity.INFO,
        check="kvm",
        what="guests run without hardware support",
        evidence=evidence,
        remedy="load kvm_intel or kvm_amd, if the CPU has it and the firmware allows it" if flag else "",
    )


@dataclass(frozen=True, slots=True)
class DirectorySeen:
    """A directory as it was found; ``problem`` says why nothing could be seen."""

    path: str
    problem: str = ""
    mode: int = 0
    writable: bool = False
    free_bytes: int = 0
    total_bytes: int = 0


def directory(check: str, purpose: str, seen: DirectorySeen, *, private: bool) -> list[Finding]:
    """Judge a directory: that it can be written, that others cannot, that it has space."""

    def finding(severity: Severity, what: str, evidence: str, remedy: str) -> Finding:
        return Finding(severity=severity, check=check, what=what, evidence=evidence, remedy=remedy)

    if seen.problem:
        remedy = "create it, or name another in the configuration"
        return [finding(Severity.ERROR, f"the {purpose} is not usable", f"{seen.path}: {seen.problem}", remedy)]
    mode = stat.S_IMODE(seen.mode)
    found = []
    if not seen.writable:
        evidence = f"{seen.path}: mode {mode:04o}"
        found.append(finding(Severity.ERROR, f"the {purpose} cannot be written", evidence, "give it to hvsnap's user"))
    open_to_others = mode & (0o007 if private else 0o002)
    if open_to_others:
        evidence = f"{seen.path}: mode {mode:04o}"
        found.append(
            finding(Severity.WARNING, f"the {purpose} is open to others", evidence, f"chmod o-rwx {seen.path}")
        )
    share = seen.free_bytes / seen.total_bytes if seen.total_bytes else 1.0
    space = f"{seen.path}: {size(seen.free_bytes)} of {size(seen.total_bytes)} free"
    if seen.free_bytes < FREE_BYTES_MIN or share < FREE_SHARE_MIN:
        remedy = "free some space: a snapshot that finds none fails, and the guest goes on"
        found.append(finding(Severity.WARNING, f"the {purpose} is short of space", space, remedy))
    return found or [finding(Severity.OK, f"the {purpose} is in order", space, "")]


def filling(days_to_full: float | None) -> list[Finding]:
    """Warn of a store whose device is full before long, at the pace of the last week."""
    if days_to_full is None or days_to_full > FULL_DAYS_MIN:
        return []
    return [
        Finding(
            severity=Severity.WARNING,
            check="store-filling",
            what="the store's device will be full before long",
            evidence=f"in {days_to_full:.1f} days, if it goes on as in the last week",
            remedy="`hvsnap usage` shows which chains grow: keep fewer snapshots, or give the store more space",
        )
    ]


def mqtt(status: MqttStatus) -> Finding:
    """Judge the publisher of events."""
    if not status.configured:
        what = "MQTT is switched off; events are kept in the catalog alone"
        return Finding(severity=Severity.INFO, check="mqtt", what=what, evidence="mqtt.url is empty", remedy="")
    evidence = f"{status.pending} events wait for the broker"
    if status.connected:
        return Finding(severity=Severity.OK, check="mqtt", what="the broker is connected", evidence=evidence, remedy="")
    return Finding(
        severity=Severity.WARNING,
        check="mqtt",
        what="the broker is not connected; snapshots are not affected",
        evidence=f"{status.error or 'not connected yet'}; {evidence}",
        remedy="check that the broker runs, and mqtt.url and the password in the configuration",
    )


def broker(url: str, problem: str) -> Finding:
    """Judge whether anybody answers where the broker should be; empty ``problem``: somebody does."""
    if not problem:
        what = "somebody answers on the broker's port"
        return Finding(severity=Severity.OK, check="mqtt", what=what, evidence=url, remedy="")
    return Finding(
        severity=Severity.WARNING,
        check="mqtt",
        what="the broker is not to be reached; snapshots are not affected",
        evidence=f"{url}: {problem}",
        remedy="check that the broker runs, and mqtt.url",
    )


def operations(left: list[Operation], open_now: int) -> Finding:
    """Judge the journal: of so many open entries, those that nobody works on need a recovery."""
    if not left:
        evidence = f"{open_now} entries are open, all of them being worked on" if open_now else "no entry is open"
        return Finding(severity=Severity.OK, check="journal", what="the journal is clean", evidence=evidence, remedy="")
    shown = ", ".join(f"{one.kind} {one.id} at {one.step!r}" for one in left[:5])
    return Finding(
        severity=Severity.WARNING,
        check="journal",
        what="something was interrupted and is not settled yet",
        evidence=shown,
        remedy="`hvsnap recover` finishes or undoes it; its answer says what stands in the way",
    )


def disks(guests: GuestList) -> list[Finding]:
    """Judge the guests' disks: which are left out, and which will be read as a whole."""
    found = []
    for guest in guests.guests:
        for disk in guest.disks:
            where = f"disk {disk.target} of {guest.name}"
            if disk.bitmap is BitmapHealth.LOST:
                found.append(
                    Finding(
                        severity=Severity.INFO,
                        check="bitmap",
                        what=f"{where} has lost its dirty bitmap: its next snapshot reads the whole disk",
                        evidence=f"{disk.path}: the bitmap is missing or inconsistent, as after a crash of QEMU",
                        remedy="nothing; the next snapshot makes a new one",
                    )
                )
            elif not disk.skip_reason and disk.format == "raw":
                found.append(
                    Finding(
                        severity=Severity.INFO,
                        check="raw-image",
                        what=f"every snapshot of {where} reads the whole disk",
                        evidence=f"{disk.path} is raw, and raw images store no dirty bitmap",
                        remedy="convert it to qcow2 (qemu-img convert -O qcow2) when the guest is off",
                    )
                )
    return found


def silent_guests(silent: Mapping[str, HvsnapError]) -> list[Finding]:
    """Tell of bare guests that cannot be looked at; libvirt has a finding of its own."""
    return [
        Finding(
            severity=Severity.ERROR,
            check="bare-guest",
            what=f"guest {name} cannot be looked at, and is not protected",
            evidence=error.message,
            remedy=error.hint,
        )
        for name, error in silent.items()
        if name != "libvirt"
    ]


def transient(guests: list[GuestView]) -> list[Finding]:
    """Warn of running guests without a definition: after a crash nothing says that they are on an overlay."""
    return [
        Finding(
            severity=Severity.WARNING,
            check="transient-guest",
            what=f"guest {guest.name} is transient",
            evidence="libvirt keeps no definition of it: if it dies while a snapshot is open, its launcher starts it "
            "from the image underneath",
            remedy="virsh define it, or run `hvsnap recover` before its launcher starts it again",
        )
        for guest in guests
        if guest.active and not guest.persistent
    ]

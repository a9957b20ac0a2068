"""What the doctor concludes of the host around guests: configuration, hook, confinement, clock. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from hvsnap.config import Settings
from hvsnap.errors import HvsnapError
from hvsnap.service.findings import Version, dotted
from hvsnap.wire import Finding, HookReport, Severity

LIBNBD_TESTED: Version = (1, 14)
"""The oldest libnbd that the tests run with (Debian 12)."""

CLOCK_BEFORE_S = 60.0
"""How far the catalog may be ahead of the clock before the clock is wrong."""

VOLATILE = {"tmpfs", "ramfs", "devtmpfs"}
LOCAL = {"localhost", "127.0.0.1", "::1"}
AA_HELPER = "/etc/apparmor.d/usr.lib.libvirt.virt-aa-helper"


def _finding(severity: Severity, check: str, what: str, evidence: str, remedy: str) -> Finding:
    return Finding(severity=severity, check=check, what=what, evidence=evidence, remedy=remedy)


# -- the configuration ----------------------------------------------------------------------------


def unreadable(error: HvsnapError) -> Finding:
    """Tell that the configuration cannot be used."""
    what = "the configuration cannot be used: the daemon does not start with it"
    return _finding(Severity.ERROR, "configuration", what, error.message, error.hint)


def configuration(settings: Settings, file_systems: Mapping[str, str]) -> list[Finding]:
    """Judge what a configuration says that is allowed and unwise; ``file_systems``: path → type, where it is known."""
    found = list(_configuration(settings, file_systems))
    ok = _finding(Severity.OK, "configuration", "the configuration is in order", f"host_id {settings.host_id}", "")
    return found or [ok]


def _configuration(settings: Settings, file_systems: Mapping[str, str]) -> Iterator[Finding]:
    purposes = {settings.state_dir: "state_dir", settings.capture.overlay_dir: "capture.overlay_dir"}
    if settings.store.path is not None:
        purposes[str(settings.store.path)] = "store.url"
    for path, key in purposes.items():
        kind = file_systems.get(path, "")
        if path and kind in VOLATILE:
            what = f"{key} lies in memory: a loss of power loses " + (
                "what guests have written since a snapshot began" if "overlay" in key else "all of it"
            )
            yield _finding(Severity.ERROR, "volatile", what, f"{path} is on {kind}", "name a directory on a device")
    key_file = settings.store.encryption.key_file
    if key_file and settings.store.path is not None and key_file.startswith(f"{settings.store.path}/"):
        what = "the key lies in the store that it opens: whoever has a copy of the store has the key"
        evidence = f"store.encryption.key_file is {key_file}"
        yield _finding(Severity.WARNING, "key-in-store", what, evidence, "move it to another place, and keep a copy")
    broker = urlsplit(settings.mqtt.url)
    if broker.scheme == "mqtt" and broker.hostname not in LOCAL:
        what = "events, and the broker's password, cross the network in plain text"
        evidence = f"mqtt.url is {settings.mqtt.url}"
        yield _finding(Severity.WARNING, "mqtt-plain", what, evidence, "use mqtts:// (docs/mqtt.md, TLS)")


# -- the hook -------------------------------------------------------------------------------------


def hook(report: HookReport) -> list[Finding]:
    """Judge libvirt's hook."""
    if not report.installed:
        what = "libvirt's hook is not installed: nothing keeps a guest from starting on a half-written disk"
        return [_finding(Severity.WARNING, "hook", what, f"{report.script} is not there", "hvsnap hook-install")]
    found = [
        _finding(Severity.WARNING, "hook", "libvirt's hook is not as it should be", problem, "hvsnap hook-install")
        for problem in report.problems
    ]
    if report.restart_libvirtd:
        what = "libvirtd does not run the hook yet: it was started when there was none"
        remedy = "restart it once (systemctl restart libvirtd); guests run on"
        found.append(_finding(Severity.WARNING, "hook", what, report.script, remedy))
    if report.barred:
        what = "guests are kept from starting, by an open rollback or overlay"
        remedy = "`hvsnap recover`; then start them"
        found.append(_finding(Severity.WARNING, "hook-barred", what, ", ".join(report.barred[:5]), remedy))
    return found or [_finding(Severity.OK, "hook", "libvirt's hook is in place", report.script, "")]


# -- libraries and the clock ----------------------------------------------------------------------


def libnbd(version: Version | None) -> list[Finding]:
    """Judge libnbd's version; one that is missing has its finding already."""
    if version is None or version >= LIBNBD_TESTED:
        return []
    what = "this libnbd is older than any that hvsnap is tested with"
    remedy = f"use libnbd {dotted(LIBNBD_TESTED)} or later"
    return [_finding(Severity.WARNING, "libnbd", what, f"libnbd {dotted(version)}", remedy)]


def libguestfs(*, installed: bool) -> Finding:
    """Judge whether files in snapshots can be looked at; all else does without."""
    if installed:
        return _finding(
            Severity.OK, "libguestfs", "files in snapshots can be looked at", "its Python binding is there", ""
        )
    what = "files in snapshots cannot be looked at: libguestfs' Python binding is missing"
    remedy = "if that is wanted: apt-get install python3-guestfs"
    return _finding(Severity.INFO, "libguestfs", what, "guestfs: not found", remedy)


def nbdkit(*, installed: bool) -> Finding:
    """Judge whether snapshots can be served, which instant disks and looking at files build on."""
    if installed:
        return _finding(Severity.OK, "nbdkit", "snapshots can be served as disks", "nbdkit is there", "")
    what = "snapshots cannot be served, nor instant disks be made: nbdkit is missing"
    remedy = "apt-get install nbdkit nbdkit-plugin-python"
    return _finding(Severity.WARNING, "nbdkit", what, "nbdkit: not found", remedy)


def clock(synchronised: bool | None) -> Finding:
    """Judge whether something keeps the clock right; None: the kernel does not say."""
    evidence = {True: "the kernel's clock is synchronised", False: "the kernel's clock is not synchronised"}
    shown = evidence.get(synchronised, "the kernel does not say") if synchronised is not None else "not to be seen"
    if synchronised is False:
        what = "nothing keeps the clock right: policies run by it, and snapshots carry its times"
        return _finding(Severity.INFO, "clock", what, shown, "run chrony or systemd-timesyncd")
    return _finding(Severity.OK, "clock", "nothing speaks against the clock", shown, "")


def clock_before(newest_s: float, now_s: float) -> list[Finding]:
    """Judge the clock by the newest snapshot: one of the future means that it was set back."""
    ahead_s = newest_s - now_s
    if ahead_s <= CLOCK_BEFORE_S:
        return []
    what = "the clock is behind the newest snapshot: it was set back, or had been ahead"
    remedy = "set it right; nothing is deleted by a clock alone, but policies wait until it is past"
    return [_finding(Severity.WARNING, "clock", what, f"by {ahead_s:.0f} s", remedy)]


# -- who may read overlays ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """What a profile of AppArmor lets be read; ``text`` is the profile with its local additions."""

    text: str

    def reads(self, path: str) -> bool:
        """Whether a rule lets a file be read."""
        for line in self.text.splitlines():
            rule = re.fullmatch(r"\s*(?:owner\s+)?((?:/|@\{)\S*)\s+[a-zA-Z]*r[a-zA-Z]*,\s*(?:#.*)?", line)
            if rule is not None and re.fullmatch(pattern(rule[1]), path):
                return True
        return False


def pattern(glob: str) -> str:
    """Return AppArmor's pattern of paths as a regular expression."""
    glob = glob.replace("@{HOME}", "{/home/*,/root}")
    parts = {"**": ".*", "*": "[^/]*", "?": "[^/]", "{": "(?:", "}": ")", ",": "|"}
    made = []
    for token in re.findall(r"\*\*|\[[^\]]*\]|.", glob):
        made.append(parts.get(token, token if token.startswith("[") else re.escape(token)))
    return "".join(made)


def confinement(labels: Mapping[str, str], directories: Sequence[str], rules: Rules | None) -> list[Finding]:
    """Judge whether libvirt's helper may look at overlays in these directories; without it, no profile names them."""
    if "apparmor" not in labels or rules is None:
        return []
    blind = [one for one in directories if not rules.reads(f"{one.rstrip('/')}/disk.s-aaaaaaaaaaaa.overlay")]
    if not blind:
        what = "AppArmor lets libvirt look at overlays"
        return [_finding(Severity.OK, "apparmor", what, ", ".join(directories[:5]) or AA_HELPER, "")]
    what = "AppArmor keeps libvirt's helper from overlays: a guest may not start while it is on one"
    remedy = f"add `{blind[0].rstrip('/')}/*.overlay r,` to /etc/apparmor.d/local/{AA_HELPER.rpartition('/')[2]}"
    return [_finding(Severity.WARNING, "apparmor", what, ", ".join(blind[:5]), remedy)]


def access(directory: str, owner: str, *, passes: bool) -> Finding:
    """Judge whether QEMU's user gets through to the directory of overlays."""
    if passes:
        what = "QEMU's user reaches the directory of overlays"
        return _finding(Severity.OK, "overlay-access", what, f"{directory} as {owner}", "")
    what = "QEMU's user cannot reach the directory of overlays: no guest of libvirt can be captured"
    remedy = f"let others pass through it and the directories above it: chmod o+x {directory}"
    return _finding(Severity.ERROR, "overlay-access", what, f"{directory} as {owner}", remedy)

"""What the doctor concludes: each trap it knows, and nothing of a healthy host."""

import stat
from dataclasses import replace
from pathlib import Path

import pytest

from hvsnap.config import Settings, parse
from hvsnap.model import Bitmap, GuestState, Operation, OperationId
from hvsnap.service import doctor, findings, findings_disks, findings_host
from hvsnap.service.findings import DirectorySeen
from hvsnap.service.findings_disks import DiskSeen
from hvsnap.wire import HookReport, MqttStatus, Severity
from tests.service_kit import WEB, a_guest

HEALTHY = DirectorySeen("/x", mode=stat.S_IFDIR | 0o750, writable=True, free_bytes=1 << 40, total_bytes=1 << 41)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("qemu-img version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", (7, 2, 22)),
        ("9.0.0", (9, 0, 0)),
        ("no version at all", None),
        ("", None),
    ],
)
def test_versions_are_read_from_what_tools_say(text: str, version: tuple[int, ...] | None) -> None:
    assert findings.parse_version(text) == version


def test_known_traps_of_qemu_are_named_for_the_versions_that_have_them() -> None:
    assert [one.severity for one in findings.qemu(None)] == [Severity.WARNING]
    assert [one.severity for one in findings.qemu((4, 2))] == [Severity.ERROR]
    assert [(one.check, one.severity) for one in findings.qemu((7, 2, 22))] == [
        ("qemu", Severity.OK),
        ("qemu-nbd-iothread", Severity.INFO),
    ]
    assert [one.severity for one in findings.qemu((10, 0))] == [Severity.OK]


def test_kvm_that_exists_and_cannot_work_is_told_apart() -> None:
    both, neither = frozenset({"fpu", "svm"}), frozenset({"fpu"})
    assert findings.kvm(device=True, cpu_flags=both).severity is Severity.OK
    assert findings.kvm(device=True, cpu_flags=neither).severity is Severity.WARNING
    assert "hang" in findings.kvm(device=True, cpu_flags=neither).what
    assert findings.kvm(device=False, cpu_flags=neither).severity is Severity.INFO


def test_libvirt_that_does_not_answer_is_an_error_with_its_words() -> None:
    lost = findings.libvirt(None, "Connection refused", "qemu:///system")
    assert (lost.severity, lost.evidence) == (Severity.ERROR, "qemu:///system: Connection refused")
    assert findings.libvirt((9, 0, 0), "", "qemu:///system").severity is Severity.OK
    assert findings.libvirt((6, 0, 0), "", "qemu:///system").severity is Severity.WARNING


@pytest.mark.parametrize(
    ("seen", "severities"),
    [
        (HEALTHY, [Severity.OK]),
        (replace(HEALTHY, problem="No such file or directory"), [Severity.ERROR]),
        (replace(HEALTHY, writable=False), [Severity.ERROR]),
        (replace(HEALTHY, mode=stat.S_IFDIR | 0o755), [Severity.WARNING]),
        (replace(HEALTHY, free_bytes=1 << 20), [Severity.WARNING]),
        (replace(HEALTHY, free_bytes=3 << 30, total_bytes=1 << 50), [Severity.WARNING]),
        (
            replace(HEALTHY, writable=False, mode=0o777, free_bytes=0),
            [Severity.ERROR, Severity.WARNING, Severity.WARNING],
        ),
    ],
)
def test_a_directory_is_judged_by_access_and_space(seen: DirectorySeen, severities: list[Severity]) -> None:
    found = findings.directory("state-dir", "state directory", seen, private=True)
    assert [one.severity for one in found] == severities
    assert all(one.remedy or one.severity is Severity.OK for one in found)
    assert all("/x" in one.evidence for one in found)


def test_a_broker_away_is_a_warning_and_none_at_all_is_not() -> None:
    status = MqttStatus(configured=True, connected=False, pending=3, error="refused")
    assert findings.mqtt(status).severity is Severity.WARNING
    assert "refused" in findings.mqtt(status).evidence
    assert findings.mqtt(status.model_copy(update={"connected": True})).severity is Severity.OK
    assert findings.mqtt(status.model_copy(update={"configured": False})).severity is Severity.INFO


def test_journal_entries_that_nobody_works_on_ask_for_a_recovery() -> None:
    entry = Operation(OperationId("o-1"), "capture", WEB, "reading", {}, 1.0)
    assert findings.operations([], 0).severity is Severity.OK
    assert findings.operations([], 1).severity is Severity.OK
    left = findings.operations([entry], 2)
    assert (left.severity, left.evidence) == (Severity.WARNING, "capture o-1 at 'reading'")
    assert "hvsnap recover" in left.remedy


def test_a_running_transient_guest_is_warned_of() -> None:
    transient = a_guest(persistent=False)
    off = a_guest(persistent=False, state=GuestState.OFF)
    assert [one.check for one in findings.transient([transient, a_guest(), off])] == ["transient-guest"]


def test_serving_should_be_possible_and_files_in_snapshots_are_no_must() -> None:
    assert findings_host.nbdkit(installed=True).severity is Severity.OK
    unserved = findings_host.nbdkit(installed=False)
    assert unserved.severity is Severity.WARNING
    assert "nbdkit-plugin-python" in unserved.remedy
    missing = findings_host.libguestfs(installed=False)
    assert missing.severity is Severity.INFO
    assert "python3-guestfs" in missing.remedy
    assert findings_host.libguestfs(installed=True).severity is Severity.OK


async def test_the_host_is_really_looked_at(workdir: Path) -> None:
    place = doctor.Place("state-dir", "state directory", str(workdir / "missing"), private=True)
    found = {one.check: one for one in await doctor.host_findings(doctor.Premises([place], ""))}
    assert "qemu-img version" in found["qemu-img"].evidence
    assert "libnbd" in found["libnbd"].evidence
    assert found["libguestfs"].severity is Severity.OK
    assert found["state-dir"].severity is Severity.ERROR
    assert "No such file" in found["state-dir"].evidence
    assert doctor.report(list(found.values())).worst is Severity.ERROR


def test_what_is_no_directory_is_not_taken_for_one(workdir: Path) -> None:
    (workdir / "file").write_text("")
    assert doctor.look_at_directory(str(workdir / "file")).problem == "it is not a directory"
    assert doctor.look_at_directory(str(workdir)).total_bytes > 0


# -- guests' disks --------------------------------------------------------------------------------

DISK = DiskSeen("web01", "vda", "/images/a.qcow2", "qcow2", discard="unmap")


def test_a_disk_in_order_gives_no_finding() -> None:
    assert findings_disks.settings([DISK, replace(DISK, discard=None)]) == []
    assert findings_disks.bitmaps([DISK]) == []


@pytest.mark.parametrize(
    ("changed", "check"),
    [
        ({"cache": "unsafe"}, "cache-unsafe"),
        ({"discard": ""}, "no-discard"),
        ({"discard": "ignore"}, "no-discard"),
        ({"format": "raw", "head": b"QFI\xfb"}, "raw-header"),
        ({"backing_unnamed": "/images/base"}, "backing-format"),
    ],
)
def test_each_trap_of_a_disk_is_named_once_for_all_disks_in_it(changed: dict[str, object], check: str) -> None:
    trapped = [replace(DISK, guest=f"web{number}", **changed) for number in range(9)]  # type: ignore[arg-type]
    (found,) = findings_disks.settings([DISK, *trapped])
    assert found.check == check
    assert found.evidence.endswith("and 4 more")
    assert found.remedy


def test_bitmaps_beside_the_expected_one_are_told_apart() -> None:
    def bitmap(name: str, *, inconsistent: bool = False) -> Bitmap:
        return Bitmap(name, 65536, recording=True, persistent=True, inconsistent=inconsistent)

    held = (bitmap("hvsnap-s-2"), bitmap("hvsnap-s-1"), bitmap("theirs"), bitmap("torn", inconsistent=True))
    disk = replace(DISK, bitmaps=held, expected="hvsnap-s-2")
    found = {one.check: one.evidence for one in findings_disks.bitmaps([disk])}
    assert found == {
        "bitmap-inconsistent": "torn on vda of web01",
        "bitmap-foreign": "theirs on vda of web01",
        "bitmap-unused": "hvsnap-s-1 on vda of web01",
    }
    # A capture has two of them at work.
    assert "bitmap-unused" not in {one.check for one in findings_disks.bitmaps([replace(disk, capturing=True)])}


def test_a_block_device_needs_a_directory_for_overlays() -> None:
    disk = replace(DISK, path="/dev/vg/a", format="raw")
    (found,) = findings_disks.devices([DISK, disk], {"/dev/vg/a"}, "")
    assert "/dev/vg/a (vda of web01)" in found.evidence
    assert findings_disks.devices([DISK, disk], {"/dev/vg/a"}, "/overlays") == []


# -- the host -------------------------------------------------------------------------------------


def settings(text: str) -> Settings:
    return parse(text, "hvsnap.toml")


def test_what_is_allowed_and_unwise_in_a_configuration_is_found() -> None:
    told = settings(
        """
        [capture]
        overlay_dir = "/run/overlays"
        [store]
        url = "file:///srv/store"
        [store.encryption]
        key_file = "/srv/store/key"
        [mqtt]
        url = "mqtt://broker.example.org"
        """
    )
    found = findings_host.configuration(told, {"/run/overlays": "tmpfs", "/srv/store": "ext4"})
    assert [(one.check, one.severity) for one in found] == [
        ("volatile", Severity.ERROR),
        ("key-in-store", Severity.WARNING),
        ("mqtt-plain", Severity.WARNING),
    ]
    assert "guests have written" in found[0].what
    local = settings('[mqtt]\nurl = "mqtt://localhost"\n')
    assert [one.severity for one in findings_host.configuration(local, {})] == [Severity.OK]


def test_the_hook_is_judged_by_its_report() -> None:
    report = HookReport(
        installed=True, script="/hooks/50-hvsnap", state_dir="/s", socket="/s/x", others=[], restart_libvirtd=False,
        barred=[], problems=[],
    )  # fmt: skip
    assert [one.severity for one in findings_host.hook(report)] == [Severity.OK]
    assert [one.severity for one in findings_host.hook(report.model_copy(update={"installed": False}))] == [
        Severity.WARNING
    ]
    bad = report.model_copy(update={"problems": ["it is old"], "restart_libvirtd": True, "barred": ["u"]})
    assert [(one.check, one.severity) for one in findings_host.hook(bad)] == [
        ("hook", Severity.WARNING),
        ("hook", Severity.WARNING),
        ("hook-barred", Severity.WARNING),
    ]


DEBIAN_12 = """
  @{HOME}/** r,
  /var/lib/libvirt/images/** r,
  /{media,mnt,opt,srv}/** r,
  /**.qcow{,2} r,
  deny /dev/sd* r,
  /usr/lib/libvirt/virt-aa-helper mr,
"""


@pytest.mark.parametrize(
    ("directory", "seen"),
    [
        ("/srv/vm/", True),
        ("/root/vm", True),
        ("/var/lib/libvirt/images", True),
        ("/var/lib/vm", False),
        ("/dev", False),
    ],
)
def test_apparmors_rules_are_read_as_it_reads_them(directory: str, seen: bool) -> None:
    (found,) = findings_host.confinement({"apparmor": ""}, [directory], findings_host.Rules(DEBIAN_12))
    assert found.severity is (Severity.OK if seen else Severity.WARNING)
    assert findings_host.confinement({"dac": "+1:+1"}, [directory], findings_host.Rules(DEBIAN_12)) == []
    if not seen:
        rules = findings_host.Rules(DEBIAN_12 + f"  {directory}/*.overlay r,\n")
        assert [one.severity for one in findings_host.confinement({"apparmor": ""}, [directory], rules)] == [
            Severity.OK
        ]


def test_a_clock_behind_the_newest_snapshot_is_wrong_and_one_that_nobody_keeps_may_be() -> None:
    assert findings_host.clock_before(1000.0, 990.0) == []
    assert [one.severity for one in findings_host.clock_before(5000.0, 990.0)] == [Severity.WARNING]
    assert findings_host.clock(None).severity is Severity.OK
    assert findings_host.clock(False).severity is Severity.INFO

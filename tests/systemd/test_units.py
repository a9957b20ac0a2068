"""What `hvsnap install` puts in place, held against systemd's own tools."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hvsnap import config, wire
from hvsnap.cli.installing import UNITS
from tests.cli_kit import HVSNAP, in_process

SERVICES = ("hvsnapd.service", "hvsnap-recover.service")
EXPOSURE_MAX = 40
"""In tenths of systemd's points, of 100: what the units' comments say cannot be had (any image, any address) is 3.5."""

analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    done = subprocess.run([HVSNAP, "install", "--prefix", tmp_path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "hvsnap hook-install" in done.stdout
    return tmp_path


def unit(root: Path, name: str) -> Path:
    return root / "etc" / "systemd" / "system" / name


def lines(path: Path, key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", path.read_text(), re.M)


def test_nothing_is_written_by_a_dry_run_and_all_of_it_by_a_real_one(tmp_path: Path) -> None:
    ran = in_process("install", "--dry-run", "--prefix", str(tmp_path), "--json")
    planned = wire.Installed.model_validate(ran.object)
    assert list(tmp_path.iterdir()) == []
    ran = in_process("install", "--prefix", str(tmp_path), "--json")
    done = wire.Installed.model_validate(ran.object)
    assert done.files == planned.files
    assert {file.action for file in done.files} == {"create"}
    assert sorted(file.path for file in done.files) == sorted(str(p) for p in tmp_path.rglob("*") if p.is_file())
    assert len(done.files) == len(list(UNITS.iterdir()))


def test_an_upgrade_replaces_the_units_and_keeps_the_configuration(root: Path) -> None:
    unit(root, "hvsnapd.service").write_text("old")
    own = root / "etc" / "hvsnap" / "hvsnap.toml"
    own.write_text('host_id = "mine"\n')
    done = wire.Installed.model_validate(in_process("install", "--prefix", str(root), "--json").object)
    actions = {Path(file.path).name: file.action for file in done.files}
    assert actions.pop("hvsnapd.service") == "update"
    assert set(actions.values()) == {"keep"}
    assert "Type=notify" in unit(root, "hvsnapd.service").read_text()
    assert own.read_text() == 'host_id = "mine"\n'


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "etc").write_text("a file")
    ran = in_process("install", "--prefix", str(tmp_path))
    assert ran.status == 1
    assert "Not a directory" in ran.err
    assert "Traceback" not in ran.err


def test_the_first_configuration_is_valid_also_with_all_that_it_suggests(root: Path) -> None:
    text = (root / "etc" / "hvsnap" / "hvsnap.toml").read_text()
    assert config.parse(text, "first").socket_group == "hvsnap"
    suggested = re.sub(r"^# (?=\[|[a-z]+ = )", "", text, flags=re.M)
    assert config.parse(suggested, "suggested").mqtt.url == "mqtts://broker.example.org"


@pytest.mark.parametrize("name", SERVICES)
def test_recovery_comes_before_guests_that_are_started_at_boot(root: Path, name: str) -> None:
    path = unit(root, name)
    assert "libvirt-guests.service" in lines(path, "Before")[0].split()
    assert {"libvirtd.service", "virtqemud.service"} <= set(lines(path, "After")[0].split())
    (command,) = lines(path, "ExecStart")
    program, verb = command.split()
    assert (program, verb) == (HVSNAP, "daemon" if name == "hvsnapd.service" else "recover")
    assert "@" not in re.sub(r"@system-service", "", path.read_text())


def test_both_services_have_the_same_rights() -> None:
    """The second unit says that the first one explains its lines."""
    rights = []
    for name in SERVICES:
        parser = configparser.RawConfigParser(strict=True)
        parser.optionxform = str  # type: ignore[assignment, method-assign]
        parser.read(UNITS / name)
        given = dict(parser["Service"])
        rights.append(
            {
                key: value
                for key, value in given.items()
                if re.match("NoN|Capab|Prot|Restrict[A-Z]|Lock|Key|SystemC", key)
            }
        )
    assert rights[0] == rights[1]
    assert len(rights[0]) > 14


@analyze
@pytest.mark.parametrize("name", SERVICES)
def test_systemd_finds_nothing_wrong_with_a_unit(root: Path, name: str) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit(root, name)], capture_output=True, text=True, timeout=60
    )
    ours = [line for line in done.stderr.splitlines() if "hvsnap" in line]
    assert (done.returncode, ours) == (0, [])


@analyze
def test_systemd_finds_a_broken_unit(root: Path) -> None:
    path = unit(root, "hvsnapd.service")
    path.write_text(path.read_text().replace("WatchdogSec=60", "WatchdogSec=sixty").replace(HVSNAP, "/no/such"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True, timeout=60)
    assert "Failed to parse sec value, ignoring: sixty" in done.stderr
    assert "/no/such is not executable" in done.stderr
    assert done.returncode != 0


@analyze
@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_not_more_exposed_than_its_work_needs(root: Path, name: str) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", f"--threshold={EXPOSURE_MAX}", unit(root, name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-200:]


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="systemd-sysusers is not installed")
def test_the_group_and_the_directories_come_into_being(root: Path) -> None:
    for name in ("passwd", "group"):
        (root / "etc" / name).touch()
    (root / "usr").mkdir(exist_ok=True)
    subprocess.run(["systemd-sysusers", f"--root={root}"], check=True, capture_output=True, timeout=60)
    (row,) = [line for line in (root / "etc" / "group").read_text().splitlines() if line.startswith("hvsnap:")]
    subprocess.run(["systemd-tmpfiles", "--create", f"--root={root}"], check=True, capture_output=True, timeout=60)
    run, state = (root / "run" / "hvsnap").stat(), (root / "var" / "lib" / "hvsnap").stat()
    assert (run.st_mode & 0o777, run.st_uid, run.st_gid) == (0o750, 0, int(row.split(":")[2]))
    assert (state.st_mode & 0o777, state.st_uid) == (0o700, 0)


def test_names_that_the_units_order_against_are_those_of_debian() -> None:
    """Not systemd's opinion: a name that no package has is ignored by it, and orders nothing."""
    units = {
        path.name for place in ("/lib/systemd/system", "/usr/lib/systemd/system") for path in Path(place).glob("*")
    }
    if "libvirtd.service" not in units:
        pytest.skip("libvirt's units are not installed")
    assert {"libvirtd.service", "libvirt-guests.service"} <= units

"""The Vagrantfile and what it runs, as far as that can be looked at without starting machines."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hvsnap.cli import grammar

VAGRANT = Path(__file__).parents[2] / "vagrant"


@pytest.mark.parametrize("services", ["", "1"])
def test_the_vagrantfile_is_valid_with_one_machine_and_with_two(workdir: Path, services: str) -> None:
    if shutil.which("vagrant") is None:
        pytest.skip("needs Debian's vagrant and vagrant-libvirt (scripts/setup.sh test)")
    shutil.copytree(VAGRANT, workdir / "vagrant", ignore=shutil.ignore_patterns(".vagrant", "*.box", "*.img"))
    environment = {**os.environ, "VAGRANT_HOME": str(workdir / "home"), "HVSNAP_SERVICES": services}
    environment["VAGRANT_DEFAULT_PROVIDER"] = "libvirt"
    command = ["vagrant", "validate"]
    done = subprocess.run(command, cwd=workdir / "vagrant", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validated successfully" in done.stdout


def test_a_vagrantfile_that_is_wrong_is_found(workdir: Path) -> None:
    if shutil.which("vagrant") is None:
        pytest.skip("needs Debian's vagrant and vagrant-libvirt (scripts/setup.sh test)")
    text = (VAGRANT / "Vagrantfile").read_text()
    (workdir / "Vagrantfile").write_text(text.replace("machine.vm.hostname =", "machine.vm.hostnam =", 1))
    environment = {**os.environ, "VAGRANT_HOME": str(workdir / "home"), "HVSNAP_SERVICES": "1"}
    done = subprocess.run(["vagrant", "validate"], cwd=workdir, env=environment, capture_output=True)
    assert done.returncode != 0


@pytest.mark.parametrize("script", ["provision.sh", "accept.sh", "s3.sh", "box/build.sh"])
def test_scripts_parse_and_are_executable(script: str) -> None:
    path = VAGRANT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def test_commands_that_the_scripts_run_exist() -> None:
    known = set(getattr(grammar.root(), "commands"))  # noqa: B009 - typer's own type does not tell of them
    used = set()
    for script in ("provision.sh", "accept.sh"):
        used |= set(re.findall(r"\bhvsnap ((?:hook-)?[a-z]+)(?= |$|\))", (VAGRANT / script).read_text(), re.MULTILINE))
    assert {"install", "hook-install", "doctor"} <= used
    assert used - known - {"in", "hvsnap"} == set()

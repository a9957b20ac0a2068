"""What documents say can be typed: run where that is possible, else parsed; drawings held against what makes them.

A shell block of a guide is preceded by ``<!-- run -->``, ``<!-- run: any status -->``, or ``<!-- not run: why -->``.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvsnap.config import parse
from tests.cli_kit import HVSNAP
from tests.conftest import short_directory
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.libvirtd import Libvirtd

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
DOCUMENTS = [ROOT / "README.md", ROOT / "vagrant" / "README.md", *sorted(DOCS.rglob("*.md"))]
GUIDES = ["getting-started.md", "disaster-recovery.md"]
BLOCK = re.compile(r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)```", re.DOTALL)


def blocks(path: Path, kind: str) -> Iterator[tuple[str, str]]:
    """Yield the mark and the text of each block of a kind."""
    for found in BLOCK.finditer(path.read_text()):
        if found["kind"] == kind:
            yield found["mark"] or "", found["text"]


def shell_of(mark: str, text: str) -> str:
    """Return what of a block is run: all that it says, where any status will do."""
    return f"{{ {text}}} || true\n" if "any status" in mark else text


@pytest.fixture
def host() -> Iterator[tuple[Path, dict[str, str]]]:
    """A libvirtd with a guest web01, a daemon, and `hvsnap` that finds it by itself."""
    directory = short_directory()
    with Libvirtd(directory / "libvirt") as libvirtd:
        image = make_image(directory / "web01.qcow2", "32M")
        subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 0 4M", image], check=True, capture_output=True)
        image.chmod(0o666)
        guest = Guest(libvirtd, directory, "web01", [DiskSpec(image)]).define().start()
        daemon = Daemon(directory, libvirtd.uri).start()
        path = f"{Path(HVSNAP).parent}:{os.environ['PATH']}"
        yield directory, {**os.environ, "HVSNAP_CONFIG": str(daemon.config), "PATH": path}
        daemon.kill()
        guest.remove()
    subprocess.run(["rm", "-rf", directory], check=True)


def test_the_commands_of_getting_started_do_what_it_says(host: tuple[Path, dict[str, str]]) -> None:
    directory, environment = host
    told = [shell_of(mark, text) for mark, text in blocks(DOCS / "getting-started.md", "sh") if mark.startswith("run")]
    assert len(told) >= 6
    script = "set -euo pipefail\n" + "".join(told)
    done = subprocess.run(["bash", "-c", script], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("web01", "first", "second", "file format: qcow2", "would free", "nightly"):
        assert expected in done.stdout, done.stdout


@pytest.mark.parametrize("guide", GUIDES)
def test_blocks_of_guides_say_whether_they_are_run(guide: str) -> None:
    marks = [mark for mark, text in blocks(DOCS / guide, "sh") if "pytest" not in text]
    assert marks
    assert [mark for mark in marks if not re.match(r"run|not run.*: .+", mark)] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shell_and_configuration_of_documents_are_well_formed(path: Path) -> None:
    for _mark, text in blocks(path, "sh"):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + text
        for named in re.findall(r"\btests/[\w/]+(?:\.py)?", text):
            assert (ROOT / named).exists(), named
    for _mark, text in blocks(path, "toml"):
        parse(text, path.name)


def test_drawings_are_what_their_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "drawings" / "draw.py")
    assert spec is not None
    assert spec.loader is not None
    draw = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw)
    for name, text in draw.files().items():
        assert (DOCS / "drawings" / name).read_text() == text, "run: python docs/drawings/draw.py"
    assert {path.name for path in (DOCS / "drawings").glob("*.svg")} == set(draw.files())
    # SERVICE 4.2's own example.
    after, freed = draw.without(draw.WRITTEN, "S2")
    assert (list(freed.values()), after[-1]) == (["B1"], ("S3", {"B": "B2", "C": "C1"}))
    assert list(draw.restores_to(after, "S3").values()) == list(draw.restores_to(draw.WRITTEN, "S3").values())

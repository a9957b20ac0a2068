"""The house's own rules: documents tell what the code does, all of it and no more; nothing strays in."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hvsnap import config
from hvsnap.capture.facts import Step
from hvsnap.cli import grammar
from hvsnap.errors import HvsnapError

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

MODULES_OF = {
    "guestfs": "python3-guestfs",
    "nbd": "python3-libnbd",
    "nbdkit": "nbdkit-plugin-python",
    "libvirt": "python3-libvirt",
    "libvirt_qemu": "python3-libvirt",
    "paho": "paho-mqtt",
    "qemu": "qemu.qmp",
}
"""Modules whose package has another name."""

COMES_WITH = {"starlette": "fastapi", "click": "typer", "requests": "schemathesis", "urllib3": "schemathesis"}
"""Imported, and brought by another dependency, whose version decides over theirs."""

COMMAND = re.compile(r"hvsnap ((?:snapshot|chain|disk|policy|image|store)-[a-z]+)")
"""A command of the command line, as documents and hints of errors spell it."""

HINTS_AHEAD: set[str] = set()
"""Commands that hints name and that are still to come: crossed out here when they are there."""


DOCUMENTS_AHEAD: set[str] = set()
"""Documents that the code names and that are still to come."""


@cache
def tracked() -> list[Path]:
    """Return the project's files: those of git, or (in an unpacked archive) all that are not made."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        hidden = re.compile(r"(^|/)\.")
        paths = [path for path in ROOT.rglob("*") if not hidden.search(str(path.relative_to(ROOT)))]
    return [path for path in paths if path.is_file()]


def python_files(*places: str) -> Iterator[Path]:
    return (path for path in tracked() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in places)


def documents() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".md"]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def table_rows(path: Path) -> list[list[str]]:
    """Return the cells of every table row whose first cell is code."""
    lines = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# -- documents and code tell the same -------------------------------------------------------------


def default_of(key: str) -> object:
    """Return a key's default; the text that stands for it where it depends on the host or there is none."""
    if key == "host_id":
        return "the host's name"
    model: Any = config.Settings
    for part in key.split("."):
        if part == "NAME":
            continue
        field = model.model_fields[part]
        kind = field.annotation
        model = config.get_args(kind)[1] if config.get_origin(kind) is dict else kind
    return "(must be given)" if field.is_required() else field.default


def test_every_key_of_the_configuration_is_documented_with_its_default_and_none_else() -> None:
    told = {cells[0].strip("`"): cells[1].strip("`") for cells in table_rows(DOCS / "configuration.md")}
    known = {key: default_of(key) for key in list(config.keys())}
    shown = {key: f'"{value}"' if isinstance(value, str) else str(value) for key, value in known.items()}
    shown |= {key: str(value).lower() for key, value in known.items() if isinstance(value, bool)}
    for plain in ("the host's name", "(must be given)"):
        shown = {key: value.strip('"') if value.strip('"') == plain else value for key, value in shown.items()}
    assert told == shown


def test_the_example_of_the_configuration_is_valid() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (DOCS / "configuration.md").read_text(), re.S)
    blocks += re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        config.parse(block, "example")


def requirement(line: str) -> str:
    """Return the name of a requirement: ``numpy>=1.26`` → ``numpy``."""
    found = re.match(r"[A-Za-z0-9._-]+", line)
    assert found is not None
    return found[0]


def test_every_dependency_is_explained_and_none_else() -> None:
    project = pyproject()["project"]
    declared = {requirement(line) for line in project["dependencies"]}
    for extra in project["optional-dependencies"].values():
        declared |= {requirement(line) for line in extra}
    script = (ROOT / "scripts/setup.sh").read_text()
    for name in ("HOST", "GUEST", "AROUND", "TEST", "BENCH"):
        (words,) = re.findall(rf"^{name}=\((.*?)\)$", script, re.S | re.M)
        declared |= set(shlex.split(words))
    rows = table_rows(DOCS / "dependencies.md")
    told = {cells[0].strip("`") for cells in rows}
    assert told - set(COMES_WITH) == declared
    assert [cells[0] for cells in rows if len(cells) < 2 or len(cells[1]) < 5] == []


def test_every_imported_package_is_declared() -> None:
    project = pyproject()["project"]
    runtime = {requirement(line) for line in project["dependencies"]}
    extra = {requirement(line) for lines in project["optional-dependencies"].values() for line in lines}
    script = (ROOT / "scripts/setup.sh").read_text()
    missing = set()
    for path in python_files("hvsnap", "tests", "bench"):
        product = path.relative_to(ROOT).parts[0] == "hvsnap"
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                top = name.partition(".")[0]
                package = MODULES_OF.get(top, COMES_WITH.get(top, top))
                if top in sys.stdlib_module_names or top in ("hvsnap", "tests", "bench"):
                    continue
                known = package in runtime or package in script or (not product and package in extra)
                if not known and package.replace("_", "-") not in extra | runtime:
                    missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert missing == set()


def rules() -> set[str]:
    """Return the numbers of the rules in docs/service.md: ``2``, ``2.1`` …"""
    found: set[str] = set()
    section = ""
    for line in (DOCS / "service.md").read_text().splitlines():
        if heading := re.match(r"## (\d+)\.", line):
            section = heading[1]
            found.add(section)
        elif item := re.match(r"(\d+)\. ", line):
            found.add(f"{section}.{item[1]}")
    return found


def test_every_rule_that_the_code_cites_exists() -> None:
    known, wrong = rules(), []
    for path in python_files("hvsnap", "tests", "bench"):
        for cited in re.findall(r"SERVICE (\d+(?:\.\d+)?(?:, \d+\.\d+)*)", path.read_text()):
            wrong += [f"{path.relative_to(ROOT)}: {rule}" for rule in cited.split(", ") if rule not in known]
    assert wrong == []
    assert len(known) > 50


def test_every_rule_says_whether_it_is_kept() -> None:
    marks: list[str] = []
    section = 0
    for line in (DOCS / "service.md").read_text().splitlines():
        if heading := re.match(r"## (\d+)\.", line):
            section = int(heading[1])
        if 2 <= section <= 9 and re.match(r"\d+\. ", line):
            marks.append(line)
    assert [line for line in marks if not re.match(r"\d+\. [●◐○] ", line)] == []


def test_every_step_of_the_journal_is_in_the_protocol() -> None:
    text = (DOCS / "capture.md").read_text()
    assert [step.value for step in Step if f"`{step.value}`" not in text] == []


# -- nothing points nowhere -----------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Return what can be linked to in a document, as the usual readers name its headings."""
    text = re.sub(r"^ *```.*?^ *```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading) for heading in headings)
    found: set[str] = set()
    for name in (re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in plain):
        again = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", known) is not None for known in found)
        found.add(f"{name}-{again}" if again else name)
    return found


def test_links_between_documents_lead_somewhere() -> None:
    broken, links = [], 0
    for path in documents():
        text = re.sub(r"^ *```.*?^ *```$|`[^`\n]*`", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            name, _, anchor = target.partition("#")
            if target.startswith(("http://", "https://")):
                continue
            links += 1
            there = path.parent / name if name else path
            if not there.exists() or (anchor and anchor not in anchors(there)):
                broken.append(f"{path.relative_to(ROOT)}: {target}")
    assert broken == []
    assert links > 100


def test_what_documents_quote_as_a_chapter_is_one() -> None:
    """``[capture.md](capture.md), "Sparing the guest"``."""
    wrong = []
    for path in documents():
        for name, chapter in re.findall(r"\]\(([\w./-]+\.md)\)[,:] \"([^\"\n]+)\"", path.read_text()):
            headings = re.findall(r"^#+ (.*)$", (path.parent / name).read_text(), re.MULTILINE)
            if chapter not in headings:
                wrong.append(f"{path.relative_to(ROOT)}: {name}: {chapter}")
    assert wrong == []


def test_documents_that_the_code_names_exist() -> None:
    wrong = []
    for path in python_files("hvsnap", "bench"):
        for named in re.findall(r"docs/[a-z-]+\.(?:md|json)", path.read_text()):
            if not (ROOT / named).exists() and named not in DOCUMENTS_AHEAD:
                wrong.append(f"{path.relative_to(ROOT)}: {named}")
    assert wrong == []


def test_every_document_has_its_place_in_the_reading_order() -> None:
    order = (DOCS / "README.md").read_text()
    assert [path.name for path in DOCS.glob("*.md") if path.name != "README.md" and f"({path.name})" not in order] == []


def commands() -> set[str]:
    """Return the commands that the command line has."""
    return set(getattr(grammar.root(), "commands"))  # noqa: B009 - typer's own type does not tell of them


def test_commands_that_documents_and_hints_name_exist() -> None:
    known = commands()
    sources = [ROOT / "README.md", ROOT / "CHANGELOG.md", *DOCS.glob("*.md"), *python_files("hvsnap")]
    named = {(path.name, command) for path in sources for command in COMMAND.findall(path.read_text())}
    assert len(named) > 10
    assert sorted(one for one in named if one[1] not in known | HINTS_AHEAD) == []
    assert HINTS_AHEAD & known == set()


def test_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for path in documents() for target in re.findall(r"`make ([a-z]+)", path.read_text())}
    assert named - targets == set()
    assert {"setup", "check", "test", "demo", "bench"} <= targets


def test_error_codes_are_one_each() -> None:
    seen: dict[str, type] = {}
    todo = [HvsnapError]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        own = kind.__dict__.get("code")
        if own is not None:
            assert own not in seen, f"{kind.__name__} and {seen[own].__name__} are both {own}"
            seen[own] = kind


# -- nothing strays in ----------------------------------------------------------------------------


def test_no_file_knows_the_place_it_was_written_in() -> None:
    place = str(ROOT)
    homes = re.compile(r"/(?:home|Users)/[a-z][a-z0-9_-]*/")
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if (len(ROOT.parts) > 2 and place in text) or homes.search(text):
            found.append(str(path.relative_to(ROOT)))
    assert found == []


@pytest.mark.parametrize("script", ["scripts/setup.sh", ".ci/run"])
def test_scripts_are_executable_and_parse(script: str) -> None:
    path = ROOT / script
    assert path.stat().st_mode & 0o111
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""


def test_setup_explains_a_set_that_it_does_not_know() -> None:
    done = subprocess.run([str(ROOT / "scripts/setup.sh"), "garage"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "garage is no set of packages" in done.stderr
    assert "hint: choose from: demo test bench" in done.stderr

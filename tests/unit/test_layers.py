"""Imports point down, adapters do not know each other, and every library has one room: held for the whole tree.

values → pure → adapters → use cases → service → entrances (HTTP, MQTT) → daemon → command line. docs/architecture.md
says why. A new module belongs to the layer of its directory; one that decides purely is named in :data:`PURE`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from enum import IntEnum
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "hvsnap"
LINES_MAX = 400
FUNCTION_LINES_MAX = 60


class Layer(IntEnum):
    VALUES = 1
    PURE = 2
    ADAPTER = 3
    USE_CASE = 4
    SERVICE = 5
    ENTRANCE = 6
    DAEMON = 7
    COMMAND_LINE = 8


VALUES = {
    "",
    "__main__",
    "alarm",
    "config",
    "drill",
    "errors",
    "happenings",
    "instant",
    "model",
    "ports",
    "reserve",
    "secret",
}
"""Everybody may speak of these; they know nothing but each other."""

PURE = {
    "capture.blockset",
    "capture.facts",
    "capture.governor",
    "capture.plan",
    "capture.support",
    "capture.unusual",
    "catalog.chain",
    "catalog.ranges",
    "catalog.recent",
    "hypervisor.disk_encryption",
    "hypervisor.domain_xml",
    "hypervisor.qemu_nodes",
    "hypervisor.disk_settings",
    "metering",
    "policy",
    "restore.block_protocol",
    "restore.plan",
    "store.identity",
    "store.idset",
    "store.image",
    "store.kinds",
    "store.manifest",
    "store.pack",
    "store.repository",
    "store.seal",
    "upkeep.plan",
}
"""They decide, and touch nothing: no event loop, no file, no process (:data:`DOERS`)."""

ROOMS = {
    "hypervisor": Layer.ADAPTER,
    "store": Layer.ADAPTER,
    "catalog": Layer.ADAPTER,
    "guard": Layer.ADAPTER,
    "guestfiles": Layer.ADAPTER,
    "hook_place": Layer.ADAPTER,
    "capture": Layer.USE_CASE,
    "restore": Layer.USE_CASE,
    "upkeep": Layer.USE_CASE,
    "service": Layer.SERVICE,
    "metrics": Layer.ENTRANCE,
    "mqtt": Layer.ENTRANCE,
    "api": Layer.ENTRANCE,
    "systemd": Layer.ENTRANCE,
    "daemon": Layer.DAEMON,
    "house": Layer.DAEMON,
    "prestart": Layer.DAEMON,
    "rebuilding": Layer.DAEMON,
    "reloading": Layer.DAEMON,
    "cli": Layer.COMMAND_LINE,
    "wire": Layer.VALUES,
}

NBD = {"capture.giveback", "capture.reader", "restore.writer"}
"""The adapter to libnbd lies in the rooms that read and write with it."""

WITHOUT_A_DAEMON = {"cli.dashboard", "cli.host", "cli.hooks", "cli.picture"}
"""Commands that are the daemon, or do without one; all others know it by its socket only."""

DOERS = {"asyncio", "http", "multiprocessing", "socket", "sqlite3", "subprocess", "tempfile", "threading", "shutil"}

LIBRARIES = {
    "aiomqtt": ("mqtt.",),
    "aiosqlite": ("catalog.",),
    "blake3": ("store.",),
    "click": ("cli.",),
    "cryptography": ("store.",),
    "fastapi": ("api.",),
    "guestfs": ("guestfiles.",),
    "httpx": ("cli.",),
    "matplotlib": ("cli.plotting",),
    "libvirt": ("hypervisor.libvirt",),
    "libvirt_qemu": ("hypervisor.libvirt",),
    "nbd": ("capture.giveback", "capture.reader", "restore.writer", "service.doctor"),
    "nbdkit": ("restore.nbdkit_plugin",),
    "numpy": ("",),
    "obstore": ("store.",),
    "paho": ("mqtt.",),
    "plotext": ("cli.plotting",),
    "prometheus_client": ("metrics",),
    "pydantic": ("wire", "config", "mqtt.", "cli.", "service.hooks"),
    "qemu": ("hypervisor.qmp",),
    "rich": ("cli.",),
    "sqlite3": ("catalog.",),
    "starlette": ("api.",),
    "typer": ("cli.",),
    "uvicorn": ("api.server",),
    "zstandard": ("store.",),
}
"""Library → what the names of the modules that may import it begin with. The bench and the tests are not held to it."""

LONG_WITH_REASON = {
    "house._furnish": "the list of the parts of the house, and which one is handed to which",
}


def name_of(path: Path, root: Path) -> str:
    """Return a module's name below the package: ``capture.plan``; empty for the package itself."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(name: str) -> Layer | None:
    """Return the layer that a module belongs to; None for one that has no place yet."""
    if name in VALUES:
        return Layer.VALUES
    if name in PURE:
        return Layer.PURE
    if name in NBD:
        return Layer.ADAPTER
    return ROOMS.get(name.partition(".")[0])


def imports_of(tree: ast.Module, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of every import, those inside functions, too; a module of ours by its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
                continue
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                below = inner.removeprefix(f"{PACKAGE}.")
                yield node.lineno, inner if inner.startswith(f"{PACKAGE}.") and below in modules else str(node.module)


def judge_ours(name: str, other: str) -> str:
    """Return why one module may not import another; empty: it may."""
    layer, target = layer_of(name), layer_of(other)
    if layer is None or target is None:
        return f"{name if layer is None else other} has no layer: give it one in tests/unit/test_layers.py"
    if target > layer:
        return f"{layer.name} must not know {target.name}"
    room, other_room = name.partition(".")[0], other.partition(".")[0]
    if layer is target is Layer.ADAPTER and room != other_room:
        return "adapters do not know each other"
    if layer is Layer.ADAPTER and room != other_room and ROOMS.get(room) is ROOMS.get(other_room) is Layer.ADAPTER:
        return "adapters do not know each other's formats"
    if layer is Layer.COMMAND_LINE and target not in (Layer.VALUES, Layer.PURE, Layer.COMMAND_LINE):
        return "" if name in WITHOUT_A_DAEMON else "the command line knows the daemon by its socket"
    return ""


def judge_library(name: str, library: str) -> str:
    """Return why a module may not import a library; empty: it may."""
    top = library.partition(".")[0]
    if name in PURE and top in DOERS:
        return "a pure module touches nothing"
    if top in LIBRARIES:
        allowed = LIBRARIES[top]
        return "" if any(name.startswith(start) for start in allowed) else f"only in {', '.join(allowed)}"
    return "" if top in sys.stdlib_module_names else "an unknown library: give it a room in tests/unit/test_layers.py"


def violations(root: Path) -> list[str]:
    """Return every import below ``root`` (the package's directory) that points where it must not."""
    files = sorted(root.rglob("*.py"))
    modules = {name_of(path, root) for path in files}
    found = []
    for path in files:
        name = name_of(path, root)
        if layer_of(name) is None:
            found.append(f"{name}: has no layer")
        for line, imported in imports_of(ast.parse(path.read_text(), str(path)), modules):
            if imported.startswith("."):
                why = "imports name the whole module"
            elif imported == PACKAGE or imported.startswith(f"{PACKAGE}."):
                why = judge_ours(name, imported.removeprefix(PACKAGE).removeprefix("."))
            else:
                why = judge_library(name, imported)
            if why:
                found.append(f"{name}:{line} imports {imported}: {why}")
    return found


def too_long(root: Path) -> list[str]:
    """Return modules and functions that have grown beyond what is read at one go."""
    found = []
    for path in sorted(root.rglob("*.py")):
        name, text = name_of(path, root), path.read_text()
        lines = text.count("\n")
        if lines > LINES_MAX and name not in LONG_WITH_REASON:
            found.append(f"{name} has {lines} lines: split it")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES_MAX and f"{name}.{node.name}" not in LONG_WITH_REASON:
                    found.append(f"{name}.{node.name} has {length} lines: split it")
    return found


@cache
def names() -> set[str]:
    return {name_of(path, ROOT / PACKAGE) for path in (ROOT / PACKAGE).rglob("*.py")}


def test_imports_point_down_and_libraries_stay_in_their_rooms() -> None:
    assert violations(ROOT / PACKAGE) == []


def test_modules_and_functions_stay_readable() -> None:
    assert too_long(ROOT / PACKAGE) == []


def test_the_lists_of_this_test_name_modules_that_exist() -> None:
    listed = PURE | (VALUES - {"", "__main__"})
    assert listed - names() == set()


# -- the test can fail: one broken tree for each rule ---------------------------------------------


@pytest.mark.parametrize(
    ("module", "line", "why"),
    [
        ("model", "from hvsnap.catalog.catalog import Catalog", "VALUES must not know ADAPTER"),
        ("capture/plan", "from hvsnap.hypervisor import images", "PURE must not know ADAPTER"),
        ("capture/plan", "import asyncio", "a pure module touches nothing"),
        ("catalog/chain", "def look():\n    import sqlite3", "a pure module touches nothing"),
        ("store/blocks", "from hvsnap.catalog.catalog import Catalog", "adapters do not know each other"),
        ("catalog/catalog", "import hvsnap.hypervisor.images", "adapters do not know each other"),
        ("catalog/catalog", "from hvsnap.store.pack import Footer", "adapters do not know each other's formats"),
        ("hypervisor/images", "from hvsnap.capture.capture import Capture", "ADAPTER must not know USE_CASE"),
        ("hypervisor/images", "from hvsnap import daemon", "ADAPTER must not know DAEMON"),
        ("capture/capture", "from hvsnap.service.uses import Uses", "USE_CASE must not know SERVICE"),
        ("service/uses", "from hvsnap.api.app import create_app", "SERVICE must not know ENTRANCE"),
        ("service/uses", "from hvsnap.mqtt.publisher import MqttPublisher", "SERVICE must not know ENTRANCE"),
        ("api/app", "from hvsnap.daemon import House", "ENTRANCE must not know DAEMON"),
        ("cli/render", "from hvsnap.catalog.catalog import Catalog", "the command line knows the daemon by its socket"),
        ("cli/render", "from hvsnap.daemon import run", "the command line knows the daemon by its socket"),
        ("capture/capture", "import libvirt", "only in hypervisor.libvirt"),
        ("hypervisor/images", "import libvirt_qemu", "only in hypervisor.libvirt"),
        ("hypervisor/images", "import nbd", "only in capture."),
        ("hypervisor/libvirt", "from qemu.qmp import QMPClient", "only in hypervisor.qmp"),
        ("service/uses", "import sqlite3", "only in catalog."),
        ("service/uses", "import aiosqlite", "only in catalog."),
        ("service/uses", "from fastapi import FastAPI", "only in api."),
        ("api/app", "import typer", "only in cli."),
        ("service/uses", "import requests", "an unknown library"),
        ("service/uses", "from . import tasks", "imports name the whole module"),
        ("garage/car", "import os", "has no layer"),
        (
            "model",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from hvsnap.api.app import create_app",
            "VALUES",
        ),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, line: str, why: str) -> None:
    tree = tmp_path / PACKAGE
    for other in (
        "api/app",
        "capture/capture",
        "capture/plan",
        "catalog/catalog",
        "daemon",
        "hypervisor/images",
        module,
    ):
        path = tree / f"{other}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""Nothing."""\n')
    assert [v for v in violations(tree) if not v.startswith("garage")] == []
    (tree / f"{module}.py").write_text(line + "\n")
    found = violations(tree)
    assert found
    assert why in found[0]
    assert module.replace("/", ".") in found[0]


def test_what_is_too_long_is_found(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("x = 1\n" * (LINES_MAX + 1))
    (tmp_path / "ports.py").write_text("def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX)
    assert [line.split(" has ")[0] for line in too_long(tmp_path)] == ["model", "ports.f"]

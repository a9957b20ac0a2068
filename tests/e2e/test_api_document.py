"""Whatever a client sends: the API answers as its OpenAPI document says, and never with a fault of ours.

schemathesis reads the document and makes requests of it, such as it allows and such as it forbids, for every call that
there is. They go to a real daemon, over its socket.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from requests.adapters import HTTPAdapter
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from hvsnap import wire
from hvsnap.api import openapi
from tests import unprivileged_daemon
from tests.conftest import short_directory
from tests.daemon_kit import Daemon

SEED = int(os.environ.get("E2E_SEED", "20260601"))
EXAMPLES = 25
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
GUEST = "web01"
STREAMS = {"/v1/events": {2}, "/v1/snapshots/{id}/look": {2, 3, 4, 5}}
"""A stream has no end that could be validated. How it may be refused: exit statuses."""


class UnprivilegedDaemon(Daemon):
    module = "tests.unprivileged_daemon"


class _Connection(HTTPConnection):
    path: str

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(20)
        self.sock.connect(self.path)


class _UnixAdapter(HTTPAdapter):
    """HTTP of the library that schemathesis uses, over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        connection = type("Connection", (_Connection,), {"path": str(path)})
        self._pool = HTTPConnectionPool("hvsnap", maxsize=1)
        self._pool.ConnectionCls = connection

    def get_connection_with_tls_context(self, *_args: Any, **_options: Any) -> HTTPConnectionPool:
        return self._pool

    get_connection = get_connection_with_tls_context  # before requests 2.32


@dataclass
class Desk:
    """A daemon with something in it, and a way to send anything to it."""

    daemon: Daemon
    session: requests.Session
    directory: Path

    def known(self, collection: str) -> list[str]:
        """Return ids of what ``GET /v1/COLLECTION`` lists now; none, if there is no such call."""
        answer = self.session.get(f"http://hvsnap/v1/{collection}", timeout=20)
        rows = next((value for value in answer.json().values() if isinstance(value, list)), []) if answer.ok else []
        return [row["id"] for row in rows if isinstance(row, dict) and "id" in row]


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    directory = short_directory()
    image = directory / "web01.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True)
    subprocess.run(["qemu-io", "-c", "write -P 7 0 256k", str(image)], check=True, capture_output=True)
    for path in (directory, image):
        shutil.chown(path, unprivileged_daemon.USER)
    guest = f'socket = "{directory}/none.qmp"\ndisks.vda.path = "{image}"'
    daemon = UnprivilegedDaemon(directory, "", **{f"hypervisor.qmp.{GUEST}": guest})
    daemon.start()
    try:
        for _ in range(2):
            daemon.snapshot(GUEST)
        with daemon.client() as client:
            client.post("/policies", wire.Policy, wire.PolicyCreate(name="nightly", hours=[2]))
        with requests.Session() as session:
            session.mount("http://hvsnap", _UnixAdapter(daemon.socket))
            yield Desk(daemon, session, directory)
        faults = daemon.log.read_text().partition("Traceback")[2]
        assert faults == "", faults[-3000:]
    finally:
        daemon.stop()
        shutil.rmtree(directory, ignore_errors=True)


# -- half of all names are those of something that exists ----------------------------------------

REAL: dict[str, list[str]] = {}
"""Names of a kind (``snapshot``, ``disk``, …) as they are now."""

PLURAL = {"snapshots": "snapshot", "ids": "snapshot", "disks": "disk", "chains": "disk", "policies": "policy",
          "tasks": "task", "images": "image", "path": "path", "target": "path", "guest": "guest"}  # fmt: skip


def look(desk: Desk) -> None:
    """Learn what exists now."""
    for collection, kind in PLURAL.items():
        REAL[kind] = desk.known(collection) or REAL.get(kind, [])
    REAL.update(guest=[GUEST], path=[str(desk.directory / f"made-{len(os.listdir(desk.directory))}")])
    REAL["disk"] = [f"{GUEST}/vda", "vda"]


def real(word: str, value: Any) -> Any:
    """Return something that exists in the place of what was made up: half of the times, by what was made up."""
    names = REAL.get(PLURAL.get(word, word))
    if isinstance(value, list):
        return [real(word, one) for one in value]
    if not names or not isinstance(value, str) or len(value) % 2:
        return value
    return names[len(value) // 2 % len(names)]


schema = schemathesis.openapi.from_dict(openapi.document())


@schema.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: dict[str, Any]) -> dict[str, Any]:
    collection = context.operation.path.split("/")[2]
    return {name: real(collection, value) for name, value in (path_parameters or {}).items()}


@schema.hook
def map_body(_context: schemathesis.HookContext, body: Any) -> Any:
    return {name: real(name, value) for name, value in body.items()} if isinstance(body, dict) else body


OPERATIONS = {one.ok().label: one.ok() for one in schema.get_all_operations()}


# Not by schemathesis's own parametrize: its tests all have one id, of which pytest-xdist runs one.
@pytest.mark.parametrize("label", list(OPERATIONS))
def test_every_answer_is_as_the_document_says(label: str, desk: Desk) -> None:
    """FAULTS 24."""
    print(f"E2E_SEED={SEED}")
    look(desk)
    asked = 0
    for boundary in schema.iter_coverage_cases(
        OPERATIONS[label], generation_modes=list(GenerationMode), generation_config=schema.config.generation
    ):
        check(boundary, desk)
    for mode in GenerationMode:

        @seed(SEED)
        @settings(
            max_examples=EXAMPLES,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
        def ask(case: schemathesis.Case) -> None:
            nonlocal asked
            asked += 1
            check(case, desk)

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong about a call without parameters
            ask()
    assert asked > 0


def check(case: schemathesis.Case, desk: Desk) -> None:
    """Send a request, and hold the answer against the document."""
    if case.operation.path in STREAMS:
        wanted = case.as_transport_kwargs(base_url="http://hvsnap")
        with desk.session.request(**wanted, stream=True, timeout=20) as response:
            if response.ok:
                assert response.headers["Content-Type"].startswith("text/event-stream")
            else:
                assert wire.Error.model_validate_json(response.content).exit_status in STREAMS[case.operation.path]
        return
    case.validate_response(case.call(base_url="http://hvsnap", session=desk.session, timeout=20), checks=CHECKS)

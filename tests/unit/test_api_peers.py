"""Who may do what on the socket: processes of other users, and groups that the configuration names."""

from __future__ import annotations

import asyncio
import grp
import json
import os
import pwd
import socket
import stat
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvsnap import wire
from hvsnap.api.app import create_app
from hvsnap.api.peers import Access, Peer, Right, peer_of
from hvsnap.config import Api
from hvsnap.errors import ConfigInvalid
from tests.api_kit import House, a_house, served
from tests.cli_kit import HVSNAP

DOOR, READERS, ADMINS = "users", "games", "news"
"""Groups that every Debian has: of those who can connect, who may look, and who may do all."""

NOBODY = pwd.getpwnam("nobody")

ASK = """
import json, socket, sys
answers = []
for method, path in json.load(sys.stdin):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        try:
            sock.connect(sys.argv[1])
        except PermissionError:
            answers.append([0, ""])
            continue
        head = f"{method} {path} HTTP/1.1\\r\\nHost: hvsnap\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n"
        sock.sendall(head.encode())
        text = b""
        while (more := sock.recv(65536)):
            text += more
            if b": keep-alive" in text:
                break  # the event stream stands, and would go on for ever
        head, _, body = text.partition(b"\\r\\n\\r\\n")
        answers.append([int(head.split()[1]), body.decode()])
json.dump(answers, sys.stdout)
"""
"""Asks from a process of its own, with nothing but the standard library: another user need not reach our files."""

Request = tuple[str, str]


def group(name: str) -> int:
    return grp.getgrnam(name).gr_gid


@dataclass(frozen=True)
class Door:
    """The API on a socket, where two groups have their rights."""

    house: House
    socket: Path

    async def asked(self, requests: Sequence[Request], *groups: str) -> list[tuple[int, str]]:
        """Return status and body of each request, as user nobody in these groups; status 0: could not connect."""

        def work() -> list[tuple[int, str]]:
            done = subprocess.run(
                ["setpriv", f"--reuid={NOBODY.pw_uid}", f"--regid={NOBODY.pw_gid}", *_groups(groups), "--",
                 "/usr/bin/python3", "-I", "-c", ASK, str(self.socket)],
                input=json.dumps(requests), capture_output=True, text=True, cwd="/", timeout=60,
            )  # fmt: skip
            assert done.stderr == ""
            return [(status, body) for status, body in json.loads(done.stdout)]

        return await asyncio.to_thread(work)


def _groups(names: Sequence[str]) -> list[str]:
    return ["--groups=" + ",".join(str(group(name)) for name in names)] if names else ["--clear-groups"]


@pytest.fixture
async def door(workdir: Path) -> AsyncIterator[Door]:
    access = Access.of(Api(read_group=READERS, admin_group=ADMINS))
    path = workdir / "s"
    async with a_house(workdir / "state") as house, served(house, path, DOOR, access):
        yield Door(house, path)


def every_call(house: House) -> list[Request]:
    """Return each call of the API, whatever it is, with something that does not exist for what it names."""
    calls = []
    for path, verbs in create_app(house.service).openapi()["paths"].items():
        calls += [(verb.upper(), path.replace("{", "no-").replace("}", "")) for verb in verbs]
    return calls


async def test_whoever_may_read_looks_at_everything_and_changes_nothing(door: Door) -> None:
    calls = every_call(door.house)
    assert {method for method, _path in calls} >= {"GET", "POST"}
    for (method, path), (status, body) in zip(calls, await door.asked(calls, DOOR, READERS), strict=True):
        if method == "GET":
            assert status in (200, 404), (path, body)
            continue
        error = wire.Error.model_validate_json(body)
        assert (status, error.code, error.exit_status) == (403, "not-allowed", 4), path
        assert "may look, and change nothing" in error.message
        assert "api.admin_group" in error.hint
    assert door.house.captures.requests == []


async def test_whoever_is_in_neither_group_gets_nothing_but_the_reason(door: Door) -> None:
    calls = [*every_call(door.house), ("GET", "/openapi.json"), ("GET", "/nothing"), ("BREW", "/v1/status")]
    for (_method, path), (status, body) in zip(calls, await door.asked(calls, DOOR), strict=True):
        error = wire.Error.model_validate_json(body)
        assert (status, error.code) == (403, "not-allowed"), path
        assert f"user {NOBODY.pw_uid}" in error.message


async def test_an_administrator_is_kept_from_nothing(door: Door) -> None:
    calls = every_call(door.house)
    assert [path for (_, path), (status, _body) in zip(calls, await door.asked(calls, DOOR, ADMINS), strict=True)
            if status in (0, 403, 500)] == []  # fmt: skip


async def test_the_socket_itself_keeps_out_who_is_not_in_its_group(door: Door) -> None:
    seen = door.socket.stat()
    assert (stat.S_IMODE(seen.st_mode), seen.st_gid) == (0o660, group(DOOR))
    assert await door.asked([("GET", "/v1/status")], ADMINS, READERS) == [(0, "")]


async def test_the_command_line_tells_why_and_exits_with_the_code_of_a_refusal(door: Door, workdir: Path) -> None:
    if any(not parent.stat().st_mode & stat.S_IXOTH for parent in Path(HVSNAP).parents):
        pytest.skip("another user does not reach the environment that the tests run in")
    config = workdir / "hvsnap.toml"
    config.write_text(f"socket = {json.dumps(str(door.socket))}\n")

    def hvsnap(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run(
            [HVSNAP, "--config", str(config), *arguments], user=NOBODY.pw_uid, group=NOBODY.pw_gid,
            extra_groups=[group(DOOR), group(READERS)], capture_output=True, text=True, cwd="/", timeout=60,
            env={**os.environ, "HOME": "/nonexistent", "XDG_STATE_HOME": "/nonexistent"},
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    status, out, _err = await asyncio.to_thread(hvsnap, "list")
    assert (status, "web01" in out) == (0, True)
    status, _out, err = await asyncio.to_thread(hvsnap, "snapshot-create", "web01")
    assert status == 4
    assert err.splitlines() == [
        f"hvsnap: snapshot-create: user {NOBODY.pw_uid} may look, and change nothing",
        "hint: that takes root, or a member of api.admin_group",
    ]
    assert door.house.captures.requests == []


async def test_root_may_do_all_whatever_its_groups(door: Door) -> None:
    def ask() -> Any:
        done = subprocess.run(
            ["setpriv", "--clear-groups", "/usr/bin/python3", "-I", "-c", ASK, str(door.socket)],
            input='[["POST", "/v1/recover"]]', capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        return json.loads(done.stdout)

    assert await asyncio.to_thread(ask) == [[200, '{"operations":[]}']]


# -- the decision alone ---------------------------------------------------------------------------

SOMEBODY = Peer(1, 1000, frozenset({100}))


@pytest.mark.parametrize(
    ("access", "peer", "right"),
    [
        (Access(), SOMEBODY, Right.ALL),
        (Access(), None, Right.ALL),
        (Access(read_group=100), SOMEBODY, Right.READ),
        (Access(admin_group=100), SOMEBODY, Right.ALL),
        (Access(read_group=100, admin_group=100), SOMEBODY, Right.ALL),
        (Access(read_group=7, admin_group=8), SOMEBODY, Right.NOTHING),
        (Access(read_group=0), SOMEBODY, Right.NOTHING),
        (Access(read_group=7), Peer(1, 0, frozenset()), Right.ALL),
        (Access(read_group=7), Peer(1, os.geteuid(), frozenset()), Right.ALL),
        (Access(read_group=7), None, Right.NOTHING),
    ],
)
def test_what_somebody_may(access: Access, peer: Peer | None, right: Right) -> None:
    assert access.right_of(peer) is right


def test_the_daemon_s_own_user_may_do_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert Access(read_group=7).right_of(SOMEBODY) is Right.ALL


def test_a_group_that_there_is_not_is_named_with_its_key() -> None:
    with pytest.raises(ConfigInvalid, match=r"api\.admin_group: there is no group nothing-of-that-name"):
        Access.of(Api(admin_group="nothing-of-that-name"))


def test_a_peer_is_whom_the_kernel_says() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert peer_of(one) == Peer(os.getpid(), os.geteuid(), frozenset((os.getegid(), *os.getgroups())))
    with socket.socket(socket.AF_INET) as tcp:
        assert peer_of(tcp) is None

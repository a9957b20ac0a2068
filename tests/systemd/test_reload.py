"""SIGHUP: the configuration is read again, and of one that is wrong nothing is taken."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvsnap import config
from hvsnap.reloading import differing
from tests.daemon_kit import Daemon
from tests.guest.libvirtd import wait_for
from tests.unit.test_api_peers import ADMINS, DOOR, READERS, Door

ALLOWED = [("GET", "/v1/status")]


@pytest.fixture
def daemon(workdir: Path) -> Iterator[Daemon]:
    one = Daemon(workdir, "")
    (workdir / "run").mkdir(mode=0o755)
    plain = one.config.read_text()
    one.config.write_text(f'socket_group = "{DOOR}"\n{plain}[api]\nadmin_group = "{ADMINS}"\n')
    yield one.start()
    one.stop()


def reload(daemon: Daemon, old: str, new: str, told: str) -> None:
    text = daemon.config.read_text()
    assert old in text
    daemon.config.write_text(text.replace(old, new))
    os.kill(daemon.pid, signal.SIGHUP)
    wait_for(lambda: told in daemon.log.read_text(), f"`{told}` in the log", 30)


async def test_f23_a_wrong_configuration_is_refused_and_the_old_one_stays(daemon: Daemon) -> None:
    door = Door(None, daemon.socket)  # type: ignore[arg-type]

    async def status(*groups: str) -> int:
        return (await door.asked(ALLOWED, DOOR, *groups))[0][0]

    assert (await status(READERS), await status(ADMINS)) == (403, 200)
    reload(daemon, "[api]", f'[api]\nread_group = "{READERS}"', "the configuration is read again\n")
    assert (await status(READERS), await status(ADMINS)) == (200, 200)
    told = f"the configuration stays as it was: {daemon.config}: api.reed_group: there is no such key"
    reload(daemon, "read_group", "reed_group", f"{told} (did you mean api.read_group?)")
    assert (await status(READERS), await status(ADMINS)) == (200, 200)
    reload(daemon, "reed_group", "read_group", "the configuration is read again\n")
    reload(daemon, ADMINS, "nothing-of-that-name", "api.admin_group: there is no group nothing-of-that-name")
    assert (await status(READERS), await status(ADMINS)) == (200, 200)
    reload(daemon, "nothing-of-that-name", ADMINS, "the configuration is read again\n")
    reload(daemon, 'host_id = "test-host"', 'host_id = "other"', "from the next start on: host_id")
    assert daemon.status().host_id == "test-host"
    assert daemon.stop() == 0
    daemon.config.write_text(daemon.config.read_text().replace("[api]", "[api]\nreed_group = ''"))
    with pytest.raises(RuntimeError, match=r"api\.reed_group: there is no such key"):
        daemon.start()


def test_keys_that_differ_are_named() -> None:
    one = config.parse("", "one")
    other = config.parse("socket_group = 'a'\napi.read_group = 'a'\n[hypervisor.qmp.web]\nsocket = '/s'", "other")
    assert differing(one, one) == []
    assert differing(one, other) == ["socket_group", "api.read_group", "hypervisor.qmp.web"]

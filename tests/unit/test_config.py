"""A configuration is taken whole, or refused with file, key and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvsnap import config
from hvsnap.errors import ConfigInvalid

WHOLE = """
state_dir = "/var/lib/hvsnap"
socket    = "/run/hvsnap/hvsnap.sock"
host_id   = "kvm-01"
[hypervisor]
libvirt_uri = "qemu:///system"
[capture]
parallel = 2
overlay_dir = ""
freeze_timeout_s = 5
compression = "zstd:1"
[store]
url = "file:///srv/hv%20snap"
[store.encryption]
key_file = ""
[limits]
snapshots_per_disk = 64
policies = 100
[mqtt]
url = "mqtt://127.0.0.1:1883"
topic_prefix = "hvsnap"
username = ""
password_file = ""
[metrics]
listen = ""
"""


def test_every_documented_key_is_known() -> None:
    settings = config.parse(WHOLE, "x.toml")
    assert settings.store.path == Path("/srv/hv snap")
    assert settings.capture.freeze_timeout_s == 5.0
    assert settings.run_dir == Path("/run/hvsnap")


def test_no_file_means_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(config.ENVIRONMENT, raising=False)
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "absent.toml")
    assert config.load().limits.snapshots_per_disk == 64
    with pytest.raises(ConfigInvalid, match=r"absent\.toml: there is no such file"):
        config.load(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stat_dir = '/x'", "x.toml: stat_dir: there is no such key", "did you mean state_dir?"),
        ("[capture]\nparalel = 2", "x.toml: capture.paralel: there is no such key", "did you mean capture.parallel?"),
        ("[capture]\nparallel = '2'", "x.toml: capture.parallel: Input should be a valid integer", "'2'"),
        ("[capture]\nparallel = 0", "x.toml: capture.parallel: Input should be greater than or equal to 1", "0"),
        ("[capture]\nfreeze_timeout_s = 9.5", "x.toml: capture.freeze_timeout_s:", "9.5"),
        ("[capture]\ncompression = 'lz4'", "x.toml: capture.compression: expected zstd:LEVEL", "lz4"),
        ("[store]\nurl = 's3://b/p'", "x.toml: store.url: expected s3://BUCKET/PREFIX", "s3://b/p"),
        ("[store]\nurl = 'file://host/p'", "x.toml: store.url: expected file:///absolute/path", "host"),
        ("[store.encryption]\nkey_file = 'k'", "x.toml: store.encryption.key_file: an absolute path", "'k'"),
        ("[hypervisor.qmp.web01]\nagent = '/s'", "x.toml: hypervisor.qmp.web01.socket: Field required", "agent"),
        ("[hypervisor.qmp.web01]\nsocket = 's'", "x.toml: hypervisor.qmp.web01.socket: an absolute path", "'s'"),
        ("[hypervisor.qmp.web01]\nsocket = ''", "x.toml: hypervisor.qmp.web01.socket: a path is expected", "''"),
        (
            "[hypervisor.qmp.web01]\nsocket = '/s'\ncapture = 'job'",
            "x.toml: hypervisor.qmp.web01.capture: Input should be 'fleece' or 'redirect'",
            "job",
        ),
        (
            "[hypervisor.qmp.web01]\nsocket = '/s'\ndisks.vda = '/a.qcow2'",
            "x.toml: hypervisor.qmp.web01.disks.vda: Input should be a valid dictionary",
            "/a.qcow2",
        ),
        ("[mqtt]\nurl = 'http://x'", "x.toml: mqtt.url: expected mqtt://", "http://x"),
        ("[mqtt]\nurl = 'mqtt://u:p@x'", "x.toml: mqtt.url: the user goes into username", "mqtt"),
        ("[mqtt]\ntopic_prefix = 'a/#'", "x.toml: mqtt.topic_prefix: expected topic levels", "a/#"),
        ("[metrics]\nlisten = '9477'", "x.toml: metrics.listen: expected HOST:PORT", "9477"),
        ("[metrics]\nlisten = 'localhost'", "x.toml: metrics.listen: expected HOST:PORT", "localhost"),
        ("[metrics]\nlisten = 'a:99999'", "x.toml: metrics.listen: expected HOST:PORT", "99999"),
        ("[metrics]\nlisten = 'http://a:1'", "x.toml: metrics.listen: expected HOST:PORT", "http"),
        (
            "[api]\nread_group = 'users'",
            "x.toml: api: socket_group is expected beside read_group and admin_group",
            "docs/configuration.md",
        ),
        ("state_dir = 'rel'", "x.toml: state_dir: an absolute path is expected", "rel"),
        ("x = [", "x.toml: ", "TOML"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, hint: str) -> None:
    """FAULTS 23."""
    with pytest.raises(ConfigInvalid) as caught:
        config.parse(text, "x.toml")
    assert caught.value.message.startswith(message)
    assert hint in caught.value.hint
    assert caught.value.exit_status == 2

"""TLS, passwords, access rules, with a real mosquitto: what is wrong is told, tried again, and never worked round."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
import trustme

from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import ConfigInvalid
from tests.mqtt.broker import Broker, password_file
from tests.mqtt.conftest import Publish
from tests.mqtt.kit import add_disk, emit
from tests.mqtt.listener import listening, until
from tests.mqtt.proxy import proxied


class Certificates:
    """A CA, a broker's certificate and a client's, as files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = trustme.CA()
        self.ca = self._write("ca.pem", self.authority.cert_pem.bytes())
        broker = self.authority.issue_cert("localhost", "127.0.0.1")
        self.broker = self._pair("broker", broker)
        self.elsewhere = self._pair("elsewhere", self.authority.issue_cert("elsewhere.example"))
        self.client = self._pair("client", self.authority.issue_cert("kvm1.example", common_name="kvm1"))
        self.other_ca = self._write("other-ca.pem", trustme.CA().cert_pem.bytes())

    def _pair(self, name: str, made: trustme.LeafCert) -> tuple[Path, Path]:
        certificate = self._write(f"{name}.pem", made.cert_chain_pems[0].bytes())
        return certificate, self._write(f"{name}.key", made.private_key_pem.bytes())

    def _write(self, name: str, data: bytes) -> Path:
        path = self.directory / name
        path.write_bytes(data)
        path.chmod(0o600)
        return path

    def listener(self, pair: tuple[Path, Path] | None = None) -> list[str]:
        """Return what a TLS listener of mosquitto needs."""
        certificate, key = pair or self.broker
        return [f"cafile {self.ca}", f"certfile {certificate}", f"keyfile {key}"]

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(*self.client)
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


def secure(broker: Broker) -> str:
    return f"mqtts://localhost:{broker.port}"


# -- TLS ------------------------------------------------------------------------------------------


async def test_events_go_over_tls(
    make_broker: Callable[..., Broker], certificates: Certificates, catalog: Catalog, publish: Publish
) -> None:
    broker = make_broker(*certificates.listener())
    await emit(catalog, 120)
    async with listening(broker.port, tls_context=certificates.context()) as listener:
        running = await publish(secure(broker), ca_file=str(certificates.ca))
        await listener.until(lambda heard: len(heard.events()) == 120, "the events")
        await running.stop()
        await listener.until(lambda heard: heard.heard[-1].json.get("reason") == "stopped", "the end")


async def test_a_client_certificate_proves_who_we_are(
    make_broker: Callable[..., Broker], certificates: Certificates, catalog: Catalog, publish: Publish
) -> None:
    rules = ["require_certificate true", "use_identity_as_username true"]
    broker = make_broker(*certificates.listener(), *rules)
    without = await publish(secure(broker), ca_file=str(certificates.ca))
    await until(lambda: "does it ask for a client certificate?" in without.publisher.status().error, "the refusal")
    await without.stop()
    certificate, key = map(str, certificates.client)
    running = await publish(secure(broker), ca_file=str(certificates.ca), cert_file=certificate, key_file=key)
    await until(lambda: running.publisher.status().connected, "the connection")
    assert "u'kvm1'" in broker.log.read_text()


async def test_a_broker_that_another_ca_vouches_for_is_not_spoken_to(
    make_broker: Callable[..., Broker], certificates: Certificates, catalog: Catalog, publish: Publish
) -> None:
    broker = make_broker(*certificates.listener())
    await emit(catalog)
    for settings in ({"ca_file": str(certificates.other_ca)}, {}):
        running = await publish(secure(broker), **settings)
        await until(lambda one=running: "certificate is refused" in one.publisher.status().error, "the error")  # type: ignore[misc]
        await running.stop()
    assert "New client connected" not in broker.log.read_text()
    assert len(await catalog.unpublished(10)) == 1


async def test_a_certificate_for_another_name_is_refused(
    make_broker: Callable[..., Broker], certificates: Certificates, catalog: Catalog, publish: Publish
) -> None:
    broker = make_broker(*certificates.listener(certificates.elsewhere))
    running = await publish(secure(broker), ca_file=str(certificates.ca))
    await until(lambda: "Hostname mismatch" in running.publisher.status().error, "the error")
    assert "New client connected" not in broker.log.read_text()


async def test_tls_never_falls_back_to_plain_text(
    broker: Broker, certificates: Certificates, catalog: Catalog, publish: Publish, workdir: Path
) -> None:
    secret = workdir / "password"
    secret.write_text("s3cret-of-ours\n")
    secret.chmod(0o600)
    said: list[bytes] = []
    async with proxied(broker.port) as proxy:
        proxy.overhear = said
        running = await publish(
            f"mqtts://localhost:{proxy.port}", ca_file=str(certificates.ca), username="u", password_file=str(secret)
        )
        await emit(catalog, 3)
        await until(lambda: "TLS" in running.publisher.status().error, "the error")
        await until(lambda: len(said) >= 3, "more attempts")
    assert all(hello[:2] == b"\x16\x03" for hello in said), "something else than a TLS handshake was sent"
    assert not any(b"s3cret-of-ours" in hello or b"MQTT" in hello for hello in said)
    assert len(await catalog.unpublished(10)) == 3


async def test_a_broker_without_tls_on_the_port_is_told_of(
    broker: Broker, certificates: Certificates, catalog: Catalog, publish: Publish
) -> None:
    running = await publish(secure(broker), ca_file=str(certificates.ca))
    await until(lambda: "does the broker speak TLS on this port?" in running.publisher.status().error, "the error")


async def test_a_broker_with_tls_on_the_port_is_told_of(
    make_broker: Callable[..., Broker], certificates: Certificates, catalog: Catalog, publish: Publish
) -> None:
    broker = make_broker(*certificates.listener())
    running = await publish(broker.url)
    await until(lambda: "is this its TLS port?" in running.publisher.status().error, "the error")


async def test_a_certificate_that_was_replaced_is_used_for_the_next_connection(
    make_broker: Callable[..., Broker], certificates: Certificates, catalog: Catalog, publish: Publish, workdir: Path
) -> None:
    broker = make_broker(*certificates.listener())
    trusted = workdir / "trusted.pem"
    trusted.write_bytes(certificates.other_ca.read_bytes())
    running = await publish(secure(broker), ca_file=str(trusted))
    await until(lambda: "TLS" in running.publisher.status().error, "the error")
    trusted.write_text("half")
    await until(lambda: "mqtt.ca_file" in running.publisher.status().error, "the error about the file")
    trusted.write_bytes(certificates.ca.read_bytes())
    await until(lambda: running.publisher.status().connected, "the connection")


# -- passwords ------------------------------------------------------------------------------------


@pytest.fixture
def guarded(make_broker: Callable[..., Broker], workdir: Path) -> tuple[Broker, Path]:
    """A broker that asks for a password, and the file with ours."""
    users = password_file(workdir / "users", hvsnap="right", watcher="look")
    secret = workdir / "secret"
    secret.write_text("right\n")
    secret.chmod(0o600)
    return make_broker(f"password_file {users}", anonymous=False), secret


async def test_a_password_that_was_replaced_works_from_the_next_attempt_on(
    guarded: tuple[Broker, Path], catalog: Catalog, publish: Publish
) -> None:
    broker, secret = guarded
    secret.write_text("wrong\n")
    await emit(catalog, 2)
    running = await publish(broker.url, username="hvsnap", password_file=str(secret))
    await until(lambda: "refuses user hvsnap" in running.publisher.status().error, "the refusal")
    assert not running.publisher.status().connected
    assert running.publisher.status().pending == 2
    async with listening(broker.port, username="watcher", password="look") as listener:
        secret.write_text("right\n")
        await listener.until(lambda heard: len(heard.events()) == 2, "the events")
    assert "right" not in broker.log.read_text()


async def test_a_broker_that_asks_for_a_name_says_so(
    guarded: tuple[Broker, Path], catalog: Catalog, publish: Publish
) -> None:
    running = await publish(guarded[0].url)
    await until(lambda: "without a user name" in running.publisher.status().error, "the refusal")


async def test_a_password_file_that_is_opened_to_others_later_is_not_used(
    guarded: tuple[Broker, Path], catalog: Catalog, publish: Publish
) -> None:
    broker, secret = guarded
    running = await publish(broker.url, username="hvsnap", password_file=str(secret))
    await until(lambda: running.publisher.status().connected, "the connection")
    secret.chmod(0o644)
    broker.stop()
    broker.start()
    await until(lambda: "open to others" in running.publisher.status().error, "the error")
    assert not running.publisher.status().connected
    secret.chmod(0o600)
    await until(lambda: running.publisher.status().connected, "the connection")


def _spoil(secret: Path, how: str) -> None:
    secret.unlink()
    if how == "directory":
        secret.mkdir(mode=0o700)
    elif how == "fifo":
        os.mkfifo(secret, 0o600)
    elif how != "missing":
        secret.write_bytes({"empty": b"", "no text": b"\xff\xfe"}.get(how, b"right"))
        secret.chmod(0o640 if how == "group" else 0o604 if how == "others" else 0o600)
        if how == "owner":
            os.chown(secret, 12345, 12345)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("missing", "cannot be read"),
        ("others", "open to others (mode 0604)"),
        ("group", "open to others (mode 0640)"),
        ("owner", "belongs to another user"),
        ("empty", "is empty"),
        ("no text", "is not UTF-8"),
        ("directory", "Is a directory"),
        ("fifo", "not a regular file"),
    ],
)
async def test_a_password_file_that_is_not_right_is_refused_at_the_start(
    guarded: tuple[Broker, Path], catalog: Catalog, publish: Publish, how: str, words: str
) -> None:
    broker, secret = guarded
    _spoil(secret, how)
    with pytest.raises(ConfigInvalid) as refused:
        await publish(broker.url, username="hvsnap", password_file=str(secret))
    assert words in refused.value.message
    assert refused.value.message.startswith("mqtt.password_file: ")
    assert refused.value.hint or how == "fifo"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"password_file": "/x"}, "mqtt.password_file: there is no username"),
        ({"ca_file": "CA"}, "mqtt.ca_file: mqtt://127.0.0.1:1 is without TLS"),
        ({"url": "mqtts://b", "cert_file": "CERT"}, "mqtt.cert_file: a client certificate needs both"),
        ({"url": "mqtts://b", "key_file": "KEY"}, "mqtt.key_file: a client certificate needs both"),
        ({"url": "mqtts://b", "ca_file": "/nowhere"}, "mqtt.ca_file: /nowhere: No such file"),
        ({"url": "mqtts://b", "cert_file": "OTHER", "key_file": "KEY"}, "mqtt.cert_file: "),
        ({"url": "mqtts://b", "cert_file": "CERT", "key_file": "OPEN"}, "mqtt.key_file: "),
        ({"url": "mqtts://b", "cert_file": "CERT", "key_file": "LOCKED"}, "mqtt.cert_file: "),
        ({"topic_prefix": "a\nb"}, "mqtt.topic_prefix: control characters"),
    ],
)
async def test_settings_that_cannot_be_right_are_refused_at_the_start(
    certificates: Certificates, publish: Publish, workdir: Path, settings: dict[str, Any], words: str
) -> None:
    certificate, key = certificates.client
    open_key, locked = workdir / "open.key", workdir / "locked.key"
    open_key.write_bytes(key.read_bytes())
    open_key.chmod(0o644)
    openssl = ["openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked]
    subprocess.run(openssl, check=True)
    locked.chmod(0o600)
    assert b"ENCRYPTED" in locked.read_bytes()
    files = {
        "CA": certificates.ca,
        "CERT": certificate,
        "KEY": key,
        "OTHER": certificates.broker[0],
        "OPEN": open_key,
        "LOCKED": locked,
    }
    filled = {name: str(files.get(value, value)) for name, value in settings.items()}
    with pytest.raises(ConfigInvalid) as refused:
        await publish(filled.pop("url", "mqtt://127.0.0.1:1"), **filled)
    assert words in refused.value.message


# -- access rules ---------------------------------------------------------------------------------

RULES = """user hvsnap
topic write hvsnap/kvm1/#
user watcher
topic read hvsnap/#
"""


async def test_rules_that_let_us_write_and_nothing_else_are_enough(
    workdir: Path, make_broker: Callable[..., Broker], catalog: Catalog, publish: Publish
) -> None:
    users = password_file(workdir / "users", hvsnap="right", watcher="look")
    rules = workdir / "acl"
    rules.write_text(RULES)
    secret = workdir / "secret"
    secret.write_text("right")
    secret.chmod(0o600)
    broker = make_broker(f"password_file {users}", f"acl_file {rules}", anonymous=False)
    disk = await add_disk(catalog)
    async with listening(broker.port, username="watcher", password="look") as listener:
        running = await publish(broker.url, username="hvsnap", password_file=str(secret))
        state = f"hvsnap/kvm1/guest/web01/disk/{disk.id}/state"
        await listener.until(lambda heard: heard.events() and heard.on(state), "event and state")
        await running.stop()
        await listener.until(lambda heard: heard.heard[-1].json.get("reason") == "stopped", "the end")


async def test_events_that_the_broker_refuses_are_kept_until_it_takes_them(
    workdir: Path, make_broker: Callable[..., Broker], catalog: Catalog, publish: Publish
) -> None:
    rules = workdir / "acl"
    rules.write_text("topic read #\ntopic write hvsnap/+/status\n")
    broker = make_broker(f"acl_file {rules}")
    await emit(catalog, 3)
    async with listening(broker.port) as listener:
        running = await publish(broker.url)
        await until(lambda: "refuses messages to hvsnap/kvm1/event" in running.publisher.status().error, "the refusal")
        assert running.publisher.status().pending == 3
        assert not listener.events()
        rules.write_text("topic readwrite #\n")
        broker.signal(signal.SIGHUP)
        await listener.until(lambda heard: len(heard.events()) == 3, "the events")
    assert listener.sequences() == [1, 2, 3]


async def test_states_that_the_broker_refuses_do_not_hold_up_events(
    workdir: Path, make_broker: Callable[..., Broker], catalog: Catalog, publish: Publish
) -> None:
    rules = workdir / "acl"
    rules.write_text("topic read #\ntopic write hvsnap/+/status\ntopic write hvsnap/+/event\n")
    broker = make_broker(f"acl_file {rules}")
    await add_disk(catalog)
    async with listening(broker.port) as listener:
        running = await publish(broker.url)
        await listener.until(lambda heard: len(heard.events()) == 1, "the event")
        await emit(catalog, 3)
        await listener.until(lambda heard: len(heard.events()) == 4, "more events")
    assert running.publisher.status().connected
    assert not [one for one in listener.heard if "/guest/" in one.topic]


async def test_a_listener_of_tests_that_may_not_read_hears_nothing(
    workdir: Path, make_broker: Callable[..., Broker]
) -> None:
    """The rules above are real: without the right to read nothing arrives, and without a password nobody connects."""
    users = password_file(workdir / "users", hvsnap="right")
    broker = make_broker(f"password_file {users}", anonymous=False)
    with pytest.raises(aiomqtt.MqttError):
        async with listening(broker.port):
            pass

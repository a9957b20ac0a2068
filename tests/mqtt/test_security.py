"""TLS, passwords, access rules, with a real mosquitto: what is wrong is told, tried again, and never worked round."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiomqtt
import pytest

from hvsnap import config
from hvsnap.catalog.catalog import Catalog
from hvsnap.errors import ConfigInvalid
from tests.mqtt.broker import Broker, password_file
from tests.mqtt.certificates import Certificates
from tests.mqtt.conftest import Publish
from tests.mqtt.forms import DOCS
from tests.mqtt.kit import add_disk, emit
from tests.mqtt.listener import listening, until
from tests.mqtt.proxy import proxied


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
    """FAULTS 16."""
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
    """FAULTS 16."""
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
    """FAULTS 16."""
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


def _documented(beginning: str) -> str:
    """Return the block of docs/mqtt.md that begins so."""
    blocks = re.findall(r"^```[\w-]*\n(.*?)^```$", (DOCS / "mqtt.md").read_text(), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if block.startswith(beginning)]
    return str(block)


def _secret(workdir: Path, password: str) -> str:
    path = workdir / "secret"
    path.write_text(password)
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize("rules", ["user kvm1", "pattern write"])
async def test_the_documented_rules_let_us_write_what_we_publish(
    workdir: Path, make_broker: Callable[..., Broker], catalog: Catalog, publish: Publish, rules: str
) -> None:
    users = password_file(workdir / "users", kvm1="right", kvm2="other", monitoring="look")
    acl = workdir / "acl"
    reading = "user monitoring\ntopic read hvsnap/#\n" if rules.startswith("pattern") else ""
    acl.write_text(_documented(rules) + reading)
    broker = make_broker(f"password_file {users}", f"acl_file {acl}", anonymous=False)
    disk = await add_disk(catalog)
    async with listening(broker.port, username="monitoring", password="look") as listener:
        running = await publish(broker.url, username="kvm1", password_file=_secret(workdir, "right"))
        state = f"hvsnap/kvm1/guest/web01/disk/{disk.id}/state"
        await listener.until(lambda heard: heard.events() and heard.on(state), "event and state")
        await running.stop()
        await listener.until(lambda heard: heard.heard[-1].json.get("reason") == "stopped", "the end")
        before = len(listener.heard)
        # Another host may not write here.
        other = await publish(broker.url, username="kvm2", password_file=_secret(workdir, "other"))
        await until(lambda: "refuses messages to hvsnap/kvm1/status" in other.publisher.status().error, "the refusal")
        assert len(listener.heard) == before


async def test_the_documented_settings_work_with_the_documented_broker(
    workdir: Path, make_broker: Callable[..., Broker], certificates: Certificates, catalog: Catalog, publish: Publish
) -> None:
    users = password_file(workdir / "users", hvsnap="right")
    acl = workdir / "acl"
    acl.write_text("user hvsnap\ntopic readwrite hvsnap/#\n")
    certificate, key = certificates.broker
    places = {"certs/ca.pem": certificates.ca, "certs/broker.pem": certificate, "certs/broker.key": key}
    places |= {"passwords": users, "acl": acl}
    lines = _documented("listener 8883").splitlines()[1:]
    for name, path in places.items():
        lines = [line.replace(f"/etc/mosquitto/{name}", str(path)) for line in lines]
    assert lines[-1] == "allow_anonymous false"
    broker = make_broker(*lines[:-1], anonymous=False)
    text = _documented("[mqtt]").replace("broker.example.org:8883", f"localhost:{broker.port}")
    text = text.replace("/etc/hvsnap/mqtt-password", _secret(workdir, "right\n"))
    text = text.replace("/etc/hvsnap/broker-ca.pem", str(certificates.ca))
    settings = config.parse(text, "docs/mqtt.md").mqtt
    await emit(catalog, 2)
    running = await publish(**settings.model_dump())
    await until(lambda: running.publisher.status().connected and running.publisher.status().pending == 0, "the events")


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

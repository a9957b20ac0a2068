"""Every block of every document is run, or checked for what it is, or says why neither can be done."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from hvsnap.config import parse
from tests.cli_kit import HVSNAP
from tests.documents.blocks import DOCUMENTS, ROOT, Block, blocks, fences
from tests.documents.test_pages import PAGES
from tests.documents.transcript import Ids, exchanges
from tests.guest.libvirtd import wait_for
from tests.mqtt.broker import Broker, password_file
from tests.mqtt.certificates import Certificates
from tests.mqtt.forms import check

ALL = [block for path in DOCUMENTS for block in blocks(path)]


def of(*kinds: str) -> list[Block]:
    found = [block for block in ALL if block.kind in kinds]
    assert found
    return found


def test_no_block_is_overlooked() -> None:
    assert {path.name: sum(block.path == path for block in ALL) for path in DOCUMENTS} == {
        path.name: fences(path) for path in DOCUMENTS
    }
    assert [str(block) for block in ALL if not block.accounted] == []


def test_blocks_that_say_that_they_are_run_are() -> None:
    assert [str(block) for block in ALL if block.runs and block.path not in PAGES.values()] == []
    for block in ALL:
        if block.reader is not None:
            assert block.path.name in block.reader.read_text(), f"{block}: {block.reader} does not read it"


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_configurations_are_valid(block: Block) -> None:
    parse(block.text, str(block))


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_messages_have_the_form_that_is_documented(block: Block) -> None:
    check(block.topic, block.text.encode())


@pytest.mark.parametrize("block", of("sh"), ids=str)
def test_scripts_are_well_formed(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for named in re.findall(r"\btests/[\w/]+(?:\.py)?", block.text):
        assert (ROOT / named).exists(), named


def test_installations_ask_for_what_a_host_needs() -> None:
    (needed,) = re.findall(r"^HOST=\((.*?)\)$", (ROOT / "scripts" / "setup.sh").read_text(), re.DOTALL | re.MULTILINE)
    told = [found for block in of("sh") for found in re.findall(r"apt-get install (qemu(?:[^\\\n]|\\\n)*)", block.text)]
    assert len(told) == 2
    for packages in told:
        assert set(packages.replace("\\\n", " ").split()) == set(needed.split())


@pytest.mark.parametrize("block", of("console"), ids=str)
def test_transcripts_have_commands(block: Block) -> None:
    assert all(exchange.command for exchange in exchanges(block.text))


@pytest.mark.parametrize("block", of("ini"), ids=str)
def test_units_are_systemd_s(block: Block, tmp_path: Path) -> None:
    assert "/usr/local/bin/hvsnap" in block.text
    unit = tmp_path / "example.service"
    unit.write_text(block.text.replace("/usr/local/bin/hvsnap", HVSNAP))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "example" in line]) == (0, [])
    ours = {path.name for path in (ROOT / "hvsnap" / "units").glob("*.service")}
    assert set(re.findall(r"hvsnap[\w-]*\.service", block.text)) <= ours


@pytest.mark.parametrize("rules", of("mosquitto-acl"), ids=str)
def test_a_broker_with_these_settings_lets_hosts_write_below_their_own_topics(rules: Block, workdir: Path) -> None:
    (settings,) = of("mosquitto")
    certificates = Certificates(workdir)
    files = {"ca.pem": certificates.ca, "broker.pem": certificates.broker[0], "broker.key": certificates.broker[1]}
    files["passwords"] = password_file(workdir / "passwords", kvm1="a", kvm2="b", monitoring="c")
    # The pattern alone lets nobody read; a page has one rule for reading, which the other case brings along.
    files["acl"] = workdir / "acl"
    files["acl"].write_text(rules.text + "\nuser monitoring\ntopic read hvsnap/#\n")
    text = re.sub(r"/etc/mosquitto/(?:certs/)?([\w.]+)", lambda found: str(files[found[1]]), settings.text)
    lines = [line for line in text.splitlines() if not line.startswith(("listener", "allow_anonymous"))]
    assert len(lines) == 5
    broker = Broker(workdir / "broker", *lines, anonymous=False).start()
    heard: list[str] = []
    try:
        listener = connected(broker, certificates, "monitoring", "c")
        listener.on_message = lambda *told: heard.append(told[-1].topic)
        listener.subscribe("hvsnap/#", 1)
        for user, password, topic in (
            ("kvm2", "b", "hvsnap/kvm1/event"),
            ("kvm1", "a", "hvsnap/kvm1/event"),
        ):
            client = connected(broker, certificates, user, password)
            client.publish(topic, b"{}", 1).wait_for_publish(10)
            client.loop_stop()
        wait_for(lambda: heard != [], "the message", 10)
        listener.loop_stop()
    finally:
        broker.stop()
    assert heard == ["hvsnap/kvm1/event"]


def connected(broker: Broker, certificates: Certificates, user: str, password: str) -> paho.Client:
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.username_pw_set(user, password)
    client.tls_set(str(certificates.ca))
    client.connect("localhost", broker.port)
    client.loop_start()
    wait_for(client.is_connected, "the connection", 10)
    return client


# -- the mechanism itself can fail ----------------------------------------------------------------


SHOWN = "s-aaaaaaaaaaaa  full snapshot, 4.0 MiB read, 0 B stored, 2026-11-24 09:43:02"


@pytest.mark.parametrize(
    "came",
    [
        "s-bbbbbbbbbbbb  full snapshot, 4.0 MiB read, 1 B stored, 2026-11-24 09:43:02",
        "s-bbbbbbbbbbbb  full snapshot, 0 B read, 0 B stored, 2026-11-24 09:43:02",
        "d-bbbbbbbbbbbb  full snapshot, 4.0 MiB read, 0 B stored, 2026-11-24 09:43:02",
        "s-bbbbbbbbbbbb  full snapshot, 4.0 MiB read, 0 B stored, yesterday",
        "s-bbbbbbbbbbbb  incremental snapshot, 4.0 MiB read, 0 B stored, 2026-11-24 09:43:02",
        "s-bbbbbbbbbbbb  full snapshot, 4.0 MiB read, 0 B stored, 2026-11-24 09:43:02\nand more",
        "",
    ],
)
def test_what_is_not_shown_is_noticed(came: str) -> None:
    assert Ids().same(SHOWN, "s-bbbbbbbbbbbb full snapshot, 17.5 GiB read, 0 B stored, 2027-01-01 00:00:00")
    assert not Ids().same(SHOWN, came)


def test_an_id_stands_for_one_and_no_other() -> None:
    ids = Ids()
    assert ids.same("s-aaaaaaaaaaaa of s-bbbbbbbbbbbb", "s-222222222222 of s-333333333333")
    assert ids.real("hvsnap snapshot-info s-bbbbbbbbbbbb") == "hvsnap snapshot-info s-333333333333"
    assert not ids.same("s-aaaaaaaaaaaa", "s-333333333333")
    assert not ids.same("s-cccccccccccc", "s-222222222222")
    with pytest.raises(ValueError, match="comes from nowhere"):
        ids.real("s-cccccccccccc")
    assert ids.same("first\n…\nlast", "first\nsome\nmore\nlast")
    assert not ids.same("first\n…\nlast", "first\nsome")


@pytest.mark.parametrize(
    ("text", "accounted"),
    [
        ("```sh\nls\n```\n", False),
        ("<!-- not run: -->\n```sh\nls\n```\n", False),
        ("<!-- not run: nobody has such a thing -->\n```sh\nls\n```\n", True),
        ("<!-- run -->\n\n```sh\nls\n```\n", False),
        ("<!-- run after:\n% off web01\n-->\n```sh\nls\n```\n", True),
        ("text\n```\nls\n```\n", False),
    ],
)
def test_a_block_without_a_word_is_noticed(text: str, accounted: bool, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(text)
    (block,) = blocks(path)
    assert block.accounted is accounted
    assert fences(path) == 1

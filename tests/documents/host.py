"""The host that documents speak of: guests `web01` and `db01`, libvirt, a daemon, a broker; and what happens on it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import libvirt
from paho.mqtt import publish

from hvsnap.happenings import EventType
from hvsnap.mqtt.messages import Absence, HostStatus, Presence, PublishedEvent
from tests.daemon_kit import Daemon
from tests.documents.blocks import DOCS, blocks
from tests.guest.domain import DiskSpec, Guest, make_image
from tests.guest.image import GuestImage
from tests.guest.libvirtd import Libvirtd, host_pids, wait_for
from tests.mqtt.broker import Broker, password_file
from tests.mqtt.certificates import Certificates
from tests.mqtt.test_forms import PAYLOADS

NEAR_S = 120
PRICE = 'price_per_gib_month = 0.05\ncurrency = "EUR"\nprepaid_gib = 0.02'


def _event(kind: EventType, ident: str, host: str, payload: Mapping[str, object]) -> PublishedEvent:
    raw = {"host": host, "sequence": 1, "id": ident, "at": datetime.now(UTC), "type": kind, "payload": payload}
    return PublishedEvent.model_validate(raw)


class Host:
    """Real parts, below one directory. Its public methods without a result are what a document may ask for."""

    def __init__(self, libvirtd: Libvirtd, directory: Path, image: GuestImage) -> None:
        self.directory = directory
        self.libvirtd = libvirtd
        for name in ("hooks", "images", "root", "vm", "etc/hvsnap"):
            (directory / name).mkdir(parents=True)
        self.guests = {
            "web01": self._guest("web01", image, {"vda": ("8G", 6), "vdb": ("2G", 4)}),
            "db01": self._guest("db01", None, {"vda": ("64M", 2)}),
        }
        self.daemon = Daemon(directory, libvirtd.uri, usage=PRICE)
        self.names = [
            ("/var/lib/libvirt/images", f"{directory}/images"),
            ("/var/lib/hvsnap", f"{directory}/state"),
            ("/etc/libvirt/hooks", f"{directory}/hooks"),
            ("/etc/hvsnap", f"{directory}/etc/hvsnap"),
            ("/run/hvsnap", f"{directory}/run"),
            ("/run/vm", f"{directory}/vm"),
            ("/srv/vm", str(directory)),
        ]
        self._broker: Broker | None = None
        self._written = 0
        self._pool = f"<pool type='dir'><name>default</name><target><path>{directory}/images</path></target></pool>"

    def here(self, text: str) -> str:
        """Return a text of a document with the places of this host."""
        for told, real in self.names:
            text = text.replace(told, real)
        return text

    def there(self, text: str) -> str:
        """Return what was printed here with the places of the documents."""
        text = text.replace(f"{self.directory}/root/", "/")
        for told, real in self.names:
            text = text.replace(real, told)
        return text

    def deed(self, name: str) -> Callable[..., None]:
        """Return what a document asks for by name."""
        deeds: list[Callable[..., None]] = [
            self.write, self.off, self.on, self.damage, self.lose_catalog, self.lose_host, self.host_a, self.bare,
            self.bare_configuration, self.sealed, self.plain, self.broker, self.two_hosts, self.between_hours,
        ]  # fmt: skip
        return {one.__name__: one for one in deeds}[name]

    # -- its life ---------------------------------------------------------------------------------

    def __enter__(self) -> Host:
        with contextlib.closing(libvirt.open(self.libvirtd.uri)) as connection:
            connection.storagePoolDefineXML(self._pool).create()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.end()
        if self._broker is not None:
            self._broker.stop()
        for guest in self.guests.values():
            guest.remove()
        with contextlib.closing(libvirt.open(self.libvirtd.uri)) as connection:
            pool = connection.storagePoolLookupByName("default")
            pool.destroy()
            pool.undefine()

    def begin(self) -> None:
        """Begin anew: nothing was ever captured or installed, `web01` and the daemon run."""
        for name in ("state", "root", "hooks"):
            shutil.rmtree(self.directory / name, ignore_errors=True)
            (self.directory / name).mkdir()
        own = {disk.path for guest in self.guests.values() for disk in guest.disks}
        for path in {
            *self.directory.glob("*.qcow2"),
            *self.directory.glob("*.raw"),
            *self.directory.glob("images/*"),
        } - own:
            path.unlink()
        (self.directory / "root" / "etc").mkdir()
        for name in ("passwd", "group"):
            (self.directory / "root" / "etc" / name).touch()
        self.guests["web01"].define()
        self.on("web01")
        self.daemon.configure(usage=PRICE)
        self.daemon.start()

    def end(self) -> None:
        """End the daemon and bare guests."""
        self.daemon.stop()
        for pid in host_pids("qemu-system", f"{self.directory}/vm/"):
            os.kill(pid, signal.SIGKILL)

    def _guest(self, name: str, image: GuestImage | None, disks: dict[str, tuple[str, int]]) -> Guest:
        specs = []
        for target, (size, holds_mib) in disks.items():
            path = self.directory / (f"{name}.qcow2" if target == "vda" else f"{name}-data.qcow2")
            specs.append(DiskSpec(self._image(f"{name}-{target}", path, size, holds_mib)))
        return Guest(self.libvirtd, self.directory, name, specs, image).define()

    def _image(self, name: str, path: Path, size: str, holds_mib: int) -> Path:
        self._content(name, holds_mib << 20)
        command = f"write -s {self.directory}/{name}.seed 0 {holds_mib}M"
        subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", command, make_image(path, size)], check=True, capture_output=True
        )
        path.chmod(0o666)
        return path

    def _content(self, name: str, size_bytes: int) -> bytes:
        """Return what a disk holds at first: incompressible, and the same each time."""
        content = random.Random(name).randbytes(size_bytes)
        (self.directory / f"{name}.seed").write_bytes(content)
        return content

    # -- what happens on the host -----------------------------------------------------------------

    def write(self, guest: str, target: str, offset: str, size: str) -> None:
        """Let a guest write something new to a disk of it; sizes as qemu-io has them."""
        self._written += 1
        name = f"written-{self._written}"
        self._content(name, int(size.removesuffix("M")) << 20)
        command = f"write -s {self.directory}/{name}.seed {offset} {size}"
        self.guests[guest].qemu_io(ord(target[-1]) - ord("a"), command)

    def off(self, guest: str) -> None:
        """Power a guest off, once what was captured of it is merged."""
        if self.daemon.alive():
            self.daemon.settled()
        self.guests[guest].destroy()

    def on(self, guest: str) -> None:
        """Return when a guest runs, and its agent can answer; whoever has started it."""
        one = self.guests[guest]
        if not one.active:
            one.start()
        try:
            one.run("true")
        except ConnectionError:  # somebody else has started it
            one.reconnect()

    def damage(self, name: str) -> None:
        """Overwrite a byte of the store in which a disk's first block lies."""
        (at,) = [
            (pack, offset)
            for pack in self.daemon.store.glob("packs/*/*")
            if (offset := pack.read_bytes().find((self.directory / f"{name}.seed").read_bytes()[:4096])) >= 0
        ]
        pack, offset = at
        pack.chmod(0o600)
        with pack.open("r+b") as file:
            file.seek(offset)
            file.write(b"damage")

    def between_hours(self) -> None:
        """Return when the next full hour, at which policies run, is not near."""
        wait_for(lambda: time.time() % 3600 < 3600 - NEAR_S, "the full hour", NEAR_S + 60)

    def lose_catalog(self) -> None:
        """Remove the catalog."""
        for path in (self.directory / "state").glob("catalog.db*"):
            path.unlink()

    def lose_host(self) -> None:
        """Remove all but the store and the guest's definition: catalog, the guest and its image are gone."""
        self.off("web01")
        (self.directory / "web01.xml").write_text(self.guests["web01"].xml())
        (self.directory / "web01.qcow2").unlink()
        self.guests["web01"].domain().undefine()
        for path in (self.directory / "state").iterdir():
            if path != self.daemon.store:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def host_a(self) -> None:
        """Write the configuration that the page shows for another host's store."""
        (text,) = [
            block.text
            for block in blocks(DOCS / "operations.md")
            if "host-a.toml" in block.text and block.kind == "toml"
        ]
        text = text.replace("s3://backups/host-a", f"file://{self.daemon.store}")
        (self.directory / "etc" / "hvsnap" / "host-a.toml").write_text(self.here(text))

    def bare(self) -> None:
        """Prepare what a bare guest needs."""
        self._image("db1-vda", self.directory / "db1.qcow2", "64M", 3)

    def bare_configuration(self) -> None:
        """Give the daemon the configuration that the page shows for it."""
        (text,) = [block.text for block in blocks(DOCS / "getting-started.md") if block.kind == "toml"]
        tables = dict(re.findall(r"^\[(\S+)\]\n(.*?)(?=\n\[|\Z)", self.here(text), re.MULTILINE | re.DOTALL))
        self.daemon.configure(usage=PRICE, **tables)

    def sealed(self) -> None:
        """Configure a daemon with an encrypted store of its own, which it has made, and end it."""
        self.daemon.stop()
        for name in ("old.key", "new.key"):
            path = self.directory / "etc" / "hvsnap" / name
            path.write_text(random.Random(name).randbytes(32).hex() + "\n")
            path.chmod(0o600)
        key = self.directory / "etc" / "hvsnap" / "old.key"
        self.daemon.configure(
            store=f'url = "file://{self.directory}/state/sealed"', **{"store.encryption": f'key_file = "{key}"'}
        )
        (self.directory / "state").rename(self.directory / "state.plain")
        self.daemon.start()
        self.daemon.stop()

    def plain(self) -> None:
        """Take that back."""
        shutil.rmtree(self.directory / "state")
        (self.directory / "state.plain").rename(self.directory / "state")
        self.daemon.configure(usage=PRICE)

    def broker(self) -> None:
        """Start a broker with TLS and passwords."""
        certificates = Certificates(self.directory)
        users = password_file(self.directory / "passwords", ops="secret", kvm1="secret")
        word = self.directory / ".hvsnap-mqtt"
        word.write_text("secret\n")
        word.chmod(0o600)
        lines = [*certificates.listener(), f"password_file {users}"]
        self._broker = Broker(self.directory / "broker", *lines, anonymous=False).start()
        self.names.append(("broker.example.org", f"localhost:{self._broker.port}"))

    def two_hosts(self) -> None:
        """Publish what two hosts would, in the forms of the product."""
        assert self._broker is not None
        at = datetime.now(UTC)
        disk = {"disk": "d-erpqozfuhzg3", "guest_uuid": "0a4eedd5-1fb1-457b-814b-ac173587078e"}
        run = disk | {"guest": "web01", "target": "vda", "policy": "nightly"}
        run |= {"snapshot": "s-lbyfszmmvhdc", "name": "auto_20261124_1"}
        failed = PAYLOADS[EventType.SNAPSHOT_FAILED] | {"guest": "db1", "target": "vdb", "name": "auto_20261124_1"}
        failed |= {"snapshot": "s-72cte26gsl35", "error": "no space left"}
        said: list[tuple[str, HostStatus | PublishedEvent]] = [
            ("status", HostStatus(host="kvm1", state=Presence.ONLINE, reason=None, at=at, hvsnap="0.1.0")),
            ("event", _event(EventType.POLICY_RUN, "a", "kvm1", run)),
            ("event", _event(EventType.SNAPSHOT_FAILED, "b", "kvm2", failed)),
            ("status", HostStatus(host="kvm2", state=Presence.OFFLINE, reason=Absence.LOST, at=None, hvsnap="0.1.0")),
        ]
        publish.multiple(
            [{"topic": f"hvsnap/{one.host}/{what}", "payload": one.to_json(), "qos": 1} for what, one in said],
            hostname="localhost",
            port=self._broker.port,
            auth={"username": "ops", "password": "secret"},
            tls={"ca_certs": str(self.directory / "ca.pem")},
        )

"""``make demo``: the main path, on real parts, told as a story. Nothing that runs on this host is touched.

A private libvirtd, a tiny guest, a broker and the daemon live in a temporary directory for a minute. Ends with
``demo: OK``, or with what went wrong and a non-zero exit.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho

from tests.conftest import short_directory
from tests.daemon_kit import Daemon
from tests.guest.domain import DiskSpec, Guest, kvm_works, make_image
from tests.guest.image import build
from tests.guest.libvirtd import Libvirtd, wait_for
from tests.mqtt.broker import Broker

HVSNAP = str(Path(sys.executable).parent / "hvsnap")
GUEST = "demo"
FILES = "/mnt/files"
DATA_DIRECTORIES = ("/usr/bin", "/usr/lib/x86_64-linux-gnu", "/usr/sbin")
DATA_BYTES_MAX = 300 << 20
DISK_BYTES = 1 << 30
REST_S = 4


class DemoFailed(Exception):
    """Something is not as it must be."""


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def say(text: str) -> None:
    print(text, flush=True)


def expect(truth: bool, what: str) -> None:
    """Say that it holds, or end the demo."""
    if not truth:
        raise DemoFailed(what)
    say(f"  [ok] {what}")


class Listener:
    """Everybody's monitoring: subscribes to all that hvsnap publishes."""

    def __init__(self, port: int) -> None:
        self.messages: list[tuple[str, dict[str, Any]]] = []
        self._client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
        self._client.on_connect = lambda client, *_rest: client.subscribe("hvsnap/#", qos=1)
        self._client.on_message = self._take
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()

    def _take(self, _client: object, _data: object, message: Any) -> None:
        if message.payload:
            self.messages.append((message.topic, json.loads(message.payload)))

    def events(self) -> list[dict[str, Any]]:
        return [body for topic, body in self.messages if topic.endswith("/event")]

    def close(self) -> None:
        self._client.loop_stop()


class Demo:
    """The parts, and the words for them."""

    def __init__(self, directory: Path, libvirtd: Libvirtd, guest: Guest, daemon: Daemon, listener: Listener) -> None:
        self.directory = directory
        self.libvirtd = libvirtd
        self.guest = guest
        self.daemon = daemon
        self.listener = listener

    def hvsnap(self, *words: str, show: bool = True) -> str:
        """Run a command as a user would, and show it."""
        if show:
            say(f"$ hvsnap {shlex.join(words)}")
        done = subprocess.run(
            [HVSNAP, "--config", str(self.daemon.config), *words], capture_output=True, text=True, cwd=self.directory
        )
        if show:
            for line in (done.stdout + done.stderr).splitlines():
                say(f"  {line}")
        if done.returncode:
            raise DemoFailed(f"hvsnap {words[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def ask(self, *words: str) -> Any:
        """Run a command for its JSON."""
        return json.loads(self.hvsnap("--json", *words, show=False))

    # -- in the guest -----------------------------------------------------------------------------

    def checksum(self, root: str = FILES) -> str:
        """Return one checksum over all files and their names, made by the guest."""
        command = f"cd {root} && find . -type f | sort | xargs -n 50 sha256sum | sha256sum"
        return self.guest.run(command).split()[0]

    def change_files(self, generation: int) -> None:
        """Write, overwrite and delete some files."""
        self.guest.run(
            f"mkdir -p {FILES}/{generation} && for n in 1 2 3 4 5 6; do "
            f"dd if=/dev/urandom of={FILES}/{generation}/$n bs=64k count=10 2>/dev/null; done; "
            f"rm -rf {FILES}/{generation - 2}; echo {generation} > {FILES}/generation; sync"
        )

    def latency(self, seconds: float) -> dict[str, int]:
        """Return IOPS and latencies (us) of 4 KiB random writes, four at a time, of the next seconds."""
        line = self.guest.run(f"stress latency /dev/vdb {seconds:.0f} 4")
        return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", line)}

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Write files all the time, beside those that are compared."""
        self.guest.spawn(
            "mkdir -p /mnt/load; n=0; while [ ! -e /run/enough ]; do n=$(((n + 1) % 20)); "
            "dd if=/dev/urandom of=/mnt/load/$n bs=64k count=2 2>/dev/null; usleep 20000; done; rm /run/enough"
        )
        try:
            yield
        finally:
            self.guest.run("touch /run/enough; while [ -e /run/enough ]; do usleep 20000; done", timeout_s=30)

    # -- the story --------------------------------------------------------------------------------

    def tell(self) -> None:
        rest = self.at_rest()
        sums = [self.checksum()]
        during = self.snapshot_under_load("first")
        ids = [self.newest()]
        for generation, name in ((1, "second"), (2, "third")):
            sums.append(self.snapshot_of_changes(generation, name))
            ids.append(self.newest())
        self.the_chain(ids[1])
        self.back_to(ids[0], sums[0])
        self.beside(ids[2], sums[2])
        self.what_was_told()
        self.figures(rest, during)

    def at_rest(self) -> dict[str, int]:
        title("A guest that runs, and what protects it: nothing yet")
        self.guest.run("mount /dev/vda /mnt")
        self.hvsnap("list")
        title("How fast the guest writes at rest, so that there is something to compare with")
        say("  vda holds its files, and a program writes some more all the time. vdb takes 4 KiB random writes,")
        say("  four at a time; the guest itself measures how long each of them takes.")
        with self.writing():
            rest = self.latency(REST_S)
        say(f"  {rest['iops']} writes a second, p99 {rest['p99'] / 1000:.1f} ms")
        return rest

    def snapshot_under_load(self, name: str) -> dict[str, int]:
        """Make a snapshot of both disks while the guest writes, and measure the guest meanwhile."""
        title("First snapshot: full, of both disks at the same instant, while the guest writes as before")
        say("  Its file systems are frozen for some milliseconds, its writes go to overlays from then on, and the")
        say("  frozen images are read by another process. Then the overlays are merged back.")
        figures: dict[str, int] = {}
        measuring = threading.Thread(target=lambda: figures.update(self.latency(REST_S)))
        with self.writing():
            measuring.start()
            self.hvsnap("snapshot-create", GUEST, "--name", name, "--group")
            measuring.join()
        if not figures:
            raise DemoFailed("the guest's latency could not be measured")
        self.daemon.settled()
        return figures

    def snapshot_of_changes(self, generation: int, name: str) -> str:
        """Change files, and make a snapshot while others are being written; returns the files' checksum."""
        title(f"The guest changes some files; the {name} snapshot reads only what changed")
        self.change_files(generation)
        checksum = self.checksum()
        with self.writing():
            self.hvsnap("snapshot-create", GUEST, "vda", "--name", name)
        self.daemon.settled()
        return checksum

    def the_chain(self, middle: str) -> None:
        title("The chain: three snapshots, each block stored once")
        self.hvsnap("chain-info", f"{GUEST}/vda")
        title("The second one goes: what the third still needs of it becomes the third's")
        self.hvsnap("snapshot-delete", middle, "--dry-run")
        self.hvsnap("snapshot-delete", middle)
        self.hvsnap("snapshot-list", GUEST, "vda")

    def back_to(self, snapshot: str, checksum: str) -> None:
        title("Back to the first snapshot: the guest is shut down, what differs is written, the guest boots again")
        say("  The state that is given up is kept, too: a safety snapshot is made first.")
        self.hvsnap("disk-rollback", f"{GUEST}/vda", snapshot, "--stop", "--start")
        self.guest.reconnect()
        self.guest.run("mount /dev/vda /mnt")
        expect(self.checksum() == checksum, "the guest reads its files as they were at the first snapshot")

    def beside(self, snapshot: str, checksum: str) -> None:
        title("And the third? A new disk is made of it, and attached beside the first")
        target = self.directory / "third.qcow2"
        self.hvsnap("disk-create", snapshot, str(target))
        shutil.chown(target, "libvirt-qemu", "libvirt-qemu")
        xml = (
            f"<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{target}'/>"
            "<target dev='vdc' bus='virtio'/></disk>"
        )
        self.guest.domain().attachDevice(xml)
        self.guest.run("until [ -b /dev/vdc ]; do usleep 50000; done; mkdir -p /tmp/third && mount /dev/vdc /tmp/third")
        expect(self.checksum("/tmp/third/files") == checksum, "the guest reads on it what it had at the third snapshot")

    def newest(self) -> str:
        return str(self.ask("snapshot-list", GUEST, "vda")["snapshots"][0]["id"])

    def what_was_told(self) -> None:
        title("What a broker was told meanwhile (mosquitto_sub -t 'hvsnap/#' sees it)")
        wait_for(lambda: any(e["type"] == "disk.created" for e in self.listener.events()), "the last event", 20)
        for event in self.listener.events():
            payload = event["payload"]
            words = [str(payload[key]) for key in ("target", "name", "method", "path") if payload.get(key)]
            say(f"  {event['sequence']:>3} {event['type']:<22} {' '.join(words)}")
        sequences = [event["sequence"] for event in self.listener.events()]
        expect(sequences == sorted(set(sequences)), f"{len(sequences)} events, each once, in order")

    def figures(self, rest: dict[str, int], during: dict[str, int]) -> None:
        title("Figures")
        first = self.ask("snapshot-list", GUEST, "vda")["snapshots"][-1]
        told = [body for topic, body in self.listener.messages if topic.endswith(f"{first['id']}/progress")]
        rate = told[-1].get("rate_bytes_s", 0) if told else 0
        amounts = [f"{first[key] >> 20} MiB" for key in ("read_bytes", "size_bytes", "stored_bytes")]
        at = f", at {rate / 2**20:.0f} MiB/s" if rate else ""
        say(f"  read {amounts[0]} of vda's {amounts[1]} for the first snapshot, stored {amounts[2]}{at}")
        for name, figures in (("at rest", rest), ("while it was taken", during)):
            say(
                f"  the guest's random writes {name + ':':<20} {figures['iops']:>5} a second, "
                f"p50 {figures['p50'] / 1000:.1f} ms, p99 {figures['p99'] / 1000:.1f} ms"
            )
        cores = os.cpu_count() or 1
        if not kvm_works():
            say(f"  (Without KVM the guest needs a processor of its own, and hvsnap compresses on all {cores};")
            say("  `make bench` takes the two apart, and compares with other tools.)")


def make_data_disk(directory: Path) -> Path:
    """Make a qcow2 with an ext4 of some hundred MiB of real files: programs, libraries, documents."""
    source = directory / "source" / "files"
    source.mkdir(parents=True)
    size_bytes = 0
    for root in DATA_DIRECTORIES:
        for path in sorted(Path(root).iterdir()):
            if path.is_symlink() or not path.is_file() or size_bytes > DATA_BYTES_MAX:
                continue
            shutil.copyfile(path, source / path.name)
            size_bytes += path.stat().st_size
    raw, image = directory / "data.raw", directory / "data.qcow2"
    with raw.open("wb") as out:
        out.truncate(DISK_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", str(directory / "source"), str(raw)], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)], check=True)
    raw.unlink()
    shutil.rmtree(directory / "source")
    return image


def run(stack: contextlib.ExitStack) -> None:
    directory = short_directory()
    stack.callback(shutil.rmtree, directory, ignore_errors=True)
    title("Setting the stage")
    say(f"  everything lives in {directory}, and goes with the demo; what runs on this host is left alone")
    image = build()
    disks = [DiskSpec(make_data_disk(directory)), DiskSpec(make_image(directory / "scratch.qcow2", "256M"))]
    libvirtd = stack.enter_context(Libvirtd(directory / "libvirt"))
    broker = Broker(directory / "broker")
    broker.start()
    stack.callback(broker.stop)
    guest = Guest(libvirtd, directory, GUEST, disks, image).define()
    began = time.monotonic()
    guest.start()
    stack.callback(guest.destroy)
    say(f"  a libvirtd, a broker, and a guest that booted in {time.monotonic() - began:.1f} s")
    daemon = Daemon(directory, libvirtd.uri, mqtt=f'url = "mqtt://127.0.0.1:{broker.port}"')
    listener = Listener(broker.port)
    stack.callback(listener.close)
    daemon.start()
    stack.callback(daemon.stop)
    Demo(directory, libvirtd, guest, daemon, listener).tell()


def interrupt(*_signal: object) -> None:
    """End the demo; cleaning up is not interrupted a second time."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main() -> int:
    if os.geteuid() != 0:
        print("the demo starts a private libvirtd: run it as root, or `make demo`, which uses sudo", file=sys.stderr)
        return 1
    began = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    try:
        with contextlib.ExitStack() as stack:
            run(stack)
    except KeyboardInterrupt:
        print("\ndemo: interrupted; everything is cleaned up", file=sys.stderr)
        return 130
    except Exception as error:  # whatever it is, it is told, and the exit says so
        print(f"\ndemo: FAILED: {error}", file=sys.stderr)
        return 1
    say(f"\n({time.monotonic() - began:.0f} s)")
    say("demo: OK")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Disks whose qcow2 image has LUKS inside, opened by a secret that libvirt keeps."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import libvirt

PASSPHRASE = b"a pass=phrase, with a comma"
_ATTEMPTS = 20


@dataclass(frozen=True)
class Secret:
    """A secret of libvirt's, and the file that the tests' own tools read it from."""

    name: str  # as in <secret>: uuid='...' or usage='...'
    file: Path

    @property
    def object(self) -> list[str]:
        return ["--object", f"secret,id=key,file={self.file}"]


def keep_secret(uri: str, directory: Path, *, usage: str = "", private: bool = False, value: bool = True) -> Secret:
    """Make libvirt keep a secret; it goes by its usage where one is given."""
    kind = f"<usage type='volume'><volume>{usage}</volume></usage>" if usage else ""
    yes = "yes" if private else "no"
    connection = libvirt.open(uri)
    kept = connection.secretDefineXML(f"<secret ephemeral='no' private='{yes}'>{kind}</secret>")
    if value:
        kept.setValue(PASSPHRASE)
    return Secret(f"usage='{usage}'" if usage else f"uuid='{kept.UUIDString()}'", passphrase_file(directory))


def passphrase_file(directory: Path) -> Path:
    """Return a file with the passphrase."""
    file = directory / "passphrase"
    file.write_bytes(PASSPHRASE)
    return file


def make_luks(path: Path, size: str, secret: Secret, *options: str) -> Path:
    """Make an encrypted image. QEMU 7.2 measures time for it, and fails now and then."""
    encrypt = ["-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=20"]
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", *secret.object, *encrypt, *options, str(path), size]
    for _ in range(_ATTEMPTS):
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode == 0:
            return path
        if "accurate CPU usage" not in done.stderr:
            break
    raise RuntimeError(done.stderr)


def opened_luks(path: Path, secret: Secret) -> tuple[list[str], str]:
    """How QEMU's tools open such an image."""
    name = str(path).replace(",", ",,")
    return [*secret.object, "--image-opts"], f"driver=qcow2,file.filename={name},encrypt.key-secret=key"

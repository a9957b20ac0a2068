"""Certificates for TLS between a publisher and a broker."""

from __future__ import annotations

import ssl
from pathlib import Path

import trustme


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

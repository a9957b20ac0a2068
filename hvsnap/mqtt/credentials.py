"""What proves who we are and who the broker is: the files behind ``[mqtt]``, read anew for every connection.

So a password or certificate that is replaced works from the next attempt on. Everything here blocks.
"""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from hvsnap import config
from hvsnap.errors import ConfigInvalid
from hvsnap.secret import read_private, read_secret

PORT = 1883
TLS_PORT = 8883


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the broker is, and whether it must speak TLS."""

    host: str
    port: int
    tls: bool

    def __str__(self) -> str:
        """Return it as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a connection needs. ``tls`` is there exactly if the endpoint asks for it: there is no way without."""

    endpoint: Endpoint
    username: str | None
    password: str | None = field(repr=False)
    tls: ssl.SSLContext | None


def endpoint(url: str) -> Endpoint:
    """Return what a URL (checked by the configuration) names."""
    parts = urlsplit(url)
    tls = parts.scheme == "mqtts"
    return Endpoint(parts.hostname or "", parts.port or (TLS_PORT if tls else PORT), tls)


def load(settings: config.Mqtt) -> Credentials:
    """Read the files; raises :class:`ConfigInvalid` with the key, what is wrong, and what to do."""
    where = endpoint(settings.url)
    _check_combination(settings, where)
    password = read_secret(settings.password_file, "mqtt.password_file") if settings.password_file else None
    tls = _tls(settings) if where.tls else None
    return Credentials(where, settings.username or None, password, tls)


def _check_combination(settings: config.Mqtt, where: Endpoint) -> None:
    """Refuse settings of which one would silently have no effect."""
    if re.search(r"[\x00-\x1f\x7f-\x9f]", settings.topic_prefix):
        raise ConfigInvalid("mqtt.topic_prefix: control characters cannot be in a topic")
    if settings.password_file and not settings.username:
        raise ConfigInvalid("mqtt.password_file: there is no username to go with it", hint="set mqtt.username")
    if bool(settings.cert_file) != bool(settings.key_file):
        key = "cert_file" if settings.cert_file else "key_file"
        raise ConfigInvalid(f"mqtt.{key}: a client certificate needs both", hint="set mqtt.cert_file and mqtt.key_file")
    for key in ("ca_file", "cert_file"):
        if getattr(settings, key) and not where.tls:
            hint = f"a TLS connection is mqtts://, usually on port {TLS_PORT}"
            raise ConfigInvalid(f"mqtt.{key}: {settings.url} is without TLS", hint=hint)


def _tls(settings: config.Mqtt) -> ssl.SSLContext:
    """Return the TLS side: the broker's certificate and name are always verified."""
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
    except OSError as error:  # ssl.SSLError is one
        raise _unusable("mqtt.ca_file", settings.ca_file, error) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.cert_file:
        read_private(settings.key_file, "mqtt.key_file")
        try:
            # A password is given so that an encrypted key fails, instead of asking at a terminal.
            context.load_cert_chain(settings.cert_file, settings.key_file, password="")
        except OSError as error:
            raise _unusable("mqtt.cert_file", f"{settings.cert_file} with {settings.key_file}", error) from error
    return context


def _unusable(key: str, path: str, error: OSError) -> ConfigInvalid:
    why = getattr(error, "reason", None) or error.strerror or str(error)
    return ConfigInvalid(f"{key}: {path}: {why}", hint="PEM files are expected, of which the key is not encrypted")

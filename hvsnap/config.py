"""The configuration: one TOML file into frozen settings. An unknown key or a wrong value stops the start.

Keys and defaults: docs/configuration.md.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hvsnap.errors import ConfigInvalid

DEFAULT_PATH = Path("/etc/hvsnap/hvsnap.toml")
ENVIRONMENT = "HVSNAP_CONFIG"
MIB = 1 << 20


def _absolute(path: str) -> str:
    if path and not os.path.isabs(path):
        raise ValueError("an absolute path is expected")
    return path


def _listen(text: str) -> str:
    if text:
        parts = urlsplit(f"//{text}")
        try:
            port = parts.port
        except ValueError:
            port = None
        if not parts.hostname or not port or parts.netloc != text or "@" in text:
            raise ValueError("expected HOST:PORT, with [HOST]:PORT for IPv6, or empty for no metrics")
    return text


def _store_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "s3":
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{2,62}", parts.netloc):
            raise ValueError("expected s3://BUCKET/PREFIX, with a bucket's name of 3 to 63 characters of a-z 0-9 . -")
        if not re.fullmatch(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)*/?", parts.path):
            raise ValueError("expected s3://BUCKET/PREFIX, with a prefix of letters, digits and . _ - between slashes")
        return url
    if parts.scheme != "file" or parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError("expected file:///absolute/path or s3://BUCKET/PREFIX")
    return url


def _endpoint(url: str) -> str:
    parts = urlsplit(url)
    if url and (parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/")):
        raise ValueError("expected http://HOST[:PORT] or https://HOST[:PORT]")
    if parts.username or parts.password:
        raise ValueError("keys go into access_key and the file that secret_key_file names")
    return url


def _mqtt_url(url: str) -> str:
    if not url:
        return url
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or port == 0 or parts.path not in ("", "/"):
        raise ValueError("expected mqtt://HOST[:PORT] or mqtts://HOST[:PORT], or empty for no MQTT")
    if parts.username or parts.password:
        raise ValueError("the user goes into username, the password into the file that password_file names")
    return url


def _rate(bytes_s: int) -> int:
    if 0 < bytes_s < MIB:
        raise ValueError(
            "expected 0 for no limit, or at least 1048576 bytes a second: slower, no capture would ever end"
        )
    return bytes_s


def _compression(text: str) -> str:
    match = re.fullmatch(r"zstd:(\d{1,2})", text)
    if match is None or not 1 <= int(match[1]) <= 19:
        raise ValueError("expected zstd:LEVEL with a level from 1 to 19")
    return text


def _topic(text: str) -> str:
    if not text or text.startswith("$") or re.search(r"[+#\0]|^/|/$|//", text):
        raise ValueError("expected topic levels without + # or empty ones")
    return text


def _topic_or_none(text: str) -> str:
    return _topic(text) if text else text


AbsolutePath = Annotated[str, AfterValidator(_absolute)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _given(path: str) -> str:
    if not path:
        raise ValueError("a path is expected")
    return path


RequiredPath = Annotated[AbsolutePath, AfterValidator(_given)]


class QmpDisk(_Table):
    """A disk of a bare guest, for as long as the guest is off and was never seen running."""

    path: RequiredPath
    format: Literal["qcow2", "raw"] = "qcow2"


class QmpGuest(_Table):
    """A bare QEMU guest, reached through its QMP socket."""

    socket: RequiredPath
    agent: AbsolutePath = ""
    capture: Literal["fleece", "redirect"] = "fleece"
    disks: dict[str, QmpDisk] = Field(default_factory=dict)


class Hypervisor(_Table):
    """Where the guests are."""

    libvirt_uri: str = "qemu:///system"
    qmp: dict[str, QmpGuest] = Field(default_factory=dict)


class Capture(_Table):
    """How snapshots are taken."""

    parallel: int = Field(default=2, ge=1, le=32)
    overlay_dir: AbsolutePath = ""
    overlay_limit_bytes: int = Field(default=0, ge=0)
    space_reserve_bytes: int = Field(default=256 * MIB, ge=0)
    freeze_timeout_s: float = Field(default=5.0, gt=0, le=9.0, strict=False)
    compression: Annotated[str, AfterValidator(_compression)] = "zstd:1"
    impact_budget_pct: float = Field(default=10.0, ge=0.0, le=1000.0, strict=False)
    rate_max_bytes_s: Annotated[int, AfterValidator(_rate)] = Field(default=0, ge=0)


class Alarms(_Table):
    """When what has changed from one snapshot to the next is unusual (:class:`hvsnap.capture.unusual.Rules`)."""

    enabled: bool = True
    min_bytes: int = Field(default=512 * MIB, ge=1)
    history_min: int = Field(default=8, ge=2, le=400)
    rate_factor: float = Field(default=4.0, ge=1.0, le=1000.0, strict=False)
    stored_share: float = Field(default=0.85, ge=0.2, le=1.0, strict=False)
    hold_days: float = Field(default=14.0, ge=0.0, le=3650.0, strict=False)


class S3(_Table):
    """An S3 endpoint. Without keys here, the usual AWS_* variables and instance roles are asked."""

    endpoint: Annotated[str, AfterValidator(_endpoint)] = ""
    region: str = "default"
    access_key: str = ""
    secret_key_file: AbsolutePath = ""


class Encryption(_Table):
    """The store's key: with one, a new store is encrypted, and an existing one must be."""

    key_file: AbsolutePath = ""


class Store(_Table):
    """Where blocks and manifests are kept."""

    url: Annotated[str, AfterValidator(_store_url)] = "file:///var/lib/hvsnap/store"
    read_only: bool = False
    verify_days: int = Field(default=30, ge=0, le=3650)
    verify_bytes_per_s: int = Field(default=16 * MIB, ge=0)
    s3: S3 = S3()
    encryption: Encryption = Encryption()

    @property
    def path(self) -> Path | None:
        """The store's directory; None where it is a bucket."""
        parts = urlsplit(self.url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    @property
    def bucket(self) -> tuple[str, str]:
        """The store's bucket and prefix."""
        parts = urlsplit(self.url)
        return parts.netloc, parts.path.strip("/")

    @model_validator(mode="after")
    def _keys_come_in_pairs(self) -> Store:
        if bool(self.s3.access_key) != bool(self.s3.secret_key_file):
            raise ValueError("s3: access_key and secret_key_file are given together or not at all")
        return self


class Drill(_Table):
    """Restore drills: where snapshots are restored for trial, how much of them, how often, how fast."""

    dir: AbsolutePath = ""
    max_bytes: int = Field(default=64 << 30, ge=0)
    every_days: int = Field(default=0, ge=0, le=3650)
    bytes_per_s: int = Field(default=16 * MIB, ge=0)


class Limits(_Table):
    """Quotas (SERVICE 3.1, 5.2)."""

    snapshots_per_disk: int = Field(default=64, ge=1, le=4096)
    policies: int = Field(default=100, ge=0, le=10_000)


class Policies(_Table):
    """Automatic snapshots."""

    late_max_s: float = Field(default=3600.0, ge=60.0, le=86_400.0, strict=False)
    workers: int = Field(default=2, ge=1, le=32)
    release_days: int = Field(default=30, ge=0, le=3650)
    """A disk that has been gone from its guest for so long is released; 0: only by its owner's word."""


class Usage(_Table):
    """What storage costs (SERVICE 9.3)."""

    price_per_gib_month: float = Field(default=0.0, ge=0.0, le=1e6, strict=False)
    currency: str = Field(default="", max_length=16)
    prepaid_gib: float = Field(default=0.0, ge=0.0, le=1e9, strict=False)


class Mqtt(_Table):
    """The broker that events are published to."""

    url: Annotated[str, AfterValidator(_mqtt_url)] = ""
    topic_prefix: Annotated[str, AfterValidator(_topic)] = "hvsnap"
    discovery_prefix: Annotated[str, AfterValidator(_topic_or_none)] = ""
    username: str = ""
    password_file: AbsolutePath = ""
    ca_file: AbsolutePath = ""
    cert_file: AbsolutePath = ""
    key_file: AbsolutePath = ""


class Api(_Table):
    """Who of those that can connect to the socket may do what; without groups all may do all."""

    read_group: str = ""
    admin_group: str = ""


class Metrics(_Table):
    """The Prometheus endpoint."""

    listen: Annotated[str, AfterValidator(_listen)] = ""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port to listen at; ``listen`` is not empty."""
        parts = urlsplit(f"//{self.listen}")
        return parts.hostname or "", parts.port or 0


class Settings(_Table):
    """The whole configuration."""

    state_dir: AbsolutePath = "/var/lib/hvsnap"
    socket: AbsolutePath = "/run/hvsnap/hvsnap.sock"
    socket_group: str = ""
    host_id: str = Field(default_factory=platform.node, min_length=1, max_length=255)
    api: Api = Api()
    hypervisor: Hypervisor = Hypervisor()
    capture: Capture = Capture()
    alarms: Alarms = Alarms()
    store: Store = Store()
    drill: Drill = Drill()
    limits: Limits = Limits()
    policies: Policies = Policies()
    usage: Usage = Usage()
    mqtt: Mqtt = Mqtt()
    metrics: Metrics = Metrics()

    @model_validator(mode="after")
    def _groups_can_connect(self) -> Settings:
        if (self.api.read_group or self.api.admin_group) and not self.socket_group:
            raise ValueError("api: socket_group is expected beside read_group and admin_group: who can connect at all")
        return self

    @property
    def run_dir(self) -> Path:
        """Where private sockets live: beside the daemon's own."""
        return Path(self.socket).parent


def load(path: Path | None = None) -> Settings:
    """Return the settings of ``path``, of ``$HVSNAP_CONFIG``, of /etc/hvsnap/hvsnap.toml, or the defaults.

    A file that is named must exist; the one in /etc need not. Raises :class:`ConfigInvalid` with file, key and what
    was expected.
    """
    named = path or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    file = named or DEFAULT_PATH
    try:
        text = file.read_text()
    except FileNotFoundError as error:
        if named is None:
            return Settings()
        raise ConfigInvalid(f"{file}: there is no such file", hint="check --config and $HVSNAP_CONFIG") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{file}: {error}") from error
    return parse(text, str(file))


def parse(text: str, name: str) -> Settings:
    """Return the settings that a TOML text holds; ``name`` is for errors."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigInvalid(f"{name}: {error}", hint="the file must be TOML") from error
    try:
        return Settings.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigInvalid(f"{name}: {key}: there is no such key", hint=_nearest(key)) from error
        what = first["msg"].removeprefix("Value error, ")
        if not key:
            raise ConfigInvalid(f"{name}: {what}", hint="docs/configuration.md explains the keys") from error
        raise ConfigInvalid(f"{name}: {key}: {what}", hint=f"the value is {_shown(first['input'])}") from error


def keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Yield every key that the configuration knows, dotted; NAME stands where names are the user's own."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from keys(kind, f"{prefix}{name}.")
        elif get_origin(kind) is dict:
            yield from keys(get_args(kind)[1], f"{prefix}{name}.NAME.")
        else:
            yield f"{prefix}{name}"


def _nearest(key: str) -> str:
    close = difflib.get_close_matches(key, list(keys()), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "docs/configuration.md lists the keys"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

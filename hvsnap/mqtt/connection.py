"""One connection to the broker: opening it, publishing on it, and what its failures mean.

aiomqtt does the work. What this adds is told by the places where it reaches into it (:class:`BrokerClient`): a broker
that refuses a message says so in its acknowledgement, one that closes the connection instead of answering should not
be waited for, and a descriptor that is closed must not be registered with the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from dataclasses import dataclass
from typing import Any, NoReturn

import aiomqtt
from aiomqtt import ProtocolVersion
from paho.mqtt.client import Client as PahoClient
from paho.mqtt.client import DisconnectFlags
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from hvsnap.errors import ConfigInvalid
from hvsnap.mqtt.credentials import Credentials

# Reason codes of MQTT 5 (2.4); paho translates those of 3.1.1 into them.
_UNSPECIFIED = 0x80
_UNSUPPORTED_VERSION = 0x84
_LASTING = {0x85: "client id not valid", 0x86: "wrong user name or password", 0x87: "not authorised", 0x8A: "banned"}
_TAKEN_OVER = 0x8E

_quiet = logging.getLogger(f"{__name__}.paho")
"""For paho, which logs as errors what it returns as errors, too: we tell those once, not at every attempt."""
_quiet.setLevel(logging.CRITICAL)


@dataclass(frozen=True, slots=True)
class Timings:
    """Deadlines and intervals, in seconds."""

    answer_s: float = 10.0
    """For the broker to accept a connection, and to acknowledge a message."""

    keepalive_s: int = 15
    """Silence after which the broker is asked whether it is there; twice that, and it is not."""

    pause_min_s: float = 1.0
    pause_max_s: float = 60.0
    """Between attempts."""

    status_s: float = 60.0
    """After which the status is published again."""

    farewell_s: float = 5.0
    """For what is waiting, and for saying that this is the end."""

    progress_s: float = 1.0
    """Between two reports of the progress of one snapshot or task."""


class BrokerFailed(Exception):
    """The broker cannot be used now; the message says why. ``lasting``: until somebody changes something."""

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class Refused(BrokerFailed):
    """The broker did not take a message."""


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes, retained, when we are gone without a word."""

    topic: str
    payload: bytes


class BrokerClient(aiomqtt.Client):
    """aiomqtt's client, which also tells what it keeps to itself."""

    refusal: ReasonCode | None = None
    _over = False

    def _on_publish(
        self, client: PahoClient, userdata: Any, mid: int, reason_code: ReasonCode, properties: Properties
    ) -> None:
        if reason_code.is_failure:
            self.refusal = reason_code
        super()._on_publish(client, userdata, mid, reason_code, properties)

    def _on_disconnect(
        self,
        client: PahoClient,
        userdata: Any,
        flags: DisconnectFlags,
        reason_code: ReasonCode,
        properties: Properties | None = None,
    ) -> None:
        # May be called in the thread that connects.
        self._loop.call_soon_threadsafe(self._closed_early, reason_code)
        super()._on_disconnect(client, userdata, flags, reason_code, properties)
        self._look_at_the_end()

    def _closed_early(self, reason_code: ReasonCode) -> None:
        if not self._over and not self._connected.done():
            self._connected.set_exception(_ClosedEarly(reason_code))

    # aiomqtt registers the number of a descriptor some time after it was told of it. By then the connection may be
    # closed, and the number another's: a disk's, for one. So it is looked at when it is registered.

    def _on_socket_open(self, client: PahoClient, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch, client, sock)

    def _on_socket_register_write(self, client: PahoClient, userdata: Any, sock: Any) -> None:
        self._loop.call_soon_threadsafe(self._watch_writable, client, sock)

    def _watch(self, client: PahoClient, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.add_reader(sock.fileno(), self._readable, client)
            self._misc_task = self._loop.create_task(self._misc_loop())

    def _watch_writable(self, client: PahoClient, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.add_writer(sock.fileno(), self._writable, client)

    def _readable(self, client: PahoClient) -> None:
        try:
            client.loop_read()
            # What TLS has decrypted already makes no descriptor readable.
            while isinstance(sock := client.socket(), ssl.SSLSocket) and sock.pending():
                client.loop_read()
        except Exception as error:
            self._broken(error)

    def _writable(self, client: PahoClient) -> None:
        try:
            client.loop_write()
        except Exception as error:
            self._broken(error)

    def _broken(self, error: Exception) -> None:
        if not self._disconnected.done():
            self._disconnected.set_exception(error)
            self._look_at_the_end()

    def _look_at_the_end(self) -> None:
        """Whoever waits for the end of the connection gets its error; that nobody does is none."""
        if self._disconnected.done() and not self._disconnected.cancelled():
            self._disconnected.exception()

    def cut(self) -> None:
        """Close the connection without a word, so that the broker publishes the will."""
        self._over = True
        connected = self._client.socket()
        if isinstance(connected, socket.socket):
            # The reader then sees the end and cleans up; closing it here would leave the loop with a dead descriptor.
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def cut_when_open(self, opening: asyncio.Future[Any]) -> None:
        """Close what an attempt opened that nobody waits for any more."""
        if not opening.cancelled():
            opening.exception()
        self.cut()


class _ClosedEarly(aiomqtt.MqttCodeError):
    """The broker closed the connection in place of an answer."""


class Connection:
    """A connection that the broker has accepted. Publishes one message at a time, in the order of the calls."""

    def __init__(self, client: BrokerClient, *, version: ProtocolVersion, tls: bool) -> None:
        self._client = client
        self._tls = tls
        self._turn = asyncio.Lock()
        self.version = version

    async def publish(
        self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: int | None = None
    ) -> None:
        """Publish; with QoS 1 the broker has taken the message on return.

        Raises :class:`Refused` when it says no (which MQTT 3.1.1 cannot express), :class:`BrokerFailed`.
        """
        # One at a time: the refusal that comes in is then that of this message.
        async with self._turn:
            self._client.refusal = None
            try:
                await self._client.publish(topic, payload, qos, retain, self._properties(payload, expiry_s))
            except aiomqtt.MqttError as error:
                raise explain(error, tls=self._tls) from error
            if self._client.refusal is not None:
                raise Refused(f"the broker refuses messages to {topic}: {self._client.refusal}", lasting=True)

    async def lost(self) -> NoReturn:
        """Return never; raise :class:`BrokerFailed` when the connection is lost."""
        try:
            async for _unasked in self._client.messages:
                pass
        except aiomqtt.MqttError as error:
            raise explain(error, tls=self._tls) from error
        raise BrokerFailed("the broker closed the connection")

    async def close(self) -> None:
        """Say goodbye, so that the broker does not publish the will, and close."""
        try:
            await self._client.__aexit__(None, None, None)
        except aiomqtt.MqttError:
            pass
        finally:
            self.cut()

    def cut(self) -> None:
        """Close without goodbye: the broker then publishes the will."""
        self._client.cut()

    def _properties(self, payload: bytes, expiry_s: int | None) -> Properties | None:
        if self.version is not ProtocolVersion.V5:
            return None
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        if payload:  # an empty one clears a retained message
            properties.ContentType = "application/json"
            properties.PayloadFormatIndicator = 1
        if expiry_s is not None:
            properties.MessageExpiryInterval = expiry_s
        return properties


async def connect(credentials: Credentials, identifier: str, will: Will, timings: Timings) -> Connection:
    """Return a new connection: MQTT 5, or 3.1.1 if the broker does not know that. Raises :class:`BrokerFailed`.

    A cancelled attempt ends by itself in the background, and is closed.
    """
    try:
        return await _connect(credentials, identifier, will, timings, ProtocolVersion.V5)
    except _OtherVersion as first:
        try:
            return await _connect(credentials, identifier, will, timings, ProtocolVersion.V311)
        except _OtherVersion as second:
            raise (second if second.certain else first) from second


class _OtherVersion(BrokerFailed):
    """Perhaps another version of MQTT is needed; ``certain`` if the broker says so, and did not just hang up."""

    certain = False


async def _connect(
    credentials: Credentials, identifier: str, will: Will, timings: Timings, version: ProtocolVersion
) -> Connection:
    where = credentials.endpoint
    if where.tls != (credentials.tls is not None):
        raise ConfigInvalid(f"mqtt.url: {where} without the TLS settings that it needs")
    client = BrokerClient(
        where.host,
        where.port,
        username=credentials.username,
        password=credentials.password,
        identifier=identifier,
        protocol=version,
        will=aiomqtt.Will(will.topic, will.payload, qos=1, retain=True),
        # A session has nothing to keep for us: what is not acknowledged is in the catalog.
        clean_session=None if version is ProtocolVersion.V5 else True,
        timeout=timings.answer_s,
        keepalive=timings.keepalive_s,
        max_queued_incoming_messages=1,
        logger=_quiet,
        tls_context=credentials.tls,
    )
    opening = asyncio.ensure_future(client.__aenter__())
    try:
        await asyncio.shield(opening)
    except asyncio.CancelledError:
        # Its thread cannot be stopped; what it opens is closed as soon as it is open.
        opening.add_done_callback(client.cut_when_open)
        raise
    except aiomqtt.MqttError as error:
        client.cut()
        raise explain(error, tls=where.tls, user=credentials.username) from error
    except UnicodeError as error:  # not even a name that could be asked for
        raise BrokerFailed(f"the broker's name {where.host!r} is no host name: {error}", lasting=True) from error
    return Connection(client, version=version, tls=where.tls)


def explain(error: aiomqtt.MqttError, *, tls: bool, user: str | None = None) -> BrokerFailed:
    """Return what an error of aiomqtt means, in words for the status."""
    # aiomqtt keeps some causes as the context alone.
    cause = error.__cause__ or error.__context__
    for one in (error, cause):
        if isinstance(one, aiomqtt.MqttCodeError):
            return _explain_code(one, tls=tls, user=user)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return BrokerFailed(f"TLS: the broker's certificate is refused: {cause.verify_message}", lasting=True)
    if isinstance(cause, ssl.SSLError):
        why = (cause.reason or str(cause)).replace("_", " ").lower()
        return BrokerFailed(f"TLS: {why} (does the broker speak TLS on this port?)", lasting=True)
    if isinstance(cause, socket.gaierror):
        return BrokerFailed(f"the broker's name cannot be resolved: {cause.strerror}")
    if isinstance(cause, TimeoutError):
        return BrokerFailed("the broker does not answer in time")
    if isinstance(cause, OSError):
        hint = " (does the broker speak TLS on this port?)" if tls and isinstance(cause, ConnectionResetError) else ""
        return BrokerFailed(f"the broker cannot be reached: {cause.strerror or cause}{hint}")
    return BrokerFailed("the broker closed the connection" if cause is None else f"the connection was lost: {cause}")


def _explain_code(error: aiomqtt.MqttCodeError, *, tls: bool, user: str | None) -> BrokerFailed:
    code = error.rc.value if isinstance(error.rc, ReasonCode) else None
    if code == _UNSUPPORTED_VERSION:
        other = _OtherVersion("the broker speaks neither MQTT 5 nor 3.1.1")
        other.certain = True
        return other
    if isinstance(error, _ClosedEarly) and code not in _LASTING:
        hint = "does it ask for a client certificate?" if tls else "is this its TLS port?"
        return _OtherVersion(f"the broker closed the connection without an answer ({hint})")
    if code in _LASTING:
        who = f"user {user}" if user else "connections without a user name"
        return BrokerFailed(f"the broker refuses {who}: {_LASTING[code]}", lasting=True)
    if code == _TAKEN_OVER:
        return BrokerFailed("another client connected with this host's id: is host_id used twice?")
    if code in (None, _UNSPECIFIED):
        return BrokerFailed("the connection was lost")
    return BrokerFailed(f"the broker closed the connection: {error.rc}")

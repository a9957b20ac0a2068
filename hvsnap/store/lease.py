"""One writer per repository: a lease in the repository itself, that a dead holder loses and a living one keeps.

The lease is a sequence of small objects, ``lease/NUMBER``. Whoever creates the next number holds the lease, and renews
it by creating the next one again. Creating is exclusive in every object store, so the numbers settle all races, without
clocks that agree, and without any other kind of conditional write. A holder that finds its next number taken has lost
the lease, and stops at once. Format: docs/format.md, "Lease".
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from dataclasses import asdict, dataclass

from blake3 import blake3

from hvsnap.errors import NotFound, ObjectExists, StoreBusy, StoreFailed
from hvsnap.ports import ObjectStore
from hvsnap.store.sole import SoleOwner

log = logging.getLogger(__name__)

LEASE = "lease"
TTL_S = 60.0
"""A lease that was not renewed for so long may be taken by another writer."""

TTL_S_MAX = 86_400.0
"""A term that claims more is damaged: nobody would ever get the lease again."""

BYTES_MAX = 64 * 1024
RENEWALS_PER_TTL = 3
CERTAIN_SHARE = 2 / 3
"""Of that time: the rest is for a removal that was begun, and takes so long (:data:`hvsnap.store.s3.REMOVAL_S`)."""

POLL_S_MAX = 2.0
DIGITS = 12


@dataclass(frozen=True, slots=True)
class Term:
    """What one object of the lease says. ``nonce`` makes every term another one, so that none is taken for another.

    ``boot``: the holder has the store's directory locked, in this boot of its host; "" if it has not.
    """

    holder: str
    host: str
    ttl_s: float
    released: bool
    nonce: str
    boot: str = ""

    def encode(self) -> bytes:
        """Return the object's bytes."""
        values = {"format": "hvsnap-lease", "version": 1, **asdict(self)}
        return json.dumps(values | {"check": _check(values)}).encode()

    @classmethod
    def decode(cls, data: bytes) -> Term:
        """Return what an object says; one that is damaged counts as held by somebody unknown, for the usual time."""
        try:
            raw = json.loads(data[:BYTES_MAX])
            check = raw.pop("check", None)  # earlier releases wrote none
            ttl_s = float(raw["ttl_s"])
            if (check is None or check == _check(raw)) and 0 < ttl_s <= TTL_S_MAX:
                boot = str(raw.get("boot", ""))
                return cls(str(raw["holder"]), str(raw["host"]), ttl_s, raw["released"] is True, "", boot)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            pass
        return cls("?", "an unknown host", TTL_S, False, "")


class WriterLease:
    """The lease of one repository for ``holder``, who is unique and stays the same over restarts."""

    def __init__(
        self, objects: ObjectStore, holder: str, host: str, *, ttl_s: float = TTL_S, sole: SoleOwner | None = None
    ) -> None:
        """``sole`` is the lock of a store that is a directory of this host."""
        self._sole = sole
        self._boot = ""
        self._objects = objects
        self._holder = holder
        self._host = host
        self._ttl_s = ttl_s
        self._number = 0
        self._renewed_at = 0.0
        self._unanswered: dict[bytes, float] = {}
        """Terms that may have begun, since a request's answer was lost: their bytes, and when it was made."""

    @property
    def number(self) -> int:
        """The present term's number; 0 while the lease is not held."""
        return self._number

    @property
    def certain(self) -> bool:
        """Whether nobody else can have taken the lease: asked before anything is removed from the repository."""
        return self._number > 0 and _now() - self._renewed_at < self._ttl_s * CERTAIN_SHARE

    async def acquire(self) -> None:
        """Take the lease: at once where it is free, our own, or its holder is seen to be dead; else when it expires.

        Raises :class:`StoreBusy` when the holder is alive, :class:`StoreFailed` when the store does not answer.
        """
        if self._sole is not None:
            self._boot = await asyncio.to_thread(self._sole.take)
        number, term = await self._latest()
        while term is not None and not term.released and term.holder != self._holder:
            if self._boot and term.boot == self._boot:
                # Its lock was on the directory that is locked by us now, under this very kernel.
                log.warning("the store's last writer, on %s, has died: its lease is taken over", term.host)
                break
            if await self._await_expiry(number, term):
                break
            number, term = await self._latest()  # given back meanwhile
        try:
            await self._create(number + 1)
        except ObjectExists as error:
            raise _busy((await self._latest())[1]) from error
        await self._forget_before(self._number)

    async def keep(self) -> None:
        """Renew until cancelled. Raises :class:`StoreBusy` when another writer has taken the lease over."""
        while True:
            await asyncio.sleep(self._ttl_s / RENEWALS_PER_TTL)
            try:
                await self._create(self._number + 1)
                await self._forget_before(self._number)
            except ObjectExists as error:
                raise _busy((await self._latest())[1]) from error
            except StoreFailed:
                # Nobody is sure of the lease meanwhile, so nothing is removed; what is written harms nobody.
                continue

    async def release(self) -> int:
        """Let the next writer begin at once, and return the last term's number.

        A lease that has been lost, or cannot be reached, is left as it is: then 0.
        """
        try:
            if not self._number:
                return 0
            await self._create(self._number + 1, released=True)
            number = self._number
            await self._forget_before(number)
        except (StoreFailed, NotFound):
            return 0
        finally:
            self._number = 0
            if self._sole is not None:
                self._sole.let_go()
        return number

    # -- inside -----------------------------------------------------------------------------------

    async def _create(self, number: int, *, released: bool = False) -> None:
        """Begin the next term; it counts from before the request, whenever that took effect.

        Raises :class:`ObjectExists` if somebody else has: another one with our own name included (a copy of this host).
        """
        asked_at = _now()
        data = Term(self._holder, self._host, self._ttl_s, released, secrets.token_hex(16), self._boot).encode()
        try:
            await self._objects.put(_name(number), data)
        except ObjectExists:
            earlier = await self._ours(number)
            if earlier is None:
                raise
            self._began(number, earlier)
            await self._create(number + 1, released=released)
        except BaseException:  # a cancellation, too, ends no request that is on its way
            self._unanswered[data] = asked_at
            raise
        else:
            self._began(number, asked_at)

    def _began(self, number: int, asked_at: float) -> None:
        self._number, self._renewed_at = number, asked_at
        self._unanswered.clear()

    async def _ours(self, number: int) -> float | None:
        """Return when we asked for a term whose answer was lost; None if it is somebody else's."""
        if not self._unanswered:
            return None
        try:
            return self._unanswered.get(await self._objects.get(_name(number)))
        except NotFound:
            return None

    async def _latest(self) -> tuple[int, Term | None]:
        """Return the newest term and its number; 0 and None if there is none."""
        newest = ""
        async for item in self._objects.list(LEASE):
            newest = item.name
        if not newest:
            return 0, None
        try:
            return _number(newest), Term.decode(await self._objects.get(newest))
        except NotFound:  # renewed, and tidied up, since it was listed
            return await self._latest()

    async def _await_expiry(self, number: int, term: Term) -> bool:
        """Return True when a foreign lease was not renewed for its whole time, by our own clock; False: look again."""
        log.warning(
            "the store was not given back by its last writer, a daemon on %s; if that is dead, its lease expires"
            " within %.0f s, which is waited for",
            term.host, term.ttl_s,
        )  # fmt: skip
        deadline = time.monotonic() + term.ttl_s
        while time.monotonic() < deadline:
            await asyncio.sleep(min(POLL_S_MAX, term.ttl_s / 10))
            latest, now = await self._latest()
            if latest != number:
                if now is None or not now.released:
                    raise _busy(now)
                return False
        return True

    async def _forget_before(self, number: int) -> None:
        """Remove older terms, but for the last one: somebody may be reading that."""
        async for item in self._objects.list(LEASE):
            if _number(item.name) < number - 1:
                await self._objects.delete(item.name)


def _now() -> float:
    """Return seconds that go on while the host sleeps: others count them, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _check(values: dict[str, object]) -> str:
    """Return what tells a flipped bit: a shorter time would take the lease from one who lives."""
    return blake3(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _name(number: int) -> str:
    return f"{LEASE}/{number:0{DIGITS}d}"


def _number(name: str) -> int:
    digits = name.removeprefix(f"{LEASE}/")
    return int(digits) if digits.isdigit() else 0


def _busy(term: Term | None) -> StoreBusy:
    host = "another host" if term is None else term.host
    return StoreBusy(
        f"the store is in use by a daemon on {host}",
        hint="one repository has one writer: give this host a path or prefix of its own, or stop the other daemon",
    )

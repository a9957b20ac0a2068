"""What nbdkit's plugin and the daemon say to each other on a private Unix socket: pure, and the same file for both.

The plugin asks, one request at a time on a connection; the daemon answers. All numbers are big-endian.

========= =================================================================================================
request   magic, operation, snapshot's id, offset and length in bytes (:data:`REQUEST`)
answer    status, length of what follows (:data:`ANSWER`): data, extents, or in UTF-8 why it failed
extents   length in bytes and 1 for zeroes, 0 for data (:data:`EXTENT`), one after the other from the offset on
========= =================================================================================================

Nothing but the standard library is imported: the plugin runs in nbdkit's own interpreter.
"""

from __future__ import annotations

from struct import Struct

MAGIC = b"HVB1"
"""The last character is the protocol's version: an nbdkit that outlives an upgrade of the daemon is told so."""

REQUEST = Struct(">4sB16sQI")
ANSWER = Struct(">BI")
EXTENT = Struct(">QB")

READ, EXTENTS = 1, 2
OK, FAILED, NOT_SERVED = 0, 1, 2

READ_BYTES_MAX = 4 << 20
"""Bytes of one read: longer ones of a client are asked for in pieces, so that the daemon's memory is bounded."""

ANSWER_BYTES_MAX = READ_BYTES_MAX
"""No answer is longer; extents that would be are cut off, which a client of NBD has to expect."""


def request(operation: int, snapshot: str, offset: int = 0, length: int = 0) -> bytes:
    """Return a request as it is sent."""
    return REQUEST.pack(MAGIC, operation, snapshot.encode("ascii"), offset, length)

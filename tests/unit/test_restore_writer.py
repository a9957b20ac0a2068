"""What a batch becomes on its way to the server."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hvsnap.restore.writer import Piece, merged

KIB = 1024


@st.composite
def batches(draw: st.DrawFn) -> list[Piece]:
    """Pieces that do not overlap, in any order: data, zeroes, gaps."""
    pieces, offset = [], 0
    for number, kind in enumerate(draw(st.lists(st.sampled_from(["data", "zero", "gap"]), max_size=30))):
        length = draw(st.integers(1, 4)) * KIB
        if kind == "data":
            pieces.append(Piece(offset, length, memoryview(bytes([number + 1]) * length)))
        elif kind == "zero":
            pieces.append(Piece(offset, length, None))
        offset += length
    return list(draw(st.permutations(pieces)))


def applied(pieces: list[Piece]) -> bytes:
    image = bytearray(b"\xff" * (130 * KIB))
    for piece in pieces:
        image[piece.offset : piece.offset + piece.length] = piece.data or bytes(piece.length)
    return bytes(image)


@given(batches())
def test_merged_pieces_write_the_same_bytes(batch: list[Piece]) -> None:
    found = list(merged(batch))
    assert applied(found) == applied(batch)
    assert sum(piece.length for piece in found) == sum(piece.length for piece in batch)


@given(batches())
def test_no_neighbours_with_data_are_left_apart(batch: list[Piece]) -> None:
    found = list(merged(batch))
    ends = {piece.offset + piece.length for piece in found if piece.data is not None}
    assert not [piece for piece in found if piece.data is not None and piece.offset in ends]

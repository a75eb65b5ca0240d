"""What a blend is put together of: which rows of which stored chunks, and where they go."""

from __future__ import annotations

from collections.abc import Sequence

from kvstrata.blend.signposts import Signpost
from kvstrata.connectors.vllm.messages import Piece, Source


def source_of(lease: int, keys: Sequence[bytes], offsets: Sequence[int], num_parts: int) -> Source:
    """Leading chunks of a lease."""
    each = [
        list(offsets[number * num_parts : (number + 1) * num_parts]) for number in range(len(keys))
    ]
    return Source(lease, list(keys), each)


def behind(pieces: Sequence[Piece], start: int) -> list[Piece]:
    """What of pieces lies behind a position, which vLLM has itself up to there."""
    left = []
    for piece in pieces:
        if (over := max(0, start - piece.position)) < piece.count:
            left.append(
                Piece(piece.source, piece.chunk, piece.row + over, piece.count - over,
                      piece.position + over, piece.was + over)
            )  # fmt: skip
    return left


def pieces_of(
    text: range, signpost: Signpost, num_chunks: int, size: int, head: int, most: int, source: int
) -> list[Piece]:
    """What of a text there is, chunk by chunk.

    Args:
        text: its positions in this prompt.
        signpost: where it was computed.
        num_chunks: how many of those are there.
        size: tokens of a chunk.
        head: what lies before this position is exact.
        most: and what lies from here on is computed by vLLM.
        source: number of the lease.
    """
    pieces = []
    shift = text.start - signpost.start
    start, stop = max(text.start, head), min(text.stop, most)
    for chunk in range(num_chunks):
        begin = (signpost.start // size + chunk) * size
        first = max(begin + shift, start)
        count = min(begin + size + shift, stop) - first
        if count > 0:
            was = first - shift
            pieces.append(Piece(source, chunk, was - begin, count, first, was))
    return pieces


def is_exact(piece: Piece, signpost: Signpost, size: int, keys: Sequence[bytes]) -> bool:
    """Whether a piece is what an exact hit would be: all that is before it is the same, too.

    So it is where two prompts begin alike and part within a chunk, behind a text of both.

    Args:
        piece: of a text.
        signpost: where that was computed.
        size: tokens of a chunk.
        keys: of this prompt's chunks.
    """
    if piece.position != piece.was:
        return False
    number = (piece.position - piece.row) // size
    if number == 0:
        return signpost.start == 0
    # The chunk before it is the same, and from its end on the text is.
    return piece.chunk > 0 and signpost.keys[piece.chunk - 1] == keys[number - 1]

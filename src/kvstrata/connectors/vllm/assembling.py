"""What a blend is put together of: which rows of which stored chunks, and where they go."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import groupby, pairwise

from kvstrata.blend.anchors import NEAR_TOKENS, anchor_weights, sketch
from kvstrata.blend.segments import MIN_TOKENS
from kvstrata.blend.signposts import Signpost
from kvstrata.connectors.vllm.finding import Text
from kvstrata.connectors.vllm.messages import Piece, Source


class Assembly:
    """A prompt put together of what was found of its texts.

    Args:
        tokens: the prompt's.
        keys: of its chunks.
        size: tokens of a chunk.
        num_parts: that make up a chunk.
        head: what lies before this position is exact.
        most: and what lies from here on is computed by vLLM.
    Attributes:
        runs: by ascending position, of some rows of a text each prompt's piece; one alone, or
            several that are mixed.
        sources: of these.
        weights: of each source, how much its rows count where several are mixed.
        tiers: of each chunk that a run's first piece is of, its tier.
        first: position of the first token that is not exact; ``most``: there is none.
    """

    def __init__(
        self,
        tokens: Sequence[int],
        keys: Sequence[bytes],
        size: int,
        num_parts: int,
        head: int,
        most: int,
    ) -> None:
        self._tokens, self._keys, self._size = tokens, keys, size
        self._num_parts, self._head, self._most = num_parts, head, most
        self.runs: list[list[Piece]] = []
        self.sources: list[Source] = []
        self.weights: list[float] = []
        self.tiers = b""
        self.first = most

    def add(self, texts: Sequence[Text]) -> None:
        """Put in texts by ascending position, each with all places that it was looked for at."""
        for _, places in groupby(texts, key=lambda text: text.tokens.start):
            self._add(list(places))

    def _add(self, places: Sequence[Text]) -> None:
        found: list[tuple[Text, Signpost, int]] = []
        for text in places:
            signpost = text.signpost
            if signpost is None or not text.tiers:
                continue
            some = self._pieces(text, signpost, 0)
            count = sum(piece.count for piece in some)
            if count < MIN_TOKENS:
                continue
            if any(is_exact(one, signpost, self._size, self._keys) for one in some):
                # What others had of it is further off.
                found = [(text, signpost, count)]
                break
            found.append((text, signpost, count))
        if not found:
            return
        found.sort(key=lambda one: -one[2])  # the one that has most of it comes first
        if len(found) > 1:
            start = places[0].tokens.start
            here = sketch(self._tokens[max(0, start - NEAR_TOKENS) : start])
            self.weights += anchor_weights(here, [post.before for _, post, _ in found]).tolist()
        else:
            self.weights.append(1.0)
        each = []
        for text, signpost, _ in found:
            each.append(self._pieces(text, signpost, len(self.sources)))
            keys = list(signpost.keys[: len(text.tiers)])
            self.sources.append(source_of(text.lease, keys, text.offsets, self._num_parts))
        text, signpost, _ = found[0]
        self.tiers += bytes(text.tiers[piece.chunk] for piece in each[0])
        for piece in each[0]:
            if not is_exact(piece, signpost, self._size, self._keys):
                self.first = min(self.first, piece.position)
                break
        self.runs += aligned(each)

    def _pieces(self, text: Text, signpost: Signpost, source: int) -> list[Piece]:
        return pieces_of(text.tokens, signpost, len(text.tiers), self._size, self._head,
                         self._most, source)  # fmt: skip


def source_of(lease: int, keys: Sequence[bytes], offsets: Sequence[int], num_parts: int) -> Source:
    """Leading chunks of a lease."""
    each = [
        list(offsets[number * num_parts : (number + 1) * num_parts]) for number in range(len(keys))
    ]
    return Source(lease, list(keys), each)


def cut(piece: Piece, first: int, last: int) -> Piece:
    """The rows ``first`` to ``last`` of a piece."""
    return Piece(
        piece.source,
        piece.chunk,
        piece.row + first,
        last - first,
        piece.position + first,
        piece.was + first,
    )


def within(piece: Piece, span: range) -> Piece | None:
    """What of a piece lies in a span of positions."""
    first = max(span.start - piece.position, 0)
    last = min(span.stop - piece.position, piece.count)
    return cut(piece, first, last) if first < last else None


def aligned(places: Sequence[Sequence[Piece]]) -> list[list[Piece]]:
    """The rows of a text as several prompts had them, side by side.

    Args:
        places: of each prompt its pieces of the text, ascending; the first has most of it.
    Returns:
        For each run of rows by ascending position what holds them, the first place's piece first.
        What that one lacks is in none.
    """
    edges = sorted(
        {
            edge
            for some in places
            for one in some
            for edge in (one.position, one.position + one.count)
        }
    )
    cuts = [_cut_at(edges, some) for some in places]
    return [[some[at] for some in cuts if at in some] for at in cuts[0]]


def _cut_at(edges: Sequence[int], pieces: Sequence[Piece]) -> dict[int, Piece]:
    """Pieces cut at all of these positions, by where they begin."""
    found = {}
    for piece in pieces:
        first = bisect_left(edges, piece.position)
        last = bisect_right(edges, piece.position + piece.count)
        for start, stop in pairwise(edges[first:last]):
            found[start] = cut(piece, start - piece.position, stop - piece.position)
    return found


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

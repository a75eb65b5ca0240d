"""The plan `anchors` in vLLM's own scheduler: a text's places, and what of them is mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from tests.connector.blend_rig import BlendRig
from tests.connector.fake_model import CHUNK
from tests.connector.gates import TIMEOUT_S, GatedTier, tiered
from tests.connector.rig import prompt
from tests.connector.test_blending import HEAD, QUESTION, A, B, blend, joined, last, warm
from tests.connector.test_hints import say

from kvstrata.blend.anchors import anchor_weights, sketch
from kvstrata.blend.signposts import ORDER, PART, PLACES, Signpost, Signposts
from kvstrata.connectors.vllm import finding
from kvstrata.connectors.vllm.assembling import aligned
from kvstrata.connectors.vllm.messages import Blend, Piece
from kvstrata.keys import KeyChain

Make = Callable[..., BlendRig]


class Shelf:
    """A text behind prefixes of one's choice, in one rig.

    Args:
        rig: whose node keeps it.
        text: tokens.
    """

    def __init__(self, rig: BlendRig, text: list[int]) -> None:
        self.rig, self.text = rig, text
        client = rig.side._lookups.client
        parts = rig.side._lookups.namespaces.parts_of(rig.request(text))
        assert client is not None
        assert parts is not None
        self.client = client
        self._secret, self._space = client.hello.secret, parts.digest()
        self._seed = 1000

    def before(self, place: int, length: int = 60, end: Sequence[int] = ()) -> list[int]:
        """Tokens behind which the text comes to a place of this number."""
        while True:
            self._seed += 1
            tokens = [*HEAD, *prompt(length, seed=self._seed), *end]
            chain = KeyChain(self._secret, self._space, CHUNK)
            keys = chain.keys(tokens + self.text)[len(tokens) // CHUNK :]
            if Signpost(len(tokens), tuple(keys)).place == place:
                return tokens

    def keys(self, text: list[int], places: Sequence[int]) -> list[bytes]:
        """Of the signposts of these places."""
        posts = Signposts(self._secret, self._space, CHUNK)
        return [posts.key(text, place) for place in places]

    def bring(self, post: bytes, place: int) -> None:
        """Have a signpost in host memory."""
        nbytes = Signposts(self._secret, self._space, CHUNK).payload_bytes(len(self.text), place)
        found = self.client.match([post], [PART], [ORDER], [nbytes], bytes(16), b"").wait(TIMEOUT_S)
        self.client.await_arrival(found.lease, 0).wait(TIMEOUT_S)
        self.client.release(found.lease)

    def store(self, before: list[int]) -> None:
        """Have the text computed exactly behind these, and named."""
        tokens = before + self.text + QUESTION
        named = blend([[len(before), len(before) + len(self.text)]], None)
        self.rig.ask(tokens, 40, **say({**named, "load": False}, 40))
        self.rig.settle()
        self.rig.reset()

    def ask(self, before: list[int], plan: str = "anchors") -> Blend:
        """Ask for the text behind these; what the worker was told."""
        number = len(self.rig.blends)
        segments = [[len(before), len(before) + len(self.text)]]
        tokens = before + self.text + QUESTION
        self.rig.ask(tokens, 2, **say({**blend(segments, plan, ratio=0.0), "store": False}, 2))
        assert len(self.rig.blends) == number + 1, last(self.rig)["blend_miss"]
        self.rig.reset()
        return self.rig.blends[-1]


def mixed(told: Blend) -> int:
    """Tokens that more than one prompt has."""
    return sum(piece.count for piece, more in zip(told.pieces, told.beside, strict=True) if more)


def test_all_places_of_a_text_are_mixed_by_how_like_its_prefixes_are(make_blends: Make) -> None:
    rig = make_blends()
    shelf = Shelf(rig, A)
    here = [*HEAD, *prompt(90, seed=7)]
    # The second ends as what is here does, so it counts most.
    befores = [
        shelf.before(1), shelf.before(2, length=41, end=here[-64:]), shelf.before(3, length=75)
    ]  # fmt: skip
    for one in befores:
        shelf.store(one)
    told = shelf.ask(here)
    assert told.first == len(here)
    reused = [number for number, p in enumerate(told.pieces) if p.position >= told.first]
    # Each prompt had it at another place within its chunks, so runs are shorter than chunks.
    assert sum(told.pieces[number].count for number in reused) == len(A)
    assert {len(told.beside[number]) for number in reused} == {2}
    right = anchor_weights(sketch(here), [sketch(one) for one in befores])
    found = {
        one.was - one.position + len(here): told.weights[one.source]
        for number in reused
        for one in (told.pieces[number], *told.beside[number])
    }
    assert found == {len(one): weight for one, weight in zip(befores, right, strict=True)}
    assert right[1] > 2 * max(right[0], right[2])
    record = last(rig)
    assert record["blend_plan"] == "anchors 0"
    assert record["blended_tokens"] == len(A)
    # Other plans take one of them, as ever.
    assert mixed(shelf.ask(here, "edges")) == 0
    rig.check()


def test_the_first_prefix_of_a_place_keeps_it(make_blends: Make) -> None:
    rig = make_blends()
    shelf = Shelf(rig, A)
    first, second = shelf.before(2), shelf.before(2)
    shelf.store(first)
    shelf.store(second)
    assert [tier == 255 for tier in shelf.client.lookup(shelf.keys(A, (1, 2, 3)), [PART])] == [
        True, False, True
    ]  # fmt: skip
    told = shelf.ask([*HEAD, *prompt(30, seed=8)])
    assert mixed(told) == 0
    assert {p.was - len(first) for p in told.pieces if p.position == told.first} == {0}
    rig.check()


def test_a_text_without_places_is_found_by_its_signpost(make_blends: Make) -> None:
    """As one is that was stored by a release without places."""
    rig = make_blends()
    shelf = Shelf(rig, A)
    shelf.store(shelf.before(1))
    shelf.client.clear(shelf.keys(A, range(1, PLACES + 1)))
    told = shelf.ask([*HEAD, *prompt(30, seed=8)])
    assert sum(p.count for p in told.pieces if p.position >= told.first) == len(A)
    assert mixed(told) == 0
    rig.check()


def test_a_place_whose_chunks_have_gone_is_left_out(make_blends: Make) -> None:
    rig = make_blends()
    shelf = Shelf(rig, A)
    befores = [shelf.before(place) for place in (1, 2, 3)]
    for one in befores:
        shelf.store(one)
    chain = KeyChain(shelf._secret, shelf._space, CHUNK)
    keys = chain.keys(befores[1] + A)
    shelf.client.clear(keys[len(befores[1]) // CHUNK :])
    # Of the third the end has gone.
    shelf.client.clear(chain.keys(befores[2] + A)[-2:])
    told = shelf.ask([*HEAD, *prompt(30, seed=8)])
    counts = [len(more) for p, more in zip(told.pieces, told.beside, strict=True)
              if p.position >= told.first]  # fmt: skip
    assert sorted(set(counts)) == [0, 1]
    assert counts == sorted(counts, reverse=True)
    rig.check()


def test_a_place_that_has_next_to_nothing_hides_no_signpost(make_blends: Make) -> None:
    rig = make_blends()
    shelf = Shelf(rig, A)
    before = shelf.before(1, length=2 * CHUNK - len(HEAD) - 5)
    shelf.store(before)
    # Of that prompt five tokens of the text are left, and the text's signpost leads elsewhere.
    shelf.client.clear(shelf.keys(A, (0,)))
    shelf.store(shelf.before(2))
    shelf.client.clear(shelf.keys(A, (2,)))
    chain = KeyChain(shelf._secret, shelf._space, CHUNK)
    shelf.client.clear(chain.keys(before + A)[2:])
    told = shelf.ask([*HEAD, *prompt(30, seed=8)])
    assert sum(p.count for p in told.pieces if p.position >= told.first) == len(A)
    assert mixed(told) == 0
    rig.check()


def test_what_is_exact_is_mixed_with_nothing(make_blends: Make) -> None:
    rig = make_blends()
    shelf = Shelf(rig, A)
    here = shelf.before(1)
    shelf.store(here)
    shelf.store(shelf.before(2))
    # Behind the same prefix, and another text behind it: its last rows lie in a chunk that parts.
    tokens = here + A + B + QUESTION
    assert (len(here) + len(A)) % CHUNK
    warm(rig, B)
    segments = [[len(here), len(here) + len(A)], [len(here) + len(A), len(here) + len(A) + len(B)]]
    rig.ask(tokens, 2, **say(blend(segments, "anchors"), 2))
    (told,) = rig.blends
    assert told.first == len(here) + len(A)
    assert mixed(told) == 0
    rig.check()


def test_places_in_a_slow_tier_are_brought(make_blends: Make) -> None:
    tier = GatedTier()
    rig = make_blends(make_node=tiered(tier), extra={"deadlines.match": "20ms"})
    shelf = Shelf(rig, A)
    for place in (1, 2):
        shelf.store(shelf.before(place))
    rig.drop_host()
    assert mixed(shelf.ask([*HEAD, *prompt(30, seed=8)])) == len(A)
    rig.check()


def test_a_signpost_of_what_is_not_asked_for_stays(
    make_blends: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chunks are there, and this request keeps to another tier."""
    monkeypatch.setattr(finding, "STALE_S", 0.0)
    rig = make_blends(make_node=tiered(GatedTier()))
    shelf = Shelf(rig, A)
    shelf.store(shelf.before(1))
    rig.drop_host()
    (post,) = shelf.keys(A, (1,))
    shelf.bring(post, 1)
    assert list(shelf.client.lookup([post], [PART])) == [0]
    here = [*HEAD, *prompt(30, seed=8)]
    segments = [[len(here), len(here) + len(A)]]
    wanted = {**blend(segments, "anchors"), "store": False, "tiers": ["host"]}
    rig.ask(here + A + QUESTION, 2, **say(wanted, 2))
    assert last(rig)["blend_miss"] == "none of its texts was found"
    assert list(shelf.client.lookup([post], [PART])) == [0]
    rig.reset()
    assert sum(p.count for p in shelf.ask(here).pieces if p.position >= len(here)) == len(A)
    rig.check()


def test_several_texts_each_have_their_own(make_blends: Make) -> None:
    rig = make_blends()
    one, other = Shelf(rig, A), Shelf(rig, B)
    for shelf in (one, other):
        for place in (1, 3):
            shelf.store(shelf.before(place))
    tokens, segments = joined(B, A)
    rig.ask(tokens, 2, **say(blend(segments, "anchors"), 2))
    (told,) = rig.blends
    assert mixed(told) == len(A) + len(B)
    assert (told.plan, told.ratio) == ("anchors", 0.15)
    rig.check()


@pytest.mark.parametrize("shift", [0, 3, 16])
def test_rows_side_by_side(shift: int) -> None:
    longest = [Piece(0, 0, 5, 27, 100, 5), Piece(0, 1, 0, 32, 127, 32), Piece(0, 2, 0, 9, 159, 64)]
    other = [
        Piece(1, 0, 5 + shift, 27 - shift, 100, 5 + shift),
        Piece(1, 1, 0, 20, 127 - shift, 32),
    ]
    runs = aligned([longest, other])
    at = 100
    for first, *rest in runs:
        assert first.position == at
        at += first.count
        assert len(rest) == (first.position < 147 - shift)
        for one in rest:
            assert (one.position, one.count) == (first.position, first.count)
            assert one.was - one.position == shift - 95
            assert one.was == one.row + 32 * one.chunk
        assert first.was == first.row + 32 * first.chunk
    assert at == 168

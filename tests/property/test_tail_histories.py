"""Random histories of chunks and tails on a disk, beside a plain dict.

Prompts come, begin like others, grow; others fill host memory, tenants are cleared, tails are
pinned, the node is started anew. What is on the disk is what the dict says, and what is found
inside is as much as any of it has in common.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.insides import CHUNK, Engine
from tests.support.nodes import arrive, clear, flush, make_node, owned, until

from kvstrata.header import NOBODY
from kvstrata.node.node import Node
from kvstrata.tiers.disk.tier import DiskTier
from kvstrata.tiers.marks import UNKNOWN
from kvstrata.wire import protocol as p

WHOSE = [("a", ""), ("a", "salt"), ("b", "")]
ACTS = ["store", "store", "store", "ask", "ask", "overrun", "clear", "forget", "pin", "restart"]


class Stored(NamedTuple):
    """An object: whose, the tokens before it, its own."""

    who: int
    before: tuple[int, ...]
    tokens: tuple[int, ...]

    def begins(self, other: Stored) -> bool:
        """Whether it is a tail that another begins with, as far as marks tell."""
        marked = len(self.tokens) // 16 * 16
        return (
            len(self.tokens) < min(CHUNK, len(other.tokens))
            and (self.who, self.before) == (other.who, other.before)
            and self.tokens[:marked] == other.tokens[:marked]
        )


class Life:
    """A node on one folder, one life after the other, and what it is to have on its disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.there: dict[bytes, Stored] = {}
        self.pinned: set[bytes] = set()

    async def begin(self) -> None:
        self.node = make_node(slots=12, tier=DiskTier(self._folder), tier_slots=1000)
        self.engines = [Engine(self.node, *who) for who in WHOSE]
        await self.node.start()
        index = owned(self.node).index
        await until(lambda: len(index) == len(self.there))
        await until(lambda: all(index.whose(key) != UNKNOWN for key in self.there))
        assert len(self.node.insides.children) == len(self.there)

    async def end(self) -> None:
        for key in self.pinned:
            owned(self.node).index.pinned.let_go(key)
        self.pinned.clear()
        await self.node.stop(drain_s=5.0)

    async def check(self) -> None:
        node: Node = self.node
        await flush(node, self.engines[0].client)
        await until(lambda: set(owned(node).index.keys()) == self.there.keys())
        await until(lambda: not owned(node)._removals.nbytes)
        node.check_integrity()

    def objects(self, who: int, tokens: tuple[int, ...]) -> dict[bytes, Stored]:
        """What of a prompt can be found again: an end has 16 tokens, or it goes no further."""
        starts = range(0, len(tokens), CHUNK)
        each = [Stored(who, tokens[:start], tokens[start : start + CHUNK]) for start in starts]
        keyed = zip(self.engines[who].keys(tokens), each, strict=True)
        return {key: one for key, one in keyed if len(one.tokens) >= 16}

    async def store(self, who: int, tokens: tuple[int, ...]) -> None:
        self.engines[who].store(tokens)
        for key, one in self.objects(who, tokens).items():
            if key not in self.there:
                gone = [name for name, other in self.there.items()
                        if other.begins(one) and name not in self.pinned]  # fmt: skip
                for name in gone:
                    del self.there[name]
                self.there[key] = one

    async def ask(self, who: int, tokens: tuple[int, ...]) -> None:
        engine = self.engines[who]
        matched = engine.match(tokens)
        whole = 0
        for key in engine.chain.keys(tokens):
            if key not in self.there:
                break
            whole += 1
        assert len(matched.tiers) == whole
        if matched.lease:
            ready = 0
            while ready < whole:
                arrived = await arrive(self.node, engine.client, matched.lease, ready)
                assert not arrived.failed
                ready = arrived.ready
            engine.release(matched.lease)
        before, rest = tokens[: whole * CHUNK], tokens[whole * CHUNK :][:CHUNK]
        if len(rest) < 16:
            return
        good = [
            next((i for i, (a, b) in enumerate(zip(rest, one.tokens, strict=False)) if a != b),
                 min(len(rest), len(one.tokens))) // 16 * 16
            for one in self.there.values()
            if (one.who, one.before) == (who, before)
        ]  # fmt: skip
        nearest = await engine.brought(tokens, whole)
        assert nearest.good_tokens == max(good, default=0)

    async def overrun(self) -> None:
        """Nothing of it stays in host memory."""
        await clear(self.node, self.engines[0].client, tiers=["host"])

    async def clear(self, who: int) -> None:
        engine = self.engines[who]
        await self.node.clear(engine.client, p.Clear(1, None, [], engine.owner))
        self.drop(key for key, one in self.there.items() if one.who == who)

    async def forget(self, who: int, tokens: tuple[int, ...]) -> None:
        keys = list(self.objects(who, tokens))[-1:]
        await clear(self.node, self.engines[who].client, keys)
        self.drop(key for key in keys if key in self.there)

    def drop(self, keys: object) -> None:
        for key in list(keys):  # type: ignore[call-overload]
            del self.there[key]
            self.pinned.discard(key)

    def pin(self, who: int, tokens: tuple[int, ...]) -> None:
        index = owned(self.node).index
        key = next(reversed(self.objects(who, tokens)), b"")
        if key in self.there and index.pinned.hold(key, NOBODY, index.nbytes(key)):
            self.pinned.add(key)


# Of few tokens, so that prompts often begin alike and part anywhere.
prompts = st.builds(
    lambda pieces, cut: tuple([t for one in pieces for t in [one] * 16][cut:]),
    st.lists(st.sampled_from([1, 2]), min_size=1, max_size=9),
    st.integers(0, 15),
)
histories = st.lists(
    st.tuples(st.sampled_from(ACTS), st.integers(0, len(WHOSE) - 1), prompts),
    min_size=1,
    max_size=14,
)


@settings(max_examples=15, deadline=None)
@given(histories)
def test_as_a_plain_dict(history: list[tuple[str, int, tuple[int, ...]]]) -> None:
    async def main() -> None:
        with tempfile.TemporaryDirectory() as folder:
            life = Life(Path(folder))
            await life.begin()
            try:
                for act, who, tokens in history:
                    match act:
                        case "store":
                            await life.store(who, tokens)
                        case "ask":
                            await life.ask(who, tokens)
                        case "overrun":
                            await life.overrun()
                        case "clear":
                            await life.clear(who)
                        case "forget":
                            await life.forget(who, tokens)
                        case "pin":
                            life.pin(who, tokens)
                        case "restart":
                            await life.end()
                            await life.begin()
                    await life.check()
            finally:
                await life.end()

    asyncio.run(main())

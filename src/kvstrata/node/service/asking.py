"""What a shared store has of a prompt, in as few round trips as it takes.

A store that answers for many objects in one round trip is asked for all of them. One where each is
a call of its own is asked for a few at once, and where the prompt ends there is found by galloping.
That holds for full attention, whose chunks are stored head first. Of windows and states one says
nothing of another: they are asked for backwards, until what a boundary needs was seen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kvstrata.node.common.slices import at_once
from kvstrata.node.service.backing import Question
from kvstrata.node.service.calls import TierCalls
from kvstrata.node.service.gallop import Gallop
from kvstrata.node.service.hints import Hints
from kvstrata.node.service.names import Where
from kvstrata.node.service.origin import Origin
from kvstrata.node.slots.boundaries import longest
from kvstrata.observe.counters import Counters
from kvstrata.parts import PORTABLE, at_level
from kvstrata.tiers.base import Outcome, Stat, Store

MAX_ASKED = 1 << 14
"""Objects of one question that are asked for at most; what lies behind them waits for the next."""
MAX_ROUNDS = 4
"""In which a boundary is looked for backwards; more where one needs more chunks than that."""
NOTE_SLICE = 256

Places = list[tuple[int, int, Where]]
"""Of objects: number of the chunk, part, and where."""


class Asking:
    """Asks one shared tier, and notes what it hears; lives on the node's loop.

    Args:
        store: the tier.
        stat: its `Store.stat`, for a question.
        num_levels: copies of an object that may be there, the object itself included.
        calls: into the tier.
        hints: where the answers go.
        counters: the node's.
    """

    def __init__(
        self,
        store: Store,
        stat: Callable[[Question, Sequence[bytes]], list[Stat | Outcome]],
        num_levels: int,
        *,
        calls: TierCalls,
        hints: Hints,
        counters: Counters,
    ) -> None:
        self._store = store
        self._stat = stat
        self._num_levels = num_levels
        self._calls = calls
        self._hints = hints
        self._counters = counters
        self._liked: dict[bytes, str] = {}  # by namespace: the byte order of what was found last

    async def ask(self, question: Question, epoch: int, still: Callable[[], bool]) -> None:
        """Note what is there of the leading chunks of a question.

        Args:
            question: what is asked.
            epoch: in which it is asked.
            still: whether that is still the present, so that an answer is worth a note.
        Raises:
            TierUnavailable: the store cannot be asked.
        """
        wheres = [Where(epoch, question.namespace, order) for order in question.orders]
        if any(question.needs):
            return await self._ask_backwards(question, wheres, still)
        limits = self._store.limits
        each = len(wheres) * len(question.parts) * self._num_levels
        if len(question.keys) * each <= limits.round_objects:
            await self._ask_for_all(question, wheres, limits.batch_objects, each, still)
        else:
            await self._gallop(question, wheres, limits.round_objects, still)

    async def there(self, keys: Sequence[bytes], origin: Origin, epoch: int) -> set[bytes]:
        """Which chunks of a commit others have written, in its byte order or the portable one.

        Raises:
            TierUnavailable: the store cannot be asked.
        """
        orders = dict.fromkeys((origin.order, PORTABLE))
        wheres = [Where(epoch, origin.namespace, order) for order in orders]

        def work() -> set[bytes]:
            names = [where.name(key, origin.part) for where in wheres for key in keys]
            size, answers = self._store.limits.batch_objects, []
            for start in range(0, len(names), size):
                answers += self._store.stat(names[start : start + size])
            pairs = zip([*keys] * len(wheres), answers, strict=True)
            return {key for key, answer in pairs if isinstance(answer, Stat)}

        return await self._calls.call("lookup", work)

    async def _ask_for_all(
        self,
        question: Question,
        wheres: Sequence[Where],
        batch: int,
        each: int,
        still: Callable[[], bool],
    ) -> None:
        """One round of batches side by side. A hole is not the end: another tier may fill it."""
        self._counters.add("lookup_rounds_total", tier=self._store.name)
        count = min(len(question.keys), max(1, MAX_ASKED // each))
        size = max(1, batch // each)
        batches = [
            self._look(question, [
                (number, part, where)
                for number in range(start, min(start + size, count))
                for part, where in self._copies(question.parts, wheres)
            ])
            for start in range(0, count, size)
        ]  # fmt: skip
        for found in await asyncio.gather(*batches):
            await self._note(question, found, still)

    async def _ask_backwards(
        self, question: Question, wheres: Sequence[Where], still: Callable[[], bool]
    ) -> None:
        """The last chunks first, each object for itself, until what a boundary needs was seen."""
        limits, parts, count = self._store.limits, question.parts, len(question.keys)
        size = len(self._copies(parts, wheres))
        chunks = max(1, min(limits.round_objects, MAX_ASKED) // size)
        seen: set[tuple[int, int]] = set()
        span = max(MAX_ROUNDS * chunks, *question.needs)
        for stop in range(count, max(0, count - span), -chunks):
            start = max(0, stop - chunks)
            asked = [
                (number, part, where)
                for number in range(start, stop)
                for part, where in self._copies(parts, wheres)
            ]
            self._counters.add("lookup_rounds_total", tier=self._store.name)
            batches = [
                self._look(question, asked[first : first + limits.batch_objects])
                for first in range(0, len(asked), limits.batch_objects)
            ]
            found = [one for batch in await asyncio.gather(*batches) for one in batch]
            await self._note(question, found, still)
            seen.update(one[:2] for one in found)
            reached, _ = at_once(longest(
                question.needs, count, lambda column, number: (number, parts[column]) in seen, start
            ))  # fmt: skip
            if reached > start:
                return

    def _copies(self, parts: Sequence[int], wheres: Sequence[Where]) -> list[tuple[int, Where]]:
        """A chunk's objects in any order, the one liked least first, and their coarser copies."""
        whole = [(part, where) for where in reversed(wheres) for part in parts]
        coarser = [
            (at_level(part, level), where)
            for where in wheres
            if where.order == PORTABLE
            for part in parts
            for level in range(1, self._num_levels)
        ]
        return whole + coarser

    async def _gallop(
        self,
        question: Question,
        wheres: Sequence[Where],
        width: int,
        still: Callable[[], bool],
    ) -> None:
        parts, gallop = question.parts, Gallop(len(question.keys))
        liked = self._liked.get(question.namespace)
        wheres = sorted(wheres, key=lambda where: where.order != liked)
        # The first chunk in every order: the rest is in the one that it is in.
        others = [(0, parts[0], where) for where in wheres[1:]]
        where, nbytes, noted = wheres[0], dict[int, int](), 0
        while not gallop.ended:
            numbers = gallop.places(max(1, width - len(others)))
            # Which part is asked for changes from chunk to chunk: each must have come so far.
            asked = [(number, parts[number % len(parts)], where) for number in numbers]
            self._counters.add("lookup_rounds_total", tier=self._store.name)
            found = {one[:3]: one[3] for one in await self._look(question, asked + others)}
            elsewhere, others = next((one for one in others if one in found), None), []
            if elsewhere is not None and (0, parts[0], where) not in found:
                where, gallop = elsewhere[2], Gallop(len(question.keys))
                gallop.low = 1
                nbytes[parts[0]] = found[elsewhere]
            else:
                nbytes.update({one[1]: size for one, size in found.items()})
                gallop.learn({one[0]: one in found for one in asked})
            guess = max(nbytes.values(), default=0)
            if gallop.low > noted:
                await self._note(question, [
                    (number, part, where, nbytes.get(part, guess))
                    for number in range(noted, gallop.low)
                    for part in parts
                ], still)  # fmt: skip
                noted = gallop.low
        if noted:
            self._liked[question.namespace] = where.order
        if noted and self._num_levels > 1:
            await self._note_coarser(question, noted, still)

    async def _note_coarser(
        self, question: Question, count: int, still: Callable[[], bool]
    ) -> None:
        """Whether the last chunk has coarser copies says whether those before it do."""
        asked: Places = [
            (count - 1, at_level(part, level), Where(0, question.namespace, PORTABLE))
            for part in question.parts[:1]
            for level in range(1, self._num_levels)
        ]
        hint = self._hints.last(question.keys[count - 1], question.parts[0])
        if hint is None:
            return
        where = hint.where._replace(order=PORTABLE)
        self._counters.add("lookup_rounds_total", tier=self._store.name)
        found = await self._look(question, [(number, part, where) for number, part, _ in asked])
        levels = [(part ^ question.parts[0], nbytes) for _, part, _, nbytes in found]
        await self._note(question, [
            (number, part | level, where, nbytes)
            for number in range(count)
            for part in question.parts
            for level, nbytes in levels
        ], still)  # fmt: skip

    async def _look(self, question: Question, places: Places) -> list[tuple[int, int, Where, int]]:
        """Which of these are there, and how large they are."""
        keys = question.keys

        def work() -> list[Stat | object]:
            names = [where.name(keys[number], part) for number, part, where in places]
            return list(self._stat(question, names))

        stats = await self._calls.ask(work)
        return [
            (*place, stat.nbytes)
            for place, stat in zip(places, stats, strict=True)
            if isinstance(stat, Stat)
        ]

    async def _note(
        self,
        question: Question,
        found: Sequence[tuple[int, int, Where, int]],
        still: Callable[[], bool],
    ) -> None:
        for start in range(0, len(found), NOTE_SLICE):
            if start:
                await asyncio.sleep(0)
            if not still():
                return
            for number, part, where, nbytes in found[start : start + NOTE_SLICE]:
                self._hints.note(question.keys[number], part, where, nbytes)

"""Random histories of several processes on one node, against a dictionary of what was committed.

Objects have several sizes, two slower tiers have gates that may be shut, loads may have a target,
and a match or a commit may be under way while others are served: all slices are as short as they
can be. Processes die, their connections are dropped, requests are aborted, and nodes are started
again over what the tiers keep.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
)
from tests.support.nodes import (
    NAMESPACE,
    ORDER,
    OTHER,
    SLOT,
    GatedTier,
    arrive,
    at_once,
    chunk_keys,
    clear,
    flush,
    make_backing,
    payload,
    release,
    stored_payload,
    template,
)

from kvstrata.config import Config, HostConfig, LeaseConfig, PinConfig
from kvstrata.errors import TierFull, TierUnavailable
from kvstrata.memory.pool import Pool
from kvstrata.node import answering, matching
from kvstrata.node.coding.sealing import KeyRing
from kvstrata.node.common import slices
from kvstrata.node.node import Node
from kvstrata.node.operating import clearing
from kvstrata.node.service import calls, movement, write_behind
from kvstrata.node.slots import reservations as reserving
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.objects import HEADER_BYTES, checksum, decode
from kvstrata.observe.counters import Counters
from kvstrata.testing.clock import ManualClock
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.faulty import Answer, FaultyTier, FlipBit, Raise
from kvstrata.tiers.journal import Journal
from kvstrata.wire import protocol as p
from kvstrata.wire.client import offsets_of

PROMPTS = [chunk_keys(4, prompt) for prompt in range(3)]
ALL = [key for prompt in PROMPTS for key in prompt]
# Payload bytes of the parts of each prompt's chunks: slots of 3, 4 and 6 pages.
SIZES = [(5000, 9000), (5000, 9000), (20000, 5000)]
NBYTES = {
    (key, part): SIZES[number][part]
    for number, prompt in enumerate(PROMPTS)
    for key in prompt
    for part in range(2)
}
HOST_SLOTS, TIER_SLOTS = 12, (6, 14)
ORDERS = [ORDER, OTHER]
OWNERS = [b"a" * 16, b"b" * 16]
OWNER_OF = {key: OWNERS[number % 2] for number, prompt in enumerate(PROMPTS) for key in prompt}
DEADLINE_S = 5.0
Name = tuple[bytes, int]
R = TypeVar("R")

prompts = st.sampled_from(PROMPTS)
processes = st.integers(0, 2)
tiers_ = st.integers(0, 1)
parts_ = st.sampled_from([[0], [1], [0, 1], [0, 1]])
seldom = st.sampled_from([False, False, True])
some_order = st.sampled_from([ORDER, ORDER, ORDER, OTHER])
orders_ = st.sampled_from([[ORDER], [OTHER], ORDERS, ORDERS])


class Lasting(GatedTier):
    """A tier whose objects outlive the node."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def close(self) -> None:
        pass


async def whenever(ask: Callable[[], R | Awaitable[R]]) -> R:
    """An answer, at once or later."""
    answer = ask()
    return await answer if isinstance(answer, Awaitable) else answer


@dataclass
class Process:
    """A process: the connection that it uses, and those that were dropped."""

    holder: Holder = field(default_factory=Holder)
    dropped: list[Client] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.client = Client("pid 1", self.holder)

    def connect_again(self) -> None:
        self.dropped.append(self.client)
        self.client = Client("pid 1", self.holder)

    @property
    def connections(self) -> list[Client]:
        return [*self.dropped, self.client]


@dataclass
class Reserved:
    client: Client
    number: int
    prefix: list[bytes]
    first: int
    part: int
    order: str
    version: str
    offsets: list[int]
    cleared: set[bytes]

    @property
    def objects(self) -> Iterator[tuple[bytes, int]]:
        return zip(self.prefix[self.first :], self.offsets, strict=True)


@dataclass
class Matching:
    """A match, under way or leased."""

    client: Client
    keys: list[bytes]
    parts: list[int]
    orders: list[str]
    # what each object may be: all that was committed and not cleared at some time of the match
    valid: dict[Name, set[bytes]]
    answer: asyncio.Future[p.Matched]
    number: int = 0
    ready: int = 0
    # what lay in each ready slot when it was first seen
    seen: dict[int, bytes] = field(default_factory=dict)


class Histories(RuleBasedStateMachine):
    # What was not granted enters its bundle as None: whether it is depends on how fast threads
    # are, and what hypothesis may draw next must not.
    reservations = Bundle("reservations")

    @initialize(
        policy=st.sampled_from(["lru", "s3fifo", "cost"]),
        codecs=st.tuples(
            st.sampled_from(["raw", "lossless"]), st.sampled_from(["raw", "lossless"])
        ),
        keys=st.sampled_from([None, KeyRing([bytes(32)])]),
    )
    def begin(self, policy: str, codecs: tuple[str, str], keys: KeyRing | None) -> None:
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(matching, "SLICE_OBJECTS", 3)
        self.patches.setattr(matching, "SLICE", 2)
        self.patches.setattr(answering, "SLICE", 2)
        self.patches.setattr(matching, "SLICE_STARTS", 1)
        self.patches.setattr(clearing, "SLICE", 1)
        self.patches.setattr(movement, "CALL_OFF_SLICE", 1)
        for module, names in (
            (reserving, ["GRANT_SLICE", "FINISH_SLICE", "TOUCH_SLICE"]),
            (write_behind, ["ADD_SLICE", "STRIKE_SLICE", "TOUCH_SLICE"]),
        ):
            for name in names:
                self.patches.setattr(module, name, 1)
        self.patches.setattr(slices, "HOLD_S", 0.0)
        self.patches.setattr(calls, "GRACE_S", 0.01)
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.inner = [Lasting("memory"), Lasting("disk")]
        self.journal = Journal()
        self.tiers = [FaultyTier(inner) for inner in self.inner]
        self.policy, self.codecs, self.keys = policy, codecs, (None, keys)
        # object -> the payloads that were committed since it was last cleared
        self.model: dict[Name, set[bytes]] = {}
        # of objects whose clear failed: a later node may find them
        self.undead: dict[Name, set[bytes]] = {}
        # what may be taken for there until it is read
        self.doubtful: set[Name] = set()
        self.versions = 0
        self.processes = [Process() for _ in range(3)]
        self.start()
        for number, prompt in enumerate(PROMPTS):
            self.store(number, prompt, [0, 1], ORDER)
            self.flush()

    def start(self) -> None:
        self.open_reservations: list[Reserved] = []
        self.open_matches: list[Matching] = []
        self.clears: list[asyncio.Future[int]] = []
        self.commits: list[asyncio.Future[p.Done]] = []

        async def make() -> Node:
            counters = Counters()
            config = Config(
                host=HostConfig(capacity=HOST_SLOTS * SLOT, policy=self.policy, verify_every=3),
                leases=LeaseConfig(per_client=Fraction(3, 4), total=Fraction(4, 5)),
                pins=PinConfig(Fraction(2, 5), Fraction(3, 5)),
            )
            backings = [
                make_backing(
                    tier, slots, counters=counters, clock=self.clock, deadline_s=DEADLINE_S,
                    queue_slots=4, policy=self.policy, codec=codec, keys=keys,
                )
                for tier, slots, codec, keys in zip(
                    self.tiers, TIER_SLOTS, self.codecs, self.keys, strict=True
                )
            ]  # fmt: skip
            pool = Pool.create(HOST_SLOTS * SLOT)
            node = Node(config, pool, backings, counters, clock=self.clock, journal=self.journal)
            await node.start()
            return node

        self.node = self.run(make())

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, 30))

    def open_gates(self) -> None:
        """What hangs goes on, and all that was asked for is answered."""
        for inner in self.inner:
            inner.open()

        async def answered() -> None:
            await asyncio.gather(*self.clears, return_exceptions=True)
            await asyncio.gather(*[one.answer for one in self.open_matches])
            await asyncio.gather(*self.commits)

        self.run(answered())
        self.tick(0)

    # writing

    @rule(
        target=reservations,
        process=processes,
        prompt=prompts,
        first=st.integers(0, 3),
        length=st.integers(1, 4),
        part=st.integers(0, 1),
        order=some_order,
    )
    def begin_to_store(
        self, process: int, prompt: list[bytes], first: int, length: int, part: int, order: str
    ) -> Reserved | None:
        return self.reserve(process, prompt, first, length, part, order)

    def reserve(
        self, process: int, prompt: list[bytes], first: int, length: int, part: int, order: str
    ) -> Reserved | None:
        me, prefix = self.processes[process].client, prompt[: first + length]
        form = template(order, NBYTES[prompt[0], part])
        cost = 0.1 * len(prefix) if first else 0.0
        owner, keys = OWNER_OF[prompt[0]], b"".join(prefix)
        request = p.Reserve(1, NAMESPACE, keys, first, part, form, cost, "", owner)
        reserved = self.run(whenever(lambda: self.node.reserve(me, request)))
        offsets = list(offsets_of(reserved.offsets))
        if max(offsets) < 0:
            return None
        self.versions += 1
        version = f"{order} {self.versions}"
        taken = Reserved(
            me, reserved.reservation, prefix, first, part, order, version, offsets, set()
        )
        # Two who write one object at once would be a lost update.
        ours = {key for key, offset in taken.objects if offset >= 0}
        for other in self.open_reservations:
            if other.part == part:
                assert not ours & {key for key, offset in other.objects if offset >= 0}
        self.open_reservations.append(taken)
        return taken

    @rule(
        taken=consumes(reservations),
        written=st.lists(st.booleans(), min_size=4, max_size=4),
        wait=st.booleans(),
    )
    def end_storing(self, taken: Reserved | None, written: list[bool], wait: bool) -> None:
        if taken is not None and taken in self.open_reservations and self.may_use(taken):
            self.commit(taken, written, wait)

    def may_use(self, taken: Reserved | Matching) -> bool:
        """Whether the connection that it came by still stands."""
        return any(taken.client is one.client for one in self.processes)

    def commit(
        self,
        taken: Reserved,
        written: list[bool],
        wait: bool = True,
        clear_after: int | None = None,
    ) -> None:
        self.open_reservations.remove(taken)
        sums = []
        count = 0
        for (key, offset), wanted in zip(taken.objects, written, strict=False):
            nbytes = NBYTES[key, taken.part]
            data = payload(key, taken.part, taken.version, nbytes)
            if offset >= 0:
                self.node.host.pool.view(offset + HEADER_BYTES, nbytes)[:] = data
            sums.append(checksum(data) if wanted else bytes(16))
            if wanted and offset >= 0 and key not in taken.cleared:
                count += 1
                name = key, taken.part
                self.model.setdefault(name, set()).add(data)
                for one in self.open_matches:
                    if not one.number and name in one.valid:
                        one.valid[name].add(data)

        request = p.Commit(1, taken.number, b"".join(sums))

        async def begin() -> asyncio.Future[p.Done]:
            done = asyncio.ensure_future(whenever(lambda: self.node.commit(taken.client, request)))
            await asyncio.sleep(0)
            assert at_once(self.node.commit(taken.client, request)).count == 0
            if clear_after is not None:
                for _ in range(clear_after):
                    await asyncio.sleep(0)
                self.clears.append(asyncio.ensure_future(clear(self.node, Client("pid 2"))))
                await asyncio.sleep(0)
            return done

        done = self.run(begin())
        if clear_after is not None:
            self.note_clear(set(ALL), [])
        if wait:
            assert self.run(done).count == count
        else:
            self.commits.append(done)

    @rule(process=processes, prompt=prompts, parts=parts_, order=some_order)
    def store(self, process: int, prompt: list[bytes], parts: list[int], order: str) -> None:
        """All of a prompt, reserved and committed at once."""
        self.store_parts(process, prompt, parts, order)

    @rule(process=processes, prompt=prompts, part=st.integers(0, 1))
    def begin_to_commit(self, process: int, prompt: list[bytes], part: int) -> None:
        """The same, and others are served before the commit has ended."""
        self.store_parts(process, prompt, [part], ORDER, wait=False)

    @rule(process=processes, prompt=prompts, part=st.integers(0, 1), turns=st.integers(0, 9))
    def clear_amid_a_commit(self, process: int, prompt: list[bytes], part: int, turns: int) -> None:
        """Nothing of it is found, wherever the commit had come to."""
        taken = self.reserve(process, prompt, 0, 4, part, ORDER)
        if taken is not None:
            self.commit(taken, [True] * 4, wait=False, clear_after=turns)
            self.flush()
            self.wait_for(self.match(process, prompt, [part], ORDERS))

    def store_parts(
        self, process: int, prompt: list[bytes], parts: list[int], order: str, wait: bool = True
    ) -> None:
        for part in parts:
            taken = self.reserve(process, prompt, 0, 4, part, order)
            if taken is not None:
                self.commit(taken, [True] * 4, wait)

    # reading

    @rule(process=processes, prompt=prompts, parts=parts_, orders=orders_, wait=st.booleans())
    def ask(
        self, process: int, prompt: list[bytes], parts: list[int], orders: list[str], wait: bool
    ) -> None:
        """Begin a match; others may be served before it is answered."""
        one = self.match(process, prompt, parts, orders)
        if wait:
            self.wait_for(one)

    def wait_for(self, one: Matching) -> None:
        self.run(asyncio.wait([one.answer]))
        self.harvest()

    def match(
        self, process: int, prompt: list[bytes], parts: list[int], orders: list[str]
    ) -> Matching:
        client = self.processes[process].client
        lengths = [NBYTES[prompt[0], part] for part in parts]
        request = p.Match(1, b"".join(prompt), parts, orders, lengths)

        async def ask() -> asyncio.Future[p.Matched]:
            answer = self.node.match(client, request)

            async def later() -> p.Matched:
                return answer if isinstance(answer, p.Matched) else await answer

            return asyncio.ensure_future(later())

        valid = {
            (key, part): set(self.model.get((key, part), ())) for key in prompt for part in parts
        }
        one = Matching(client, prompt, parts, orders, valid, self.run(ask()))
        self.open_matches.append(one)
        self.harvest()
        return one

    def harvest(self) -> None:
        """Look at the matches that have been answered."""
        for one in [one for one in self.open_matches if one.answer.done() and not one.number]:
            matched = one.answer.result()
            assert (matched.lease == 0) == (not matched.tiers)
            if not matched.lease:
                self.open_matches.remove(one)
                continue
            assert not one.client.ended
            one.number, one.keys = matched.lease, one.keys[: len(matched.tiers)]
            objects = [(key, part) for key in one.keys for part in one.parts]
            for name, offset in zip(objects, offsets_of(matched.offsets), strict=True):
                doubtful = offset < 0 and name in self.doubtful
                assert one.valid[name] or doubtful, "a hit on what was never stored, or cleared"
                if offset >= 0:
                    self.see(one, name, offset)

    def see(self, one: Matching, name: Name, offset: int) -> None:
        """What is leased is what was there at the match, also if it has been cleared since."""
        data = stored_payload(self.node, offset, NBYTES[name])
        header = decode(self.node.host.pool.view(offset, HEADER_BYTES))
        assert (header.key, header.rank) == name
        assert header.order in one.orders
        assert data in one.valid[name], "other bytes came back"
        one.seen[offset] = data

    @rule(number=st.integers(0, 9))
    def load(self, number: int) -> None:
        """Wait until all has come, or will not come."""
        self.open_gates()
        if not self.open_matches:
            return
        one = self.open_matches[number % len(self.open_matches)]

        async def load() -> None:
            while one.ready < len(one.keys):
                arrived = await arrive(self.node, one.client, one.number, one.ready)
                chunks = one.keys[one.ready : arrived.ready]
                objects = [(key, part) for key in chunks for part in one.parts]
                for name, offset in zip(objects, offsets_of(arrived.offsets), strict=True):
                    self.see(one, name, offset)
                one.ready = arrived.ready
                if arrived.failed:
                    break

        self.run(load())

    @rule(number=st.integers(0, 9), keep=st.integers(0, 3))
    def release(self, number: int, keep: int) -> None:
        mine = [one for one in self.open_matches if one.number and self.may_use(one)]
        if mine:
            self.end_match(mine[number % len(mine)], keep)

    def end_match(self, one: Matching, keep: int = 0) -> None:
        async def end() -> None:
            release(self.node, one.client, one.number, keep)

        self.run(end())
        one.keys = one.keys[:keep]
        one.ready = min(one.ready, keep)
        one.seen.clear()  # not known which offset belongs to which chunk
        if not keep:
            self.open_matches.remove(one)

    @rule(process=processes)
    def abort(self, process: int) -> None:
        """Many requests at once, given up before anything has come."""
        for prompt in PROMPTS:
            one = self.match(process, prompt, [0, 1], ORDERS)
            self.wait_for(one)
            if one in self.open_matches:
                self.end_match(one)

    # ends

    @rule(process=processes)
    def drop(self, process: int) -> None:
        """A connection sends garbage: it is hung up on, and what it holds stays in force."""
        self.processes[process].connect_again()

    @rule(process=processes, really=seldom)
    def die(self, process: int, really: bool) -> None:
        if really:
            self.kill(process)

    def kill(self, process: int) -> None:
        dead = self.processes[process].connections

        async def end() -> list[Matching]:
            # The loop may have come to the end of one just before.
            unanswered = [one for one in self.open_matches if not one.answer.done()]
            for client in dead:
                self.node.end(client)
                assert not client.holds_something
            return unanswered

        unanswered = self.run(end())
        for one in [one for one in self.open_matches if one.client in dead]:
            if one in unanswered:
                assert self.run(one.answer).lease == 0
            self.open_matches.remove(one)
        self.open_reservations = [r for r in self.open_reservations if r.client not in dead]
        self.processes[process] = Process()

    @rule(really=seldom)
    def restart(self, really: bool) -> None:
        """A node that is stopped in good order, and the next one over the same tiers."""
        if not really:
            return
        self.open_gates()
        for process in range(3):
            self.kill(process)
        self.run(flush(self.node, Client("pid 2")))
        self.node.check_integrity(contents=True)
        self.run(self.node.stop(drain_s=5.0))
        for name, versions in self.undead.items():
            self.model.setdefault(name, set()).update(versions)
        self.undead.clear()
        self.start()

    # forgetting

    @rule(
        chosen=st.none() | st.lists(st.sampled_from(ALL), max_size=5),
        tiers=st.sampled_from([[], [], ["host"], ["memory"], ["disk", "host"]]),
    )
    def clear(self, chosen: list[bytes] | None, tiers: list[str]) -> None:
        """Nothing of it is found from now on in these tiers, even where one hangs."""
        self.note_clear(set(ALL if chosen is None else chosen), tiers)

        async def begin() -> asyncio.Future[int]:
            return asyncio.ensure_future(clear(self.node, Client("pid 2"), chosen, tiers))

        self.clears.append(self.run(begin()))
        self.tick(3)

    def note_clear(self, gone: set[bytes], tiers: list[str]) -> None:
        for taken in self.open_reservations:
            taken.cleared |= gone
        for name in NBYTES if not tiers else ():
            if name[0] in gone and (versions := self.model.pop(name, None)):
                self.undead.setdefault(name, set()).update(versions)

    @rule(count=st.integers(1, 20))
    def tick(self, count: int) -> None:
        """Let the node go on a little."""

        async def turns() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.run(turns())
        self.harvest()
        for commit in [one for one in self.commits if one.done()]:
            self.commits.remove(commit)
            commit.result()
        for done in [one for one in self.clears if one.done()]:
            self.clears.remove(done)
            with contextlib.suppress(TierUnavailable):
                done.result()

    @rule()
    def forget_host(self) -> None:
        """So that the slower tiers are asked."""
        self.flush()
        for taken in self.open_reservations:
            taken.cleared |= set(ALL)
        self.run(clear(self.node, Client("pid 2"), None, ["host"]))

    @rule()
    def flush(self) -> None:
        self.open_gates()
        self.run(flush(self.node, Client("pid 2")))

    # trouble

    @rule(tier=tiers_, verb=st.sampled_from(["read", "write", "delete", "clear", "touch"]))
    def shut(self, tier: int, verb: str) -> None:
        """What is asked of a tier from now on hangs."""
        self.inner[tier].shut(verb)

    @rule(really=seldom)
    def hang(self, really: bool) -> None:
        """So long that the deadlines pass of all that hangs."""
        if not really:
            return
        self.clock.advance(2 * DEADLINE_S)
        self.run(asyncio.sleep(0.03))
        self.harvest()

    @rule(tier=tiers_, target_s=st.sampled_from([0.0, 1e-6, 1e-3, 10.0]))
    def aim(self, tier: int, target_s: float) -> None:
        """Loads from a tier have a target from now on."""
        self.node.backings[tier].load_target_s = target_s

    @rule(
        tier=tiers_,
        fault=st.sampled_from(
            [
                ("write", FlipBit(8 * 5000)),
                ("read", FlipBit(8 * 5000)),
                ("read", Answer(Outcome.FAILED)),
                ("read", Raise(TierUnavailable("gone"))),
                ("read", Raise(ValueError("a bug"))),
                ("write", Answer(Outcome.FAILED)),
                ("write", Raise(TierFull("no space"))),
                ("delete", Answer(Outcome.FAILED)),
                ("delete", Raise(TierUnavailable("gone"))),
                ("clear", Raise(TierUnavailable("gone"))),
            ]
        ),
    )
    def hurt(self, tier: int, fault: tuple[Any, Any]) -> None:
        self.tiers[tier].inject(*fault, times=1)

    @rule()
    def heal(self) -> None:
        self.open_gates()
        for tier in self.tiers:
            tier.heal()
        self.clock.advance(100.0)

    @invariant()
    def laws(self) -> None:
        if not hasattr(self, "node"):
            return
        self.node.check_integrity()
        assert self.node.host.allocated_bytes <= HOST_SLOTS * SLOT
        for inner, slots in zip(self.inner, TIER_SLOTS, strict=True):
            assert inner.most <= slots * SLOT
        for one in self.open_matches:
            for offset, data in one.seen.items():
                found = stored_payload(self.node, offset, len(data))
                assert found == data, "leased bytes have moved"

    def teardown(self) -> None:
        if not hasattr(self, "node"):
            return
        for tier in self.tiers:
            tier.heal()
        self.open_gates()
        for process in range(3):
            self.kill(process)
        self.run(flush(self.node, Client("pid 2")))
        self.node.check_integrity()
        assert not list(self.node.reservations.filling())
        self.run(self.node.stop(drain_s=1.0))
        self.loop.close()
        self.patches.undo()


Histories.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestHistories(Histories.TestCase):  # type: ignore[misc, valid-type]
    pass

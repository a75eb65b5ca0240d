"""Stores, lookups and loads of several ranks and pools on a real node, without SGLang."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from tests.support.host_pools import HostPool

from kvstrata.config import load_config
from kvstrata.connectors.sglang.holds import Hold, Holds
from kvstrata.connectors.sglang.loads import Loads
from kvstrata.connectors.sglang.lookups import Lookups, Wanted
from kvstrata.connectors.sglang.names import Names
from kvstrata.connectors.sglang.pages import KV, TokenPages
from kvstrata.connectors.sglang.pools import Pools
from kvstrata.connectors.sglang.records import record_of
from kvstrata.connectors.sglang.renewals import Generation
from kvstrata.connectors.sglang.stats import Tally
from kvstrata.connectors.sglang.stores import Stores
from kvstrata.errors import DeadlineExceeded
from kvstrata.keys import Namespace
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.wire.client import Call

PAGE, PATIENCE_S = 16, 20.0
HASHES = [bytes([n] * 32).hex() for n in range(1, 9)]


class Rank:
    """What a rank's session has, with pools of its own.

    Args:
        node: whose client it is.
        rank: its number, of two.
        latent: whether ranks share what they keep.
        more: other pools beside the keys and values.
    """

    def __init__(
        self, node: InProcessNode, rank: int = 0, latent: bool = False, more: tuple[str, ...] = ()
    ) -> None:
        place = SimpleNamespace(pp_rank=0, tp_rank=rank, tp_size=2, is_mla_model=latent)
        self.client = node.connect()
        self.pools = Pools(place, PAGE)
        self.host = {name: HostPool("page_first", pages=8) for name in (KV, *more)}
        for name, pool in self.host.items():
            self.pools.add(TokenPages(pool, name, PAGE))
        space = Namespace("model", self.pools.layout, PAGE, tensor_parallel=2)
        names = Names(lambda generation: space, Generation())
        self.ended: list[Hold] = []
        self.holds = Holds(PATIENCE_S, self.ended.append)
        self.lookups = Lookups(names, self.pools, self.holds, "", PATIENCE_S)
        self.loads = Loads(self.pools, self.lookups, self.holds, Tally(), PATIENCE_S)
        self.stores = Stores(names, self.pools, Tally(), "", PATIENCE_S)
        self.names = names

    def write(self, first: int, last: int, name: str = KV, seed: int = 1) -> None:
        """Store pages ``first`` to ``last``, the last one not, of noise."""
        self.host[name].fill(seed)
        starts = [PAGE * n for n in range(first, last)]
        kept = self.stores.write(
            self.client, "", name, HASHES[:first], HASHES[first:last], starts, ""
        )
        assert kept == [True] * (last - first)

    def prefix(self, count: int = 8, *wanted: Wanted) -> int:
        """How many of so many pages can be had."""
        return self.lookups.prefix(self.client, "", HASHES[:count], (), (Wanted(KV), *wanted))

    def read(self, first: int, last: int, name: str = KV, seed: int = 1) -> int:
        """Load pages; how many came, each as noise of the seed had it."""
        pool = self.host[name]
        pool.fill(seed)
        expected = pool.words().copy()
        pool.words()[:] = 0
        starts = [PAGE * n for n in range(first, last)]
        count = self.loads.read(self.client, "", name, HASHES[first:last], starts)
        there = slice(PAGE * first, PAGE * (first + count))
        assert np.array_equal(pool.words()[:, there], expected[:, there])
        assert not pool.words()[:, there.stop :].any()
        return count

    def forget(self, *numbers: int) -> None:
        """Have the node lose these pages."""
        keys = self.names.keys(self.client.hello.secret, self.names.digest(""), HASHES)
        self.client.clear([keys[number] for number in numbers])

    def close(self) -> None:
        self.holds.close()
        self.client.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[InProcessNode]:
    options = {"host.capacity": "8MiB", "secret_file": str(tmp_path / "secret")}
    with InProcessNode(load_config(environ={}, overrides=options)) as made:
        yield made
        with closing(made.connect()) as client:
            held = client.status()["leases"]
        assert held == {"count": 0, "bytes": 0, "reservations": 0}
        made.run(lambda: made.node.check_integrity(True))


def test_each_rank_has_its_part(node: InProcessNode) -> None:
    ranks = [Rank(node, 0), Rank(node, 1)]
    ranks[0].write(0, 8, seed=1)
    assert ranks[1].prefix() == 0, "the other's part is not its own"
    ranks[1].write(0, 5, seed=2)
    # SGLang takes the smaller number for both.
    assert [rank.prefix() for rank in ranks] == [8, 5]
    assert ranks[0].read(0, 5, seed=1) == 5
    assert ranks[1].read(0, 5, seed=2) == 5
    for rank in ranks:
        rank.close()


def test_what_ranks_share_one_stores_and_all_load(node: InProcessNode) -> None:
    ranks = [Rank(node, 0, latent=True), Rank(node, 1, latent=True)]
    ranks[0].write(0, 8, seed=3)
    for rank in ranks:
        assert rank.prefix() == 8
        assert rank.read(0, 8, seed=3) == 8
        rank.close()


def test_a_prompt_ends_where_every_pool_can_go_on(node: InProcessNode) -> None:
    rank = Rank(node, more=("swa",))
    window = Wanted("swa", 2)
    rank.write(0, 8)
    assert rank.prefix(8, window) == 0
    rank.write(2, 4, "swa", seed=2)
    rank.write(5, 7, "swa", seed=2)
    assert rank.prefix(8, window) == 7
    assert rank.prefix(6, window) == 4, "of the sixth page's window the fifth page is missing"
    good = rank.lookups.restorable(rank.client, "", HASHES[:7], [Wanted(KV), window])
    assert good == [4, 7]
    assert rank.read(0, 7) == 7
    assert rank.read(5, 7, "swa", seed=2) == 2
    rank.close()


def test_every_page_may_be_needed_of_another_pool(node: InProcessNode) -> None:
    rank = Rank(node, more=("indexer",))
    rank.write(0, 8)
    rank.write(0, 3, "indexer", seed=2)
    rank.write(5, 8, "indexer", seed=2)
    assert rank.prefix(8, Wanted("indexer")) == 3
    good = rank.lookups.restorable(rank.client, "", HASHES, [Wanted(KV), Wanted("indexer")])
    assert good == [1, 2, 3]
    rank.close()


def test_a_window_at_the_beginning_is_what_there_is(node: InProcessNode) -> None:
    rank = Rank(node, more=("swa",))
    rank.write(0, 2)
    rank.write(0, 2, "swa")
    assert rank.prefix(8, Wanted("swa", 4)) == 2
    good = rank.lookups.restorable(rank.client, "", HASHES[:2], [Wanted(KV), Wanted("swa", 4)])
    assert good == [1, 2]
    rank.close()


@pytest.mark.parametrize("hole", range(8))
def test_a_hole_ends_what_is_found(node: InProcessNode, hole: int) -> None:
    rank = Rank(node)
    rank.write(0, 8)
    rank.forget(hole)
    assert rank.prefix() == hole
    assert rank.read(0, 8) == hole
    assert rank.loads.read(rank.client, "", KV, HASHES[hole + 1 :], [0] * (7 - hole)) == 7 - hole
    rank.close()


def test_a_page_that_nobody_asked_for_is_read_all_the_same(node: InProcessNode) -> None:
    rank = Rank(node)
    rank.write(0, 8)
    assert rank.read(2, 6) == 4
    assert len(rank.holds) == 0
    rank.close()


def test_a_read_of_two_questions_takes_from_both(node: InProcessNode) -> None:
    rank = Rank(node)
    rank.write(0, 4)
    assert rank.prefix() == 4
    rank.write(4, 8)
    assert rank.prefix() == 8
    assert rank.read(0, 8) == 8
    rank.close()
    records = [record_of(hold, PAGE, ["host"]) for hold in rank.ended]
    assert sum(record["loaded_tokens"] for record in records) == 8 * PAGE
    for record, asked in zip(records, (8, 8), strict=True):
        reasons = sum(one["tokens"] for one in record["reasons"])
        assert record["loaded_tokens"] + reasons == asked * PAGE


def test_two_prompts_that_begin_alike_have_a_record_each(node: InProcessNode) -> None:
    rank = Rank(node)
    rank.write(0, 8)
    assert [rank.prefix(5), rank.prefix(8)] == [5, 8]
    assert [rank.read(0, 5), rank.read(0, 8)] == [5, 8]
    records = [record_of(hold, PAGE, ["host"]) for hold in rank.ended]
    assert [record["loaded_tokens"] for record in records] == [5 * PAGE, 8 * PAGE]
    assert not any(record["reasons"] for record in records)
    rank.close()


def test_what_is_there_or_being_written_counts_as_kept(node: InProcessNode) -> None:
    rank, other = Rank(node), Rank(node)
    rank.write(0, 6)
    rank.write(0, 8)
    pages: Any = rank.pools.get(KV)
    keys = rank.names.keys(rank.client.hello.secret, rank.names.digest(""), ["ee" * 32])
    busy = other.client.reserve(
        rank.names.digest(""), keys, 0, rank.pools.part(KV), pages.template(0)
    ).wait(PATIENCE_S)
    assert rank.stores.write(rank.client, "", KV, [], ["ee" * 32], [0], "") == [True]
    other.client.commit(busy.reservation, [bytes(16)]).wait(PATIENCE_S)
    assert rank.lookups.prefix(rank.client, "", ["ee" * 32], ()) == 0
    rank.close()
    other.close()


def test_a_lookup_that_fails_leaves_no_lease(
    node: InProcessNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Rank(node)) as rank:
        rank.write(0, 4)
        client = rank.client
        with pytest.raises(ValueError, match="hex"):
            rank.lookups.prefix(client, "", HASHES, ["no hash"])
        assert client.status()["leases"]["count"] == 0
        # While two secrets are known, the answer for the second one does not come.
        secrets = [client.hello.secret, bytes(32)]
        monkeypatch.setattr(client, "hello", replace(client.hello, secrets=secrets))
        match, asked = client.match, list[Any]()

        def late(*args: Any, **kwargs: Any) -> Any:
            asked.append(args)
            if len(asked) > 1:
                raise DeadlineExceeded("late")
            return match(*args, **kwargs)

        monkeypatch.setattr(client, "match", late)
        assert rank.read(0, 8) == 4
        assert len(asked) == 3, "and once more, for what follows"
        assert client.status()["leases"]["count"] == 0


def test_boundaries_are_not_waited_for_longer_than_a_match(
    node: InProcessNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = Rank(node, more=("swa",))
    with closing(rank.client):
        waited = list[float]()
        wait = Call.wait

        def noted(call: Call, timeout_s: float) -> Any:
            waited.append(timeout_s)
            return wait(call, timeout_s)

        monkeypatch.setattr(Call, "wait", noted)
        rank.lookups.restorable(rank.client, "", HASHES, [Wanted(KV), Wanted("swa", 1)])
        assert waited == [PATIENCE_S]

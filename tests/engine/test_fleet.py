"""A fleet: engines with a node each, on machines that share what any of them computed."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.engine.engine import Engine, Prompt, whole_chunks
from tests.engine.place import Place, eventually
from tests.engine.plain import Plain, Texts

from kvstrata.testing.ports import HOST, free_port

pytestmark = pytest.mark.engine

STORES = ("redis", "mooncake", "object_store")
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "node", "AWS_SECRET_ACCESS_KEY": "not-a-secret"}


class Member(NamedTuple):
    """A node and an engine of its own."""

    place: Place
    engine: Engine

    def hears(self, tier: str) -> bool:
        """Whether a tier of this node is in service."""
        tiers = self.place.node.status()["tiers"]
        return any(one["name"] == tier and one["state"] == "ok" for one in tiers)

    def hits(self) -> Counter[str]:
        """Chunks that its node found so far, by tier."""
        tiers = ("host", "peer", *STORES)
        count = self.place.count
        return Counter({one: int(count(f'hit_chunks_total{{tier="{one}"}}')) for one in tiers})

    def forget(self) -> None:
        """Have nothing any more that is not somebody else's."""
        self.place.node.clear(tiers=["host"])
        self.engine.forget()


def start_stores(ends: ExitStack, folder: Path) -> dict[str, str]:
    """A real server of each kind; the options that name them, fastest first."""
    from kvstrata.testing.servers.mooncake import MooncakeServer
    from kvstrata.testing.servers.redis import RedisServer
    from kvstrata.testing.servers.seaweedfs import BUCKET, SeaweedFS

    redis, mooncake = RedisServer(folder / "redis"), MooncakeServer(folder / "mooncake", 2)
    ends.callback(redis.close)
    ends.callback(mooncake.close)
    s3 = SeaweedFS(folder / "s3")
    ends.callback(s3.close)
    options = {
        "redis.url": redis.url,
        "mooncake.master": mooncake.address,
        "object_store.url": f"s3://{BUCKET}/kv",
        "object_store.endpoint": s3.endpoint,
        "object_store.capacity": "the store's",
    }
    for store in STORES:
        # A busy machine may take a second for an answer. A clear waits as long as an epoch lasts.
        options |= {f"{store}.epoch_every": "4s", f"{store}.lookup_timeout": "10s"}
    return options


@pytest.fixture(scope="module")
def members(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Member, Member]]:
    """The first one answers other nodes; the second one is such a node."""
    secret = tmp_path_factory.mktemp("deployment") / "secret"
    address = f"{HOST}:{free_port()}"
    with ExitStack() as ends:
        made = []
        stores = start_stores(ends, tmp_path_factory.mktemp("stores"))
        common = {"host.capacity": "256MiB", "secret_file": str(secret), **stores}
        asks = {"peer.nodes": address, "peer.lookup_timeout": "10s"}
        for settings in ({"network.listen": address}, asks):
            place = ends.enter_context(Place(tiny_llama, {**common, **settings}))
            made.append(Member(place, place.engine(environment=CREDENTIALS)))
        for member in made:
            member.engine.wait()
        for tier in ("peer", *STORES):
            eventually(partial(made[1].hears, tier), f"the second node hears of {tier}")
        yield made[0], made[1]


def test_what_one_node_has_another_loads(
    members: tuple[Member, Member], plain: Plain, prompts: list[Prompt]
) -> None:
    first, second = members
    cold = first.engine.answers(prompts)
    assert [answer.tokens for answer in cold] == plain.cold(prompts)
    first.place.await_stored(first.engine, prompts)
    warm = second.engine.answers(prompts)
    assert [answer.cached for answer in warm] == [whole_chunks(len(p)) for p in prompts]
    assert [answer.tokens for answer in warm] == plain.warm(prompts)
    assert second.place.count('hit_chunks_total{tier="peer"}') == sum(
        whole_chunks(len(prompt)) // 128 for prompt in prompts
    )
    assert first.place.count("peer_sent_bytes_total") > 0
    second.engine.forget()
    again = second.engine.answers(prompts)
    assert [answer.tokens for answer in again] == plain.warm(prompts)
    assert second.place.count('hit_chunks_total{tier="host"}') > 0, "it has them itself now"
    first.place.check()
    second.place.check()


def test_what_one_stored_another_finds_in_every_store(
    members: tuple[Member, Member], plain: Plain, texts: Texts
) -> None:
    """One after the other is cleared for all, until nobody has it any more."""
    first, second = members
    prompts = texts.of(700, 1100, 1500)
    whole = [whole_chunks(len(prompt)) for prompt in prompts]
    cold = [answer.tokens for answer in first.engine.answers(prompts)]
    assert cold == plain.cold(prompts)
    first.place.await_stored(first.engine, prompts)
    first.place.flush()
    first.forget()
    for number, store in enumerate(STORES):
        # What came from a slower one is kept in the faster ones, too.
        second.place.flush()
        second.place.node.clear(tiers=STORES[:number] or ["host"])
        before = second.hits()
        second.forget()
        eventually(partial(second.hears, store), f"the second node hears of {store}")
        answers = second.engine.answers(prompts)
        assert [answer.cached for answer in answers] == whole, store
        assert [answer.tokens for answer in answers] == plain.warm(prompts), store
        assert second.hits() - before == Counter({store: sum(whole) // 128})
    second.place.flush()
    second.place.node.clear()
    second.engine.forget()
    assert [answer.cached for answer in second.engine.answers(prompts)] == [0] * 3
    second.place.check()


def test_a_peer_that_dies_costs_a_miss(
    members: tuple[Member, Member], plain: Plain, texts: Texts
) -> None:
    first, second = members
    prompts = texts.of(700, 900, 1100)
    cold = [answer.tokens for answer in first.engine.answers(prompts)]
    assert cold == plain.cold(prompts)
    first.place.await_stored(first.engine, prompts)
    second.forget()
    assert [a.cached for a in second.engine.answers(prompts[:1])] == [whole_chunks(700)]
    os.kill(first.place.node.hello.pid, signal.SIGKILL)
    second.place.node.clear()
    second.engine.forget()
    answers = second.engine.answers(prompts)
    assert [answer.cached for answer in answers] == [0] * 3
    assert [answer.tokens for answer in answers] == cold
    second.place.check()

"""What names the chunks of a prompt acts on all layer groups: through the API, on a real node."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.apis import SPACE, Rig, prompt
from tests.support.groups import FULL, STATE, WINDOW, Needs, group_template, needed
from tests.support.nodes import ORDER, RAW, payload
from tests.unit.test_api_operating import ended

from kvstrata.control import Client
from kvstrata.keys import owner_digest
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire.client import offsets_of

NEEDS: Needs = {FULL: 0, WINDOW: 2, STATE: 1}
HAS = {FULL: range(6), WINDOW: range(6), STATE: [3]}
"""Numbers of the chunks that have each part: the longest boundary is behind the fourth."""
TOKENS = prompt(8)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name), {"disk.codec": "raw"})
        with rig.engine() as engine:
            engine.tell(orders=[ORDER], objects=[*NEEDS], needs=[*NEEDS.values()],
                        lengths=[RAW] * 3)  # fmt: skip
            keys = engine.keys(TOKENS)
            owner = owner_digest(engine.secret, SPACE.tenant, "")
            for part, numbers in HAS.items():
                for number in numbers:
                    reserved = engine.client.reserve(
                        SPACE.digest(), keys[: number + 1], number, part, group_template(part),
                        owner=owner,
                    ).wait(5.0)  # fmt: skip
                    (offset,) = offsets_of(reserved.offsets)
                    data = payload(keys[number], part)
                    engine.client.pool.view(offset + HEADER_BYTES, RAW)[:] = data
                    engine.client.commit(reserved.reservation, [checksum(data)]).wait(5.0)
            engine.client.flush()
        yield rig
        assert rig.node is not None
        rig.node.check_integrity()
        rig.close()


@pytest.fixture
def client(rig: Rig) -> Iterator[Client]:
    with rig.client() as client:
        yield client


def held(rig: Rig, tier: str = "host") -> set[tuple[int, int]]:
    """What a tier has of the prompt, by part and number of the chunk."""
    assert rig.node is not None
    node = rig.node.node
    with rig.engine() as engine:
        keys = engine.keys(TOKENS)
    index: Any = node.host.index if tier == "host" else node.backings[0].index  # type: ignore[attr-defined]
    found: set[tuple[int, int]] = rig.node.run(
        lambda: {(part, n) for n, key in enumerate(keys) for part in NEEDS if index.get(key, part)}
    )
    return found


ALL = {(part, number) for part, numbers in HAS.items() for number in numbers}
OF_BOUNDARY = {
    (part, number) for part, need in NEEDS.items() for number in range(4) if needed(need, 4, number)
}


def test_a_lookup_and_an_explanation_go_by_the_boundary(rig: Rig, client: Client) -> None:
    found = client.lookup(tokens=TOKENS)
    assert (found.leading_chunks, found.tiers) == (4, {"host": 4})
    told = client.explain(tokens=TOKENS)
    assert told.tiers == {"host": 4 * 16}
    assert [one.tokens for one in told.reasons] == [2 * 16, 2 * 16], "no state; never stored"


def test_a_prefetch_brings_what_the_boundary_needs(rig: Rig, client: Client) -> None:
    client.clear(everything=True, tiers=["host"])
    assert held(rig) == set()
    job = ended(client, client.prefetch(tokens=TOKENS))
    assert (job.state, job.done) == ("done", 4)
    assert held(rig) == OF_BOUNDARY


def test_a_move_takes_all_that_is_there_and_a_clear_too(rig: Rig, client: Client) -> None:
    client.clear(everything=True, tiers=["host"])
    job = ended(client, client.move("disk", "host", tokens=TOKENS))
    assert (job.state, job.done, job.failed) == ("done", 8, 0)
    assert (held(rig), held(rig, "disk")) == (ALL, set())
    with rig.engine() as engine:
        first = [key.hex() for key in engine.keys(TOKENS)[:2]]
    client.clear(keys=first)
    assert held(rig) == {(part, number) for part, number in ALL if number >= 2}


def test_a_pin_keeps_all_of_a_chunk(rig: Rig, client: Client) -> None:
    pinned = client.pin("prefix", 3600, tokens=TOKENS[:64])
    assert (pinned.chunks, pinned.kept) == (4, 4)
    assert pinned.tiers["disk"] == 4

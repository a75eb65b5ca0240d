"""What a prefetch has found is kept until it is read, for a while, and never given up in a read."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from kvstrata.connectors.sglang import holds as module
from kvstrata.connectors.sglang.holds import MAX_HOLDS, Hold, Holds

FOREVER_S = 1000.0


class Client:
    """As much of a node's client as a hold touches."""

    def __init__(self) -> None:
        self.alive = True
        self.released: list[int] = []

    def release(self, lease: int) -> None:
        self.released.append(lease)


def a_hold(
    client: Client, lease: int, pages: str, parts: tuple[int, ...] = (0,), generation: str = ""
) -> Hold:
    node: Any = client
    return Hold(
        client=node, lease=lease, generation=generation, hashes=list(pages),
        keys=[page.encode() for page in pages], parts=parts,
        offsets=[0] * (len(pages) * len(parts)), tiers=bytes(len(pages)), first=b"", before=0,
        asked=len(pages), why=(),
    )  # fmt: skip


def ended_by(holds: list[Hold]) -> list[int]:
    return [hold.lease for hold in holds]


def eventually(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("seed", range(60))
def test_random_histories_against_a_plain_list(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    most = rng.choice([3, 64])
    monkeypatch.setattr(module, "MAX_HOLDS", most)
    clients, ended = [Client(), Client()], list[Hold]()
    holds = Holds(FOREVER_S, ended.append)
    kept: list[Hold] = []  # the oldest first
    reading: list[Hold] = []
    gone: list[int] = []
    for lease in range(1, 120):
        kind = rng.choice(["add", "add", "take", "take", "leave", "drop", "die"])
        if kind == "add":
            start, length = rng.randrange(8), rng.randrange(4)
            parts = rng.choice([(0,), (0, 65536)])
            hold = a_hold(rng.choice(clients), lease, "abcdefghijkl"[start : start + length],
                          parts, rng.choice("xy"))  # fmt: skip
            hold.busy = rng.random() < 0.1 and bool(length)
            if hold.busy:
                reading.append(hold)
            holds.add(hold)
            kept.append(hold)
            if not length:
                kept.remove(hold)
                gone.append(lease)
            idle = [one for one in kept if one not in reading]
            for one in idle[: max(0, len(kept) - most)]:
                kept.remove(one)
                gone.append(one.lease)
        elif kind == "take":
            page, part, name = rng.choice("abcdefghijkl"), rng.choice([0, 65536]), rng.choice("xy")
            fitting = [
                one for one in kept
                if one not in reading and one.client.alive and one.generation == name
                and page in one.hashes and part in one.parts
            ]  # fmt: skip
            taken = holds.take(page, part, name)
            assert taken is (fitting[0] if fitting else None)
            reading += [taken] if taken else []
        elif kind == "leave" and reading:
            hold, done = reading.pop(rng.randrange(len(reading))), rng.random() < 0.5
            holds.leave(hold, done=done)
            if done:
                kept.remove(hold)
                gone.append(hold.lease)
        elif kind == "drop":
            client: Any = rng.choice([*clients, None])
            holds.drop(client)
            for one in [one for one in kept if one not in reading]:
                if client is None or one.client is client:
                    kept.remove(one)
                    gone.append(one.lease)
        elif kind == "die" and rng.random() < 0.2:
            clients[0].alive = False
        assert len(holds) == len(kept)
        assert ended_by(ended) == gone
    holds.close()
    assert sorted(ended_by(ended)) == sorted(gone + [one.lease for one in kept if not one.busy])
    for hold in reading:
        holds.leave(hold, done=False)
    released = clients[0].released + clients[1].released
    assert sorted(released) == sorted(ended_by(ended)), "each lease once, and no other"
    assert len(holds) == 0


def test_what_nobody_comes_for_ends_by_itself() -> None:
    client, ended = Client(), list[Hold]()
    holds = Holds(0.05, ended.append)
    for lease in range(5):
        holds.add(a_hold(client, lease, "abc"))
    eventually(lambda: len(ended) == 5)
    assert client.released == [0, 1, 2, 3, 4]
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "kvstrata-holds"])
    holds.add(a_hold(client, 5, "abc"))
    eventually(lambda: len(ended) == 6)


def test_what_is_read_does_not_end_by_its_age() -> None:
    client, ended = Client(), list[Hold]()
    holds = Holds(0.05, ended.append)
    holds.add(a_hold(client, 1, "abc"))
    hold = holds.take("b", 0, "")
    assert hold is not None
    time.sleep(0.3)
    holds.drop()
    assert ended == []
    assert holds.take("b", 0, "") is None, "one reads it"
    holds.leave(hold, done=False)
    eventually(lambda: len(ended) == 1)


def test_there_are_never_too_many() -> None:
    client, ended = Client(), list[Hold]()
    holds = Holds(FOREVER_S, ended.append)
    for lease in range(MAX_HOLDS + 10):
        holds.add(a_hold(client, lease, "abc"))
    assert len(holds) == MAX_HOLDS
    assert ended_by(ended) == list(range(10)), "the oldest go"
    holds.close()
    holds.close()
    assert len(ended) == MAX_HOLDS + 10


def test_questions_that_found_nothing_push_out_nothing() -> None:
    client, ended = Client(), list[Hold]()
    holds = Holds(FOREVER_S, ended.append)
    holds.add(a_hold(client, 1, "abc"))
    for lease in range(2, 2 * MAX_HOLDS):
        holds.add(a_hold(client, lease, ""))
    assert len(holds) == 1
    taken = holds.take("a", 0, "")
    assert taken is not None
    assert taken.lease == 1
    holds.leave(taken, done=True)


def test_a_read_goes_on_while_all_is_closed() -> None:
    client, ended = Client(), list[Hold]()
    holds = Holds(FOREVER_S, ended.append)
    holds.add(a_hold(client, 1, "abc"))
    hold = holds.take("a", 0, "")
    assert hold is not None
    late = a_hold(client, 2, "abc")
    late.busy = True
    holds.close()
    holds.add(late)
    assert client.released == [], "its slots may be read"
    for one in (hold, late):
        holds.leave(one, done=False)
    assert client.released == [1, 2]
    holds.add(a_hold(client, 3, "abc"))
    assert client.released == [1, 2, 3], "what comes later ends at once"


def test_pages_that_arrive_are_taken_in() -> None:
    hold = a_hold(Client(), 1, "abcd", parts=(0, 65536))
    hold.offsets = [-1] * 8
    assert hold.arrived(1, b"".join(n.to_bytes(8, "little") for n in (10, 11, 12, 13))) == 2
    assert hold.offsets == [-1, -1, 10, 11, 12, 13, -1, -1]
    assert (hold.offset(1, 0), hold.offset(2, 65536)) == (10, 13)


def test_a_record_that_fails_keeps_no_lease() -> None:
    def ended(hold: Hold) -> None:
        raise RuntimeError("a bug")

    client, holds = Client(), Holds(0.05, ended)
    holds.add(a_hold(client, 1, "ab"))
    eventually(lambda: client.released == [1])
    holds.add(a_hold(client, 2, "ab"))
    holds.add(a_hold(client, 3, ""))
    eventually(lambda: sorted(client.released) == [1, 2, 3])
    holds.close()

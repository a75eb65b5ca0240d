"""The storage under SGLang's own threads while its node dies, hangs, or comes back from disk."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's own, of what it finds on this machine
    pytest.importorskip("sglang")
    import torch
    from tests.sglang.kit import Kit, kind
from tests.sglang.place import Place, eventually

from kvstrata.connectors.sglang.loads import Loads
from kvstrata.connectors.sglang.pages import TokenPages
from kvstrata.errors import CorruptObject

PAGES = 8
KINDS = ("full", "swa", "mamba", "mla")
SGLANGS_S = 1.0 + 0.25 * PAGES * 64 / 1024
"""How long SGLang waits for such a prefetch."""
OURS_S = 1.0
"""``deadlines.request``: how long an answer may take, here, where the machine is busy."""

Kits = Callable[..., Kit]


@pytest.fixture(scope="module")
def place(tiny_llama: Path) -> Iterator[Place]:
    """A node with a disk behind it."""
    with tempfile.TemporaryDirectory(prefix="kvstrata-disk-", dir="/tmp") as folder:
        settings = {
            "host.capacity": "64MiB",
            "disk.path": folder,
            "disk.capacity": "256MiB",
            "disk.scrub_rate": "0",
            "disk.codec": "raw",
            "deadlines.request": f"{OURS_S:g}s",
        }
        with Place(tiny_llama, settings) as made:
            made.node  # noqa: B018  (it is up)
            yield made


@pytest.fixture
def kits(place: Place, tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> Iterator[Kits]:
    """Makes kits whose KV is kept apart; at the end nothing is held, and no bug was hit."""
    made: list[Kit] = []
    tenant = os.urandom(8).hex()

    def make(what: Any, settings: Mapping[str, Any] | None = None, **more: Any) -> Kit:
        options = {**place._settings, "tenant": tenant, **(settings or {})}
        made.append(Kit(what, tiny_llama, options, **more))
        return made[-1]

    with caplog.at_level(logging.INFO, "kvstrata"):
        yield make
        for kit in made:
            kit.doCleanups()
    assert not [record for record in caplog.records if record.exc_info], caplog.text
    place.check()


def restart(place: Place) -> None:
    """End the node as its operator does, and have another one take its disk over."""
    place.node.flush()
    place.stop_node()
    back(place)


def back(place: Place) -> None:
    """Another node, once it knows its disk."""
    place._node = None
    place.start_node()
    eventually(
        lambda: all(tier["state"] == "ok" for tier in place.node.status()["tiers"]), "a scan"
    )


@pytest.mark.parametrize("name", KINDS)
def test_a_node_comes_back_from_disk_with_all_that_it_had(
    kits: Kits, place: Place, name: str
) -> None:
    kit = kits(kind(name, 64))
    tokens = kit.tokens(PAGES)
    stored = kit.cache(1).store(tokens)
    restart(place)
    consumer = kit.cache(2)
    assert consumer.prefetch(tokens) == len(tokens)
    loaded = consumer.loaded(tokens)
    for pool, expected in stored.items():
        assert torch.equal(loaded[pool], expected), pool


class Stored:
    """Pages that a storage has written, and the bytes that they had."""

    def __init__(self, kit: Kit, seed: int = 1) -> None:
        self.cache = kit.cache()
        self.storage = self.cache.storage
        self.hashes = self.cache.hashes(kit.tokens(PAGES, seed))
        self.indices = self.cache.host_pages(PAGES)
        self.cache.fill_host(seed)
        self.bytes = self.cache.host_bytes(self.indices)

    def write(self) -> list[bool]:
        """Store all of them."""
        self.cache.fill_host(1)
        self.bytes = self.cache.host_bytes(self.indices)
        return list(self.storage.batch_set_v1(self.hashes, self.indices))

    def read(self) -> int:
        """Load all of them; how many came, each as it was."""
        self.cache.fill_host(2)
        read = self.storage.batch_get_v1(self.hashes, self.indices)
        count = int(sum(read))
        assert read == [True] * count + [False] * (PAGES - count)
        assert torch.equal(self.cache.host_bytes(self.indices)[:count], self.bytes[:count])
        return count

    def exist(self) -> int:
        """How many are there, says the storage."""
        return int(self.storage.batch_exists(self.hashes))

    def to_disk(self, place: Place) -> None:
        """Have them in the slower tier alone."""
        place.node.flush()
        place.node.clear(tiers=["host"])


def within(call: Callable[[], Any], limit_s: float) -> Any:
    """What a call gives, which has to come soon."""
    begun = time.monotonic()
    given = call()
    assert time.monotonic() - begun < limit_s
    return given


@pytest.fixture
def frozen(place: Place) -> Iterator[Callable[[], None]]:
    """Has the node say nothing, until the test is over."""
    pids = []

    def freeze() -> None:
        pids.append(place.node.hello.pid)
        os.kill(pids[-1], signal.SIGSTOP)

    yield freeze
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_a_node_that_hangs_is_waited_for_no_longer_than_sglang_waits(
    kits: Kits, place: Place, frozen: Callable[[], None]
) -> None:
    kit = kits(kind("full", 64))
    here, away, new = Stored(kit), Stored(kit, 2), Stored(kit, 3)
    assert away.write() == [True] * PAGES
    away.to_disk(place)
    assert here.write() == [True] * PAGES
    assert here.exist() == away.exist() == PAGES
    frozen()
    # What was found in host memory is leased: its bytes are there without the node.
    assert within(here.read, SGLANGS_S) == PAGES
    # What was on its way may have arrived before, and nobody says so.
    within(away.read, SGLANGS_S)
    assert within(here.exist, 2 * OURS_S + 0.5) == 0
    assert within(here.read, 2 * OURS_S + 0.5) == 0
    assert within(new.write, 2 * OURS_S + 0.5) == [False] * PAGES


def test_a_node_that_hung_is_used_again(kits: Kits, place: Place) -> None:
    stored = Stored(kits(kind("full", 64)))
    stored.write()
    pid = place.node.hello.pid
    for _ in range(3):
        os.kill(pid, signal.SIGSTOP)
        assert stored.exist() == 0
        os.kill(pid, signal.SIGCONT)
        eventually(lambda: stored.exist() == PAGES, "it answers again")
        assert stored.read() == PAGES


def test_a_tree_goes_on_while_the_node_hangs(
    kits: Kits, place: Place, frozen: Callable[[], None]
) -> None:
    kit = kits(kind("swa", 64), prefetch="timeout")
    producer, consumer, tokens = kit.cache(1), kit.cache(2), kit.tokens(PAGES)
    producer.store(tokens)
    frozen()
    assert within(lambda: consumer.prefetch(tokens), SGLANGS_S + 2 * OURS_S + 0.5) == 0


def kill_before(stored: Stored, place: Place, patch: pytest.MonkeyPatch) -> None:
    place.kill_node()
    assert stored.exist() == 0
    assert stored.read() == 0


def kill_between_question_and_read(stored: Stored, place: Place, patch: pytest.MonkeyPatch) -> None:
    assert stored.exist() == PAGES
    place.kill_node()
    stored.read()


def kill_while_pages_arrive(stored: Stored, place: Place, patch: pytest.MonkeyPatch) -> None:
    stored.to_disk(place)
    assert stored.exist() == PAGES
    os.kill(place.node.hello.pid, signal.SIGSTOP)
    timer = threading.Timer(0.1, place.kill_node)
    timer.start()
    within(stored.read, SGLANGS_S)
    timer.join()


def kill_while_pages_are_read(stored: Stored, place: Place, patch: pytest.MonkeyPatch) -> None:
    copy, copied = Loads._copy, []

    def counted(*arguments: Any) -> None:
        copied.append(1)
        if len(copied) == 3:
            place.kill_node()
        copy(*arguments)

    assert stored.exist() == PAGES
    patch.setattr(Loads, "_copy", counted)
    assert stored.read() >= 2


def kill_between_reservation_and_commit(
    stored: Stored, place: Place, patch: pytest.MonkeyPatch
) -> None:
    read, written = TokenPages.read, []

    def counted(*arguments: Any) -> None:
        written.append(1)
        if len(written) == 3:
            place.kill_node()
        read(*arguments)

    place.node.clear()
    patch.setattr(TokenPages, "read", counted)
    assert stored.write() == [False] * PAGES


def kill_behind_a_commit(stored: Stored, place: Place, patch: pytest.MonkeyPatch) -> None:
    place.node.clear()
    assert stored.write() == [True] * PAGES
    place.kill_node()


@pytest.mark.parametrize(
    "kill",
    [
        kill_before,
        kill_between_question_and_read,
        kill_while_pages_arrive,
        kill_while_pages_are_read,
        kill_between_reservation_and_commit,
        kill_behind_a_commit,
    ],
)
def test_a_node_that_is_killed_costs_pages_and_nothing_else(
    kits: Kits, place: Place, kill: Callable[[Stored, Place, pytest.MonkeyPatch], None]
) -> None:
    stored = Stored(kits(kind("full", 64)))
    assert stored.write() == [True] * PAGES
    place.node.flush()
    with pytest.MonkeyPatch.context() as patch:
        kill(stored, place, patch)
    back(place)
    # A storage is attached again in the background; what was on the disk is found, and whole.
    eventually(lambda: attached(stored, place), "a node")
    there = stored.exist()
    assert stored.read() == there
    assert stored.write() == [True] * PAGES
    assert stored.exist() == PAGES
    assert stored.read() == PAGES


def attached(stored: Stored, place: Place) -> bool:
    """Whether a storage has the node that there is."""
    stored.exist()  # so that it hears of one that has gone
    with stored.storage._session._attachment.client() as client:
        return client is not None and client.hello.pid == place.node.hello.pid


def test_a_copy_that_raises_ends_the_prefix_there(
    kits: Kits, place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    stored = Stored(kits(kind("full", 64)))
    stored.write()
    write, num = TokenPages.write, []

    def raising(*arguments: Any) -> None:
        num.append(1)
        if len(num) == 4:
            raise CorruptObject("not what it should be")
        write(*arguments)

    assert stored.exist() == PAGES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenPages, "write", raising)
        assert stored.read() == 3, "what came before it is kept"
    assert stored.exist() == stored.read() == PAGES


def test_a_storage_without_a_node_costs_no_time(tiny_llama: Path, tmp_path: Path) -> None:
    settings = {"node": f"unix:{tmp_path}/none.sock", "secret_file": str(tmp_path / "secret")}
    kit = Kit(kind("full", 64), tiny_llama, settings)
    try:
        stored = Stored(kit)
        for call in (stored.exist, stored.read):
            assert within(call, 0.1) == 0
        assert within(stored.write, 0.2) == [False] * PAGES
    finally:
        kit.doCleanups()


def test_prefetches_that_nobody_reads_hold_nothing_for_long(kits: Kits, place: Place) -> None:
    stored = Stored(kits(kind("full", 64), {"deadlines.load": "500ms"}))
    stored.write()
    for number in range(1000):
        assert (
            stored.storage.batch_exists(stored.hashes[: 1 + number % PAGES]) == 1 + number % PAGES
        )
    assert 0 < len(stored.storage._session._holds) <= 64
    assert place.node.status()["leases"]["bytes"] > 0
    eventually(lambda: place.node.status()["leases"]["bytes"] == 0, "all leases ended", 5.0)
    assert len(stored.storage._session._holds) == 0
    assert stored.exist() == stored.read() == PAGES


def more_than(things: list[Any], count: int) -> bool:
    """Whether a list is longer."""
    return len(things) > count


def test_prompts_that_are_given_up_hold_nothing_for_long(kits: Kits, place: Place) -> None:
    kit = kits(kind("full", 64), {"deadlines.load": "500ms"})
    tokens = kit.tokens(PAGES)
    kit.cache(1).store(tokens)
    consumer = kit.cache(2)
    ask, asked = consumer.storage.batch_exists, []

    def counted(*arguments: Any) -> Any:
        asked.append(1)
        return ask(*arguments)

    consumer.storage.batch_exists = counted
    for number in range(1000):
        consumer.give_up(tokens[: (1 + number % PAGES) * 64], partial(more_than, asked, number))
    eventually(lambda: place.node.status()["leases"]["bytes"] == 0, "all leases ended", 10.0)
    assert consumer.prefetch(tokens) == len(tokens)

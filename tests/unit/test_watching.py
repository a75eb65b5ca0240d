"""Who watches a node hears of every change of its own tiers, or that some are missing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from tests.support.attached import Attached, secret_in
from tests.support.nodes import chunk_keys

from kvstrata.config import load_config
from kvstrata.errors import UsageError
from kvstrata.node.common import journal
from kvstrata.node.common.changes import Cause, Changes
from kvstrata.node.common.journal import Journal
from kvstrata.node.operating.watching import MOST_OF_ONE, Watching
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.slots.clients import Client, Holder
from kvstrata.wire import protocol as p

KEYS = chunk_keys(5)


def test_a_client_hears_of_what_was_stored_and_cleared(tmp_path: Path) -> None:
    overrides = {
        "host.capacity": "1MiB",
        "secret_file": str(secret_in(tmp_path)),
        "disk.path": str(tmp_path / "disk"),
        "disk.capacity": "1MiB",
    }
    with InProcessNode(load_config(environ={}, overrides=overrides)) as node:
        one = Attached(node.connect())
        watcher = node.connect()
        begun = watcher.begin(p.Watch, p.Watched).wait(5.0)
        assert (begun.changes, begun.lost) == ([], False)
        waiting = watcher.begin(p.Watch, p.Watched, begun.next, 60.0)
        assert not waiting.ready()
        one.store(KEYS)
        one.client.flush()
        one.client.clear(KEYS[:1], ["host"])
        one.client.clear()
        heard, since = [], begun.next
        answer = waiting.wait(10.0)
        while True:
            heard += answer.changes
            since = answer.next
            if len(heard) >= 2 * len(KEYS) + 3:
                break
            answer = watcher.begin(p.Watch, p.Watched, since, 10.0).wait(20.0)
        host = [(c.what, c.key) for c in heard if c.tier == 0]
        assert sorted(host[: len(KEYS)]) == sorted(("entered", key) for key in KEYS)
        assert host[len(KEYS) :] == [("cleared", KEYS[0]), ("emptied", b"")]
        assert {(c.tier, c.what, c.key) for c in heard if c.tier == 1} == {
            *((1, "entered", key) for key in KEYS),
            (1, "emptied", b""),
        }
        assert watcher.begin(p.Watch, p.Watched, since, 0.05).wait(5.0).changes == []
        with pytest.raises(UsageError, match="a wait of"):
            watcher.begin(p.Watch, p.Watched, since, 1e9).wait(5.0)
        for client in (one.client, watcher):
            client.close()


def test_a_reader_that_is_too_slow_is_told_so() -> None:
    kept = Journal(4)
    for key in KEYS:
        kept.entered("host", key, 0)
    read = kept.read(0, 100)
    assert (read.lost, read.next, [one.key for one in read.changes]) == (True, 5, KEYS[1:])
    assert not kept.read(1, 100).lost
    assert kept.read(3, 1) == ([journal.Change("host", KEYS[3], 0, None)], 4, False)
    assert kept.read(5, 100) == ([], 5, False)
    assert kept.read(99, 100).lost  # of another journal
    kept.left("host", KEYS[0], 2, Cause.EVICTED)
    assert kept.read(5, 100).changes == [journal.Change("host", KEYS[0], 2, Cause.EVICTED)]


def test_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_WAITING", 2)

    async def main() -> None:
        kept = Journal()
        waits = [asyncio.ensure_future(kept.wait(0, 60.0)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(UsageError):
            await kept.wait(0, 60.0)
        kept.entered("host", KEYS[0], 0)
        await asyncio.wait_for(asyncio.gather(*waits), 10.0)
        await kept.wait(0, 60.0)  # which is there already
        await kept.wait(1, 0.0)
        assert not kept._waiting

    asyncio.run(main())


def test_of_one_process_only_so_many_wait_and_others_still_may() -> None:
    async def main() -> None:
        watching = Watching(Changes(), ["host"])
        greedy = Holder()
        first, second, other = Client("a", greedy), Client("b", greedy), Client("c")

        def watch(client: Client) -> asyncio.Future[p.Watched]:
            return asyncio.ensure_future(watching.watch(client, p.Watch(1, -1, 60.0)))

        waits = [watch(first) for _ in range(MOST_OF_ONE)]
        await asyncio.sleep(0)
        for client in (first, second):  # another connection of the process is no other process
            with pytest.raises(UsageError, match="of this process"):
                await watch(client)
        waits.append(watch(other))
        await asyncio.sleep(0)
        waits.pop(0).cancel()  # its connection has ended
        await asyncio.sleep(0)
        waits.append(watch(second))
        await asyncio.sleep(0)
        watching.journal.entered("host", KEYS[0], 0)
        answers = await asyncio.wait_for(asyncio.gather(*waits), 10.0)
        assert [len(one.changes) for one in answers] == [1] * len(waits)
        assert greedy.num_watches == 0

    asyncio.run(main())

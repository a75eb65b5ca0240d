"""A node that is killed while it writes tails: what is found afterwards is whole, and all of it."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

from tests.support.nodes import NAMESPACE, ORDER

from kvstrata.config import Config, load_config
from kvstrata.header import NOBODY
from kvstrata.keys import KeyChain
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect

CHUNK, BLOCK, TOKENS = 64, 16, 40
BLOCK_BYTES = 1 << 20
NBYTES = 3 * BLOCK_BYTES
NUM_SURE = 3
PATIENCE_S = 30.0


class Engine:
    """Stores tails of one token each, and asks what begins like them."""

    def __init__(self, config: Config) -> None:
        self.client: NodeClient = connect(config)
        self.chain = KeyChain(self.client.hello.secret, NAMESPACE, CHUNK)

    def store(self, token: int) -> None:
        tokens = [token] * TOKENS
        template = p.Template("native", ORDER, "bfloat16", [1, NBYTES], TOKENS, NBYTES, CHUNK)
        marks = self.chain.marks(tokens, [None])[0]
        reserved = self.client.reserve(
            NAMESPACE, [self.chain.tail(tokens)], 0, 0, template, marks=marks
        ).wait(PATIENCE_S)
        (offset,) = offsets_of(reserved.offsets)
        assert offset >= 0
        data = payload(token)
        self.client.pool.view(offset + HEADER_BYTES, NBYTES)[:] = data
        assert self.client.commit(reserved.reservation, [checksum(data)]).wait(PATIENCE_S).count

    def find(self, token: int) -> bool:
        """Whether it is found; if so it is what was stored."""
        marks = self.chain.marks([token] * TOKENS, [None])[0]
        nearest: p.Nearest = self.client.begin(
            p.Inside, p.Nearest, 0, marks, [0], [ORDER], [BLOCK_BYTES], [BLOCK], NOBODY, 0.0, []
        ).wait(PATIENCE_S)
        if not nearest.lease:
            return False
        assert nearest.num_tokens == TOKENS
        arrived: p.Arrived = self.client.await_arrival(nearest.lease, 0).wait(PATIENCE_S)
        assert not arrived.failed
        (offset,) = offsets_of(arrived.offsets)
        assert self.client.pool.view(offset + HEADER_BYTES, NBYTES) == payload(token)
        self.client.release(nearest.lease)
        return True


def payload(token: int) -> bytes:
    return random.Random(token).randbytes(NBYTES)


def test_killed_in_the_middle_of_a_write(config: Config, tmp_path: Path) -> None:
    folder, common = tmp_path / "disk", config.to_dict()
    config = load_config(
        environ={},
        overrides={
            **common,
            "host": {**common["host"], "capacity": "64MiB"},
            "disk.path": str(folder),
            "disk.capacity": "1GiB",
            "disk.codec": "raw",
            "disk.scrub_rate": "0",
            "planner": "off",
        },
    )
    engine = Engine(config)
    for token in range(NUM_SURE):
        engine.store(token)
    engine.client.flush(PATIENCE_S)
    deadline = time.monotonic() + PATIENCE_S
    for token in itertools.count(NUM_SURE):
        assert time.monotonic() < deadline, "nothing was ever seen half written"
        engine.store(token)
        if is_writing(folder) and is_stopped_there(engine.client.hello.pid, folder):
            break
    os.kill(engine.client.hello.pid, signal.SIGKILL)
    engine.client.close()
    assert list(folder.rglob("*.tmp"))
    last = token

    engine = Engine(config)
    while not all([engine.find(token) for token in range(NUM_SURE)]):
        assert time.monotonic() < deadline, "what was written is not found"
    found = {token for token in range(last + 1) if engine.find(token)}
    whole = {token for token in range(last + 1) if list(folder.rglob(name_of(engine, token)))}
    assert set(range(NUM_SURE)) <= found == whole
    assert not list(folder.rglob("*.tmp"))
    engine.client.close()


def is_writing(folder: Path) -> bool:
    """Whether the node is in the middle of a file now; looked at for a moment."""
    return any(list(folder.rglob("*.tmp")) for _ in range(50))


def is_stopped_there(pid: int, folder: Path) -> bool:
    """Whether the node, which stands still now, still is; it goes on if not."""
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.02)
    if list(folder.rglob("*.tmp")):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def name_of(engine: Engine, token: int) -> str:
    return f"{engine.chain.tail([token] * TOKENS).hex()}*.kvo"

"""Warm answers while another client's cold prompts are stored, and encoded by a tier.

The other client stores real KV under new keys at a steady rate, as an engine would that computes on
cores of its own. Another engine on these two would only measure how they fight for them.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from benchmarks.common import (
    CHUNK_TOKENS,
    DOCUMENT_TOKENS,
    Ledger,
    Options,
    Prompts,
    Row,
    disk_folder,
    main,
    say,
    spread,
)
from benchmarks.long_document_qa.run import stored_files
from benchmarks.under_load.clients import NAME, Clients, Times, pairs
from benchmarks.under_load.serving import Serving

from kvstrata.errors import KVStrataError
from kvstrata.header import ObjectHeader
from kvstrata.objects import HEADER_BYTES, checksum, decode
from kvstrata.testing.workplace import Workplace
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of

CODECS = ("lossless", "cachegen-3")
DOCUMENTS = 8
ENGINE = {"num_gpu_blocks_override": 30 * DOCUMENTS}
IN_FLIGHT = 2
BOUND = 1.15
# Half as much again as this machine's own prefill makes: some 2,600 tokens a second.
STORED_MB_S = 60
CHUNKS_AT_ONCE = 8
# So much in one period at the most: on a slow machine more would push the documents out of memory.
MOST_STORED_BYTES = 800_000_000
LEAD_S = 1.0
PATIENCE_S = 30.0


class Chunk:
    """One stored chunk: what another one is made of.

    Args:
        path: its file, stored raw.
    """

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        self.header: ObjectHeader = decode(data)
        self.payload = data[HEADER_BYTES : HEADER_BYTES + self.header.stored_length]
        self.checksum = checksum(self.payload)


class OtherClient:
    """Stores cold prompts, one after the other, in steps as an engine would.

    Args:
        client: of the node; used by one thread at a time.
        chunks: stored raw, of one layout.
    """

    def __init__(self, client: NodeClient, chunks: Sequence[Chunk], seed: int) -> None:
        self._client = client
        self._chunks = chunks
        self._random = random.Random(seed)
        header = chunks[0].header
        self._namespace = header.namespace
        self._template = p.Template(
            header.kind,
            header.order,
            header.dtype,
            list(header.shape),
            header.num_tokens,
            header.raw_length,
        )
        self._failed: list[Exception] = []
        #: bytes that the node took
        self.stored = 0

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Store all the while; nothing is under way afterwards."""
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop,))
        thread.start()
        try:
            time.sleep(LEAD_S)  # until the tier has work
            yield
        finally:
            stop.set()
            thread.join()
        if self._failed:
            raise self._failed[0]

    def _run(self, stop: threading.Event) -> None:
        pause_s = CHUNKS_AT_ONCE * len(self._chunks[0].payload) / (STORED_MB_S * 1e6)
        due = time.monotonic()
        most = self.stored + MOST_STORED_BYTES
        try:
            while not stop.is_set() and self.stored < most:
                prefix: list[bytes] = []
                while len(prefix) < DOCUMENT_TOKENS // CHUNK_TOKENS and not stop.is_set():
                    self._step(prefix)
                    due = max(due + pause_s, time.monotonic() - pause_s)
                    stop.wait(max(0.0, due - time.monotonic()))
        except Exception as error:
            self._failed.append(error)

    def _step(self, prefix: list[bytes]) -> None:
        """Store some chunks more of a prompt."""
        first = len(prefix)
        prefix += [self._random.randbytes(32) for _ in range(CHUNKS_AT_ONCE)]
        # A node that is short of room refuses, as it would an engine.
        with contextlib.suppress(KVStrataError):
            reserved: p.Reserved = self._client.reserve(
                self._namespace, prefix, first, 0, self._template
            ).wait(PATIENCE_S)
            sums = []
            for offset in offsets_of(reserved.offsets):
                chunk = self._random.choice(self._chunks)
                if offset >= 0:
                    view = self._client.pool.view(offset + HEADER_BYTES, len(chunk.payload))
                    np.frombuffer(view, np.uint8)[:] = np.frombuffer(chunk.payload, np.uint8)
                sums.append(chunk.checksum if offset >= 0 else bytes(16))
            done: p.Done = self._client.commit(reserved.reservation, sums).wait(PATIENCE_S)
            self.stored += done.count * self._template.raw_length


class Side:
    """An engine and a node whose disk has one codec.

    Args:
        place: where they are.
        folder: of the disk tier.
    """

    def __init__(self, place: Workplace, folder: Path) -> None:
        self._place = place
        self._folder = folder
        self._engine = place.engine_of(Serving, ENGINE)
        #: MB/s while the other client stored, period by period: what it stored, raw bytes that the
        #: tier encoded, bytes that it wrote
        self.rates: list[tuple[float, ...]] = []

    def prepare(self, prompts: Prompts) -> None:
        """Store every document, and compare answers."""
        self._engine.wait()
        self.clients = Clients(self._engine, Ledger(self._place.client()), prompts.make(DOCUMENTS))
        self.clients.store()
        self.clients.compare_alone()

    def chunks(self) -> list[Chunk]:
        """What the disk holds, which must be raw."""
        return [Chunk(path) for path in sorted(stored_files(self._folder))]

    def begin(self, chunks: Sequence[Chunk], seed: int) -> None:
        """Bring in the other client."""
        self._other = OtherClient(self._place.client(), chunks, seed)

    def turns(self, orders: Sequence[Sequence[int]], times: Times, who: str) -> None:
        """Warm turns by themselves."""
        for order in orders:
            times.add(who, self.clients.warm(order, IN_FLIGHT))

    def busy_turns(self, orders: Sequence[Sequence[int]], times: Times, who: str) -> None:
        """Warm turns while the other client stores."""
        with self._other.busy():
            before, began = self._counted(), time.monotonic()
            self.turns(orders, times, who)
            seconds = time.monotonic() - began
            self.rates.append(
                tuple(
                    (now - then) / seconds / 1e6
                    for now, then in zip(self._counted(), before, strict=True)
                )
            )
        assert self.clients.ledger is not None
        self.clients.ledger.drain()

    def _counted(self) -> tuple[float, ...]:
        assert self.clients.ledger is not None
        counters = self.clients.ledger.client.status()["counters"]
        return (
            self._other.stored,
            counters.get('encoded_bytes_total{of="raw",tier="disk"}', 0),
            counters.get('tier_write_bytes_total{tier="disk"}', 0),
        )


def rows_of(codec: str, times: Times, busy: Times, side: Side, raw: Side) -> list[Row]:
    """One codec beside raw: while the other client stores, and while it does not."""
    found, control = (
        spread(
            ratio
            for ours, theirs in zip(each.by[codec], each.by["raw"], strict=True)
            for ratio in pairs(ours, theirs)
        )
        for each in (busy, times)
    )
    ms = [1e3 * spread(busy.firsts(who)).median for who in (codec, "raw")]
    idle = [1e3 * spread(times.firsts(who)).median for who in (codec, "raw")]
    stored, encoded, written = np.median(side.rates, axis=0)
    raw_stored, _, raw_written = np.median(raw.rates, axis=0)
    return [
        Row(
            NAME,
            f"warm while another client's prompts are stored, {codec} / raw",
            found.median,
            BOUND,
            detail=f"{found}; {ms[0]:.0f} and {ms[1]:.0f} ms; encoded {encoded:.0f} of "
            f"{stored:.0f} MB/s stored, written as {written:.0f}; raw {raw_written:.0f} of "
            f"{raw_stored:.0f} MB/s",
        ),
        Row(
            NAME,
            f"control: warm while nobody stores, {codec} / raw",
            control.median,
            None,
            detail=f"{control}; {idle[0]:.0f} and {idle[1]:.0f} ms",
        ),
    ]


def measure(options: Options) -> list[Row]:
    """The rows of tiers that encode."""
    prompts = Prompts(options.seed)
    rounds, repeats = (2, 1) if options.quick else (6, 3)
    rng = random.Random(options.seed)
    names = ["raw", *(CODECS[:1] if options.quick else CODECS)]
    times, busy = Times(), Times()
    with contextlib.ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in names:
            folder = stack.enter_context(disk_folder(options))
            settings = {
                "host.capacity": "2GiB",
                "disk.path": str(folder),
                "disk.capacity": "2GiB",
                "disk.codec": name,
            }
            place = stack.enter_context(Workplace(prompts.model, settings))
            sides[name] = Side(place, folder)
        for side in sides.values():
            side.prepare(prompts)
        chunks = sides["raw"].chunks()
        for side in sides.values():
            side.begin(chunks, options.seed)
        for number in range(rounds):
            orders = [rng.sample(range(DOCUMENTS), DOCUMENTS) for _ in range(repeats)]
            for name in names if number % 2 else reversed(names):
                sides[name].turns(orders, times, name)
                sides[name].busy_turns(orders, busy, name)
            say(f"round {number + 1} of {rounds}")
        for side in sides.values():
            say(side.clients.agreement())
    times.tell("warm, nobody stores")
    busy.tell("warm, another client's prompts are stored")
    return [
        row for name in names[1:] for row in rows_of(name, times, busy, sides[name], sides["raw"])
    ]


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))

"""Does the HTTP API answer in time, and stay as it is, under a mix of verbs?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.common import Options, Row, expect, main, milliseconds, say

from kvstrata.config import load_config
from kvstrata.control.http import HEAD_S
from kvstrata.keys import KeyChain, Namespace
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.testing.engine import engine_environment
from kvstrata.transfer.tcp import Address
from kvstrata.wire import protocol as p
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.launch import connect
from kvstrata.wire.namespaces import Described

NAME = "api"
RATE = 100
CONNECTIONS = 200
IDLE = 1000
SECONDS, QUICK_SECONDS = 300, 20
IDLE_SECONDS, QUICK_IDLE_SECONDS = 30, 10
P99_MS = 100.0
ANSWER_S = 60.0
AT_ONCE = 32
"""Long lookups of before, so that how many come together by chance is not taken for a leak."""
CHUNK = 128
NBYTES = 16 << 10
SHORT, LONG = 24, 781
"""Chunks of a usual prompt, and of one of 100,000 tokens."""
PROMPTS = 8
SPACE = Namespace("fingerprint", "layout", CHUNK)

MIX = {
    "lookup of 3,072 tokens": 58,
    "lookup of 100,000 tokens": 2,
    "status": 10,
    "metrics": 8,
    "requests": 8,
    "chunks": 6,
    "namespaces": 4,
    "inspect": 2,
    "flush": 1,
    "clear of two chunks": 1,
}
"""Of 100 requests."""


@dataclass(frozen=True)
class Asked:
    """One request, and whether an answer to it is right."""

    head: bytes
    body: bytes
    right: Callable[[bytes], bool]


@dataclass
class Seen:
    """What came of a run."""

    seconds: list[float] = field(default_factory=list)
    wrong: Counter[str] = field(default_factory=Counter)


def tokens_of(number: int, chunks: int) -> list[int]:
    """A prompt's token ids."""
    rng = random.Random(f"{number} {chunks}")
    return [rng.randrange(128_000) for _ in range(chunks * CHUNK)]


def store(client: NodeClient, tokens: list[int]) -> list[str]:
    """Store a prompt as an engine does; the keys of its chunks."""
    keys = KeyChain(client.hello.secret, SPACE.digest(), CHUNK).keys(tokens)
    template = p.Template("native", "benchmark/api", "bfloat16", [1, NBYTES // 2], CHUNK, NBYTES)
    data = random.Random(len(tokens)).randbytes(NBYTES)
    reserved = client.reserve(SPACE.digest(), keys, 0, 0, template).wait(ANSWER_S)
    for offset in offsets_of(reserved.offsets):
        expect(offset >= 0, "there is room for the prompt")
        client.pool.view(offset + HEADER_BYTES, NBYTES)[:] = data
    client.commit(reserved.reservation, [checksum(data)] * len(keys)).wait(ANSWER_S)
    return [key.hex() for key in keys]


def requests(client: NodeClient) -> dict[str, list[Asked]]:
    """Requests of each kind; what they ask for is stored, or is there to be cleared."""
    client.record(Described(SPACE, {"name": "m"}).record())
    for number in range(300):
        client.record({"request": f"r{number}", "outcome": "hit", "prompt_tokens": 3072})

    def lookup(number: int, chunks: int) -> Asked:
        tokens = tokens_of(number, chunks)
        store(client, tokens)
        return post("/v1/lookup", {"tokens": tokens}, has("leading_chunks", chunks))

    looks = [lookup(number, SHORT) for number in range(PROMPTS)]
    long = lookup(PROMPTS, LONG)
    keys = store(client, tokens_of(PROMPTS + 1, 4))
    client.flush()
    return {
        "lookup of 3,072 tokens": looks,
        "lookup of 100,000 tokens": [long],
        "status": [get("/v1/status", has("pid", client.hello.pid))],
        "metrics": [get("/metrics", lambda body: b"kvstrata_host_capacity_bytes" in body)],
        "requests": [get("/v1/requests?limit=50", lambda b: len(json.loads(b)["records"]) == 50)],
        "chunks": [get("/v1/chunks?limit=100", lambda b: len(json.loads(b)["chunks"]) == 100)],
        "namespaces": [get("/v1/namespaces", lambda b: len(json.loads(b)["namespaces"]) == 1)],
        "inspect": [post("/v1/inspect", {"tier": "disk", "key": keys[0]}, has("problem", ""))],
        "flush": [post("/v1/flush", None, has("status", "ok"))],
        "clear of two chunks": [
            post("/v1/clear", {"keys": keys[2:]}, lambda body: "objects" in json.loads(body))
        ],
    }


def has(name: str, value: object) -> Callable[[bytes], bool]:
    """Whether an answer has this in a field."""
    return lambda body: bool(json.loads(body)[name] == value)


def get(path: str, right: Callable[[bytes], bool]) -> Asked:
    return Asked(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode(), b"", right)


def post(path: str, what: Any, right: Callable[[bytes], bool]) -> Asked:
    body = b"" if what is None else json.dumps(what).encode()
    kind = "Content-Type: application/json\r\n" if body else ""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{kind}Content-Length: {len(body)}\r\n\r\n"
    return Asked(head.encode(), body, right)


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of one answer."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length:")[2].partition("\r\n")[0])
    return int(head.split()[1]), await reader.readexactly(length)


async def ask(address: Address, asked: dict[str, list[Asked]], seconds: int, seed: int) -> Seen:
    """So many requests a second for so long; late is counted from when each was due."""
    rng = random.Random(seed)
    kinds = rng.choices(list(MIX), list(MIX.values()), k=RATE * seconds)
    seen = Seen()
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(CONNECTIONS):
        free.put_nowait(await asyncio.open_connection(address.host, address.port))
    began = time.perf_counter()

    async def one(number: int, kind: str) -> None:
        due = began + number / RATE
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        request = rng.choice(asked[kind])
        reader, writer = await free.get()
        try:
            writer.write(request.head + request.body)
            status, body = await asyncio.wait_for(answer(reader), ANSWER_S)
            seen.seconds.append(time.perf_counter() - due)
            if status != 200 or not request.right(body):
                seen.wrong[f"{kind}: {status} {body[:100]!r}"] += 1
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError) as error:
            seen.wrong[f"{kind}: {error!r}"] += 1
            reader, writer = await asyncio.open_connection(address.host, address.port)
        free.put_nowait((reader, writer))

    await asyncio.gather(*(one(number, kind) for number, kind in enumerate(kinds)))
    while not free.empty():
        free.get_nowait()[1].close()
    return seen


async def together(address: Address, request: Asked, count: int) -> None:
    """The same request so many times at once."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(request.head + request.body)
        status, body = await asyncio.wait_for(answer(reader), ANSWER_S)
        expect(status == 200 and request.right(body), f"{status} {body[:100]!r}")
        writer.close()

    await asyncio.gather(*(one() for _ in range(count)))


@contextlib.contextmanager
def process(*command: str, begin: str) -> Iterator[tuple[int, str]]:
    """A command's pid, and the rest of the line that says that it is ready."""
    running = subprocess.Popen(
        [sys.executable, "-m", "kvstrata.cli", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=engine_environment({}),
    )
    try:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith(begin):
                yield running.pid, line.removeprefix(begin).strip()
                break
        else:
            expect(False, f"{command[0]} did not start")
    finally:
        running.terminate()
        running.communicate()


def held(pid: int) -> tuple[float, int]:
    """MiB of memory of its own, and descriptors, of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = status.partition("RssAnon:")[2].split()[0]
    return int(resident) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def measure(options: Options) -> list[Row]:
    """All rows."""
    seconds, idle_seconds = SECONDS, IDLE_SECONDS
    if options.quick:
        seconds, idle_seconds = QUICK_SECONDS, QUICK_IDLE_SECONDS
    with contextlib.ExitStack() as ends:
        folder = Path(ends.enter_context(tempfile.TemporaryDirectory(prefix="kv-")))
        node = f"unix:{folder}/node.sock"
        settings = {
            "node": node,
            "secret_file": str(folder / "secret"),
            "host.capacity": "256MiB",
            "disk.path": str(folder / "disk"),
            "disk.capacity": "256MiB",
        }
        given = [f"--set={name}={value}" for name, value in settings.items()]
        node_pid, _ = ends.enter_context(process("serve", *given, begin="serving on "))
        api = ("api", "--node", node, "--listen", "127.0.0.1:0")
        api_pid, url = ends.enter_context(process(*api, begin="API on "))
        client = connect(load_config(environ={}, overrides=settings))
        ends.callback(client.close)
        asked = requests(client)
        address = Address.parse(url.removeprefix("http://"))
        asyncio.run(together(address, asked["lookup of 100,000 tokens"][0], AT_ONCE))
        first = asyncio.run(ask(address, asked, seconds // 2, options.seed + 1))
        time.sleep(1.0)
        before = held(api_pid), held(node_pid)
        seen = asyncio.run(ask(address, asked, seconds // 2, options.seed))
        seen = Seen(first.seconds + seen.seconds, first.wrong + seen.wrong)
        time.sleep(1.0)
        after = held(api_pid), held(node_pid)
        crowded = asyncio.run(_crowded(address, asked, idle_seconds, options.seed))
    say(milliseconds("of the mix", seen.seconds))
    say(milliseconds(f"beside {IDLE} that say nothing", crowded.seconds))
    for words, count in (seen.wrong + crowded.wrong).items():
        say(f"WRONG {count} times: {words}")
    return rows(seen, crowded, before, after)


async def _crowded(
    address: Address, asked: dict[str, list[Asked]], seconds: int, seed: int
) -> Seen:
    """The same beside connections that say nothing; those that are hung up on come back."""

    async def idle(number: int) -> None:
        await asyncio.sleep(number / IDLE * HEAD_S)  # so that not all are hung up on at once
        while True:
            reader, writer = await asyncio.open_connection(address.host, address.port)
            with contextlib.suppress(OSError):
                await reader.read()
            writer.close()

    idling = [asyncio.ensure_future(idle(number)) for number in range(IDLE)]
    try:
        await asyncio.sleep(HEAD_S)
        return await ask(address, asked, seconds, seed)
    finally:
        for one in idling:
            one.cancel()
        await asyncio.wait(idling)


def rows(
    seen: Seen,
    crowded: Seen,
    before: tuple[tuple[float, int], tuple[float, int]],
    after: tuple[tuple[float, int], tuple[float, int]],
) -> list[Row]:
    """What was seen as rows."""
    found = []
    for what, one in (
        (f"API, {RATE} requests/s over {CONNECTIONS} connections", seen),
        (f"the same beside {IDLE} connections that say nothing", crowded),
    ):
        p50, p99 = np.percentile(np.asarray(one.seconds) * 1e3, [50, 99])
        wrong, count = one.wrong.total(), len(one.seconds)
        detail = f"p50 {p50:.1f} ms, n = {count}"
        found.append(Row(NAME, f"{what}, p99", float(p99), P99_MS, unit="ms", detail=detail))
        found.append(Row(NAME, f"{what}, wrong or failed", wrong, 0, detail=f"of {count}"))
    for who, (mib, files), (mib_after, files_after) in zip(
        ("the API", "the node"), before, after, strict=True
    ):
        detail = f"{mib:.1f} MiB at half time, {mib_after:.1f} MiB after"
        found.append(
            Row(NAME, f"memory of {who}, second half", mib_after / mib, 1.05, detail=detail)
        )
        detail = f"{files} before, {files_after} after"
        found.append(
            Row(NAME, f"descriptors of {who}, more", files_after - files, 0, detail=detail)
        )
    return found


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))

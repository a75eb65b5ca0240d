"""The commands explain and records, at a node that listens on a real socket."""

from __future__ import annotations

import json
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.asking import MODEL
from tests.support.attached import Attached, secret_in

from kvstrata import cli
from kvstrata.cli.records import Follower, _append
from kvstrata.config import Config, load_config
from kvstrata.errors import NodeUnavailable
from kvstrata.heads import heads
from kvstrata.keys import KeyChain, Namespace, owner_digest
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.process.run import bind
from kvstrata.observe.reasons import Why
from kvstrata.wire.explaining import explain_prompt, explain_request
from kvstrata.wire.namespaces import Described
from kvstrata.wire.sockets import socket_path

NAMESPACE = Namespace(model="m", layout="l", chunk_tokens=128)
TOKENS = list(range(300))


class Serving:
    """A node in this process, and a client of it."""

    def __init__(self, folder: Path) -> None:
        settings = {
            "node": f"unix:{folder}/node.sock",
            "host.capacity": "4MiB",
            "secret_file": str(secret_in(folder)),
        }
        self.config: Config = load_config(environ={}, overrides=settings)
        self.inprocess = InProcessNode(self.config)
        path = socket_path(self.config)
        self.inprocess.run(lambda: self.inprocess.server.listen(bind(path)))
        self.attached = Attached(self.inprocess.connect())
        self.client = self.attached.client
        self.node = f"--node=unix:{folder}/node.sock"

    def tell(self, **parts: Any) -> Described:
        described = Described(replace(NAMESPACE, **parts), MODEL)
        self.client.record(described.record())
        return described

    def keys(self, tokens: list[int]) -> list[bytes]:
        return KeyChain(self.client.hello.secret, NAMESPACE.digest(), 128).keys(tokens)

    def records(self, *names: str) -> None:
        for name in names:
            self.client.record({"request": name, "outcome": "stopped"})
        self.client.status()  # which comes behind them

    def close(self) -> None:
        self.client.close()
        self.inprocess.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


@pytest.fixture
def serving(folder: Path) -> Iterator[Serving]:
    serving = Serving(folder)
    yield serving
    serving.close()


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kvstrata", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


def test_a_request(serving: Serving, command: Any) -> None:
    evicted = {"why": "evicted", "tokens": 256, "tier": "disk", "ago_s": 8.0}
    serving.client.record({
        "request": "chat-17-a", "prompt_tokens": 300, "local_tokens": 0, "loaded_tokens": 0,
        "reasons": [evicted, {"why": "not a whole chunk", "tokens": 44}],
    })  # fmt: skip
    serving.records("chat-18-b")
    status, out, _ = command("explain", "chat-17", serving.node)
    assert status == 0
    first, *lines = out.splitlines()
    assert first.startswith("request chat-17-a: 300 prompt tokens")
    assert lines[0] == "  256 tokens: it was evicted from disk to make room 8 s before."
    assert lines[1] == "    → raise disk.capacity, add a slower tier, or pin what must stay."
    assert lines[2].startswith("  44 tokens: the end of the prompt")
    status, out, _ = command("explain", "chat-17-a", serving.node, "--json")
    assert json.loads(out)["record"]["reasons"][0] == evicted


@pytest.mark.parametrize(
    ("engines", "says"),
    [
        ({"sglang": 1640, "vllm": 256}, " (computed: 1,640 by sglang, 256 by vllm)"),
        ({}, ""),
        ("of another release", ""),
        ({"x": "y"}, " (computed: 0 by x)"),
    ],
)
def test_who_computed_what_was_loaded(
    serving: Serving, command: Any, engines: Any, says: str
) -> None:
    serving.client.record({
        "request": "shared-1", "prompt_tokens": 2000, "local_tokens": 0, "loaded_tokens": 1896,
        "loaded_from": engines, "reasons": [],
    })  # fmt: skip
    status, out, _ = command("explain", "shared-1", serving.node)
    assert status == 0
    assert out.startswith("request shared-1: 2,000 prompt tokens")
    assert out.splitlines()[0].endswith(f", 1,896 loaded{says}")


def test_why_a_chunk_did_not_come_however_late_the_record_is_heard(
    serving: Serving, command: Any
) -> None:
    """A busy node hears of a request some time after it has ended."""
    keys, began = serving.keys(TOKENS), time.monotonic()
    serving.attached.store(keys)
    serving.client.clear(keys)
    failed = {"why": "the load failed", "tokens": 128, "tier": "disk", "key": keys[0].hex()}
    for name, arrived_at in (("before", began), ("after", began + 60.0)):
        serving.client.record({
            "request": name, "prompt_tokens": 300, "seconds": 0.0, "arrived_at": arrived_at,
            "reasons": [failed],
        })  # fmt: skip
    whys = {}
    for name in ("before", "after"):
        record = explain_request(serving.client, name, 5.0).record
        assert "arrived_at" not in record
        whys[name] = record["reasons"][0]["why"]
    assert whys == {"before": "cleared", "after": "the load failed"}


def test_a_record_of_no_numbers(serving: Serving, command: Any) -> None:
    serving.client.record({"request": "a", "prompt_tokens": "many", "local_tokens": [], "x": None})
    status, out, _ = command("explain", "a", serving.node)
    assert status == 0
    assert out.startswith("request a: 0 prompt tokens, of them 0 from")


def test_a_request_that_nobody_knows(serving: Serving, command: Any) -> None:
    serving.records("one")
    status, out, err = command("explain", "another", serving.node)
    assert (status, out) == (2, "")
    assert "another" in err
    assert command("explain", serving.node)[0] == 2, "neither a request nor a prompt"
    assert command("explain", "one", "--tokens=1", serving.node)[0] == 2, "both"


def test_the_exact_name_goes_before_a_part_of_one(serving: Serving) -> None:
    serving.records("7", "17")
    assert explain_request(serving.client, "7", 5.0).record["request"] == "7"
    assert explain_request(serving.client, "1", 5.0).record["request"] == "17"


def test_a_prompt(serving: Serving, command: Any, folder: Path) -> None:
    serving.tell()
    serving.attached.store(serving.keys(TOKENS)[:1])
    ids = ",".join(map(str, TOKENS))
    status, out, _ = command("explain", f"--tokens={ids}", serving.node)
    assert (status, out.splitlines()[0]) == (0, "300 tokens, of them 128 there: 128 in host")
    assert [line.split(":")[0] for line in out.splitlines()[1::2]] == [
        "  128 tokens",
        "  44 tokens",
    ]
    file = folder / "ids.json"
    file.write_text(json.dumps(TOKENS))
    assert command("explain", f"--tokens=@{file}", serving.node)[1] == out
    serving.client.clear()
    status, out, _ = command("explain", f"--tokens=@{file}", serving.node, "--json")
    told = json.loads(out)["reasons"]
    assert [(one["why"], one["tokens"]) for one in told] == [
        ("cleared", 128), ("never stored", 128), ("not a whole chunk", 44),
    ]  # fmt: skip
    assert command("explain", f"--tokens={ids}", "--salt=s", serving.node)[0] == 0


def test_whose_prompt(serving: Serving, command: Any) -> None:
    assert "no engine has asked" in command("explain", "--tokens=1", serving.node)[2]
    adapted, plain = serving.tell(adapter="a"), serving.tell()
    assert command("explain", f"--tokens={[1] * 128}", serving.node)[0] == 0, "without an adapter"
    other = serving.tell(layout="other")
    status, _, err = command("explain", f"--tokens={[1] * 128}", serving.node)
    assert status == 2
    assert all(one.parts.digest().hex() in err for one in (adapted, plain, other))
    chosen = f"--model={adapted.parts.digest().hex()}"
    assert command("explain", f"--tokens={[1] * 128}", chosen, serving.node)[0] == 0
    assert command("explain", "--tokens=1,x", chosen, serving.node)[0] == 2
    assert command("explain", "--tokens=@/nowhere", chosen, serving.node)[0] == 2
    assert command("explain", "--tokens=1,2", chosen, serving.node)[0] == 2, "no whole chunk"


def test_a_prompt_of_another_namespace(serving: Serving) -> None:
    """Asked for and stored under an adapter, as an engine does."""
    adapted, plain = serving.tell(adapter="a").parts.digest(), serving.tell()
    secret = serving.client.hello.secret
    owner, begin = owner_digest(secret, "", ""), heads(secret, TOKENS, 128)
    keys = KeyChain(secret, adapted, 128).keys(TOKENS)
    serving.attached.match(keys, adapted, owner=owner, heads=begin)
    serving.attached.store(keys)
    (reason,) = explain_prompt(serving.client, plain, TOKENS, 5.0).reasons
    assert (reason.why, reason.chunks, reason.detail) == (Why.NAMESPACE, 2, "adapter")
    (reason,) = explain_prompt(serving.client, plain, TOKENS, 5.0, salt="s").reasons
    assert reason.why is Why.NEVER
    (reason,) = explain_prompt(serving.client, plain, TOKENS, 5.0, salt="s", across=True).reasons
    assert reason.detail == "adapter, salt"


def lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def test_records(serving: Serving, command: Any, folder: Path) -> None:
    serving.records(*(str(number) for number in range(300)))
    status, out, _ = command("records", serving.node)
    assert status == 0
    assert [one["request"] for one in lines(out)] == [str(number) for number in range(300)]
    file = folder / "records.jsonl"
    assert command("records", serving.node, f"--to={file}")[:2] == (0, "")
    assert file.read_text() == out


def test_records_are_followed_once_each(serving: Serving) -> None:
    written: list[str] = []
    follower = Follower(serving.config, serving.inprocess.connect(), written.extend)
    serving.records("a", "b")
    follower._take()
    follower._take()
    serving.records("c")
    follower._take()
    assert [one["request"] for one in lines("\n".join(written))] == ["a", "b", "c"]
    serving.records(*(str(number) for number in range(1500)))
    written.clear()
    follower._take()
    assert lines(written[0]) == [{"missed": 476}]
    assert len(written) == 1025
    follower.once()


def test_a_full_disk_leaves_no_half_line_and_loses_nothing(serving: Serving, folder: Path) -> None:
    serving.records("a")
    to = _append(Path("/dev/full"))
    follower = Follower(serving.config, serving.inprocess.connect(), to)
    with pytest.raises(OSError, match="No space"):
        follower._take()
    file = folder / "records.jsonl"
    follower._write = _append(file)
    follower._take()
    os.rename(file, folder / "records.1")
    serving.records("b")
    follower._take()
    assert [one["request"] for one in lines((folder / "records.1").read_text())] == ["a"]
    assert [one["request"] for one in lines(file.read_text())] == ["b"]
    follower.once()


def test_a_file_whose_disk_fills_within_a_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folder / "records.jsonl"
    write = _append(file)
    write(["x" * 100])
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(["y" * 100, "z" * 100])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_text() == "x" * 100 + "\n"


def test_it_outlives_the_node(folder: Path) -> None:
    written: list[str] = []
    first = Serving(folder)
    follower = Follower(first.config, first.inprocess.connect(), written.extend)
    first.records("a")
    follower._take()
    first.close()
    with pytest.raises(NodeUnavailable):
        follower._take()
    follower._let_go()
    with pytest.raises(NodeUnavailable):
        follower._take()
    second = Serving(folder)
    try:
        second.records("b")
        follower._take()
        assert [one["request"] for one in lines("\n".join(written))] == ["a", "b"]
        follower.once()
    finally:
        second.close()

"""The commands that speak to the API, with one and without."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.apis import CHUNK, MODEL, Rig, prompt
from tests.unit.test_api_jobs import StandIn
from tests.unit.test_tokenizing import model

from kvstrata import cli


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name))
        yield rig
        rig.close()


@pytest.fixture(autouse=True)
def _no_environment(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVSTRATA_")]:
        monkeypatch.delenv(name)


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["kvstrata", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    told = capsys.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, told.out, told.err


def ways(rig: Rig) -> list[list[str]]:
    """Over HTTP by a URL, over HTTP by the configuration, and straight to the node."""
    return [
        ["--api", rig.url],
        ["--set", f"api.listen=127.0.0.1:{rig.port}"],
        ["--node", str(rig.config.node)],
    ]


def test_lookup_in_every_way(
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with rig.engine() as engine:
        engine.tell()
        engine.store(prompt(2))
    ids = tmp_path / "ids"
    texts = (" ".join(map(str, prompt(3))), f"{prompt(3)}\n", ",".join(map(str, prompt(3))))
    for way, text in zip(ways(rig), texts, strict=True):
        ids.write_text(text)
        arguments = ["lookup", "--tokens", f"@{ids}", "--model", MODEL, *way]
        assert run(monkeypatch, capsys, *arguments) == (
            0,
            f"{2 * CHUNK} of {3 * CHUNK} tokens would hit: 2 of 3 chunks of {CHUNK}\n"
            "  chunks 0 to 1: host\n  chunks 2 to 2: nowhere\n",
            "",
        )
        status, out, _ = run(monkeypatch, capsys, *arguments, "--json")
        assert json.loads(out)["leading_chunks"] == 2
        status, out, err = run(monkeypatch, capsys, *arguments, "--model", "other")
        assert (status, out) == (1, "")
        assert err.startswith("kvstrata: no engine told this node of a model other")


def test_lookup_of_text_and_messages(
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = model(tmp_path / "m")
    with rig.engine() as engine:
        engine.tell(name=str(folder))
        engine.store([0, 4, 5] + [4] * 13)  # <s> hello world hello ...
        engine.store([0] + [2, 4, 3] * 5)
    text = "hello world" + " hello" * 13
    (tmp_path / "text").write_text(text)
    chat = [
        {"role": "user", "content": "hello assistant " + "user hello assistant " * 3 + "user hello"}
    ]
    (tmp_path / "chat").write_text(json.dumps(chat))
    node = ["--node", str(rig.config.node), "--model", str(folder)]
    for how in ([text], ["--file", f"{tmp_path}/text"], ["--messages", f"{tmp_path}/chat"]):
        status, out, err = run(monkeypatch, capsys, "lookup", *how, *node)
        assert (status, err) == (0, "")
        assert out.startswith(f"{CHUNK} of {CHUNK} tokens"), how


def test_what_is_no_prompt(
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for arguments, words in [
        ([], "in one way"),
        (["a", "--tokens", "1"], "in one way"),
        (["--tokens", "1,x"], "whole numbers"),
        (["--file", f"{tmp_path}/none"], "cannot be read"),
    ]:
        status, _, err = run(monkeypatch, capsys, "lookup", *arguments)
        assert status == 2
        assert words in err
        assert err.count("\n") == 1


def test_without_an_api_or_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for way in (["--api", "http://127.0.0.1:1"], ["--node", "unix:/tmp/kv-none.sock"]):
        status, out, err = run(monkeypatch, capsys, "lookup", "--tokens", "1", *way)
        assert (status, out) == (1, "")
        assert "answers" in err
    status, _, err = run(monkeypatch, capsys, "api")
    assert status == 2
    assert err.startswith("kvstrata: api.listen: missing")


def test_warm_shows_what_became_of_it(
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = StandIn()
    file = tmp_path / "prompts"
    file.write_text('"a text"\n\n[1, 2]\n{"prompt": "more"}\n')
    try:
        for way in ways(rig):
            command = ["warm", str(file), "--engine", engine.url, "--model", "m", *way]
            assert run(monkeypatch, capsys, *command) == (
                0,
                "done: 3 of 3 prompts, 12 tokens\n",
                "",
            )
        engine.answer = lambda body: (400, b"")
        status, out, err = run(monkeypatch, capsys, *command)
        assert (status, out) == (1, "failed: 3 of 3 prompts, 0 tokens\n")
        assert "prompt 0: the engine answered 400" in err
    finally:
        engine.close()
    for text, words in [("x", "line 1 is no JSON"), ("5", "is no prompt"), ("", "no prompt in it")]:
        file.write_text(text)
        status, _, err = run(monkeypatch, capsys, *command)
        assert status == 2
        assert words in err


def test_chunks_are_brought_listed_and_looked_at(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    way = ["--api", rig.url]
    which = ["--tokens", ",".join(map(str, prompt(3))), "--model", MODEL]

    def told(*arguments: str) -> tuple[int, str, str]:
        return run(monkeypatch, capsys, *arguments, *way)

    with rig.engine() as engine:
        engine.client.clear()
        engine.tell()
        keys = engine.store(prompt(3))
        tiers = engine.client.lookup
        engine.client.clear(keys, ["host"])
        status, out, err = told("prefetch", *which)
        assert (status, err) == (0, "")
        assert out.startswith("done: 3 of 3 chunks")
        assert list(tiers(keys, [0])) == [0, 0, 0]
        status, out, _ = told("move", "--from", "disk", "--to", "host", *which)
        assert (status, out[:11]) == (0, "done: 3 of ")
        engine.client.clear(keys[:1])
        assert list(tiers(keys, [0])) == [255, 0, 0]
        status, out, _ = told("copy", "--from", "host", "--to", "disk", *which)
        assert status == 0
        engine.client.clear(keys, ["host"])
        assert list(tiers(keys, [0])) == [255, 1, 1]
        status, out, _ = told("ls", "--tier", "disk")
        assert [line.split()[0] for line in out.splitlines()] == sorted(k.hex() for k in keys[1:])
        status, out, err = told("ls", "--most", "1", "--json")
        assert json.loads(out)["tiers"].keys() == {"disk"}
        assert "there are more" in err
        status, out, _ = told("inspect", keys[1].hex(), "--tier", "disk")
        assert status == 0
        assert "whole" in out
        assert keys[0].hex() in out, "its parent"
        assert told("inspect", keys[0].hex(), "--tier", "disk")[0] == 1
        status, _, err = told("inspect", "zz")
        assert status == 1
        assert "body.key" in err


def test_a_node_is_kept_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> tuple[int, str, str]:
        return run(monkeypatch, capsys, *arguments, "--api", rig.url)

    for command in (["scrub", "disk"], ["scrub", "host"], ["transcode", "disk"]):
        assert told(*command)[0] == 0
    assert told("scrub", "tape")[0] == 1
    assert told("drain")[1].startswith("done: ")
    look = ("status", "--node", str(rig.config.node))
    assert "\ndrained: it takes no stores" in run(monkeypatch, capsys, *look)[1]
    assert told("drain", "--undo")[1] == "it takes stores again\n"
    assert "drained" not in run(monkeypatch, capsys, *look)[1]
    assert told("drain", "--undo")[1] == "it was not drained\n"
    assert told("drain", "--undo", "--end")[0] == 2
    options = [f"--set={name}={value}" for name, value in rig.options.items()]
    assert told("reload", *options, "--set=planner=off")[1] == "changed: planner\n"
    status, _, err = told("reload", *options, "--set=host.policy=cost")
    assert status == 1
    assert "host.policy" in err
    assert told("reload", *options)[1] == "changed: planner\n"
    status, out, _ = told("jobs")
    assert status == 0
    assert "drain" in out
    id = out.split()[0]
    assert told("jobs", "--cancel", id)[1].startswith(id)
    assert told("jobs", "--cancel", "node-0")[0] == 1
    found = [json.loads(line) for line in told("jobs", "--json")[1].splitlines()]
    assert {"scrub", "drain", "transcode"} <= {job["kind"] for job in found}
    status, _, err = told("send", "--to", "127.0.0.1:1", "--tokens", "1", "--model", MODEL)
    assert status == 1


def test_pins_and_quotas(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    which = ["--tokens", ",".join(map(str, prompt(2))), "--model", MODEL]

    def told(*arguments: str) -> tuple[int, str, str]:
        return run(monkeypatch, capsys, *arguments, "--api", rig.url)

    with rig.engine() as engine:
        engine.client.clear()
        engine.tell()
        owner = engine.owner_of(engine.store(prompt(2))[0])
    status, out, _ = told("pin", "--name", "the manual", "--ttl", "1h", *which)
    assert (status, out[:26]) == (0, "2 of 2 chunks are kept: ho")
    status, out, _ = told("pin")
    assert out.startswith(f"the manual  owner {owner}  2 of 2 chunks  until ")
    assert told("unpin", "the manual", "--tenant", "nobody")[0] == 1
    assert told("unpin", "the manual", "--tenant", "a")[1] == "2 chunks are kept no more\n"
    assert told("pin") == (0, "", "")
    assert told("pin", "--name", "n", "--ttl", "soon", *which)[0] == 2
    assert told("pin", *which)[0] == 2
    status, out, _ = told("quota", "disk", "1GiB", "--owner", owner)
    assert status == 0
    assert out.startswith(f"owner {owner} has ")
    assert told("quota", "disk", "1GiB")[0] == 1
    assert told("quota", "disk", "much", "--tenant", "a")[0] == 2
    assert told("quota", "disk", "none", "--tenant", "a")[0] == 0

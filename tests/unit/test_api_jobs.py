"""Jobs of the API, and `warm`: an engine is asked for every prompt, and tells only numbers."""

from __future__ import annotations

import asyncio
import gzip
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.support.apis import Rig

from kvstrata.control import jobs
from kvstrata.control.client import ApiProblem
from kvstrata.control.jobs import Jobs, Work
from kvstrata.control.problems import NoSuch
from kvstrata.control.verbs.jobs import Job
from kvstrata.control.verbs.warm import MAX_ANSWER_BYTES
from kvstrata.errors import Busy


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        rig = Rig(Path(name))
        yield rig
        rig.close()


class StandIn:
    """An engine's HTTP side: answers when it may, as it is told, and counts."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.open = threading.Event()
        self.open.set()
        self.most = 0
        self.encoding = ""
        self.answer: Callable[[dict[str, Any]], tuple[int, bytes]] = lambda body: (
            200,
            json.dumps({"usage": {"prompt_tokens": len(body["prompt"])}}).encode(),
        )
        now, lock = 0, threading.Lock()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                nonlocal now
                assert self.path == "/v1/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    now += 1
                    stand_in.most = max(stand_in.most, now)
                    stand_in.asked.append(body)
                stand_in.open.wait(60)
                status, text = stand_in.answer(body)
                with lock:
                    now -= 1
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "/elsewhere")
                if stand_in.encoding:
                    self.send_header("Content-Encoding", stand_in.encoding)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.open.set()
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def engine() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


def until(rig: Rig, id: str, true: Callable[[Job], bool]) -> Job:
    deadline = time.monotonic() + 30
    with rig.client() as client:
        while not true(job := client.job(id)):
            assert time.monotonic() < deadline, job
            time.sleep(0.01)
    return job


def test_every_prompt_is_computed_once_and_so_many_at_a_time(rig: Rig, engine: StandIn) -> None:
    prompts: list[str | list[int]] = ["a text", [1, 2, 3], *("x" * n for n in range(1, 20))]
    engine.open.clear()
    with rig.client() as client:
        job = client.warm(engine.url + "/", "m", prompts, at_once=3)
        assert (job.state, job.total, job.done) == ("running", 21, 0)
        again = client.warm(engine.url + "/", "m", prompts, at_once=3)
        assert again.id == job.id, "what runs is not begun twice"
        engine.open.set()
        job = until(rig, job.id, lambda job: job.state != "running")
    assert (job.state, job.done, job.failed, job.troubles) == ("done", 21, 0, [])
    assert job.tokens == 6 + 3 + sum(range(1, 20))
    assert job.ended_at is not None
    key = {"model": "m", "max_tokens": 1, "temperature": 0}
    found = sorted(engine.asked, key=lambda body: str(body["prompt"]))
    wanted = sorted(({**key, "prompt": one} for one in prompts), key=lambda b: str(b["prompt"]))
    assert found == wanted
    assert engine.most <= 3


def test_a_job_that_is_cancelled_asks_for_nothing_more(rig: Rig, engine: StandIn) -> None:
    engine.open.clear()
    with rig.client() as client:
        job = client.warm(engine.url, "m", ["a", "b", "c", "d"], at_once=1)
        deadline = time.monotonic() + 30
        while not engine.asked:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ended = client.cancel(job.id)
        assert (ended.state, ended.done) == ("cancelled", 0)
        assert client.cancel(job.id) == ended, "it can be repeated"
    engine.open.set()
    assert [body["prompt"] for body in engine.asked] == ["a"]


@pytest.mark.parametrize(
    ("status", "text", "words"),
    [
        (400, b"secret", "the engine answered 400"),
        (500, b"secret", "the engine answered 500"),
        (302, b"secret", "the engine answered 302"),
        (200, b"secret", "no OpenAI server"),
        (200, b"[]", "no OpenAI server"),
        (200, b'{"usage": {"prompt_tokens": "secret"}}', "no OpenAI server"),
    ],
)
def test_what_an_engine_refuses_is_counted_and_passed_over(
    rig: Rig, engine: StandIn, status: int, text: bytes, words: str
) -> None:
    fine = engine.answer
    engine.answer = lambda body: (status, text) if body["prompt"] == "b" else fine(body)
    with rig.client() as client:
        job = client.warm(engine.url, "m", ["a", "b", "c"], at_once=1)
        job = until(rig, job.id, lambda job: job.state != "running")
    assert (job.state, job.done, job.failed, job.tokens) == ("failed", 3, 1, 2)
    assert len(job.troubles) == 1
    assert job.troubles[0].startswith("prompt 1: ")
    assert words in job.troubles[0]
    assert "secret" not in str(job), "an answer of whatever is behind a URL goes to nobody"


@pytest.mark.parametrize(
    "text",
    [
        b" " * (MAX_ANSWER_BYTES + 1),
        b'{"usage": {"prompt_tokens": Infinity}}',
        b'{"usage": {"prompt_tokens": -5}}',
        b'{"usage": {"prompt_tokens": 99999999999999999999}}',
        b"[" * 200_000,
    ],
)
def test_an_answer_is_bounded_in_every_way(rig: Rig, engine: StandIn, text: bytes) -> None:
    engine.answer = lambda body: (200, text)
    with rig.client() as client:
        job = client.warm(engine.url, "m", [f"a{len(text)}"])
        job = until(rig, job.id, lambda job: job.state != "running")
    assert (job.state, job.tokens) == ("failed", 0)
    assert job.troubles == ["prompt 0: that is no OpenAI server"]


def test_a_password_in_a_url_is_not_shown(rig: Rig, engine: StandIn) -> None:
    with rig.client() as client:
        job = client.warm(engine.url.replace("//", "//anna:hidden@"), "m", ["a"])
        job = until(rig, job.id, lambda job: job.state != "running")
    assert job.state == "done"
    assert engine.url in job.about
    assert "hidden" not in str(job)
    assert "anna" not in str(job)


def test_a_compressed_answer_is_not_unpacked(rig: Rig, engine: StandIn) -> None:
    engine.encoding = "gzip"
    engine.answer = lambda body: (200, gzip.compress(b'{"usage": {"prompt_tokens": 1}}'))
    with rig.client() as client:
        job = client.warm(engine.url, "m", ["compressed"])
        job = until(rig, job.id, lambda job: job.state != "running")
    assert job.troubles == ["prompt 0: that is no OpenAI server"]


def test_an_engine_that_is_not_there(rig: Rig) -> None:
    with rig.client() as client:
        job = client.warm("http://127.0.0.1:1", "m", ["a"] * 30)
        job = until(rig, job.id, lambda job: job.state != "running")
    assert (job.state, job.failed) == ("failed", 30)
    assert job.troubles == [f"prompt {number}: ConnectError" for number in range(16)]


@pytest.mark.parametrize("url", ["", "ftp://a", "http://", "http://a/v1", "http://[", "file:///a"])
def test_what_is_no_engines_url_is_refused(rig: Rig, url: str) -> None:
    with rig.client() as client, pytest.raises(ApiProblem) as caught:
        client.warm(url, "m", ["a"])
    assert caught.value.problem.field == "body.url"


def test_jobs_come_in_pages_the_latest_first(rig: Rig, engine: StandIn) -> None:
    with rig.client() as client:
        begun = [client.warm(engine.url, "m", [f"page {number}"]).id for number in range(5)]
        for id in begun:
            until(rig, id, lambda job: job.state == "done")
        seen, after = [], ""
        while True:
            page = client.jobs(after, limit=2)
            seen += [job.id for job in page.jobs]
            if not (after := page.next):
                break
        assert seen[:5] == begun[::-1]
        assert len(set(seen)) == len(seen)
        with pytest.raises(ApiProblem, match="no job nothing"):
            client.jobs("nothing")


# the jobs themselves


def test_so_many_run_and_so_many_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_RUNNING", 3)
    monkeypatch.setattr(jobs, "MAX_REMEMBERED", 5)

    async def main() -> None:
        known, go_on = Jobs(), asyncio.Event()

        async def work(job: Work) -> None:
            await go_on.wait()

        running = [known.begin("k", 1, number, work) for number in range(3)]
        assert known.begin("k", 1, 2, work) is running[2]
        with pytest.raises(Busy):
            known.begin("k", 1, 9, work)
        await known.cancel(running[1].id)
        fresh = known.begin("k", 1, 1, work)
        assert fresh is not running[1]
        assert running[1].state == "cancelled", "though it had not begun"
        go_on.set()
        await asyncio.wait({job.task for job in (*running, fresh) if job.task is not None})
        for number in range(10, 20):
            job = known.begin("k", 1, number, work)
            assert job.task is not None
            await job.task
            assert job.state == "done"
        assert len(known.latest()) == 5
        with pytest.raises(NoSuch):
            known.get(running[0].id)
        await known.close()

    asyncio.run(main())


def test_a_mistake_ends_a_job_and_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        known = Jobs()

        async def work(job: Work) -> None:
            raise ZeroDivisionError("why")

        job = known.begin("k", 1, 0, work)
        assert job.task is not None
        await job.task
        assert (job.state, job.failed) == ("failed", 1)
        assert "ZeroDivisionError" in job.troubles[0]

    asyncio.run(main())
    assert "the job api-1 failed" in caplog.text

"""Jobs: they run, tell how far they are, end when asked, and are bounded in number."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from tests.support.nodes import until

from kvstrata.errors import Busy, TierUnavailable
from kvstrata.node.operating import jobs
from kvstrata.node.operating.jobs import Job, JobTable
from kvstrata.observe.counters import Counters


def on_table(test: Any) -> None:
    async def main() -> None:
        table = JobTable(Counters())
        try:
            await asyncio.wait_for(test(table), 20)
        finally:
            await table.close(1.0)

    asyncio.run(main())


async def forever(job: Job) -> None:
    while True:
        await job.pause(60.0)


async def at_once(job: Job) -> None:
    job.total = job.done = 3


def fails(error: Exception) -> Any:
    async def work(job: Job) -> None:
        raise error

    return work


def test_a_job_runs_to_its_end() -> None:
    async def test(table: JobTable) -> None:
        job, again = table.start("copy", "all of it", b"1", at_once)
        assert (job.state, again, job.ended) == ("running", False, 0.0)
        await until(lambda: not job.running)
        told = job.told()
        assert (told.id, told.kind, told.about, told.state) == (job.id, "copy", "all of it", "done")
        assert (told.total, told.done, told.failed) == (3, 3, 0)
        assert told.ended >= told.began > 0
        assert table.running == []

    on_table(test)


def test_what_is_being_done_is_not_begun_twice() -> None:
    async def test(table: JobTable) -> None:
        job, _ = table.start("copy", "", b"1", forever)
        same, again = table.start("copy", "", b"1", forever)
        other, _ = table.start("copy", "", b"2", forever)
        assert same is job
        assert again
        assert other is not job
        assert table.cancel(job.id)
        await until(lambda: not job.running)
        assert job.state == "cancelled"
        assert not table.cancel(job.id), "it has ended"
        new, again = table.start("copy", "", b"1", forever)
        assert new is not job
        assert not again
        assert other.running

    on_table(test)


def test_so_many_run_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_RUNNING", 3)

    async def test(table: JobTable) -> None:
        table.start("fetch", "", b"0", forever, most=1)
        with pytest.raises(Busy, match="1 fetch jobs run already"):
            table.start("fetch", "", b"1", forever, most=1)
        table.start("copy", "", b"2", forever)
        last, _ = table.start("copy", "", b"3", forever)
        with pytest.raises(Busy, match="3 "):
            table.start("copy", "", b"4", forever)
        assert table.start("copy", "", b"3", forever) == (last, True), "that runs already"
        table.cancel(last.id)
        await until(lambda: not last.running)
        table.start("copy", "", b"4", forever)

    on_table(test)


def test_the_last_are_remembered_and_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "MAX_REMEMBERED", 4)

    async def test(table: JobTable) -> None:
        old, _ = table.start("copy", "", b"old", forever)
        for number in range(10):
            job, _ = table.start("copy", "", bytes([number]), at_once)
            await until(lambda j=job: not j.running)  # type: ignore[misc]
        some, following = table.page(0, 3)
        rest, end = table.page(following, 3)
        assert [job.id for job in (*some, *rest)] == [old.id, 8, 9, 10, 11]
        assert end == 0
        assert table.get(7) is None
        assert table.get(old.id) is old

    on_table(test)


@pytest.mark.bugs
@pytest.mark.parametrize(
    ("work", "note"),
    [
        (fails(TierUnavailable("disk: off: it hangs")), "disk: off: it hangs"),
        (fails(ZeroDivisionError()), "a bug, see the node's log: ZeroDivisionError"),
    ],
)
def test_what_fails_says_why(work: Any, note: str) -> None:
    async def test(table: JobTable) -> None:
        job, _ = table.start("copy", "", b"1", work)
        await until(lambda: not job.running)
        assert (job.state, job.note) == ("failed", note)
        assert table.running == []

    on_table(test)


def test_troubles_are_counted_and_some_told() -> None:
    async def test(table: JobTable) -> None:
        job, _ = table.start("scrub", "", b"1", forever)
        for number in range(100):
            job.trouble(f"{number} " + "x" * 1000)
        told = job.told()
        assert told.failed == 100
        assert len(told.troubles) == jobs.MAX_TROUBLES
        assert told.troubles[0].startswith("0 ")
        assert max(map(len, told.troubles)) == jobs.MAX_CHARS

    on_table(test)


def test_waits_end_with_the_job() -> None:
    ends: list[str] = []

    async def never(job: Job) -> None:
        try:
            await job.wait(asyncio.get_running_loop().create_future())
        finally:
            ends.append("let go")

    async def late(job: Job) -> None:
        with pytest.raises(asyncio.TimeoutError):
            await job.wait(asyncio.sleep(60), 0.001)
        ends.append(await job.wait(value("answered")))

    async def value(word: str) -> str:
        return word

    async def test(table: JobTable) -> None:
        job, _ = table.start("copy", "", b"1", never)
        await asyncio.sleep(0)
        table.cancel(job.id)
        await until(lambda: not job.running)
        assert job.state == "cancelled"
        other, _ = table.start("copy", "", b"2", late)
        await until(lambda: not other.running)
        assert other.state == "done"
        assert ends == ["let go", "answered"]

    on_table(test)


def test_all_of_them_end_with_the_node() -> None:
    async def main() -> Job:
        table = JobTable(Counters())
        job, _ = table.start("copy", "", b"1", forever)
        await table.close(5.0)
        with pytest.raises(Busy, match="about to end"):
            table.start("copy", "", b"2", forever)
        return job

    work: Coroutine[Any, Any, Job] = main()
    assert asyncio.run(work).state == "cancelled"

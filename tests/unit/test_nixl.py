"""NIXL on its own: what it reads is right or an error, and after an error it moves no byte more."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from kvstrata.errors import TierUnavailable
from kvstrata.memory.pool import Pool
from kvstrata.transfer import nixl, peers
from kvstrata.transfer.borrowing import Borrower, Line
from kvstrata.transfer.nixl import Agent, Memory
from kvstrata.transfer.tcp import Channel

pytest.importorskip("nixl_cu12", reason="NIXL is not installed: scripts/install-dev.sh")

NBYTES = 128 << 20

OWNER = """
import json, socket, sys, threading
import numpy as np
from kvstrata.transfer import peers as p
from kvstrata.transfer.nixl import Lender, Memory
from kvstrata.transfer.tcp import Channel
array = np.arange(int(sys.argv[1]) // 8, dtype=np.uint64)
lender = Lender(Memory(array.ctypes.data, array.nbytes))
if sys.argv[2] == "helps":
    lender.begin()
listener = socket.create_server(("127.0.0.1", 0))
print(json.dumps([lender.metadata.hex(), array.ctypes.data, listener.getsockname()[1]]), flush=True)
def serve(channel):
    while body := channel.receive():
        match p.decode_request(body):
            case p.Borrow(loan, name, most):
                channel.send(p.Lent(loan, most, int.from_bytes(name)))
            case p.Return(loan):
                channel.send(p.Taken(loan))
while True:
    threading.Thread(target=serve, args=(Channel(listener.accept()[0], 3600.0),)).start()
"""


class Owner:
    """A process that lends memory, in which the numbers from 0 on are.

    Args:
        helps: it does its part, without which no read by UCX's TCP comes to an end.
    """

    def __init__(self, *, helps: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(NBYTES), "helps" if helps else "does not"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        metadata, self.address, self._port = json.loads(self.process.stdout.readline())
        self.metadata = bytes.fromhex(metadata)
        self._line: Line | None = None

    def line(self) -> Line:
        """One to borrow on, for as long as it lasts."""
        if self._line is None or not self._line.lasts(60.0):
            channel = Channel(socket.create_connection(("127.0.0.1", self._port)), 5.0)
            channel.agent = self.metadata
            self._line = Line(channel)
        return self._line

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(params=["memory", "tcp"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What UCX takes: a process's memory itself, or TCP on loopback."""
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    if request.param == "tcp":
        monkeypatch.setenv("UCX_TLS", "tcp")
    return str(request.param)


@pytest.fixture
def owner(way: str) -> Iterator[Owner]:
    with contextlib.closing(Owner()) as owner:
        yield owner


class Target:
    """A pool to read into."""

    def __init__(self) -> None:
        self.pool = Pool.create(NBYTES)
        self.borrower = Borrower(Memory(self.pool.address, NBYTES))
        self.words: Any = self.pool.array(0, NBYTES).view(np.uint64)

    def pull(
        self, owner: Owner, begin: int = 0, nbytes: int = 1 << 20, within_s: float = 20
    ) -> Any:
        """Read the same range of the owner's; what is there then."""
        name = (owner.address + begin).to_bytes(8, "big")
        address, deadline = self.pool.address + begin, time.monotonic() + within_s
        read = self.borrower.fetch(owner.line(), name, address, nbytes, deadline)
        assert read == nbytes
        return self.words[begin // 8 : (begin + nbytes) // 8]


@pytest.fixture
def target(way: str) -> Iterator[Target]:
    target = Target()
    yield target
    target.borrower.close()
    target.borrower.close()
    target.pool.close()


def right(words: Any) -> bool:
    return bool((np.diff(words.astype(np.int64)) == 1).all())


def test_what_is_read_is_what_is_there(owner: Owner, target: Target) -> None:
    with ThreadPoolExecutor(4) as threads:
        pulls = [threads.submit(target.pull, owner, i << 20) for i in range(64)]
    for i, one in enumerate(pulls):
        words = one.result()
        assert words[0] == (i << 20) // 8
        assert right(words)


def test_only_into_its_own_memory(way: str, target: Target) -> None:
    address = target.pool.address
    assert target.borrower.reaches(address, NBYTES)
    assert not target.borrower.reaches(address - 1, 10)
    assert not target.borrower.reaches(address + NBYTES - 9, 10)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_owner_that_ends_in_the_middle(owner: Owner, target: Target, number: int) -> None:
    """Once the pull has failed, not one byte comes any more: the slot is somebody else's."""
    assert right(target.pull(owner))
    threading.Timer(0.02, owner.process.send_signal, (number,)).start()
    begun = time.monotonic()
    try:
        while True:
            assert right(target.pull(owner, 0, NBYTES, within_s=1.0))
    except OSError:
        assert time.monotonic() - begun < 10.0
    target.words[:] = 1 << 63
    owner.process.send_signal(signal.SIGCONT)
    again = None
    with contextlib.closing(Owner()) as other:
        again = target.pull(other, 0, 1 << 20)
        assert right(again)
        time.sleep(0.3)
        assert right(target.pull(other, 1 << 20))
    assert (target.words[(2 << 20) // 8 :] == 1 << 63).all(), "bytes came after the end"


def test_a_read_that_fails_ends_those_beside_it(owner: Owner, target: Target, way: str) -> None:
    """They share the agent that is given up, and none returns before it has ended."""
    if way == "memory":
        pytest.skip("a read ends within the call that begins it")
    with (
        contextlib.closing(Owner(helps=False)) as a,
        contextlib.closing(Owner(helps=False)) as b,
        ThreadPoolExecutor(3) as threads,
    ):
        beside = [threads.submit(target.pull, b, i << 20, 1 << 20, 30) for i in (1, 2)]
        time.sleep(0.2)
        late = threads.submit(target.pull, a, 0, 1 << 20, 0.5)
        with pytest.raises(OSError, match="in time"):
            late.result(20.0)
        for one in beside:
            with pytest.raises(OSError, match="given up"):
                one.result(20.0)
    assert right(target.pull(owner))


def test_what_is_late_on_one_line_ends_no_other(owner: Owner, target: Target) -> None:
    """Where nothing is being read into memory, no agent has to be given up."""
    assert right(target.pull(owner))
    with contextlib.closing(Owner()) as stopped:
        line = stopped.line()
        stopped.process.send_signal(signal.SIGSTOP)
        agent = target.borrower._agent
        with ThreadPoolExecutor(1) as threads:
            late = threads.submit(target.pull, stopped, 0, 1 << 20, 0.5)
            while not late.done():
                assert right(target.pull(owner))
            with pytest.raises(OSError, match="in time"):
                late.result()
        assert not line.lasts(60.0)
        assert target.borrower._agent is agent


def test_what_is_read_after_its_loan_may_have_ended_does_not_count(
    owner: Owner, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert right(target.pull(owner))
    read = Agent.read

    def stands_still(self: Agent, *args: Any) -> int | None:
        number = read(self, *args)
        time.sleep(0.3)
        while number is not None and not self.done(number):
            pass
        return None

    monkeypatch.setattr(Agent, "read", stands_still)
    monkeypatch.setattr(peers, "LOAN_S", 0.2)
    with pytest.raises(TimeoutError, match="not come in time"):
        target.pull(owner)
    monkeypatch.undo()
    assert right(target.pull(owner))


@pytest.mark.parametrize("way", ["memory"], indirect=True)  # UCX's TCP ends owners in the end
def test_lines_that_are_hung_up_while_others_borrow_on_them(owner: Owner, target: Target) -> None:
    ends = time.monotonic() + 2.0
    good = itertools.count()

    def pull(number: int) -> None:
        while time.monotonic() < ends:
            with contextlib.suppress(ConnectionError):
                words = target.pull(owner, number << 20)
                assert words[0] == (number << 20) // 8
                assert right(words)
                next(good)

    with ThreadPoolExecutor(6) as threads:
        pulls = [threads.submit(pull, number) for number in range(6)]
        while time.monotonic() < ends:
            time.sleep(0.02)
            line = owner.line()
            target.borrower.hang_up(line)
    for one in pulls:
        one.result()
    assert next(good) > 5
    while line.lasts(60.0):
        time.sleep(0.01)
    assert right(target.pull(owner))


def test_a_line_that_cannot_be_heard_is_an_error(owner: Owner, target: Target) -> None:
    """As where the system has no more descriptors to watch; and nobody waits for ever."""

    class Full:
        def __init__(self, heard: Any) -> None:
            self._heard = heard

        def __getattr__(self, name: str) -> Any:
            return getattr(self._heard, name)

        def register(self, *args: Any) -> None:
            raise OSError(errno.ENOSPC, "no more watches")

    heard = target.borrower._heard
    target.borrower._heard = Full(heard)  # type: ignore[assignment]
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(OSError, match="no more watches"):
            threads.submit(target.pull, owner).result(20)
        target.borrower._heard = heard
        assert right(threads.submit(target.pull, owner).result(20))


def test_nonsense_is_an_error(owner: Owner, target: Target, way: str) -> None:
    metadata, address = owner.metadata, owner.address
    for owner.metadata, owner.address in ((b"nonsense", address), (metadata, 4096)):
        with pytest.raises(OSError, match="NIXL"):
            target.pull(owner)
    owner.metadata, owner.address = metadata, address
    assert right(target.pull(owner))


def test_after_close_nothing_works(owner: Owner, target: Target) -> None:
    line = owner.line()
    assert right(target.pull(owner))
    target.borrower.close()
    with pytest.raises(ConnectionError, match="any more"):
        target.pull(owner)
    assert not line.lasts(60.0)


def test_it_ends_though_a_line_is_hung_up_at_that_moment(owner: Owner, target: Target) -> None:
    assert right(target.pull(owner))
    line = owner.line()
    target.borrower.hang_up(line)
    closing = threading.Thread(target=target.borrower.close, daemon=True)
    closing.start()
    closing.join(10.0)
    assert not closing.is_alive()
    assert not line.lasts(60.0)


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The name of an object that nobody answers for: who wants it does not come to say so."""
    say, name = Line.say, b"unsaid"

    def some(self: Line, *words: peers.Request) -> None:
        say(self, *(one for one in words if getattr(one, "name", b"") != name))

    monkeypatch.setattr(Line, "say", some)
    return name


@pytest.mark.parametrize("way", ["memory"], indirect=True)
def test_a_read_that_waits_holds_no_loan_of_others(
    owner: Owner, target: Target, unsaid: bytes
) -> None:
    assert right(target.pull(owner))
    line = owner.line()
    with ThreadPoolExecutor(1) as threads:
        address, deadline = target.pool.address, time.monotonic() + 3.0
        late = threads.submit(target.borrower.fetch, line, unsaid, address, 8, deadline)
        while not line.reads:
            time.sleep(0.01)
        assert right(target.pull(owner, 1 << 20))
        while (line.done or line.returned) and not late.done():
            time.sleep(0.01)
        assert not late.done()
        with pytest.raises(TimeoutError):
            late.result()


@pytest.mark.parametrize("way", ["memory"], indirect=True)
def test_who_comes_after_close_ends_nothing_that_is_under_way(
    owner: Owner, target: Target, unsaid: bytes
) -> None:
    """Its loan would end with the connection, and its bytes would count."""
    assert right(target.pull(owner))
    line = owner.line()
    with ThreadPoolExecutor(2) as threads:
        address, deadline = target.pool.address, time.monotonic() + 2.0
        late = threads.submit(target.borrower.fetch, line, unsaid, address, 8, deadline)
        while not line.reads:
            time.sleep(0.01)
        closing = threads.submit(target.borrower.close)
        while not target.borrower._closed:
            time.sleep(0.01)
        with pytest.raises(ConnectionError, match="any more"):
            target.borrower.fetch(line, b"", address, 8, deadline)
        assert line.channel._socket.fileno() == line.channel.descriptor
        with pytest.raises(TimeoutError):
            late.result()
        closing.result()
    assert line.channel._socket.fileno() == -1


@pytest.mark.parametrize("way", ["memory"], indirect=True)
def test_a_line_that_ended_before_it_was_heard_takes_no_other_s_place(
    owner: Owner, target: Target
) -> None:
    ended = owner.line()
    target.borrower.hang_up(ended)
    while ended.lasts(60.0):
        time.sleep(0.01)
    while ended.channel._socket.fileno() != -1:
        time.sleep(0.01)
    while not target.borrower._waits:
        time.sleep(0.01)
    target.borrower._new.append(ended)
    assert owner.line().channel.descriptor == ended.channel.descriptor
    assert right(target.pull(owner))


def test_its_thread_may_end_before_close_does(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.eventfd_write

    def twice(descriptor: int, value: int) -> None:
        write(descriptor, value)
        time.sleep(0.2)
        write(descriptor, value)

    monkeypatch.setattr(os, "eventfd_write", twice)
    target.borrower.close()


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "LIBRARIES", ("no_such_library",))
    with pytest.raises(TierUnavailable, match=r"pip install 'kvstrata\[nixl\]'"):
        Agent(Memory(4096, 4096))


def test_an_idle_agent_costs_nothing(target: Target) -> None:
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.2


def test_a_process_that_used_it_ends_well(way: str) -> None:
    code = (
        "from kvstrata.transfer.nixl import *\nimport numpy as np\na = np.zeros(4096, np.uint8)\n"
    )
    code += "Agent(Memory(a.ctypes.data, 4096))"
    environ = {name: value for name, value in os.environ.items() if name != "UCX_MODULES"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr

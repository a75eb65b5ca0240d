"""The other end of what our peers are compared with: a process that has the objects.

``python -m benchmarks.peers.owner KIND SEED NUM_OBJECTS NBYTES`` prints one line of JSON that
says where it answers, and ends with its standard input.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import socket
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from kvstrata.memory.pool import Pool
from kvstrata.objects import HEADER_BYTES, stored_bytes
from kvstrata.transfer.tcp import WITHIN_BYTES

INDEX = struct.Struct("<I")


def payload(seed: int, number: int, nbytes: int) -> bytes:
    """Of object ``number``."""
    return np.random.default_rng([seed, number]).bytes(nbytes)


def bare(seed: int, count: int, nbytes: int, kept: int = 0) -> Callable[[], None]:
    """A socket that sends object ``i`` to who says ``i``, and a thread for each connection.

    Args:
        kept: what the kernel keeps of what is sent, if not what it would by itself.
    """
    _, views = objects(seed, count, nbytes)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def serve(connected: socket.socket) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if kept:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kept)
        with connected, contextlib.suppress(ConnectionError):
            while request := connected.recv(INDEX.size, socket.MSG_WAITALL):
                connected.sendall(views[INDEX.unpack(request)[0]])

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = listener.accept()
                threading.Thread(target=serve, args=(connected,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    say(port=listener.getsockname()[1])
    return listener.close


def within(seed: int, count: int, nbytes: int) -> Callable[[], None]:
    """The same, keeping what our connections within a machine do."""
    return bare(seed, count, nbytes, WITHIN_BYTES)


def nixl(seed: int, count: int, nbytes: int) -> Callable[[], None]:
    """A NIXL agent that has them registered; what it needs to do is done every millisecond."""
    pool, views = objects(seed, count, nbytes)
    agent = raw_agent("owner")
    agent.register_memory([(pool.address, pool.capacity_bytes, 0, "")], "DRAM")
    addresses = [pool.address + sum(map(len, views[:number])) for number in range(count)]
    ending = threading.Event()

    def progress() -> None:
        while not ending.wait(0.001):
            agent.get_new_notifs()

    thread = threading.Thread(target=progress)
    thread.start()
    say(metadata=agent.get_agent_metadata().hex(), addresses=addresses)

    def end() -> None:
        ending.set()
        thread.join()
        pool.close()

    return end


def raw_agent(name: str) -> Any:
    """NIXL as it comes, without the thread that never sleeps: it would take one core of two."""
    library: Any = importlib.import_module("nixl_cu12")
    settings = library.nixl_agent_config(
        enable_prog_thread=False,
        backends=["UCX"],
        sync_mode=library.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
    )
    logging.getLogger("nixl").handlers.clear()
    return library.nixl_agent(name, settings)


def objects(seed: int, count: int, nbytes: int) -> tuple[Pool, list[memoryview]]:
    """The objects in a pool; the first page of each, which only a node fills, is empty."""
    size = stored_bytes(nbytes)
    pool = Pool.create(count * size)
    pool.populate(in_background=False)  # as a node does
    views = [pool.view(number * size, size) for number in range(count)]
    for number, view in enumerate(views):
        view[:] = bytes(size)
        view[HEADER_BYTES : HEADER_BYTES + nbytes] = payload(seed, number, nbytes)
    return pool, views


def say(**where: Any) -> None:
    """Tell who started this."""
    print(json.dumps(where), flush=True)


KINDS = {"bare": bare, "within": within, "nixl": nixl}

if __name__ == "__main__":
    kind, *numbers = sys.argv[1:]
    end = KINDS[kind](*map(int, numbers))
    sys.stdin.read()
    end()

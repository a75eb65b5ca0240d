"""A node in this process with the HTTP API before it on a real port; for tests."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

from tests.support.nodes import ORDER, RAW, payload, template

from kvstrata.config import Config, load_config
from kvstrata.control import Client
from kvstrata.control.run import serve
from kvstrata.keys import Namespace, owner_digest
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.process.run import bind
from kvstrata.objects import HEADER_BYTES, checksum
from kvstrata.pagekeys import chain_of
from kvstrata.wire.client import NodeClient, offsets_of
from kvstrata.wire.namespaces import Described
from kvstrata.wire.operator import Operator
from kvstrata.wire.sockets import socket_path

MIB = 1 << 20
MODEL = "a/model"
CHUNK = 16
SPACE = Namespace("fingerprint", "layout", CHUNK, tenant="a")


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def problem(self) -> Any:
        """The body of an answer that is a problem."""
        assert self.headers["content-type"] == "application/problem+json"
        assert self.body["status"] == self.status
        assert self.body["title"]
        return self.body


class Rig:
    """A node and its API.

    Args:
        folder: for sockets and the secret; its path must be short.
        more: options beside those of a small node.
        lives: whether there is a node at first.
    """

    def __init__(self, folder: Path, more: Mapping[str, Any] | None = None, lives: bool = True):
        self.options: dict[str, Any] = {
            "node": f"unix:{folder}/node.sock",
            "secret_file": str(folder / "secret"),
            "host.capacity": "16MiB",
            "disk.path": str(folder / "disk"),
            "disk.capacity": "64MiB",
            "disk.scrub_rate": "0",
            "api.listen": "127.0.0.1:0",
            **(more or {}),
        }
        self.config: Config = load_config(environ={}, overrides=self.options)
        self.node: InProcessNode | None = None
        if lives:
            self.start_node()
        self._ended = threading.Event()
        told: Queue[str | BaseException] = Queue()

        def run() -> None:
            try:
                serve(self.config, told.put, self._ended)
            except BaseException as error:
                told.put(error)

        self._thread = threading.Thread(target=run, name="api", daemon=True)
        self._thread.start()
        url = told.get(timeout=60)
        if isinstance(url, BaseException):
            self.close()
            raise url
        self.url = url

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def start_node(self) -> None:
        self.node = InProcessNode(self.config)
        path = socket_path(self.config)
        node = self.node
        node.run(lambda: node.server.listen(bind(path)))

    def stop_node(self) -> None:
        assert self.node is not None
        self.node.close()
        socket_path(self.config).unlink()
        self.node = None

    def close(self) -> None:
        """End both."""
        self._ended.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        if self.node is not None:
            self.node.close()

    def client(self, **more: Any) -> Client:
        return Client(self.url, **more)

    def raw(self) -> socket.socket:
        """A connection that says what a test has it say."""
        return socket.create_connection(("127.0.0.1", self.port), 30)

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """One request on a connection of its own; ``body``: bytes as they are, or JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            given = dict(headers or {})
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
                given.setdefault("Content-Type", "application/json")
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            text = answer.read()
            told = {name.lower(): value for name, value in answer.getheaders()}
            return Answer(answer.status, told, json.loads(text) if text else None)
        finally:
            connection.close()

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """What an engine does with the node."""
        assert self.node is not None
        client = self.node.connect()
        try:
            yield Engine(client)
        finally:
            client.close()


class Engine:
    """Tells the node of a namespace, and stores prompts in it.

    Args:
        client: of the node.
        secret: with which it names what it stores; None: the one that the node gives.
    """

    def __init__(self, client: NodeClient, secret: bytes | None = None) -> None:
        self.client = client
        self.secret = secret or client.hello.secret

    def tell(self, space: Namespace = SPACE, name: str = MODEL, **more: Any) -> str:
        """Hand in a namespace; its digest."""
        told = Described(space, {"name": name, "weights": "w"}, **more)
        self.client.record(told.record())
        self.client.status()  # so that it has been taken in
        return space.digest().hex()

    def keys(self, tokens: list[int], space: Namespace = SPACE, salt: str = "") -> list[bytes]:
        size = space.chunk_tokens
        chain = chain_of(self.secret, space.digest(), size, salt, pages=space.pages)
        return chain.keys(tokens)

    def owner_of(self, key: bytes) -> str:
        """Whose a stored chunk is, in hex, as its header says."""
        owner: str = Operator(self.client).inspect("host", key).header["owner"]
        return owner

    def store(
        self, tokens: list[int], space: Namespace = SPACE, salt: str = "", part: int = 0
    ) -> list[bytes]:
        """Store the whole chunks of a prompt; their keys."""
        keys = self.keys(tokens, space, salt)
        owner = owner_digest(self.secret, space.tenant, salt)
        call = self.client.reserve(space.digest(), keys, 0, part, template(ORDER, RAW), owner=owner)
        reserved = call.wait(5.0)
        sums = []
        for key, offset in zip(keys, offsets_of(reserved.offsets), strict=True):
            data = payload(key, part)
            if offset >= 0:
                self.client.pool.view(offset + HEADER_BYTES, RAW)[:] = data
            sums.append(checksum(data))
        self.client.commit(reserved.reservation, sums).wait(5.0)
        self.client.flush()
        return keys


def prompt(chunks: int, start: int = 0) -> list[int]:
    """Tokens that fill so many chunks."""
    return list(range(start, start + chunks * CHUNK))

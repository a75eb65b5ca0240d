"""A fleet in the middle of an upgrade: nodes of two releases share a store and are peers.

Hits or misses, and nothing else: no node takes away what another one wrote, and none fails. The
last release had neither shared tiers nor peers (``test_releases.py`` has what it shares: a disk and
a socket), so the others are this one with other version numbers, older and newer, each a process
of its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.support.attached import secret_in
from tests.support.nodes import chunk_keys
from tests.support.releases import NEWER, OLDER, THIS, Release, ReleaseNode

from kvstrata.errors import Incompatible
from kvstrata.testing.ports import free_port
from kvstrata.testing.servers.redis import RedisServer, installed
from kvstrata.wire.launch import connect

MINE, THEIRS, LATER = (chunk_keys(5, prompt) for prompt in range(3))
OTHERS = pytest.mark.parametrize("other", [OLDER, NEWER], ids=["older", "newer"])

Serve = Callable[..., ReleaseNode]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A path short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="kv-") as path:
        yield Path(path)


@pytest.fixture
def serve(folder: Path) -> Iterator[Serve]:
    """Starts a node of a release, under a name."""
    with ExitStack() as ends:

        def start(name: str, release: Release, options: dict[str, Any]) -> ReleaseNode:
            common = {
                "host.capacity": "1MiB",
                "leases.per_client": "80%",
                "secret_file": str(secret_in(folder)),
                "planner": "off",
            }
            node = ReleaseNode(folder / name, release, {**common, **options})
            ends.callback(node.close)
            return node

        yield start


@pytest.fixture(params=["redis", "object_store"])
def store(request: pytest.FixtureRequest, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A store that a fleet shares: its tier's name, and the options for it."""
    name = str(request.param)
    common = {f"{name}.epoch_every": "1s", f"{name}.lookup_timeout": "5s"}
    if name == "object_store":
        (folder / "shared").mkdir()
        url = {"object_store.url": f"file://{folder}/shared", "object_store.capacity": "1GiB"}
        yield name, {**common, **url}
        return
    if not installed():
        pytest.skip("there is no redis-server")
    server = RedisServer(folder / "redis")
    yield name, {**common, "redis.url": server.url}
    server.close()


def in_service(tier: str, *nodes: ReleaseNode) -> None:
    for node in nodes:
        node.until(lambda n=node: n.tier(tier) == "ok", 30.0)  # type: ignore[misc]


def written(node: ReleaseNode, keys: list[bytes]) -> None:
    """Store, down to the shared tier; and forget what is in host memory."""
    node.store(keys)
    node.client.flush()
    node.client.clear(tiers=["host"])


def no_harm(*nodes: ReleaseNode) -> None:
    """Nothing was taken for corrupt, and no bug was hit."""
    for node in nodes:
        counters = node.client.status()["counters"]
        assert not [name for name in counters if name.startswith(("corrupt_objects", "bugs_"))]
        assert node.process.poll() is None


@OTHERS
def test_a_store_that_two_releases_share(
    serve: Serve, store: tuple[str, dict[str, Any]], other: Release
) -> None:
    tier, options = store
    mine, theirs = serve("mine", THIS, options), serve("theirs", other, options)
    in_service(tier, mine, theirs)
    written(mine, MINE)
    written(theirs, THEIRS)
    for _ in range(3):
        # What this release cannot read is a miss, and so it is the other way round.
        assert len(mine.get(THEIRS)) == (5 if other is OLDER else 0)
        assert theirs.get(MINE) == []
        # Neither has taken it away from those who can, and goes on finding it in the store.
        assert len(mine.get(MINE)) == len(theirs.get(THEIRS)) == 5
        for node in (mine, theirs):
            node.client.clear(tiers=["host"])
    unread = 'incompatible_objects_total{tier="' + tier
    assert bool(mine.counted(unread)) is (other is NEWER)
    assert theirs.counted(unread) > 0
    # And each keeps what it has to compute itself.
    mine.store(THEIRS)
    assert len(mine.get(THEIRS)) == 5
    no_harm(mine, theirs)
    theirs.client.clear()
    mine.client.clear(tiers=["host"])
    mine.until(lambda: mine.get(MINE) == [], 30.0)


@OTHERS
def test_peers_of_two_releases_part_in_words(serve: Serve, other: Release) -> None:
    ports = [free_port() for _ in range(2)]
    mine, theirs = (
        {
            "network.listen": f"127.0.0.1:{here}",
            "peer.nodes": f"127.0.0.1:{there}",
            "peer.lookup_timeout": "2s",
        }
        for here, there in (ports, reversed(ports))
    )
    one, two = serve("one", THIS, mine), serve("two", other, theirs)
    for node, stranger in ((one, two), (two, one)):
        words = (
            f"refuses: the other node (KVStrata {node.release.name!r}) speaks peer protocol "
            f"{node.release.peers}, this one (KVStrata {stranger.release.name}) "
            f"{stranger.release.peers}; install one release on both sides"
        )
        refused = 'peers_refused_total{why="version"}'
        node.until(lambda n=node, w=words: w in n.tier("peer"), 30.0)  # type: ignore[misc]
        node.until(lambda n=node, r=refused: n.counted(r) > 0, 30.0)  # type: ignore[misc]
        node.store(MINE if node is one else THEIRS)
    assert one.get(THEIRS) == two.get(MINE) == []
    no_harm(one, two)
    two.close()
    two = serve("two", THIS, theirs)
    in_service("peer", one, two)
    assert len(two.get(MINE)) == 5, "they are of one release now"
    two.store(LATER)
    assert len(one.get(LATER)) == 5


@OTHERS
def test_a_client_of_this_release_refuses_a_node_of_another(serve: Serve, other: Release) -> None:
    node = serve("node", other, {})
    words = rf"the node \(KVStrata {other.name}\) speaks protocol {other.protocol}, this client"
    with pytest.raises(Incompatible, match=words):
        connect(node.config)
    node.store(MINE)
    assert len(node.get(MINE)) == 5, "it still serves its own"


def test_one_node_after_the_other(serve: Serve, folder: Path) -> None:
    """To another release and back, while all of them are used."""
    ports = [free_port() for _ in range(3)]
    (folder / "shared").mkdir()
    everybody: list[list[bytes]] = []

    def options(number: int) -> dict[str, Any]:
        others = ", ".join(f"127.0.0.1:{port}" for port in ports if port != ports[number])
        return {
            "network.listen": f"127.0.0.1:{ports[number]}",
            "peer.nodes": others,
            "peer.lookup_timeout": "2s",
            "object_store.url": f"file://{folder}/shared",
            "object_store.capacity": "1GiB",
            "object_store.epoch_every": "1s",
            "object_store.lookup_timeout": "5s",
        }

    def use(nodes: list[ReleaseNode]) -> None:
        """Whoever is of one release shares; from the others come hits or misses."""
        for number, node in enumerate(nodes):
            keys = chunk_keys(4, 100 * len(everybody) + number)
            everybody.append(keys)
            node.store(keys)
            node.client.flush()
            for same in nodes:
                if same.release == node.release:
                    assert len(same.get(keys)) == 4
            for any_node in nodes:
                for keys in everybody:
                    assert len(any_node.get(keys)) in (0, 4)

    nodes = [serve(str(number), THIS, options(number)) for number in range(3)]
    in_service("object_store", *nodes)
    use(nodes)
    for release in (NEWER, THIS):
        for number in range(3):
            nodes[number].close()
            nodes[number] = serve(str(number), release, options(number))
            in_service("object_store", *nodes)
            use(nodes)
    assert all(len(node.get(keys)) == 4 for node in nodes for keys in everybody[-3:])
    no_harm(*nodes)

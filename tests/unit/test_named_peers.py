"""A peer that a request names: asked for that request, where the operator allows it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.members import Member
from tests.support.nodes import chunk_keys

from kvstrata.config import load_config
from kvstrata.config.named import Named
from kvstrata.config.network import TRUSTED
from kvstrata.connectors.naming import (
    COMPUTE_FOR_ANOTHER,
    Roles,
    decode_elsewhere,
    prefill_elsewhere,
    roles,
)
from kvstrata.errors import ConfigError
from kvstrata.tiers import peer as peer_tier
from kvstrata.tiers.base import Outcome
from kvstrata.tiers.peer import PeerTier
from kvstrata.transfer.tcp import Address

KEYS = chunk_keys(4)


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Callable[..., Member]]:
    """Makes members of one deployment, and ends them."""
    with contextlib.ExitStack() as ends:

        def make(**options: Any) -> Member:
            made = Member(tmp_path, **options)
            ends.callback(made.close)
            return made

        yield make


def nobody() -> Address:
    """An address of this machine where nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        return Address("127.0.0.1", reserved.getsockname()[1])


class TestWhatARequestNames:
    def test_a_named_peer_is_asked_for_that_request_alone(
        self, member: Callable[..., Member]
    ) -> None:
        a, b = member(), member(**{"peer.named": "loopback"})
        b.ready()
        a.store(KEYS)
        assert b.get(KEYS) == [], "nobody named it"
        assert b.get(KEYS, peer=str(a.address)) == [1] * 4
        assert b.get(KEYS) == [0] * 4

    def test_one_that_is_not_there_costs_a_miss(self, member: Callable[..., Member]) -> None:
        a, b = member(), member(**{"peer.named": "loopback"})
        b.ready()
        a.store(KEYS)
        assert b.get(KEYS, peer=str(nobody())) == []
        assert b.state() == "ok", "a client's word switches no tier off"
        assert b.get(KEYS, peer=str(a.address)) == [1] * 4

    @pytest.mark.parametrize(
        ("named", "peer", "says"),
        [
            ("loopback", "10.0.0.1:7788", "10.0.0.1:7788 may not be named here"),
            ("127.0.0.1:1", "127.0.0.1:2", "peer.named is 127.0.0.1:1"),
            ("loopback", "nonsense", "no address: 'nonsense' is no host and port"),
            ("loopback", "127.0.0.1:70000", "no address"),
            ("loopback", "x" * 5000, "no address"),
            ("", "127.0.0.1:7788", "see peer.named"),
        ],
    )
    def test_what_may_not_be_named_is_a_reason_and_no_failure(
        self, member: Callable[..., Member], named: str, peer: str, says: str
    ) -> None:
        b = member(**({"peer.named": named} if named else {}))
        b.store(KEYS[:2])
        matched = b.match(KEYS, peer=peer)
        assert list(matched.tiers) == [0, 0]
        assert says in matched.peer_refused
        assert len(matched.peer_refused) < 500
        b.client.release(matched.lease)

    def test_a_configured_peer_may_be_named(self, member: Callable[..., Member]) -> None:
        a = member()
        b = member(peers=[a.address]).ready()
        a.store(KEYS)
        matched = b.match(KEYS, peer=str(a.address))
        assert (list(matched.tiers), matched.peer_refused) == ([1] * 4, "")
        b.client.release(matched.lease)

    def test_another_deployment_says_nothing(
        self, member: Callable[..., Member], tmp_path: Path
    ) -> None:
        strange = tmp_path / "strange"
        strange.mkdir()
        (strange / "secret").write_bytes(bytes(32))
        (strange / "secret").chmod(0o600)
        a = member(secret_file=str(strange / "secret"))
        b = member(**{"peer.named": "loopback"}).ready()
        a.store(KEYS)
        assert b.get(KEYS, peer=str(a.address)) == []
        assert a.counted("peer_sent_bytes_total") == 0


class TestTheTier:
    def test_so_many_named_peers_are_kept(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(peer_tier, "MAX_NAMED", 3)

        def refuse(address: Address, timeout_s: float) -> Any:
            raise ConnectionRefusedError("nobody")

        tier = PeerTier([], refuse)
        for port in range(1, 8):
            assert tier.stat_of([bytes(60)], Address("127.0.0.1", port)) == [Outcome.MISS]
        assert [address.port for address in tier._named] == [5, 6, 7]
        assert tier.fails(Address("127.0.0.1", 7))
        assert not tier.fails(Address("127.0.0.1", 1)), "forgotten"
        assert tier.epoch().number == 0
        tier.close()

    def test_named_peers_that_stall_do_not_hide_the_others(
        self, member: Callable[..., Member], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(peer_tier, "STAT_S", 0.2)
        a = member()
        b = member(peers=[a.address], **{"peer.named": "loopback"}).ready()
        a.store(KEYS)
        with contextlib.ExitStack() as ends:
            for number in range(peer_tier.NAMED_THREADS + 1):
                silent = ends.enter_context(socket.create_server(("127.0.0.1", 0)))
                key = chunk_keys(1, 10 + number)
                assert b.get(key, peer=f"127.0.0.1:{silent.getsockname()[1]}") == []
            assert b.get(KEYS) == [1] * 4


class TestTheRule:
    @pytest.mark.parametrize(
        ("rule", "allowed", "refused"),
        [
            ("none", "", "127.0.0.1:1"),
            ("loopback", "127.0.0.1:1, [::1]:9, localhost:5, 127.9.9.9:1", "10.0.0.1:1, here:1"),
            ("10.0.0.2:7788", "10.0.0.2:7788", "10.0.0.2:7789, 10.0.0.3:7788"),
            ("10.0.0.0/24:7788", "10.0.0.9:7788", "10.0.0.9:22, 10.0.1.9:7788, ten:7788"),
            ("[fd00::/64]:7788", "[fd00::3]:7788", "[fd01::3]:7788, 10.0.0.1:7788"),
            ("prefill-1:7788, loopback", "prefill-1:7788, 127.0.0.1:1", "prefill-2:7788"),
        ],
    )
    def test_who_may_be_named(self, rule: str, allowed: str, refused: str) -> None:
        named = Named.parse(rule)
        assert Named.parse(str(named)) == named
        for text in filter(None, allowed.split(", ")):
            assert named.allows(Address.parse(text)), text
        for text in filter(None, refused.split(", ")):
            assert not named.allows(Address.parse(text)), text

    @pytest.mark.parametrize(
        "rule", ["", "x", "10.0.0.0/24", "10.0.0.0/33:1", "10.0.0.1/24:1", "a:1,,b:2", 5, [5], []]
    )
    def test_other_rules_are_errors(self, rule: Any) -> None:
        with pytest.raises(ConfigError, match=r"peer\.named"):
            load_config(environ={}, overrides={"peer.named": rule})

    @pytest.mark.parametrize("rule", ["10.0.0.2:7788", "10.0.0.0/24:7788", "prefill-1:7788"])
    def test_a_network_needs_tls_or_the_words(self, rule: str) -> None:
        with pytest.raises(ConfigError, match=r"peer\.named: .* is no loopback address"):
            load_config(environ={}, overrides={"peer.named": rule})
        load_config(environ={}, overrides={"peer.named": rule, "network.trusted": TRUSTED})
        load_config(environ={}, overrides={"peer.named": "127.0.0.0/8:7788"})

    def test_a_peer_tier_asks_somebody(self) -> None:
        with pytest.raises(ConfigError, match=r"peer\.nodes: missing, and peer\.named is none"):
            load_config(environ={}, overrides={"peer.io_threads": 2})


class TestParameters:
    @pytest.mark.parametrize(
        ("params", "found"),
        [
            (None, Roles()),
            ({}, Roles()),
            ("nonsense", Roles()),
            ({"kvstrata": {"peer": "a:1"}}, Roles()),
            ({"do_remote_prefill": True, "kvstrata": {"peer": "a:1"}}, Roles("a:1")),
            ({"do_remote_prefill": True, "remote_host": "b", "remote_port": 2}, Roles("b:2")),
            ({"do_remote_prefill": True, "remote_host": "::1", "remote_port": 2}, Roles("[::1]:2")),
            ({"do_remote_prefill": True, "remote_host": ["b"], "remote_port": "x"}, Roles()),
            ({"do_remote_prefill": True, "kvstrata": "a:1"}, Roles()),
            ({"do_remote_prefill": "yes", "kvstrata": {"peer": "a:1"}}, Roles()),
            ({"do_remote_decode": True}, Roles(lends=True)),
            (COMPUTE_FOR_ANOTHER, Roles(lends=True)),
            (prefill_elsewhere("a:1"), Roles("a:1", running=True)),
            (prefill_elsewhere("a:1", "5e"), Roles("a:1", running=True, secret="5e")),
            ({"do_remote_prefill": True, "kvstrata": {"peer": "a:1", "secret": 7}}, Roles("a:1")),
            (decode_elsewhere("[::1]:5", b"n", "r", 7, 1, "5e"), Roles("[::1]:5", secret="5e")),
        ],
    )
    def test_whatever_a_client_sends(self, params: Any, found: Roles) -> None:
        assert roles(params) == found

    def test_what_forgets_our_own_field_still_works(self) -> None:
        params = decode_elsewhere("10.0.0.1:5", b"n", "r", 7, 1, "5e")
        del params["kvstrata"]
        assert roles(params) == Roles("10.0.0.1:5")


class TestOwnAddress:
    def test_a_node_tells_its_clients_where_others_find_it(
        self, member: Callable[..., Member]
    ) -> None:
        a = member()
        assert a.client.hello.address == str(a.address)
        words = {"network.trusted": TRUSTED}
        b = member(**{"network.listen": "0.0.0.0:0", **words})
        assert b.client.hello.address == "", "nobody finds it there"
        c = member(**{"network.listen": "0.0.0.0:0", "network.advertise": "10.0.0.7:1", **words})
        assert c.client.hello.address == "10.0.0.7:1"

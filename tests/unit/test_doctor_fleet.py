"""The doctor between two nodes: over real sockets, and between what two nodes say of themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.support.certificates import certificates
from tests.support.fleets import Fleet, FleetTier, make_member

import kvstrata
from kvstrata import cli
from kvstrata.cli import fleet
from kvstrata.cli.checks import Check, check_tier
from kvstrata.config import load_config
from kvstrata.errors import ConfigError, UsageError
from kvstrata.keys import Namespace
from kvstrata.node.process.inprocess import InProcessNode
from kvstrata.node.process.run import bind
from kvstrata.node.slots.clients import Client
from kvstrata.secret import secret_check
from kvstrata.transfer import peers as p
from kvstrata.transfer.tcp import Address, Channel
from kvstrata.wire import protocol as wire
from kvstrata.wire.namespaces import Described, Shown, described, differing
from kvstrata.wire.sockets import socket_path

SECRET = bytes(range(32))
NAMESPACE = Namespace("5f3a", "full/30x3x64x2/bfloat16", 128, tenant="default")
MODEL = {"name": "org/model", "weights": "hub:org/model@0123", "max_model_len": "2048"}

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for a socket's."""
    with tempfile.TemporaryDirectory(prefix="kv-") as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _no_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("KVSTRATA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder / "config"))


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line; answers exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["kvstrata", *arguments])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert isinstance(caught.value.code, int)
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


class Machine:
    """A node with a Unix socket and a door for others, and its own secret file."""

    def __init__(self, folder: Path, secret: bytes = SECRET, **options: Any) -> None:
        folder.mkdir()
        file = folder / "secret"
        file.write_bytes(secret)
        file.chmod(0o600)
        given = {
            "node": f"unix:{folder}/node.sock",
            "host.capacity": "16MiB",
            "secret_file": str(file),
            "network.listen": "127.0.0.1:0",
            **options,
        }
        self.config = load_config(environ={}, overrides=given)
        self.inprocess = InProcessNode(self.config)
        self.inprocess.run(lambda: self.inprocess.server.listen(bind(socket_path(self.config))))
        self.arguments = [f"--set={key}={value}" for key, value in given.items()]

    @property
    def address(self) -> Address:
        assert self.inprocess.peers is not None
        return self.inprocess.peers.address

    def tell(self, *namespaces: Namespace, **model: str) -> None:
        """As an engine's first request does."""
        client = self.inprocess.connect()
        for one in namespaces:
            client.record(Described(one, {**MODEL, **model}).record())
        client.status()
        client.close()

    def close(self) -> None:
        self.inprocess.check_integrity()
        self.inprocess.close()


@pytest.fixture
def machine(folder: Path) -> Iterator[Callable[..., Machine]]:
    with contextlib.ExitStack() as ends:

        def make(name: str, **options: Any) -> Machine:
            made = Machine(folder / name, **options)
            ends.callback(made.close)
            return made

        yield make


class Stranger:
    """Something on a port: says hello as it is told, or nothing; proves itself if it may."""

    def __init__(self, secret: bytes = SECRET, **hello: Any) -> None:
        self._secret, self._hello = secret, hello
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            connected, _ = self._listener.accept()
            with contextlib.closing(Channel(connected, 5.0)) as channel:
                handshake = p.Handshake((self._secret,))
                theirs = p.decode_request(channel.receive())
                assert isinstance(theirs, p.Hello)
                ours = handshake.answer(theirs)
                changes = dict(self._hello)
                changes["now"] = ours.now + changes.pop("ahead_s", 0.0)
                channel.send(msgspec.structs.replace(ours, **changes))
                if channel.receive():
                    channel.send(p.Welcome())
                    channel.receive()
                    channel.send(p.Welcome())

    def close(self) -> None:
        self._listener.close()
        self._thread.join(10)


@pytest.fixture
def stranger() -> Iterator[Callable[..., Address]]:
    with contextlib.ExitStack() as ends:

        def make(**options: Any) -> Address:
            made = Stranger(**options)
            ends.callback(made.close)
            return made.address

        yield make


class TestPeers:
    def test_one_that_is_right(self, machine: Callable[..., Machine], command: Command) -> None:
        a, b = machine("a"), machine("b")
        code, out, _ = command("doctor", "--json", f"--peer={b.address}", *a.arguments)
        (check,) = json.loads(out)["checks"]
        assert code == 0
        assert (check["name"], check["result"]) == (f"peer {b.address}", "ok")
        assert f"KVStrata {kvstrata.__version__} with the same secret" in check["message"]
        assert 0 < check["measured"]["round_trip_ms"] < 3000

    def test_no_node_is_needed_or_started_for_it(
        self, folder: Path, machine: Callable[..., Machine], command: Command
    ) -> None:
        b = machine("b")
        alone = f"--set=node=unix:{folder}/nowhere.sock"
        secret = f"--set=secret_file={b.config.secret_file}"
        assert command("doctor", f"--peer={b.address}", alone, secret)[0] == 0
        code, out, _ = command("doctor", f"--peer={b.address}", alone)
        assert code == 1
        assert "copy the deployment's secret_file here" in out
        assert not (folder / "config" / "kvstrata" / "secret").exists(), "none was made up"

    def test_every_configured_peer_is_tried(
        self, machine: Callable[..., Machine], command: Command
    ) -> None:
        b, c = machine("b"), machine("c", secret=bytes(32))
        a = machine("a", **{"peer.nodes": f"{b.address}, {c.address}"})
        code, out, _ = command("doctor", "--json", *a.arguments)
        checks = {check["name"]: check for check in json.loads(out)["checks"]}
        assert code == 1
        assert checks[f"peer {b.address}"]["result"] == "ok"
        assert checks[f"peer {c.address}"]["result"] == "FAIL"
        assert "has another secret; copy the deployment's" in checks[f"peer {c.address}"]["message"]
        assert checks["host read"]["result"] == "ok", "and the rest goes on"

    def test_an_address_that_is_none(self, command: Command) -> None:
        code, _, err = command("doctor", "--peer=somewhere")
        assert code == 2
        assert err.startswith("kvstrata: --peer: 'somewhere' is no host and port; expected")

    @pytest.mark.parametrize(
        ("ahead_s", "result", "words"),
        [(-9.0, "warn", "behind ours"), (1.0, "ok", "the same"), (9.0, "warn", "ahead of ours")],
    )
    def test_clocks(
        self, stranger: Callable[..., Address], ahead_s: float, result: str, words: str
    ) -> None:
        check = fleet.check_peer(stranger(ahead_s=ahead_s), (SECRET,), None)
        assert (check.result, words in check.message) == (result, True)
        assert check.measured["skew_s"] == pytest.approx(abs(ahead_s), abs=1.0)
        if result == "warn":
            assert re.match(r"its clock is [89]\.\d s (ahead of|behind) ours", check.message)

    def test_another_release_and_another_protocol(self, stranger: Callable[..., Address]) -> None:
        check = fleet.check_peer(stranger(release="0.1.9"), (SECRET,), None)
        assert check.result == "warn"
        assert "it runs KVStrata 0.1.9" in check.message
        check = fleet.check_peer(stranger(version=9), (SECRET,), None)
        assert check.result == "FAIL"
        assert "speaks peer protocol 9" in check.message

    def test_nobody_and_somebody_who_says_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(fleet, "ANSWER_S", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = Address("127.0.0.1", silent.getsockname()[1])
            check = fleet.check_peer(address, (SECRET,), None)
            assert (check.result, check.message[:22]) == ("FAIL", "no answer within 0.2 s")
        check = fleet.check_peer(address, (SECRET,), None)
        assert (check.result, check.message[:21]) == ("FAIL", "nobody listens there:")
        check = fleet.check_peer(Address("no-such-host.invalid", 1), (SECRET,), None)
        assert check.result == "FAIL"
        assert "the name no-such-host.invalid is not known here" in check.message

    def test_tls(
        self, folder: Path, machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fleet, "ANSWER_S", 1.0)
        files, others = certificates(folder), folder / "others"
        others.mkdir()
        strange = load_config(environ={}, overrides=certificates(others)).network
        a, plain = machine("a", **files), machine("plain")
        tls = a.config.network.tls(serving=False)
        assert fleet.check_peer(a.address, (SECRET,), tls).result == "ok"
        for address, context, words in (
            (a.address, None, "it wants TLS, which this configuration does not have"),
            (plain.address, tls, "or one that has no TLS, as this configuration has"),
            (a.address, strange.tls(serving=False), "its certificate is not accepted"),
            (a.address._replace(host="localhost"), tls, "and be for localhost"),
        ):
            check = fleet.check_peer(address, (SECRET,), context)
            assert check.result == "FAIL"
            assert words in check.message


class TestAgainst:
    def status(self, machine: Machine, command: Command) -> Path:
        code, out, _ = command("status", "--json", *machine.arguments)
        assert code == 0
        file = machine.config.secret_file.parent / "status.json"
        file.write_text(out)
        return file

    def compared(
        self, here: Machine, there: Path, command: Command
    ) -> tuple[int, dict[str, dict[str, Any]]]:
        code, out, _ = command("doctor", "--json", f"--against={there}", *here.arguments)
        return code, {check["name"]: check for check in json.loads(out)["checks"]}

    def test_two_that_share(self, machine: Callable[..., Machine], command: Command) -> None:
        a = machine("a")
        b = machine("b", **{"peer.nodes": str(a.address)})
        a.tell(NAMESPACE)
        b.tell(NAMESPACE)
        code, checks = self.compared(a, self.status(b, command), command)
        assert code == 0
        assert {check["result"] for check in checks.values()} == {"ok"}
        assert list(checks) == ["version", "secret", "stores", "namespaces"]
        assert checks["namespaces"]["message"] == "1 in common"

    def test_two_that_do_not(self, machine: Callable[..., Machine], command: Command) -> None:
        a, b = machine("a"), machine("b", secret=bytes(32))
        a.tell(NAMESPACE)
        b.tell(replace(NAMESPACE, chunk_tokens=256, tenant="other"))
        code, checks = self.compared(a, self.status(b, command), command)
        assert code == 1
        assert {checks[name]["result"] for name in ("secret", "stores", "namespaces")} == {"FAIL"}
        assert "no key of one is a key of the other" in checks["secret"]["message"]
        assert checks["namespaces"]["message"] == (
            "none in common; org/model differs in chunk_tokens (128 here, 256 there), "
            "tenant (default here, other there)"
        )

    @pytest.mark.parametrize("text", ["", "[]", '{"release": 7, "tiers": []}', "\xff", "[" * 9999])
    def test_a_file_that_is_none(
        self, folder: Path, machine: Callable[..., Machine], command: Command, text: str
    ) -> None:
        file = folder / "status.json"
        file.write_text(text, encoding="latin-1")
        code, _, err = command("doctor", f"--against={file}", *machine("a").arguments)
        assert code == 2
        assert "is not what `kvstrata status --json` prints" in err

    def test_a_file_that_is_not_there(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read: No such file"):
            fleet.read_status(folder / "none.json")

    def test_it_starts_no_node(self, folder: Path, command: Command) -> None:
        file = folder / "status.json"
        file.write_text('{"release": "1", "tiers": []}')
        code, _, err = command("doctor", f"--against={file}", f"--set=node=unix:{folder}/no.sock")
        assert code == 1
        assert "no node answers" in err

    def test_people_are_shown_the_namespaces(
        self, machine: Callable[..., Machine], command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "160")
        a = machine("a")
        a.tell(NAMESPACE)
        _, out, _ = command("status", *a.arguments)
        assert f"secret: {secret_check(SECRET)}\n" in out
        digest = NAMESPACE.digest().hex()[:12]
        assert f"namespace {digest}: org/model, chunks of 128 tokens, tenant default" in out


def test_a_node_that_knows_two_says_so(machine: Callable[..., Machine], command: Command) -> None:
    other = bytes(range(32, 64))
    a, b = machine("a", secret=other + SECRET), machine("b")
    _, out, _ = command("status", *a.arguments)
    assert f"secret: {secret_check(other)}, and {secret_check(SECRET)} is looked up, too" in out
    _, out, _ = command("status", "--json", *a.arguments)
    assert json.loads(out)["secret_checks"] == [secret_check(other), secret_check(SECRET)]
    code, out, _ = command("doctor", f"--peer={b.address}", *a.arguments)
    assert (code, "with the same secret" in out) == (0, True)


def status(*namespaces: Namespace, tiers: Any = (), **fields: Any) -> fleet.Status:
    """What a node with these would say of itself."""
    shown = [Described(one, MODEL).shown() for one in namespaces]
    state = {"release": "1", "tiers": list(tiers), "secret_checks": ["a"], "namespaces": shown}
    return fleet.status_of({**state, **fields})


def tier(name: str, epoch: str | None, state: str = "ok") -> dict[str, Any]:
    return {"name": name, "state": state, "shared": True, "epoch": epoch}


def found(here: fleet.Status, there: fleet.Status) -> dict[str, Check]:
    return {check.name: check for check in fleet.compare(here, there)}


class TestCompare:
    def test_every_part_of_a_namespace_is_named_alone(self) -> None:
        changed: dict[str, Any] = {
            "layout": "full/2x2x2x2/float16",
            "chunk_tokens": 64,
            "tensor_parallel": 2,
            "slices": 2,
            "pages": True,
            "selection": "a-method",
            "pipeline_parallel": 2,
            "context_parallel": 2,
            "adapter": "7a",
            "tenant": "b",
        }
        for part, value in changed.items():
            other = replace(NAMESPACE, **{part: value})
            check = found(status(NAMESPACE), status(other))["namespaces"]
            assert check.result == "FAIL"
            ours = getattr(NAMESPACE, part)
            assert check.message.endswith(f"differs in {part} ({ours} here, {value} there)")

    def test_of_what_engines_share_and_an_engines_own_the_option_is_named(self) -> None:
        """Their fingerprints are made of different things, though the model be the same."""
        own = {**MODEL, "configuration": "5f3a"}
        shared = Described(replace(NAMESPACE, model="6b", pages=True), MODEL)
        same = differing(Described(NAMESPACE, own), shared)
        assert same == ["pages"]
        others = Described(shared.parts, {**MODEL, "weights": "other"})
        assert differing(Described(NAMESPACE, own), others) == ["weights", "pages"]

    def test_of_the_model_the_detail_is_named(self) -> None:
        other = Described(
            replace(NAMESPACE, model="6b"),
            {**MODEL, "name": "/elsewhere/model", "max_model_len": "4096"},
        ).shown()
        check = found(status(NAMESPACE), status(namespaces=[other]))["namespaces"]
        assert check.message.endswith("differs in model max_model_len (2048 here, 4096 there)")
        check = found(status(NAMESPACE), status(replace(NAMESPACE, model="6b")))["namespaces"]
        assert check.message.endswith("org/model differs in model"), "nobody knows what"

    def test_the_nearest_is_compared_and_what_is_shared_counted(self) -> None:
        far = replace(NAMESPACE, tenant="c", chunk_tokens=16)
        other = replace(NAMESPACE, tenant="b")
        check = found(status(far, NAMESPACE), status(NAMESPACE, other))["namespaces"]
        assert check.result == "warn"
        assert check.message == ("1 in common; org/model differs in tenant (default here, b there)")

    def test_nobody_has_asked_yet(self) -> None:
        for here, there, words in (
            (status(), status(NAMESPACE), "the node here"),
            (status(NAMESPACE), status(), "the node there"),
        ):
            check = found(here, there)["namespaces"]
            assert (check.result, words in check.message) == ("warn", True)

    def test_epochs_of_stores(self) -> None:
        here = status(tiers=[tier("redis", "3"), tier("mooncake", "1"), tier("object_store", "2")])
        there = status(tiers=[tier("redis", "3"), tier("object_store", "7")])
        checks = found(here, there)
        assert checks["redis"].result == "ok"
        assert "there is no such tier there" in checks["mooncake"].message
        assert "epoch 2 here, 7 there" in checks["object_store"].message
        off = status(tiers=[tier("redis", None, "off: it fell down")])
        checks = found(status(tiers=[tier("redis", "3")]), off)
        assert (checks["redis"].result, "it fell down" in checks["redis"].message) == ("FAIL", True)
        assert "there is no such tier here" in found(off, here)["mooncake"].message

    def test_peers_have_no_epoch(self) -> None:
        peers = {"name": "peer", "state": "ok", "shared": True, "written": False}
        assert check_tier(peers) == Check("peer", "ok", "answers")
        check = found(status(tiers=[peers]), status())["stores"]
        assert (check.result, "doctor --peer" in check.message) == ("ok", True)

    def test_releases_and_a_status_that_says_little(self) -> None:
        checks = found(status(), status(release="2", secret_checks=[]))
        assert (checks["version"].result, checks["secret"].result) == ("warn", "warn")
        assert "KVStrata 1 here, 2 there" in checks["version"].message

    @pytest.mark.parametrize(
        ("here", "there", "result", "words"),
        [
            ("a", "a", "ok", "the same on both"),
            ("ba", "ba", "ok", "the same on both, and another one known"),
            ("ab", "ba", "ok", "a is stored by here, b there; each looks up the other's, too"),
            ("a", "ab", "ok", "the same on both, and another one known"),
            ("a", "ba", "warn", "what is stored there by b is not found here: copy secret_file"),
            ("ba", "a", "warn", "what is stored here by b is not found there: copy secret_file"),
            ("ba", "ca", "warn", "here by b is not found there; what is stored there by c is"),
            ("a", "b", "FAIL", "the two have different secrets"),
            ("ab", "cd", "FAIL", "the two have different secrets"),
        ],
    )
    def test_secrets_while_one_takes_the_others_place(
        self, here: str, there: str, result: str, words: str
    ) -> None:
        checks = found(status(secret_checks=list(here)), status(secret_checks=list(there)))
        assert (checks["secret"].result, words in checks["secret"].message) == (result, True)

    def test_what_a_real_store_says_of_itself(self) -> None:
        async def ask() -> fleet.Status:
            node = make_member(FleetTier(Fleet(lasts_s=5.0), name="redis"))
            await node.start()
            try:
                while node.backings[0].state != "ok":
                    await asyncio.sleep(0.01)
                return fleet.status_of(node.status(Client("me"), wire.Status(1)).state)
            finally:
                await node.stop()

        first, second = asyncio.run(ask()), asyncio.run(ask())
        assert list(first.stores) == ["redis"]
        assert first.stores["redis"].epoch is not None
        assert found(first, first)["redis"].result == "ok"
        assert found(first, second)["redis"].result == "FAIL", "two stores of one name"


class TestTold:
    def test_the_last_sixteen_are_kept_the_latest_last(
        self, machine: Callable[..., Machine]
    ) -> None:
        a = machine("a")
        many = [replace(NAMESPACE, tenant=f"t{number}") for number in range(20)]
        a.tell(*many, many[5])  # which has not gone yet, and is used again
        client = a.inprocess.connect()
        state = client.status()
        client.close()
        tenants = [one["parts"]["tenant"] for one in state["namespaces"]]
        assert tenants == ["t4", *(f"t{number}" for number in range(6, 20)), "t5"]
        assert state["requests"] == []
        assert "requests_total" not in str(state["counters"])
        assert state["namespaces"][-1]["digest"] == many[5].digest().hex()

    @pytest.mark.parametrize(
        "told",
        [
            7,
            {},
            {"parts": {"model": "a", "layout": "b"}},
            {"parts": {"model": "a", "layout": "b", "chunk_tokens": "128"}},
            {"parts": msgspec.to_builtins(NAMESPACE), "model": {"weights": 7}},
            {"parts": msgspec.to_builtins(NAMESPACE), "model": {"weights": "x" * 257}},
            {"parts": msgspec.to_builtins(NAMESPACE), "more": 1},
            {"parts": msgspec.to_builtins(NAMESPACE), "model": {str(i): "" for i in range(17)}},
        ],
    )
    def test_what_is_no_namespace_is_refused(self, told: Any) -> None:
        with pytest.raises(UsageError, match="a record of a namespace that is none"):
            described({"namespace": told})

    def test_a_namespace_survives_the_wire(self) -> None:
        one = Described(NAMESPACE, MODEL)
        assert described(one.record()) == one
        assert msgspec.convert(one.shown(), Shown).parts == NAMESPACE


def test_the_check_of_a_secret_tells_secrets_apart_and_nothing_else() -> None:
    assert secret_check(SECRET) == secret_check(SECRET) != secret_check(bytes(32))
    assert len(secret_check(SECRET)) == 16
    assert secret_check(SECRET) not in SECRET.hex()

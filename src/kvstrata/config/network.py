"""How this node meets others on the network, and the tier that their memory is."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from kvstrata.config import kinds
from kvstrata.config.named import NAMED, Named, is_loopback
from kvstrata.config.parts import option
from kvstrata.config.shared import LOOKUP
from kvstrata.config.tierparts import Room, TierPart
from kvstrata.errors import ConfigError
from kvstrata.transfer.peers import NIXL
from kvstrata.transfer.tcp import Address

if TYPE_CHECKING:
    from kvstrata.tiers.peer import PeerTier

FLEET = "fleet"
TRUSTED = "yes, I trust this network"
MAX_PEERS = 64


def _listen(value: Any) -> Address | None:
    return None if value == "none" else Address.parse(value)


def _nodes(value: Any) -> tuple[Address, ...] | str:
    if value == "none":
        return ()
    if value == FLEET:
        return FLEET
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not 0 < len(names) <= MAX_PEERS:
        raise ValueError(f"{value!r} is no list of 1 to {MAX_PEERS} addresses")
    nodes = tuple(Address.parse(name.strip() if isinstance(name, str) else name) for name in names)
    if len(set(nodes)) != len(nodes):
        raise ValueError(f"{value!r} names a node twice")
    return nodes


def _file(value: Any) -> Path | None:
    return None if value == "none" else kinds.PATH.parse(value)


LISTEN = kinds.Kind(
    _listen, lambda value: str(value or "none"), '"none", or an address such as "10.0.0.1:7788"'
)
NODES = kinds.Kind(
    _nodes,
    lambda value: value if value == FLEET else ", ".join(map(str, value)) or "none",
    '"none", "fleet", or addresses such as "10.0.0.2:7788, 10.0.0.3:7788"',
)
FILE = kinds.Kind(_file, lambda value: str(value or "none"), f'"none", or {kinds.PATH.expected}')


@dataclass(frozen=True)
class NetworkConfig:
    """How this node meets others, see docs/peers.md; on loopback nothing but `listen` is needed."""

    listen: Address | None = option(  # noqa: RUF009 - it calls field()
        LISTEN, "none", "Where this node answers others; `none`: it does not.", shared=True
    )
    advertise: Address | None = option(  # noqa: RUF009 - it calls field()
        LISTEN,
        "none",
        "Where others find it, where that is not `listen` as it stands: behind an address of all "
        "networks, such as `0.0.0.0:7788`, or a translated one.",
        shared=True,
    )
    trusted: str = option(
        kinds.one_of(("no", TRUSTED)),
        "no",
        "Whether bytes may cross the network in the clear: whoever reads or changes them there "
        "reads or changes KV. Without these words TLS is needed on anything but loopback.",
        shared=True,
    )
    transport: str = option(
        kinds.one_of(("tcp", NIXL)),
        "tcp",
        "How bytes come from a peer: `nixl`: by NIXL (RDMA where there is some) where both ends "
        "have it and say so, over TCP otherwise. NIXL's connections prove nothing, so it takes a "
        "network that is `trusted`.",
        shared=True,
    )
    certificate: Path | None = option(  # noqa: RUF009 - it calls field()
        FILE, "none", "This node's, for TLS; PEM.", shared=True
    )
    key: Path | None = option(  # noqa: RUF009 - it calls field()
        FILE, "none", "The certificate's private key; PEM.", shared=True
    )
    authority: Path | None = option(  # noqa: RUF009 - it calls field()
        FILE, "none", "Whose certificates others must show; PEM.", shared=True
    )

    @property
    def ways(self) -> tuple[str, ...]:
        """In which bytes may come, beside the connection itself."""
        return (NIXL,) if self.transport == NIXL else ()

    @property
    def secured(self) -> bool:
        """Whether everything goes through TLS."""
        return self.certificate is not None

    def check(self) -> None:
        """Raise `ConfigError` where options do not go together."""
        files = {"certificate": self.certificate, "key": self.key, "authority": self.authority}
        if self.secured or self.key or self.authority:
            for name, path in files.items():
                if path is None:
                    raise ConfigError(
                        f"network.{name}", "missing; TLS needs certificate, key and authority"
                    )
        if self.transport == NIXL and self.trusted != TRUSTED:
            raise ConfigError(
                "network.transport",
                f"{NIXL} goes past TLS and asks nobody for the secret; expected "
                f'network.trusted = "{TRUSTED}", or "tcp"',
            )
        if self.listen is not None:
            self.check_way(self.listen, "network.listen")

    def check_way(self, address: Address, path: str) -> None:
        """Raise `ConfigError` where bytes would cross a network that nobody says is trusted."""
        if not (self.secured or self.trusted == TRUSTED or is_loopback(address.host)):
            raise ConfigError(
                path,
                f"{address.host} is no loopback address, and there is neither TLS "
                f"(network.certificate, key and authority) nor network.trusted = {TRUSTED!r}",
            )

    def tls(self, *, serving: bool) -> ssl.SSLContext | None:
        """For one end of a connection; None where there is none.

        Raises:
            ConfigError: a file cannot be used.
        """
        if not self.secured:
            return None
        purpose = ssl.Purpose.CLIENT_AUTH if serving else ssl.Purpose.SERVER_AUTH
        try:
            context = ssl.create_default_context(purpose, cafile=str(self.authority))
            context.load_cert_chain(str(self.certificate), str(self.key))
        except (OSError, ssl.SSLError) as error:
            raise ConfigError("network.certificate", f"TLS cannot be had: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        return context


@dataclass(frozen=True)
class PeerConfig(TierPart):
    """What other nodes have in host memory; off without `nodes` and `named`."""

    name: ClassVar[str] = "peer"
    nodes: tuple[Address, ...] | str = option(
        NODES,
        "none",
        "Where the others answer: their `network.listen`. They are asked for whatever is not here. "
        "`fleet`: as the fleet's registry says, and only those that have the next chunk.",
        shared=True,
    )
    named: Named = option(  # noqa: RUF009 - it calls field()
        NAMED,
        "none",
        "Which peers a request may name, see docs/disaggregation.md; `loopback`: any port of this "
        "machine.",
        shared=True,
    )
    io_threads: int = option(
        kinds.whole(1, 64), "8", "Threads that read, over all peers.", shared=True
    )
    lookup_timeout: float = option(kinds.WAIT, "20ms", LOOKUP, shared=True)

    codec = "raw"
    write_queue = 0

    def check(self, room: Room) -> None:
        if not (self.nodes or self.named):
            raise ConfigError(
                "peer.nodes", f"missing, and peer.named is none; expected {NODES.expected}"
            )

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Those that are configured by their address."""
        return () if isinstance(self.nodes, str) else self.nodes

    def check_ways(self, network: NetworkConfig) -> None:
        """Raise `ConfigError` where bytes would cross a network that nobody says is trusted."""
        for node in self.addresses:
            network.check_way(node, "peer.nodes")
        for node in self.named.addresses:
            network.check_way(node, "peer.named")
        for hosts, port in self.named.networks:
            network.check_way(Address(str(hosts), port), "peer.named")

    def why_not(self, address: Address) -> str:
        """Why a request may not name this peer; empty where it may."""
        if address in self.addresses or self.named.allows(address):
            return ""
        return f"the peer {address} may not be named here: peer.named is {self.named}"

    def open(self, config: Any) -> PeerTier:
        from kvstrata.secret import load_secrets
        from kvstrata.tiers.peer import PeerTier
        from kvstrata.transfer.tcp import connect

        network, known = config.network, load_secrets(config.secret_file)
        tls = network.tls(serving=False)
        return PeerTier(
            self.addresses,
            lambda node, timeout_s: connect(node, known, timeout_s, tls, network.ways),
        )

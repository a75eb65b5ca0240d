"""Which peers a request may name: an operator's list, for a client could name any address."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any

from kvstrata.config.kinds import Kind
from kvstrata.transfer.tcp import Address

LOOPBACK = "loopback"
MAX_ENTRIES = 256

_NETWORK = re.compile(r"\[?([0-9a-fA-F:.]+/[0-9]{1,3})\]?:([0-9]{1,5})")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Named:
    """Addresses that a request may name.

    Args:
        loopback: any port of this machine.
        addresses: these, as they are written.
        networks: any numeric address of a network, on one port.
    """

    loopback: bool = False
    addresses: tuple[Address, ...] = ()
    networks: tuple[tuple[Network, int], ...] = ()

    @classmethod
    def parse(cls, value: Any) -> Named:
        """As in a configuration.

        Raises:
            ValueError: it is no list of such.
        """
        entries = value.split(",") if isinstance(value, str) else value
        if not isinstance(entries, list | tuple) or not 0 < len(entries) <= MAX_ENTRIES:
            raise ValueError(f"{value!r} is no list of 1 to {MAX_ENTRIES} addresses")
        words = [one.strip() if isinstance(one, str) else one for one in entries]
        if words == ["none"]:
            return cls()
        addresses: list[Address] = []
        networks: list[tuple[Network, int]] = []
        for word in words:
            if word == LOOPBACK:
                continue
            found = _NETWORK.fullmatch(word) if isinstance(word, str) else None
            if found is None:
                addresses.append(Address.parse(word))
            elif int(found[2]) < 1 << 16:
                networks.append((ipaddress.ip_network(found[1]), int(found[2])))
            else:
                raise ValueError(f"{word!r} is no network and port")
        return cls(LOOPBACK in words, tuple(addresses), tuple(networks))

    def __str__(self) -> str:
        words = [LOOPBACK] if self.loopback else []
        words += [str(address) for address in self.addresses]
        words += [str(Address(str(network), port)) for network, port in self.networks]
        return ", ".join(words) or "none"

    def __bool__(self) -> bool:
        return bool(self.loopback or self.addresses or self.networks)

    def allows(self, address: Address) -> bool:
        """Whether a request may name this one; a name is never looked up to find out."""
        if address in self.addresses or (self.loopback and is_loopback(address.host)):
            return True
        try:
            host = ipaddress.ip_address(address.host)
        except ValueError:
            return False
        return any(port == address.port and host in network for network, port in self.networks)


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine is at an address, or in a network."""
    try:
        return ipaddress.ip_network(host, strict=False).is_loopback
    except ValueError:
        return host == "localhost"


NAMED = Kind(
    Named.parse,
    str,
    f'"none", or a list of "{LOOPBACK}", addresses such as "10.0.0.2:7788" and networks with a '
    'port such as "10.0.0.0/24:7788"',
)

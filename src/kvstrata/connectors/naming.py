"""What requests say of other engines' nodes: the fields that proxies forward unchanged.

They are laid out as those of vLLM's NIXL connector, so that its proxies work with KVStrata. What
comes in was sent by a client, so it may be anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvstrata.transfer.tcp import Address

MAX_PEER = 256
"""Characters of a peer's address that are looked at."""


class Roles(NamedTuple):
    """What a request's ``kv_transfer_params`` ask for.

    Args:
        peer: the node that has the prompt's KV, or is about to; empty: none is named.
        running: whether the prompt may still be computed there, or wait for its turn.
        lends: whether another engine will decode what this one computes.
        secret: check of the one that it is stored by there (`kvstrata.secret.secret_check`);
            empty: unknown.
    """

    peer: str = ""
    running: bool = False
    lends: bool = False
    secret: str = ""


def roles(params: Any) -> Roles:
    """What a request asks for; whatever is no such thing asks for nothing."""
    if not isinstance(params, dict):
        return Roles()
    lends = params.get("do_remote_decode") is True
    if params.get("do_remote_prefill") is not True:
        return Roles(lends=lends)
    ours = params.get("kvstrata")
    ours = ours if isinstance(ours, dict) else {}
    peer, running = ours.get("peer"), ours.get("running") is True
    host, port = params.get("remote_host"), params.get("remote_port")
    if not isinstance(peer, str) and isinstance(host, str) and host and isinstance(port, int):
        peer = str(Address(host, port))
    secret = ours.get("secret")
    return Roles(
        peer[:MAX_PEER] if isinstance(peer, str) else "",
        running,
        lends,
        secret if isinstance(secret, str) else "",
    )


def decode_elsewhere(
    address: str, node: bytes, request_id: str, num_tokens: int, world: int, secret: str
) -> dict[str, Any]:
    """The ``kv_transfer_params`` with which a prompt that was computed here is decoded elsewhere.

    Args:
        address: where this engine's node answers others.
        node: that node's identity.
        request_id: of the request here.
        num_tokens: of its prompt.
        world: ranks of this engine.
        secret: as of `Roles`.
    """
    host, port = Address.parse(address)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": node.hex(),
        "remote_request_id": request_id,
        "remote_block_ids": [],
        "remote_host": host,
        "remote_port": port,
        "remote_num_tokens": num_tokens,
        "tp_size": world,
        "kvstrata": {"peer": address, "secret": secret},
    }


def prefill_elsewhere(address: str, secret: str = "") -> dict[str, Any]:
    """The ``kv_transfer_params`` for a prompt that another engine is about to compute.

    Args:
        address: where that engine's node answers others.
        secret: as of `Roles`.
    """
    host, port = Address.parse(address)
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_host": host,
        "remote_port": port,
        "kvstrata": {"peer": address, "running": True, "secret": secret},
    }


COMPUTE_FOR_ANOTHER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""The ``kv_transfer_params`` for a prompt that another engine will decode."""

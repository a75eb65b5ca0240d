"""What a request says of other engines' nodes: the fields that proxies forward unchanged.

They are laid out as vLLM's NIXL connector has them, so that its proxies work with KVStrata.
"""

from __future__ import annotations

from typing import Any

from kvstrata.transfer.tcp import Address


def named_peer(params: Any) -> str:
    """The node that a request's ``kv_transfer_params`` say has its KV; empty if none is named.

    They came from a client, so they may be anything.
    """
    if not isinstance(params, dict) or not params.get("do_remote_prefill"):
        return ""
    ours = params.get("kvstrata")
    if isinstance(ours, dict) and isinstance(ours.get("peer"), str):
        return str(ours["peer"])
    host, port = params.get("remote_host"), params.get("remote_port")
    if isinstance(host, str) and host and isinstance(port, int):
        return str(Address(host, port))
    return ""

"""What SGLang shares with other engines, where ``share`` has ``engines``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kvstrata.connectors.identity import checkpoint_folder, shared_layout, shared_namespace
from kvstrata.connectors.orders import foreign_orders
from kvstrata.connectors.sglang.pages import KV, TokenPages
from kvstrata.connectors.sglang.pools import Pools
from kvstrata.errors import Incompatible
from kvstrata.keys import Namespace
from kvstrata.layout import ITEM_BYTES


def orders_of(page_tokens: int) -> tuple[str, ...]:
    """The byte orders of vLLM's that can be read, by name, of pools of any dtype."""
    dtypes = [name for name, nbytes in ITEM_BYTES.items() if nbytes > 1]
    return tuple(name for dtype in dtypes for name in foreign_orders(page_tokens, dtype))


def engines_namespace(
    server_args: Any,
    storage_config: Any,
    pools: Pools,
    model: Mapping[str, Any],
    tenant: str,
) -> Namespace:
    """The namespace that an engine shares with others.

    Args:
        server_args: SGLang's arguments, resolved.
        storage_config: ranks and their number.
        pools: that SGLang has registered.
        model: `kvstrata.connectors.sglang.fingerprint.model_of` them.
        tenant: as configured.
    Raises:
        Incompatible: it shares with none; the message says why.
    """
    pages, effective = pools.get(KV), model["effective"]
    if getattr(server_args, "speculative_algorithm", None):
        raise Incompatible("it drafts tokens, and engines keep what drafts differently")
    if getattr(server_args, "enable_lora", None) or getattr(server_args, "lora_paths", None):
        raise Incompatible("its adapters have names here that other engines do not know")
    if getattr(server_args, "json_model_override_args", "{}") not in ("", "{}", None):
        raise Incompatible("its configuration is not the checkpoint's alone")
    if getattr(server_args, "modelopt_quant", None) or getattr(
        server_args, "quantize_and_serve", 0
    ):
        raise Incompatible("its weights are quantized by the engine")
    if not isinstance(pages, TokenPages) or pools.names != [KV]:
        raise Incompatible("not all of its layers are full attention of one shape")
    group = pages.group
    if group.states == 1:
        raise Incompatible("engines may keep the parts of a latent in different orders")
    if storage_config.attn_cp_size > 1:
        raise Incompatible("its prompts are cut among ranks (context parallelism)")
    return shared_namespace(
        checkpoint_folder(server_args.model_path, model["commit"]),
        model["weights"],
        effective["dtype"],
        group.dtype,
        effective["context_length"],
        shared_layout(
            group.num_layers, group.states, group.num_kv_heads, group.head_dim, group.dtype
        ),
        pages.page_tokens,
        storage_config.tp_size,
        storage_config.pp_size,
        tenant,
        quantization=effective["quantization"].replace("None", ""),
    )

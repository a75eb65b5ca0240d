"""What SGLang shares with other engines, which of theirs it reads, and what is its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.host_pools import HostPool
from tests.unit.sglang.test_records import NAMES, PAGE, a_hold

from kvstrata.connectors.identity import shared_layout, shared_namespace
from kvstrata.connectors.sglang.engines import engines_namespace, orders_of
from kvstrata.connectors.sglang.pages import KV, TokenPages
from kvstrata.connectors.sglang.pools import Pools
from kvstrata.connectors.sglang.records import record_of
from kvstrata.errors import Incompatible
from kvstrata.keys import Namespace
from kvstrata.layout import LayerGroup, native_order
from kvstrata.wire.namespaces import MAX_ORDERS

Make = Callable[..., Namespace]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 576}))

    def made(
        args: dict[str, Any] | None = None,
        ranks: dict[str, Any] | None = None,
        effective: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
        pools: dict[str, HostPool] | None = None,
    ) -> Namespace:
        config = SimpleNamespace(
            **{"tp_size": 1, "pp_size": 1, "attn_cp_size": 1, "pp_rank": 0, "tp_rank": 0,
               "is_mla_model": False, **(ranks or {})}
        )  # fmt: skip
        server = SimpleNamespace(**{"model_path": str(tmp_path), **(args or {})})
        told = {"dtype": "bfloat16", "context_length": 4096, "quantization": "None"}
        whole = {"weights": "5f3a", "commit": None, "effective": {**told, **(effective or {})}}
        known = Pools(config, PAGE)
        for name, pool in (pools or {KV: HostPool("page_first", page_tokens=PAGE)}).items():
            known.add(TokenPages(pool, name, PAGE))
        return engines_namespace(server, config, known, {**whole, **(model or {})}, "a")

    return made


def test_it_is_the_one_that_every_engine_makes(make: Make, tmp_path: Path) -> None:
    layout = shared_layout(2, 2, 3, 8, "bfloat16")
    expected = shared_namespace(
        str(tmp_path), "5f3a", "bfloat16", "bfloat16", 4096, layout, PAGE, tenant="a"
    )
    assert make() == expected
    assert make(ranks={"tp_size": 2, "tp_rank": 1}).tensor_parallel == 2
    for layout in ("layer_first", "page_first_direct"):  # its own affair
        assert make(pools={KV: HostPool(layout, page_tokens=PAGE)}) == expected


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"args": {"speculative_algorithm": "EAGLE"}}, "drafts tokens"),
        ({"args": {"enable_lora": True}}, "adapters"),
        ({"args": {"lora_paths": ["a"]}}, "adapters"),
        ({"args": {"json_model_override_args": '{"rope_theta": 1}'}}, "not the checkpoint's"),
        ({"args": {"model_path": "org/unknown"}}, "has no folder"),
        ({"ranks": {"attn_cp_size": 2}}, "context parallelism"),
        ({"ranks": {"pp_size": 2}}, "pipeline"),
        ({"effective": {"quantization": "fp8"}}, "quantized by the engine"),
        ({"args": {"modelopt_quant": "fp8"}}, "quantized by the engine"),
        ({"model": {"weights": "dummy:1f"}}, "random"),
        ({"pools": {KV: HostPool("page_first", page_tokens=PAGE, states=1)}}, "latent"),
        (
            {"pools": {name: HostPool("page_first", page_tokens=PAGE) for name in (KV, "swa")}},
            "full attention of one shape",
        ),
    ],
)
def test_what_cannot_be_shared_says_why(make: Make, changed: dict[str, Any], why: str) -> None:
    with pytest.raises(Incompatible, match=why):
        make(**changed)


@pytest.mark.parametrize("page_tokens", [16, 64, 96, 128, 256, 4096])
def test_orders_that_are_read_are_known_and_fill_pages(page_tokens: int) -> None:
    names = orders_of(page_tokens)
    assert len(set(names)) == len(names) > 0
    for name in names:
        order = native_order(name)
        assert page_tokens % order.block_tokens == 0
        assert order.page_bytes(LayerGroup(0, "full", 1, 2, 64, 2, order.dtype)) > 0
    pages = TokenPages(HostPool("page_first", page_tokens=page_tokens), KV, page_tokens, names)
    assert all(one.endswith("/bfloat16") for one in pages.orders[1:])
    assert len(pages.orders) <= MAX_ORDERS, "as many as a node is told"


def test_a_record_says_whose_pages_were_read() -> None:
    hold = a_hold(6, 9)
    hold.loaded.update({0, 1, 2})
    hold.origins.update({0: "vllm", 1: "sglang", 2: "vllm", 3: "nobody read it"})
    record = record_of(hold, PAGE, NAMES, shares=True)
    assert record["loaded_from"] == {"vllm": 2 * PAGE, "sglang": PAGE}
    assert "loaded_from" not in record_of(hold, PAGE, NAMES)

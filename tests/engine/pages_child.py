"""The child's side of `test_pages.py`: vLLM with a connector that looks at its pages.

It does at registration what the real connector does, so the order of vLLM's own initialisation is
tested too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from kvstrata.layout import native_order


def inspect(kv_caches: Any, vllm_config: Any, kv_cache_config: Any, index: int) -> dict[str, Any]:
    """Describe and test one group, with the claimed order and with wrong ones."""
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.connectors.vllm import proof
    from kvstrata.errors import LayoutMismatch

    pages = subject.describe(kv_caches, vllm_config, kv_cache_config, index)
    layers = subject.attention_layers(pages, vllm_config)
    tensors = proof.page_tensors(pages, kv_caches)
    tensors[0][1] = 7
    before = [tensor.clone() for tensor in tensors]

    def outcome(of: Any) -> str | None:
        try:
            proof.self_test(of, kv_caches, layers)
        except LayoutMismatch as error:
            return str(error)
        return None

    accepted = outcome(pages)
    _, claimed, block, dtype = pages.order.name.split("/")
    wrong: dict[str, Any] = {}
    for other in ("cpu-vec", "cpu-amx", "strided-HNC", "strided-NHC", "strided-SHND"):
        if other != claimed and (other != "strided-NHC" or pages.group.num_kv_heads > 1):
            name = f"vllm/{other}/{block}/{dtype}"
            wrong[name] = dataclasses.replace(pages, order=native_order(name))
    value_first = (pages.order.axes[1], pages.order.axes[0])
    wrong["value first"] = dataclasses.replace(
        pages, order=dataclasses.replace(pages.order, axes=value_first)
    )
    bases = pages.bases.copy()
    bases[0], bases[-1] = bases[-1], bases[0]
    wrong["layers swapped"] = dataclasses.replace(pages, bases=bases)
    wrong["last layer off"] = dataclasses.replace(
        pages, bases=pages.bases + np.eye(len(pages.bases), dtype=np.int64)[-1] * -64
    )
    refused = {name: outcome(of) for name, of in wrong.items()}
    restored = all(bool((a == b).all()) for a, b in zip(before, tensors, strict=True))
    tensors[0][1] = 0
    return {
        "order": pages.order.name,
        "group": dataclasses.asdict(pages.group),
        "page_bytes": pages.page_bytes,
        "layer_names": pages.layer_names,
        "spans": pages.spans([4, 5, 7, 2, 3]),
        "self_test": accepted,
        "refused": refused,
        "restored": restored,
    }


def run(asked: dict[str, Any]) -> None:
    """Start the engine, answer the prompt, and leave ``report.json`` and ``native.npy``."""
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        SupportsHMA,
    )

    seen: dict[str, Any] = {}

    class Recorder(KVConnectorBase_V1, SupportsHMA):
        """Does at registration what the real connector does, and caches nothing."""

        def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
            super().__init__(vllm_config, role, kv_cache_config)
            self.configs = (vllm_config, kv_cache_config)

        def register_kv_caches(self, kv_caches: Any) -> None:
            groups = range(len(self.configs[1].kv_cache_groups))
            seen["groups"] = [inspect(kv_caches, *self.configs, index) for index in groups]
            seen["caches"] = (kv_caches, *self.configs)

        def update_state_after_alloc(self, request: Any, blocks: Any, count: int) -> None:
            seen["blocks"] = blocks.get_block_ids()[0]

        def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
            return 0, False

        def build_connector_meta(self, scheduler_output: Any) -> Any:
            return KVConnectorMetadata()

        def request_finished_all_groups(self, request: Any, block_ids: Any) -> Any:
            return False, None

        def start_load_kv(self, *args: Any, **kwargs: Any) -> None: ...
        def wait_for_layer_load(self, *args: Any, **kwargs: Any) -> None: ...
        def save_kv_layer(self, *args: Any, **kwargs: Any) -> None: ...
        def wait_for_save(self) -> None: ...

    module = types.ModuleType("kvstrata_recorder")
    module.Recorder = Recorder  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    llm = LLM(
        model=asked["model"],
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=4,
        num_gpu_blocks_override=128,
        disable_hybrid_kv_cache_manager=False,
        kv_transfer_config={
            "kv_connector": "Recorder",
            "kv_connector_module_path": module.__name__,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
        },
        **asked["engine"],
    )
    llm.generate(
        TokensPrompt(prompt_token_ids=asked["prompt"]),
        SamplingParams(max_tokens=1, temperature=0),
        use_tqdm=False,
    )
    from kvstrata.connectors.vllm import pages as subject
    from kvstrata.connectors.vllm import proof

    kv_caches, vllm_config, kv_cache_config = seen["caches"]
    pages = subject.describe(kv_caches, vllm_config, kv_cache_config)
    native = [t[seen["blocks"]].numpy() for t in proof.page_tensors(pages, kv_caches)]
    shape = pages.native_shape(len(seen["blocks"]) * pages.block_tokens)
    np.save(Path(asked["out"]) / "native.npy", np.stack(native).reshape(shape))
    report = {"groups": seen["groups"], "blocks": list(seen["blocks"])}
    (Path(asked["out"]) / "report.json").write_text(json.dumps(report))
